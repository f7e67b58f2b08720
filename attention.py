"""
Softmax attention: the non-parametric memory, which keeps the pairs themselves. With it Hope is a Transformer.

    y, state = Attention(config)(x, state)      x, y (B, T, D); the state holds the last block_size - 1 keys and values

Keys are rotated once, at the absolute position of their token, and kept rotated. With gradients on, new pairs are
concatenated with those from before, as autograd needs every version. With gradients off they are written behind them,
into a buffer that moves to one twice as long when it is full, so a token reads all pairs and hardly ever copies them. A
state is a value all the same: it may be read on from twice, split into rows, expanded, saved.

Does NOT include: fewer key heads than query heads, a learned number of tokens to see.

Glossary: B batch, H heads, T time, S pairs from before, W window = block_size, D model width, Dk key width = D / H
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import at_least_float32


class Attention(nn.Module):
    """
    Causal softmax attention over the last block_size tokens (RoPE, QK-norm). Its memory is the pairs themselves, so its
    state grows to block_size - 1 pairs and then slides; a recurrent memory's never grows.

    state   kv (B, 2, H, S, Dk), the rotated keys, and the values; end, see `append`
            position (B,) int64, tokens read so far: a tensor, so that rows can be joined and cut, and torch.compile
            does not make code for every number
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
        """No pairs yet."""
        H = self.n_head
        return {'kv': torch.zeros(batch_size, 2, H, 0, self.out.in_features // H, device=device),
                'position': torch.zeros(batch_size, dtype=torch.int64, device=device), 'end': None}

    def forward(self, x, state=None):
        B, T, D = x.shape
        H, W = self.n_head, self.window
        state = state or self.init_state(B, x.device)
        S, position = state['kv'].shape[3], state['position']
        q, k, v = self.qkv(x).view(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)       # -> three of (B, H, T, Dk)
        turn = angles(position, T, D // H)
        q = rotate(self.q_norm(at_least_float32(q)), *turn).to(v.dtype)
        k = rotate(self.k_norm(at_least_float32(k)), *turn).to(v.dtype)

        kv, end = torch.stack([k, v], dim=1), None                                  # (B, 2, H, T, Dk)
        if S and torch.is_grad_enabled():
            kv = torch.cat([state['kv'].to(v.dtype), kv], dim=3)                    # (B, 2, H, S + T, Dk)
        elif S:
            kv, end = append(state['kv'].to(v.dtype), kv, state['end'])
        k, v = kv.unbind(dim=1)

        if T == 1:      # it sees all S + 1 <= W keys; a CPU does two products in three quarters of the fused one's time
            scores = at_least_float32(q @ k.mT) * (D // H) ** -0.5                  # (B, H, 1, Dk) x (B, H, Dk, S + 1)
            y = scores.softmax(-1).to(v.dtype) @ v                                  # (B, H, 1, S + 1) x (.., S + 1, Dk)
        elif S == 0 and T <= W:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            place = torch.arange(S + T, device=x.device)                            # in kv
            distance = place[S:, None] - place                                      # (T, S + T)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < W))
        y = y.transpose(1, 2).reshape(B, T, D)                                      # (B, H, T, Dk) -> (B, T, D)
        first = max(0, S + T - (W - 1))                                             # all that the next token sees
        return self.out(y), {'kv': kv[:, :, :, first:], 'position': position + T, 'end': end}

    def flops(self, T):
        """Forward FLOPs per token beyond the weights: q k^T and scores v over the T/2 tokens seen on average."""
        return 2 * 2 * self.out.in_features * min(T, self.window) / 2


@torch.compiler.disable                                 # torch.compile does not know where a tensor lies in its buffer
def append(kv, new, end):
    """
    kv (B, 2, H, S, Dk) with new (B, 2, H, T, Dk) behind it -> (B, 2, H, S + T, Dk), and its end.

    kv may be a view of a longer buffer (B, 2, H, length, Dk) with room behind its pairs. end is a list of one number,
    shared by all states in that buffer: how many of its length are taken. If kv does not end there, somebody else has
    gone on from the same state. Then, or without room, kv moves to a new buffer, with as much room again; None is no
    buffer.
    """
    B, _, H, S, Dk = kv.shape
    T, length = new.shape[3], kv.stride(2) // Dk
    stop = kv.storage_offset() // Dk + S                        # beyond any length for rows that are not the first
    rows_apart = kv.stride(0) == 2 * H * length * Dk            # not so when one row was expanded to many
    same_mode = kv.is_inference() == torch.is_inference_mode_enabled()              # or torch refuses to write
    if not (end and end[0] == stop and stop + T <= length and rows_apart and same_mode):
        buffer = kv.new_empty(B, 2, H, max(2 * S, S + T), Dk)
        buffer[:, :, :, :S] = kv
        kv, end = buffer[:, :, :, :S], [S]
    kv = kv.as_strided((B, 2, H, S + T, Dk), kv.stride(), kv.storage_offset())
    kv[:, :, :, S:] = new
    end[0] += T
    return kv, end


def angles(position, T, Dk):
    """
    cos and sin (B, 1, T, Dk/2) of what the T tokens from position (B,) on are turned by: their position times each
    pair's own frequency. In float64, where the device has it: float32 rounds an angle of 10^7 to a whole radian.
    """
    dtype = torch.float32 if position.device.type == 'mps' else torch.float64
    frequency = 10000.0 ** (-torch.arange(0, Dk, 2, device=position.device, dtype=dtype) / Dk)
    position = position[:, None] + torch.arange(T, device=position.device)                 # (B, T)
    angle = position[:, None, :, None] * frequency                                          # (B, 1, T, Dk/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """RoPE: turn the pairs (i, i + Dk/2) of x (B, H, T, Dk) by their angles."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)
