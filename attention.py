"""
Softmax attention: the non-parametric memory, which keeps the pairs themselves. With it Hope is a Transformer.

    y, state = Attention(config)(x, state)      x, y (B, T, D); the state holds the last block_size keys and values

Does NOT include: fewer key heads than query heads, a learned number of tokens to see.

Glossary: B batch, H heads, T time, S tokens in the cache, W window = block_size, D model width, Dk key width = D / H
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import at_least_float32


class Attention(nn.Module):
    """
    Causal softmax attention over the last block_size tokens (RoPE, QK-norm). Its memory is the pairs themselves, so its
    state grows to block_size pairs and then slides; a recurrent memory's never grows.
    """
    def __init__(self, config):
        super().__init__()
        D, H = config.n_embd, config.n_head
        self.n_head, self.window = H, config.block_size
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(D // H, eps=1e-6), nn.RMSNorm(D // H, eps=1e-6)
        self.out = nn.Linear(D, D, bias=False)

    def init_weights(self, branches):
        """Normal: qkv with std 1 / sqrt(D), out with 1 / sqrt(D branches), as all that a residual branch ends in."""
        D = self.out.in_features
        self.qkv.weight.normal_(std=D ** -0.5)
        self.out.weight.normal_(std=(D * branches) ** -0.5)

    def init_state(self, batch_size, device=None):
        """No pairs yet: keys and values of (B, H, 0, Dk)."""
        H = self.n_head
        empty = torch.zeros(batch_size, H, 0, self.out.in_features // H, device=device)
        return {'k': empty, 'v': empty}

    def forward(self, x, state=None):
        B, T, D = x.shape
        H, W = self.n_head, self.window
        state = state or self.init_state(B, x.device)
        q, k, v = self.qkv(x).view(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)       # -> three of (B, H, T, Dk)
        q, k = self.q_norm(at_least_float32(q)).to(v.dtype), self.k_norm(at_least_float32(k)).to(v.dtype)
        k = torch.cat([state['k'].to(v.dtype), k], dim=2)                           # (B, H, S + T, Dk), S from before
        v = torch.cat([state['v'].to(v.dtype), v], dim=2)
        S = k.shape[2] - T

        # Keys are stored before their rotation and rotated by their place in the cache: only differences of places
        # matter, and a place never grows past S + T, so there is no position to carry and none to lose in float32.
        place = torch.arange(S + T, device=x.device)
        q_rot, k_rot = rotate(q, place[S:]), rotate(k, place)
        if T == 1:
            y = F.scaled_dot_product_attention(q_rot, k_rot, v)                     # one query sees all S + 1 <= W keys
        elif S == 0 and T <= W:
            y = F.scaled_dot_product_attention(q_rot, k_rot, v, is_causal=True)
        else:
            distance = place[S:, None] - place                                      # (T, S + T)
            y = F.scaled_dot_product_attention(q_rot, k_rot, v, attn_mask=(distance >= 0) & (distance < W))
        y = y.transpose(1, 2).reshape(B, T, D)                                      # (B, H, T, Dk) -> (B, T, D)
        first = max(0, S + T - (W - 1))                                             # all that the next token sees
        return self.out(y), {'k': k[:, :, first:], 'v': v[:, :, first:]}

    def flops(self, T):
        """Forward FLOPs per token beyond the weights: q k^T and scores v over the T/2 tokens seen on average."""
        return 2 * 2 * self.out.in_features * min(T, self.window) / 2


def rotate(x, place):
    """RoPE: turn the pairs (i, i + Dk/2) of x (B, H, T, Dk) by place (T,) times their own frequency."""
    half, dtype = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = place[:, None] * frequency                                              # (T, Dk/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)
