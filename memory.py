"""
Associative memories: a map from keys to values that is learned while reading. Objective x learning rule x architecture.

Every memory here is a layer with one signature, y, state = layer(x, state): x (B, T, D) goes in, y (B, T, D) comes out,
and the state holds all it remembers; None starts empty. A sequence may be cut anywhere: whole == any split == one token
at a time.

    linear          keeps every key-value pair in one sum                                       Katharopoulos 2020
    retnet          ... and forgets at a fixed rate per head                                    Sun 2023
    gla             ... and learns when to forget (scalar gate; Mamba-2's form)                 Dao & Gu 2024
    deltanet        erases the old answer to a key before it writes the new one                 Yang 2024
    gated_deltanet  ... and learns when to forget                                               Yang 2025
    ttt             a step of gradient descent on |S k - v|^2 taken at the chunk's start        Sun 2024
    attention       keeps the pairs themselves, the last block_size of them                     Vaswani 2017

All but the last are one recurrence (kernels.py) with different rates; `remember` below is where they differ.

    python memory.py           how well each of them recalls stored pairs as their number grows past the key width

Does NOT include: memories with hidden layers, momentum, projections that change while reading.

Glossary (paper: "Associative Memory", "Self-Referential Titans")
    paper       here    shape               meaning
    x_t         x       (B, T, D)           the layer's input
    q, k, v     q, k, v (B, H, T, Dk)       query, key, value; Dv = Dk = D / H; recurrent q and k have norm 1
    M_t         S       (B, H, Dv, Dk)      the memory
    alpha_t     alpha   (B, H, T)           retention gate in (0, 1)
    eta_t       beta    (B, H, T)           write gate in (0, 1)
    B batch, H heads, T time, C chunk, D model width, Dk key width, Dv value width
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import at_least_float32, causal_conv, delta_rule

RECURRENT = ('linear', 'retnet', 'gla', 'deltanet', 'gated_deltanet', 'ttt')
TTT_CHUNK = 16      # tokens that share one gradient step's starting point in ttt, as in its paper


# -----------------------------------------------------------------------------
# the family: who writes, keeps and erases how much


def remember(rule, q, k, v, alpha, beta, state, chunk_size):
    """
    Store the pairs (k, v) one after the other in the memory that `rule` names, and read it with q after each write.

    q, k (B, H, T, Dk), v (B, H, T, Dv), alpha, beta (B, H, T) gates in (0, 1), of which each rule takes what it needs
    state {'S': (B, H, Dv, Dk), ...}, as returned; read-only
    returns y (B, H, T, Dv) and the new state
    """
    match rule:     #                     retention    erase            write               of e =
        case 'linear':          a, b, c = None,        None,            None                # v
        case 'retnet':          a, b, c = alpha,       None,            None                # v, alpha fixed
        case 'gla':             a, b, c = alpha,       None,            -alpha.log()        # v
        case 'deltanet':        a, b, c = None,        beta,            beta                # v
        case 'gated_deltanet':  a, b, c = alpha,       alpha * beta,    beta                # v
        case 'ttt':             a, b, c = None,        None,            beta * 2 / TTT_CHUNK    # v - S_xi k
        case _: raise ValueError(f'unknown rule {rule!r}')
    if rule != 'ttt':
        y, S = delta_rule(q, k, v, a, b, c, state['S'], chunk_size)
        return y, {'S': S}

    # ttt: what is written depends on the memory at its chunk's start, so the chunks are read one after the other
    S, S_xi, place, y = state['S'], state['S_xi'], state['place'], []
    T, t = k.shape[2], 0
    while t < T:
        part = slice(t, t + min(TTT_CHUNK - place, T - t))          # up to the chunk's end
        with torch.autocast(k.device.type, enabled=False):
            k_part = at_least_float32(k[:, :, part])
            e = v[:, :, part] - k_part @ S_xi.mT.to(k_part.dtype)   # (B, H, C, Dk) x (B, H, Dk, Dv) -> (B, H, C, Dv)
        y_part, S = delta_rule(q[:, :, part], k[:, :, part], e, a, b, c[:, :, part], S, TTT_CHUNK)
        y.append(y_part)
        place = (place + part.stop - t) % TTT_CHUNK
        t = part.stop
        S_xi = S if place == 0 else S_xi
    return torch.cat(y, dim=2), {'S': S, 'S_xi': S_xi, 'place': place}


class Recurrent(nn.Module):
    """
    The layer around `remember`: projections, a short convolution, gates, and a gated norm on what is read.
    paper: Titans' block, "SiLU after q, k, v; L2-normalised q, k; depth-wise convolution; output normalised and gated".
    """
    def __init__(self, config):
        super().__init__()
        D, H = config.n_embd, config.n_head
        self.rule, self.n_head, self.chunk_size = config.mixer, H, config.chunk_size
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.conv = nn.Parameter(torch.empty(3 * D, config.conv_width))
        self.gate = nn.Linear(D, D, bias=False)                     # the output gate
        self.alpha = self.beta = None
        if self.rule in ('gla', 'gated_deltanet'):
            self.alpha = nn.Linear(D, H)
        if self.rule in ('deltanet', 'gated_deltanet', 'ttt'):
            self.beta = nn.Linear(D, H)
        decay = 1 - 2.0 ** (-5 - torch.arange(H)) if self.rule == 'retnet' else None        # as in RetNet's paper
        self.register_buffer('decay', decay, persistent=False)
        self.norm = nn.RMSNorm(D // H, eps=1e-6)
        self.out = nn.Linear(D, D, bias=False)

    def init_state(self, batch_size, device=None):
        """An empty memory: a flat dict of tensors (and, for ttt, the place inside the chunk)."""
        D, H = self.out.in_features, self.n_head
        S = torch.zeros(batch_size, H, D // H, D // H, device=device)
        state = {'S': S, 'conv': torch.zeros(batch_size, self.conv.shape[1] - 1, 3 * D, device=device)}
        return state | ({'S_xi': S, 'place': 0} if self.rule == 'ttt' else {})

    def forward(self, x, state=None):
        B, T, D = x.shape
        H = self.n_head
        state = state or self.init_state(B, x.device)
        qkv, tail = causal_conv(self.qkv(x), self.conv, state['conv'])              # (B, T, D) -> (B, T, 3 D)
        q, k, v = F.silu(qkv).view(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)       # -> three of (B, H, T, Dk)
        q, k = F.normalize(q, dim=-1, eps=1e-6), F.normalize(k, dim=-1, eps=1e-6)

        # gates: (B, T, D) -> (B, T, H) -> (B, H, T), in float32 because a retention of 0.999 is 1 in bfloat16
        alpha = beta = None
        if self.alpha is not None:
            alpha = torch.sigmoid(at_least_float32(self.alpha(x))).mT
        if self.beta is not None:
            beta = torch.sigmoid(at_least_float32(self.beta(x))).mT
        if self.decay is not None:
            alpha = self.decay[:, None].expand(B, H, T)

        y, memory = remember(self.rule, q, k, v, alpha, beta, state, self.chunk_size)
        y = self.norm(at_least_float32(y)).transpose(1, 2).reshape(B, T, D)         # (B, H, T, Dv) -> (B, T, D)
        return self.out(y * F.silu(self.gate(x))), memory | {'conv': tail}

    def flops(self, T):
        """Forward FLOPs per token beyond the weights: within a chunk (C/2 keys seen on average), and with the state."""
        D, Dk = self.out.in_features, self.out.in_features // self.n_head
        C = min(T, TTT_CHUNK if self.rule == 'ttt' else self.chunk_size)
        within = 2 * D * C / 2 * (4 if 'delta' in self.rule else 2)                 # q k^T, scores v; k k^T, inverse
        return within + 2 * D * Dk * (2 if self.beta is None else 3)                # read, write; the old answer


# -----------------------------------------------------------------------------
# softmax attention: the non-parametric member


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


MIXERS = {rule: Recurrent for rule in RECURRENT} | {'attention': Attention}


# -----------------------------------------------------------------------------
# python memory.py


@torch.no_grad()
def recall(rule, n_pairs, alike=0.0, again=0, Dk=32, trials=8):
    """
    The share of n_pairs pairs, stored one after the other with fixed gates, whose value is the nearest one to what
    their key reads. Keys are random with a mean cosine of `alike` between them; values are random. The first `again`
    keys are stored a second time with new values, and must answer with the new one.
    """
    rng = torch.Generator().manual_seed(0)
    common = F.normalize(torch.randn(trials, 1, 1, Dk, generator=rng), dim=-1)
    keys = F.normalize(torch.randn(trials, 1, n_pairs, Dk, generator=rng), dim=-1)
    keys = F.normalize(math.sqrt(alike) * common + math.sqrt(1 - alike) * keys, dim=-1)
    values = torch.randn(trials, 1, n_pairs + again, Dk, generator=rng)
    wanted = torch.arange(n_pairs)
    wanted[:again] += n_pairs                                                       # the new values stand at the end
    k = torch.cat([keys, keys[:, :, :again]], dim=2)                                # (trials, 1, n_pairs + again, Dk)
    if rule == 'attention':
        y = F.scaled_dot_product_attention(keys, k, values, scale=100.0)            # (trials, 1, n_pairs, Dk)
    else:
        S = torch.zeros(trials, 1, Dk, Dk)
        alpha, beta = torch.full(k.shape[:3], 0.99), torch.full(k.shape[:3], 0.9)
        _, state = remember(rule, k, k, values, alpha, beta, {'S': S, 'S_xi': S, 'place': 0}, chunk_size=64)
        y = keys @ state['S'].mT                                # (.., n, Dk) x (.., Dk, Dv) -> (.., n, Dv)
    nearest = torch.cdist(F.normalize(y, dim=-1), F.normalize(values, dim=-1)).argmin(-1)     # (trials, 1, n_pairs)
    return (nearest == wanted).float().mean().item()


def main():
    counts = (8, 16, 32, 64, 128)
    print('share of stored pairs recalled, in %: 32-wide keys, retention 0.99, write rate 0.9; chance is 100 / pairs')
    print(f"{'':<16}|{'keys at random':^30}|{'keys alike (cosine 1/2)':^30}| 16 keys, each")
    print(f"{'pairs stored':<16}|" + 2 * (''.join(f'{n:>6}' for n in counts) + '|') + ' written twice')
    for rule in (*RECURRENT, 'attention'):
        cells = [''.join(f'{100 * recall(rule, n, alike):6.0f}' for n in counts) for alike in (0.0, 0.5)]
        print(f'{rule:<16}|{cells[0]}|{cells[1]}|{100 * recall(rule, 16, again=16):8.0f}')


if __name__ == '__main__':
    main()
