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
import dataclasses
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import Attention
from kernels import at_least_float32, causal_conv, delta_rule, mlp_memory, mlp_memory_grad

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

    def streams(self, x, tail):
        """x (B, T, D) and the convolution's tail -> q, k (of norm 1), v (B, H, T, Dk), and the new tail."""
        B, T, D = x.shape
        qkv, tail = causal_conv(self.qkv(x), self.conv, tail)                       # (B, T, D) -> (B, T, 3 D)
        q, k, v = F.silu(qkv).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)     # -> three of (B, H, T, Dk)
        return unit(q), unit(k), v, tail

    def emit(self, y, x):
        """What was read (B, H, T, Dv), normed, gated by the layer's input x (B, T, D) and projected -> (B, T, D)."""
        y = self.norm(at_least_float32(y)).transpose(1, 2).reshape(x.shape)         # (B, H, T, Dv) -> (B, T, D)
        return self.out(y * F.silu(self.gate(x)))

    def forward(self, x, state=None):
        B, T, D = x.shape
        H = self.n_head
        state = state or self.init_state(B, x.device)
        q, k, v, tail = self.streams(x, state['conv'])

        # gates: (B, T, D) -> (B, T, H) -> (B, H, T), in float32 because a retention of 0.999 is 1 in bfloat16
        alpha = beta = None
        if self.alpha is not None:
            alpha = torch.sigmoid(at_least_float32(self.alpha(x))).mT
        if self.beta is not None:
            beta = torch.sigmoid(at_least_float32(self.beta(x))).mT
        if self.decay is not None:
            alpha = self.decay[:, None].expand(B, H, T)

        y, memory = remember(self.rule, q, k, v, alpha, beta, state, self.chunk_size)
        return self.emit(y, x), memory | {'conv': tail}

    def flops(self, T):
        """Forward FLOPs per token beyond the weights: within a chunk (C/2 keys seen on average), and with the state."""
        D, Dk = self.out.in_features, self.out.in_features // self.n_head
        C = min(T, TTT_CHUNK if self.rule == 'ttt' else self.chunk_size)
        within = 2 * D * C / 2 * (4 if 'delta' in self.rule else 2)                 # q k^T, scores v; k k^T, inverse
        return within + 2 * D * Dk * (2 if self.beta is None else 3)                # read, write; the old answer


# -----------------------------------------------------------------------------
# memories with a hidden layer, which may write their own keys, values and gates


def unit(x):
    """x with its last axis scaled to norm 1."""
    return F.normalize(x, dim=-1, eps=1e-6)


TITANS = dict(adaptive='', self_values=False, objective='l2', dgd=False)
DEEP = {'hope': {}, 'titans': TITANS | {'memory_momentum': True}, 'ttt_mlp': TITANS | {'forget': False}}


class SelfModifyingTitans(Recurrent):
    """
    doc
    """
    def __init__(self, config):
        super().__init__(config)
        D, H = config.n_embd, config.n_head
        config = self.config = dataclasses.replace(config, **DEEP[config.mixer])
        d, m = D // H, config.memory_hidden or D // H // 2
        self.memory_chunk = config.memory_chunk
        self.projection_chunk = config.projection_chunk
        M = sum(name in config.adaptive for name in 'kvq')
        R = (1 + M) * m + 2 * ('g' in config.adaptive)
        self.alpha, self.beta = nn.Linear(D, H), nn.Linear(D, H)
        self.mu = nn.Linear(D, H) if config.memory_momentum else None
        self.W2_0 = nn.Parameter(torch.empty(H, R, d))
        self.U_0 = nn.Parameter(torch.empty(H, d, d + m))
        self.W1_0 = nn.Parameter(torch.empty(H, M, d, m))
        self.rate = nn.Parameter(torch.empty(H, 2 + M))
        self.blend = nn.Parameter(torch.empty(H, 1 + M)) if config.self_values else None

    def init_state(self, batch_size, device=None):
        starts = {'W2': self.W2_0, 'U': self.U_0, 'W1': self.W1_0}
        state = {name: torch.zeros(batch_size, *x.shape, dtype=x.dtype, device=device) for name, x in starts.items()}
        anchor = {f'{name}_xi': x for name, x in state.items()}
        speed = {f'{name}_p': x for name, x in state.items()} if self.config.memory_momentum else {}
        tail = torch.zeros(batch_size, self.conv.shape[1] - 1, self.qkv.out_features, device=device)
        return state | anchor | speed | {'place': 0, 'conv': tail}

    def forward(self, x, state=None):
        state = dict(state or self.init_state(len(x), x.device))
        q, k, v, state['conv'] = self.streams(x, state['conv'])
        inputs = [at_least_float32(z) for z in (q, k, unit(v))]
        inputs += [None if gate is None else at_least_float32(gate(x)).mT for gate in (self.alpha, self.beta, self.mu)]
        with torch.autocast(x.device.type, enabled=False):
            y, state = self.chunks(inputs, state)
        return self.emit(y, x), state

    @torch.compiler.disable(recursive=False)
    def chunks(self, inputs, state):
        """Chunk after chunk. Under torch.compile only their common body is compiled, once, however many there are."""
        T, t, y = inputs[0].shape[2], 0, []
        C, m = self.memory_chunk, self.U_0.shape[2] - self.U_0.shape[1]
        place, conv = state.pop('place'), state.pop('conv')
        while t < T:
            n = min(C - place % C, T - t)
            part = [None if x is None else x[:, :, t:t + n] for x in inputs]
            y_part, new = deep_chunk(self.config, C, self.rate, self.blend, self.W2_0, self.U_0, self.W1_0, *part, state)
            y.append(y_part)
            state = state | new
            t, place = t + n, (place + n) % self.projection_chunk
            if place % C == 0:                                      # a new start for the memory that is read
                W2_xi = state['W2'] if place == 0 else torch.cat([state['W2'][:, :, :m], state['W2_xi'][:, :, m:]], dim=2)
                state |= {'W2_xi': W2_xi, 'U_xi': state['U']}
            if place == 0:                                          # and for those that generate
                state['W1_xi'] = state['W1']
        return torch.cat(y, dim=2), state | {'place': place, 'conv': conv}

    def flops(self, T):
        """Forward FLOPs per token beyond the weights."""
        H, M, d, m = self.W1_0.shape
        R, C = self.W2_0.shape[1], min(T, self.memory_chunk)
        generate = 2 * (M * d * m + 2 * d * R) + 3 * d * (d + m) + 3 * M * d * m + (1 + M) * d * m
        hidden = 3 * d * R + 2 * C * d + C * R
        out = 3 * d * (d + m) + C * (d + m) + C * d + M * (2 * d * m + C * m + C * d)
        return 2 * H * (generate + hidden + out)


def deep_chunk(o, C, rate, blend, W2_0, U_0, W1_0, q, k, v, alpha, beta, mu, state):
    """
    One chunk, or a part of one: everything is generated by the memories as they stood at the chunk's start.
    """
    M, d, m = W1_0.shape[1:]
    W2, U, W1 = W2_0 + state['W2_xi'], U_0 + state['U_xi'], W1_0 + state['W1_xi']
    names = [name for name in 'kvq' if name in o.adaptive]

    def generate(name, z):
        """unit(z + W1 silu(W2 z)) by the memory of that name; z itself where it has none."""
        if name not in names:
            return z
        i = names.index(name)
        h = F.silu(z @ W2[:, :, (1 + i) * m:(2 + i) * m].mT)                        # (.., C, d) x (.., d, m)
        return unit(z + h @ W1[:, :, i].mT)                                         # (.., C, m) x (.., m, d)

    def answers(z):
        """What all memories answer to z (B, H, C, d): mem's, the others' (B, H, M, C, d), and the layers' inputs."""
        pre = z @ W2.mT                                                             # (.., C, d) x (.., d, R)
        u, us = pre[..., :m], pre[..., m:(1 + M) * m].unflatten(-1, (M, m)).transpose(2, 3)       # (B, H, M, C, m)
        x, h = torch.cat([z, F.silu(u)], dim=-1), F.silu(us)                        # (B, H, C, d + m)
        return x @ U.mT, z[:, :, None] + h @ W1.mT, pre, u, us, x, h

    # the chunk's gates, keys, values and queries
    if 'g' in o.adaptive:
        shift = k @ W2[:, :, -2:].mT                                                # (B, H, C, 2)
        alpha, beta = alpha + shift[..., 0], beta + shift[..., 1]
    k, v, q = generate('k', k), generate('v', v), generate('q', q)
    alpha = torch.sigmoid(alpha) if o.forget else None
    mu = None if mu is None else torch.sigmoid(mu)

    # what each memory is to answer to k, and what it does answer
    target, targets = v, v[:, :, None]
    if o.self_values:
        y, ys, pre, *_ = answers(v)
        rows = pre[..., -2:]
        target = unit(v + blend[:, :1, None] * y)                                   # (B, H, C, d)
        targets = unit(v[:, :, None] + blend[:, 1:, None, None] * ys)               # (B, H, M, C, d)
    elif 'g' in o.adaptive:
        rows = v @ W2[:, :, -2:].mT
    y, ys, pre, u, us, x, h = answers(k)
    hebbian = o.objective == 'dot' and not o.dgd
    error, errors = (target, targets) if hebbian else (target - y, targets - ys)

    # what each layer is to write: its share of the gradient, around what it answers already where that is erased
    e_W2 = torch.cat([mlp_memory_grad(U[..., d:], u, error), mlp_memory_grad(W1, us, errors).transpose(2, 3).flatten(3)], -1)
    e_U, e_W1 = (error, errors) if o.objective == 'l2' else (target, targets)
    strength = 2 if o.negative_eigenvalues else 1
    erase_W2, erase = strength * o.dgd, strength * (o.dgd + (o.objective == 'l2_now'))
    if erase_W2:
        e_W2 = e_W2 + erase_W2 * pre[..., :(1 + M) * m]
    if 'g' in o.adaptive:
        e_W2 = torch.cat([e_W2, torch.tanh(rows)], dim=-1)                          # (B, H, C, R)
    if erase_W2:
        e_W2 = e_W2 - erase_W2 * (k @ W2_0.mT)                                      # (.., C, d) x (.., d, R)
    if erase:
        e_U, e_W1 = e_U - erase * (x @ U_0.mT), e_W1 - erase * (k[:, :, None] + h @ W1_0.mT)

    # step sizes, each as a share of its proximal step 1 / |input|^2
    scale = 2 / C if o.objective == 'l2' and not o.dgd else 1.0
    scale = scale if mu is None else scale * (1 - mu)
    c_W2 = scale * torch.sigmoid(beta + rate[:, :1])                                # (B, H, C)
    c_U = scale * torch.sigmoid(beta + rate[:, 1:2]) / x.square().sum(-1)
    scale = scale if mu is None else scale[:, :, None]
    c_W1 = scale * torch.sigmoid(beta[:, :, None] + rate[:, 2:, None]) / h.square().sum(-1).clamp(min=1e-6)        # (B, H, M, C)

    def write(name, q, k, e, c, erase, rows=None):
        """Write e at k into the running memory of that name and read it with q -> y, {name: its new state}."""
        S, P, a, g, shape = state[name], state.get(f'{name}_p'), alpha, mu, state[name].shape
        if k.dim() == 5:                                                            # (B, H, M, C, ..) -> (B, H M, C, ..)
            k, e, c = k.flatten(1, 2), e.flatten(1, 2), c.flatten(1, 2)
            S, P = S.flatten(1, 2), None if P is None else P.flatten(1, 2)
            a, g = (None if x is None else x.repeat_interleave(M, dim=1) for x in (a, g))
        b = None if not erase else erase * (c if a is None else a * c)
        before = q is not None and o.memory_read == 'before'
        if before:                                  # the memory before token t is the one after token t - 1
            first = q[:, :, :1] @ S[:, :, :rows].mT
            q = torch.cat([q[:, :, 1:], q[:, :, -1:]], dim=2)
        y, S = delta_rule(q, k, e, a, b, c, S if mu is None else (S, P), C, g, rows)
        y = torch.cat([first, y[:, :, :-1]], dim=2) if before else y
        S, P = (S, None) if mu is None else S
        return y, {name: S.view(shape)} | ({} if mu is None else {f'{name}_p': P.view(shape)})

    reads = o.memory_read != 'start'
    u_q, new = write('W2', q if reads else None, k, e_W2, c_W2, erase_W2, m)
    x_q = torch.cat([q, F.silu(u_q + q @ W2_0[:, :m].mT)], dim=-1) if reads else None     # (B, H, C, d + m)
    y, new_U = write('U', x_q, x, e_U, c_U, erase)
    if reads:
        y = y + x_q @ U_0.mT
    else:
        x_q = torch.cat([q, F.silu(q @ W2[:, :, :m].mT)], dim=-1)
        y = x_q @ U.mT
    if M:
        new |= write('W1', None, h, e_W1, c_W1, erase)[1]
    return y, new | new_U


MIXERS = {rule: Recurrent for rule in RECURRENT} | {mixer: SelfModifyingTitans for mixer in DEEP} | {'attention': Attention}


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
