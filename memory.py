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
    ttt_mlp         ... with a hidden layer                                                     Sun 2024
    titans          ... with momentum, and forgetting                                           Behrouz 2024
    hope            ... and it writes its own keys, values and step sizes: self-modifying       Nested Learning 2025
    attention       keeps the pairs themselves, the last block_size of them (attention.py)      Vaswani 2017

All but the last are one recurrence (kernels.py) with different rates. `remember` is where the linear ones differ; those
with a hidden layer are two such recurrences, one per layer, and differ in switches (DEEP).

    python memory.py           how well each of them recalls stored pairs as their number grows past the key width

Does NOT include: memories deeper than two layers, gates per channel, attention beside the memory (Titans' MAC, MAG).

Glossary (paper: "Associative Memory", "Self-Referential Titans", "Fast and Parallelizable Training")
    paper           here        shape               meaning
    x_t             x           (B, T, D)           the layer's input
    q, k, v         q, k, v     (B, H, T, Dk)       query, key, value; Dv = Dk = D / H; recurrent q and k have norm 1
    M_t             S           (B, H, Dv, Dk)      a linear memory
    alpha_t         alpha       (B, H, T)           retention gate in (0, 1)
    eta_t           beta        (B, H, T)           write gate in (0, 1)
  with a hidden layer:
    M_memory        W2[:m], U   (m, d), (d, d + m)  the memory that is read, M(z) = U [z; hidden(W2 z)]
    M_k, M_v, M_q   W2[m:], W1  (M m, d), (M, d, m) M memories that make the keys, values (queries), z + W1 hidden(W2 z)
    M_eta, M_alpha  gates       (2, d)              the rows that move the gates; they ride in W2, R rows in all
    v^              target(s)   (B, H, (M,) C, d)   the value that each memory makes for itself
    xi              *_xi                            the state at the chunk's start, *_0 the learned one before any token
    B batch, H heads, T time, C chunk, D model width, Dk = d key width, Dv value width, M generating memories, m hidden
"""
import math
from itertools import repeat

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import Attention
from kernels import at_least_float32, causal_conv, delta_rule, hidden, matmul_nt, mlp_memory, mlp_memory_grad

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


def write_rate(x, floor, rate=0):
    """
    sigmoid(x + rate), a share of the full step. With a floor, tokens at which sigmoid(x) is below it write nothing at
    all, at any rate, and what is above is stretched. Meant for a trained model: gates that learn with it settle above.
    paper: gates in (0, 1)    here: 0 below a floor    because whatever is written erases, a sigmoid never closes, and
    over a haystack of 32,768 tokens a hundredth of a step per token is enough to erase a needle
    """
    if not floor:
        return torch.sigmoid(x + rate)
    shut = torch.sigmoid(x.new_full((), math.log(floor / (1 - floor))) + rate)
    return ((torch.sigmoid(x + rate) - shut) / (1 - shut)).clamp(min=0)


def retain(x, floor):
    """Retention sigmoid(x). With a floor for the gates, what forgets less than a hundredth of it keeps everything."""
    kept = torch.sigmoid(x)
    return (kept / (1 - floor / 100)).clamp(max=1) if floor else kept


def qkv_streams(qkv, conv, tail, H):
    """qkv (B, T, 3 D), the convolution and its tail -> q, k (of norm 1), v (B, H, T, Dk), and the new tail."""
    B, T, _ = qkv.shape
    qkv, tail = causal_conv(qkv, conv, tail)                                        # (B, T, 3 D)
    qkv = at_least_float32(F.silu(qkv))                                             # a norm of 1 is not 1 in bfloat16
    q, k, v = (x.view(B, T, H, -1).transpose(1, 2) for x in qkv.chunk(3, dim=-1))   # three of (B, H, T, Dk)
    return unit(q), unit(k), v, tail


class Recurrent(nn.Module):
    """
    The layer around `remember`: projections, a short convolution, gates, and a gated norm on what is read.
    paper: Titans' block, "SiLU after q, k, v; L2-normalised q, k; depth-wise convolution; output normalised and gated".
    """
    def __init__(self, config):
        super().__init__()
        D, H = config.n_embd, config.n_head
        self.rule, self.n_head, self.chunk_size, self.gate_floor = config.mixer, H, config.chunk_size, config.gate_floor
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.conv = nn.Parameter(torch.empty(config.conv_width, 3 * D))
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
        state = {'S': S, 'conv': torch.zeros(batch_size, len(self.conv) - 1, 3 * D, device=device)}
        return state | ({'S_xi': S, 'place': 0} if self.rule == 'ttt' else {})

    def emit(self, y, x):
        """What was read (B, H, T, Dv), normed, gated by the layer's input x (B, T, D) and projected -> (B, T, D)."""
        y = self.norm(at_least_float32(y)).transpose(1, 2).reshape(x.shape)         # (B, H, T, Dv) -> (B, T, D)
        return self.out(y * F.silu(self.gate(x)))

    def forward(self, x, state=None):
        B, T, D = x.shape
        H = self.n_head
        state = state or self.init_state(B, x.device)
        q, k, v, tail = qkv_streams(self.qkv(x), self.conv, state['conv'], H)           # (B, T, D) -> (B, T, 3 D)

        # gates: (B, T, D) -> (B, T, H) -> (B, H, T), in float32 because a retention of 0.999 is 1 in bfloat16
        alpha = beta = None
        if self.alpha is not None:
            alpha = retain(at_least_float32(self.alpha(x)), self.gate_floor).mT
        if self.beta is not None:
            beta = write_rate(at_least_float32(self.beta(x)), self.gate_floor).mT
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
# memories with a hidden layer, which may make their own keys, values and gates


def unit(x):
    """x with its last axis scaled to norm 1."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp(min=1e-12))


TITANS = dict(adaptive='', self_values=False, objective='l2', dgd=False)
DEEP = {'hope': {}, 'titans': TITANS | {'memory_momentum': True}, 'ttt_mlp': TITANS | {'forget': False}}


class SelfModifyingTitans(Recurrent):
    """
    A memory that makes its own keys, values and gates, and learns to while it reads (paper: "Self-Referential Titans").

    Each head holds one memory that the queries read, and others that turn the streams of x into keys and values. At
    every token all of them are written, at that token's key, each with a value that it made itself. So what a token
    does to the memory depends on what the memory has become. Within a chunk everything is generated by the memories as
    they stood at its start; what is left are three linear recurrences (W2, U, W1), which kernels.py runs in parallel.

    paper: weights decay to zero    here: to their learned start    because a start that fades teaches nothing: the
    state is the difference from it, empty before the first token, and the recurrence runs on the difference

    state   W2 (B, H, R, d), U (B, H, d, d + m), W1 (B, H, M, d, m): differences from the start; with _xi, the same at
            the chunk's start; with _p, their momentum; place, tokens since the start of the (larger) chunk; conv
    """
    def __init__(self, config):
        super().__init__(config)
        D, H = config.n_embd, config.n_head
        self.config = config
        d, m = D // H, config.memory_hidden or D // H // 2
        M = len(generated(config))
        self.alpha, self.beta = nn.Linear(D, H) if config.forget else None, nn.Linear(D, H)
        self.mu = nn.Linear(D, H) if config.memory_momentum else None
        self.W2_0 = nn.Parameter(torch.empty(H, (1 + M) * m, d))
        self.gates_0 = nn.Parameter(torch.empty(H, 2, d)) if 'g' in config.adaptive else None
        self.W1_0 = nn.Parameter(torch.empty(H, 1 + M, d, m))
        self.rate = nn.Parameter(torch.empty(H, 2 + M))
        self.blend = nn.Parameter(torch.empty(H, 1 + M)) if config.self_values else None

    def starts(self):
        """What the memories hold before the first token; the rows of the gates ride below the first layers."""
        W2_0 = self.W2_0 if self.gates_0 is None else torch.cat([self.W2_0, self.gates_0], dim=1)
        U_0 = F.pad(self.W1_0[:, 0], (self.W2_0.shape[2], 0))       # the linear part starts empty: [0, W1]
        return {'W2': W2_0, 'U': U_0} | ({'W1': self.W1_0[:, 1:]} if self.W1_0.shape[1] > 1 else {})

    def init_state(self, batch_size, device=None):
        # as later ones do, these require a gradient in training, and momentum has tensors of its own: the first chunk
        # then runs the same compiled graph
        options = {'device': device, 'dtype': self.W2_0.dtype, 'requires_grad': torch.is_grad_enabled()}
        state = {name: torch.zeros(batch_size, *x.shape, **options) for name, x in self.starts().items()}
        anchor = {f'{name}_xi': x for name, x in state.items()}
        speed = {f'{name}_p': x.clone() for name, x in state.items()} if self.config.memory_momentum else {}
        tail = torch.zeros(batch_size, len(self.conv) - 1, self.qkv.out_features, **options)
        return state | anchor | speed | {'place': 0, 'conv': tail}

    def forward(self, x, state=None):
        gates = [None if gate is None else at_least_float32(gate(x)) for gate in (self.alpha, self.beta, self.mu)]
        inputs = [self.qkv(x), *gates]                                              # (B, T, 3 D), gates (B, T, H)
        with torch.autocast(x.device.type, enabled=False):
            y, state = self.chunks(inputs, state)
        return self.emit(y, x), state

    @torch.compiler.disable(recursive=False)
    def chunks(self, inputs, state):
        """Chunk after chunk. Under torch.compile only lean_chunks is compiled: once per shape, not once per call."""
        B, T, _ = inputs[0].shape
        state = dict(state or self.init_state(B, inputs[0].device))
        C, m, y = self.config.memory_chunk, self.W1_0.shape[3], []
        place, start = state.pop('place'), self.starts()
        first = min(-place % C, T)                                  # up to the chunk's end, then whole chunks, the rest
        whole, rest = divmod(T - first, C)
        n = 1
        if self.config.projection_chunk == C and inputs[0].device.type == 'cpu':
            # few rows are done before the next call is made: a long sequence takes several chunks a call. More compile
            # for longer, and more rows no longer fit the cache. On a GPU nobody has measured it
            n = max(1, min(256 // (B * C), whole // 16))
            n = n if whole % n == 0 else 1
        sizes = [first] * (first > 0) + whole // n * [n * C] + [rest] * (rest > 0)
        # split, because the backward of every slice x[:, t:t + n] would fill a gradient of x's size with zeros; the
        # gates by heads, (B, T, H) -> (B, H, T), in memory as well, as the loops of a chunk are over tokens. Not by a
        # function shared with lean_chunks: called from here, torch would compile it for itself, and that is slower
        qkv, *gates = inputs
        gates = (repeat(None) if x is None else x.mT.contiguous().split(sizes, dim=2) for x in gates)
        for part in zip(qkv.split(sizes, dim=1), *gates):
            rates = self.rate.expand(-(-part[0].shape[1] // C), -1, -1)
            y_part, new = lean_chunks(self.config, start, self.conv, rates, self.blend, *part, state, place == 0)
            y.append(y_part)
            state = state | new
            place = (place + part[0].shape[1]) % self.config.projection_chunk
            if place == 0:                                          # every memory starts a chunk
                state |= anchored(state, start)
            elif place % C == 0:                                    # the one that is read does
                W2_xi = torch.cat([state['W2'][:, :, :m], state['W2_xi'][:, :, m:]], dim=2)
                state |= {'W2_xi': W2_xi, 'U_xi': state['U']}
        return torch.cat(y, dim=2), state | {'place': place}

    def flops(self, T):
        """Forward FLOPs per token beyond the weights, half a piece's keys seen on average; momentum is not counted."""
        H, M, d, m = self.W1_0.shape
        M, R = M - 1, self.starts()['W2'].shape[1]
        C = min(T, self.config.memory_chunk, self.chunk_size)
        generate = 2 * M * d * m
        compare = 3 * d * R + 2 * d * d + 4 * (1 + M) * d * m       # at the value, at the key, and from the start
        erase = 1 - C / min(T, self.config.memory_chunk)            # the first piece's answers are those compared
        write_W2 = (1 + erase) * d * R + 2 * d * m + C / 2 * (2 * d + R + m)   # with the state, and within the chunk
        write_U = (2 + erase) * d * (d + m) + d * m + C / 2 * (4 * d + 2 * m)
        write_W1 = M * ((1 + erase) * d * m + C / 2 * (d + m))
        return 2 * H * (generate + compare + write_W2 + write_U + write_W1)


def anchored(state, start):
    """Every memory as it stands is the one that a new chunk generates from and compares with."""
    return {f'{name}_xi': state[name] for name in start}


def lean_chunks(o, start, conv, rates, blend, qkv, alpha, beta, mu, state, fresh):
    """
    deep_chunk, or several of them one after the other, which compiled keep of a chunk only what goes in. The backward
    computes the rest again, in about the time in which it could have been read back.

    Two things let it compute one chunk again at a time, and not all of them first, which is more than the cache holds:
    what a chunk returns is no view (a view is not kept for the next chunk), and rates (n, H, 2 + M) is rate once for
    each chunk (the sum of its gradients would be fused with its terms, of which the last comes from the first chunk).
    """
    y = []
    C = o.memory_chunk
    gates = (repeat(None) if x is None else x.split(C, dim=2) for x in (alpha, beta, mu))
    for rate, *part in zip(rates.unbind(), qkv.split(C, dim=1), *gates):
        inputs = o, start, conv, rate, blend, *part, state, fresh
        if torch.compiler.is_compiling():
            y_part, new = checkpoint(deep_chunk, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            y_part, new = deep_chunk(*inputs)
        y.append(y_part)
        state = state | new | anchored(new, start)
    return torch.cat(y, dim=2) if len(y) > 1 else y[0], new


def deep_chunk(o, start, conv, rate, blend, qkv, alpha, beta, mu, state, fresh):
    """
    One chunk, or a part of one, of SelfModifyingTitans: generate, compare, write, read.

    o                   the switches, a Config
    start               the learned starts, {'W2': (H, R, d), 'U': (H, d, d + m), 'W1': (H, M, d, m)}
    conv, rate, blend   (W, 3 D), (H, 2 + M), (H, 1 + M)
    qkv                 (B, C, 3 D) what the streams are made of
    alpha, beta, mu     (B, H, C) the gates before their sigmoid; alpha None forgets nothing, mu None is no momentum
    state               the difference of every memory from its start, now and (_xi) at the chunk's start; conv the tail
    fresh               whether now is the chunk's start, for every memory
    returns y (B, H, C, d), and the differences and the tail after the last token
    """
    q, z, v, tail = qkv_streams(qkv, conv, state['conv'], o.n_head)
    v = unit(v)
    made, d, m = generated(o), q.shape[-1], start['U'].shape[-1] - q.shape[-1]
    xi = {name: W + state[f'{name}_xi'] for name, W in start.items()}               # the memories at the chunk's start

    # generate: gates, key, value and query, by the memories that make them
    if 'g' in o.adaptive:
        shift = few_rows(z, xi['W2'][:, :, -2:])                                    # (.., C, 2)
        alpha, beta = alpha + shift[..., 0] if o.forget else None, beta + shift[..., 1]
    streams = {'k': z, 'v': v, 'q': q}
    if made:
        x = torch.stack([streams[name] for name in made], dim=2)                    # (B, H, M, C, d)
        W2 = xi['W2'][:, :, m:(1 + len(made)) * m].unflatten(2, (-1, m))            # (B, H, M m, d) -> (B, H, M, m, d)
        x = unit(x + matmul_nt(hidden(matmul_nt(x, W2)), xi['W1']))     # (.., C, d) x (.., d, m), (C, m) x (m, d)
        streams |= zip(made, x.unbind(2))
    k, v, q = (streams[name] for name in 'kvq')
    alpha = retain(alpha, o.gate_floor) if o.forget else None
    mu = None if mu is None else torch.sigmoid(mu)

    # compare: what each layer should answer to its input, and does. Output layers erase by DGD and by the objective
    erase_W2, erase = int(o.dgd), o.dgd + (o.objective == 'l2_now')
    x, h, e_W2, e_U, e_W1, answers = to_write(o, start, xi, blend, k, v, erase_W2, erase)
    answers = answers if fresh and mu is None else {}

    # step sizes, as shares of the proximal step 1 / |input|^2; above 1 a token flips what is stored. The errors of a
    # chunk are all taken before one of them is followed: 2 / C keeps C equal ones from overshooting if erasing does not
    most = 2.0 if o.negative_eigenvalues else 1.0
    hidden_most = most * (2 / o.projection_chunk if not erase_W2 and o.objective != 'dot' else 1)
    out_most = most * (2 / o.projection_chunk if not erase and o.objective == 'l2' else 1)
    beta, rate = beta + rate[:, 1, None], rate - rate[:, 1:2]       # a floor closes all that a head writes together
    c_W2 = hidden_most * write_rate(beta, o.gate_floor, rate[:, 0, None])           # (B, H, C)
    c_U = out_most * write_rate(beta, o.gate_floor) / x.square().sum(-1).clamp(min=1)               # x holds a unit key

    # write, and read: first the hidden layer, then the output layer
    if o.memory_read == 'start':
        y = mlp_memory(xi['W2'][:, :, :m], xi['U'], q)[0]
        _, new = write(o, state, 'W2', None, k, e_W2, alpha, erase_W2, c_W2, mu, answers)
        new |= write(o, state, 'U', None, x, e_U, alpha, erase, c_U, mu, answers)[1]
    else:
        u, new = write(o, state, 'W2', q, k, e_W2, alpha, erase_W2, c_W2, mu, answers, rows=m)
        x_q = torch.cat([q, hidden(u + q @ start['W2'][:, :m].mT)], dim=-1)         # (B, H, C, d + m)
        y, new_U = write(o, state, 'U', x_q, x, e_U, alpha, erase, c_U, mu, answers)
        y, new = y + x_q[..., d:] @ start['U'][..., d:].mT, new | new_U             # (.., C, m) x (.., m, d)
    if made:
        c_W1 = out_most * write_rate(beta[:, :, None], o.gate_floor, rate[:, 2:, None])         # (B, H, M, C)
        c_W1 = c_W1 / h.square().sum(-1).clamp(min=1e-6)
        new |= write(o, state, 'W1', None, h, e_W1, alpha, erase, c_W1, mu, answers)[1]
    return y, new | {'conv': tail.to(state['conv'].dtype)}


def few_rows(x, W):
    """x W^T, x (.., T, d), W (.., rows, d), as sums: a product of two columns takes as long as one of sixteen."""
    return torch.stack([(x * w).sum(-1) for w in W.split(1, dim=-2)], dim=-1)       # (.., T, rows)


def generated(o):
    """The streams that have a memory of their own, in the order of that memory's place in W2 and W1."""
    return [name for name in 'kvq' if name in o.adaptive]


def reads_hidden(weights, d):
    """The columns of all output layers that read the hidden layers: U (.., d, d + m), W1 (.., M, d, m) or missing."""
    return torch.cat([weights['U'][..., d:].unsqueeze(-3)] + ([weights['W1']] if 'W1' in weights else []), dim=-3)


def to_write(o, start, xi, blend, k, v, erase_W2, erase):
    """
    What every layer is to write at the keys k (B, H, C, d): the inner gradient at the chunk's start, without its outer
    product with the layer's input, and relative to the learned start where what is there is erased.
    returns the output layers' inputs x (B, H, C, d + m), h (B, H, M, C, m); e_W2 (B, H, C, R), e_U (B, H, C, d),
    e_W1 (B, H, M, C, d); and where something is erased, what the differences xi - start answer, of the same shapes
    """
    C, d, M = *k.shape[2:], len(generated(o))
    m = start['U'].shape[-1] - d

    # what the 1 + M memories answer to the values, and to the keys
    asked = torch.cat([v, k], dim=2)                                                # (B, H, 2 C, d)
    W2, W_gates = xi['W2'].tensor_split([(1 + M) * m], dim=2)
    gates = few_rows(asked, W_gates) if 'g' in o.adaptive else None                 # (B, H, 2 C, 2)
    u = matmul_nt(asked, W2).unflatten(-1, (1 + M, m)).transpose(2, 3)              # (.., d) x (d, (1 + M) m), split
    W1 = reads_hidden(xi, d)                                                        # (B, H, 1 + M, d, m)
    linear = matmul_nt(asked, xi['U'][..., :d])                                     # (.., 2 C, d) x (.., d, d)
    h = hidden(u)                                                                   # (B, H, 1 + M, 2 C, m)
    read = (torch.arange(1 + M, device=k.device) == 0)[:, None, None]               # the memory that is read is first
    y = torch.where(read, linear[:, :, None], asked[:, :, None]) + matmul_nt(h, W1)     # (.., 2 C, m) x (.., m, d)
    (_, u_k), (_, h), (y_v, y_k) = (x.chunk(2, dim=3) for x in (u, h, y))

    # the value that each of them makes, and what is missing to it; with DGD the dot product, too, regresses on it
    target = unit(v[:, :, None] + blend[:, :, None, None] * y_v) if o.self_values else v[:, :, None].expand_as(y_v)
    regress = int(o.dgd or o.objective != 'dot')
    error = target - regress * y_k                                                  # (B, H, 1 + M, C, d)
    e = error if o.objective == 'l2' else target
    e_hidden = mlp_memory_grad(W1, u_k, error).transpose(2, 3).flatten(3)           # (B, H, C, (1 + M) m)
    e_W2 = e_hidden
    if gates is not None:
        gates_v, gates_k = gates.chunk(2, dim=2)    # a gate's own value is its row at v, squashed
        e_W2 = torch.cat([e_hidden, torch.tanh(gates_v) - regress * gates_k], dim=-1)       # (B, H, C, R)

    # what is erased is all that a layer answers, its start's part included; a first layer moves from where it is
    answers = {}
    if erase_W2:
        answers['W2'] = matmul_nt(k, xi['W2'] - start['W2'])                        # (.., C, d) x (.., d, R)
        e_W2 = e_W2 + answers['W2']
    if erase:
        skip = torch.where(read, 0, k[:, :, None])                                  # what is read starts without U k
        y_start = skip + h @ reads_hidden(start, d).mT                              # (.., C, m) x (.., m, d)
        e, moved = e - erase * y_start, y_k - y_start
        answers |= {'U': moved[:, :, 0], 'W1': moved[:, :, 1:]}
    e_U, e_W1 = e.tensor_split([1], dim=2)
    h_mem, h = h.tensor_split([1], dim=2)
    return torch.cat([k, h_mem[:, :, 0]], dim=-1), h, e_W2, e_U[:, :, 0], e_W1, answers


def write(o, state, name, q, k, e, alpha, erase, c, mu, answers, rows=None):
    """
    Write c of e at k in the memory of that name, and read its first rows with q -> y, {name: its new state}.
    answers: what the memories answer to k before that, by name, as far as it is known.
    """
    S, P = state[name], state.get(f'{name}_p')
    if k.dim() == 5:                                                                # (B, H, M, ..)
        alpha, mu = (None if x is None else x[:, :, None] for x in (alpha, mu))
    b = None if not erase else erase * (c if alpha is None else alpha * c)
    c = c if mu is None else c * (1 - mu)           # a write adds up to 1 / (1 - mu) of itself, what is erased does not
    before = q is not None and o.memory_read == 'before'
    if before:                                      # the memory before token t is the one after token t - 1
        first = q[:, :, :1] @ S[:, :, :rows].mT                                     # (.., 1, Dk) x (.., Dk, rows)
        q = torch.cat([q[:, :, 1:], q[:, :, -1:]], dim=2)
    # in pieces of chunk_size: masks and inverses of a whole memory_chunk cost more than the calls that they save
    y, S = delta_rule(q, k, e, alpha, b, c, S if mu is None else (S, P), o.chunk_size, mu, rows, answers.get(name))
    y = torch.cat([first, y[:, :, :-1]], dim=2) if before else y
    S, P = (S, None) if mu is None else S
    return y, {name: S} | ({} if mu is None else {f'{name}_p': P})


MIXERS = dict.fromkeys(RECURRENT, Recurrent) | dict.fromkeys(DEEP, SelfModifyingTitans) | {'attention': Attention}


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
