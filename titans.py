"""
Memories with a hidden layer. Read from the top: the cell as one would write it on a blackboard (cell_ref), then the
same numbers for a chunk of tokens at once, in four functions, and last what is there for speed alone.

    hope        writes its own gates (or keys, values) while it reads: self-modifying      Nested Learning 2025
    titans      keys, values and gates come from the input; momentum                       Behrouz 2024
    ttt_mlp     ... without momentum and without forgetting                                Sun 2024

    y, state = DeepMemory(config)(x, state)     x, y (B, T, D)
    python titans.py        the two forms beside each other

Does NOT include: deeper memories, gates per channel, attention beside the memory (Titans' MAC, MAG).

Glossary (paper: "Self-Referential Titans", "Fast and Parallelizable Training"; column vectors, y = W x)
    paper           here            shape               meaning
    M_memory        W2[:m], U       (m, d), (d, d + m)  the memory that is read, M(s) = U [s; hidden(W2 s)]
    M_k, M_v, M_q   W2[m:-2], W1    (M m, d), (M, d, m) those that generate, M(s) = s + W1 hidden(W2 s)
    M_alpha, M_eta  W2[-2:]         (2, d)              the rows that move the gates: linear memories of one number
    x_t             q, z, v         (B, H, T, d)        what is made of it: queries, and what M_k and M_v turn into k, v
    alpha, eta      alpha, beta     (B, H, T)           retention; write gate, before its sigmoid
    -               beta_shift      (H, 2 + M)          added to beta: for first layers and gates, for U, for each W1
    v^              target          (B, H, 1 + M, C, d) the value that each memory makes of v for itself
    -               blend (lambda)  (H, 1 + M)          how much of that value is its own answer
    mu              mu              (B, H, T)           decay of the momentum
    xi              xi, *_xi        of each matrix      as it stood at the chunk's start; *_0, start: the learned one
    B batch, H heads, T time, C chunk, D model width, d = D / H, m hidden units, M memories that generate, R rows of W2
"""
import functools
from itertools import repeat
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import at_least_float32, delta_rule, hidden, matmul_nt, mlp_memory, mlp_memory_grad
from memory import MemoryLayer, chunk_sizes, qkv_streams, recall_before, retain, unit, write_rate

TITANS = dict(adaptive='', self_values=False, objective='l2', dgd=False)        # fields of Config
DEEP = {'hope': {}, 'titans': TITANS | {'memory_momentum': True}, 'ttt_mlp': TITANS | {'forget': False}}


def generated(o):
    """The streams that have a memory of their own, in the order of that memory's place in W2 and W1."""
    return [name for name in 'kvq' if name in o.adaptive]


# -----------------------------------------------------------------------------
# the cell on a blackboard


def cell_ref(layer, x):
    """One sequence, x (T, D) -> y (T, D): a token at a time, the weights themselves, inner gradients by autograd."""
    q, z, v, _ = qkv_streams(layer.qkv(x)[None], layer.conv, None, layer.n_head)    # three of (1, H, T, d)
    gates = [[None] * layer.n_head if gate is None else gate(x).mT for gate in (layer.alpha, layer.beta, layer.mu)]
    y = [head_ref(layer, i, q[0, i], z[0, i], unit(v)[0, i], *(gate[i] for gate in gates)) for i in range(layer.n_head)]
    return layer.emit(torch.stack(y)[None], x[None])[0]                             # H of (T, d) -> (T, D)


def head_ref(layer, i, q, z, v, ax, bx, mu):
    """
    cell_ref for head i: q, z, v (T, d), ax, bx, mu (T,) what x says of its gates, before the sigmoid -> y (T, d). The
    five equations of results/memories.md, ξ the start of the token's chunk and 0 the learned start. W holds all weights
    by layer and memory: 'mem' is read, 'k', 'v', 'q' generate. W['in', M] is W2, of 'gates' the rows g; W['out', M] is
    W1, of 'mem' U, whose columns for the hidden layer are its W1.
    """
    o, names, y = layer.config, generated(layer.config), []
    W_0, shift = head_weights(layer, i)
    W, P, ξ = dict(W_0), dict.fromkeys(W_0, 0), W_0
    grad = functools.partial(torch.autograd.grad, create_graph=True)

    def M(W, name, s):
        """M(s) = U [s; h(W2 s)] of the memory that is read, s + W1 h(W2 s) of others; what its layers read and make."""
        u = W['in', name] @ s
        x = torch.cat([s, hidden(u)]) if name == 'mem' else hidden(u)
        return W['out', name] @ x + (0 if name == 'mem' else s), x, u

    for t in range(len(q)):
        if t % o.memory_chunk == 0:
            ξ = dict(W) if t % o.projection_chunk == 0 else ξ | {at: W[at] for at in W if at[1] == 'mem'}

        # 1   k = unit(M_k,ξ(z))     v = unit(M_v,ξ(v))     α = sigmoid(a·x + g_α,ξ·z)     β = sigmoid(b·x + g_β,ξ·z)
        own = {'k': z[t], 'v': v[t], 'q': q[t]}
        own |= {name: unit(M(ξ, name, own[name])[0]) for name in names}
        g = o.gate_gain * (ξ['in', 'gates'] @ z[t]) if 'g' in o.adaptive else (0, 0)
        α, β_logit = retain(ax[t] + g[0], o.gate_floor) if o.forget else 1, bx[t] + g[1]
        k, before = own['k'], dict(W)

        def write(at, e, s, r=0):
            # 4   W ← W⁻ + β' (e - W⁻ s - r) sᵀ / |s|²,   W⁻ = W_0 + α (W - W_0),   s the layer's input
            rate = write_rate(β_logit + shift['out', 'mem'], o.gate_floor, shift[at] - shift['out', 'mem'])     # β'
            rate = rate * (2 if o.negative_eigenvalues else 1) / s.square().sum().clamp(min=1e-6)
            if o.objective == 'l2' and not o.dgd:       # a chunk's gradients add up: C equal ones must not overshoot
                rate = rate * 2 / o.projection_chunk
            decayed = W_0[at] + α * (W[at] - W_0[at])
            W[at] = decayed + rate * torch.outer(e - o.dgd * (decayed @ s + r), s)
            if mu is not None:                          # momentum gathers e less the learned start's answer, which is
                now = rate * torch.outer(e - o.dgd * (W_0[at] @ s + r), s)      # what stays if nothing was written
                P[at] = mu[t].sigmoid() * P[at] + (1 - mu[t].sigmoid()) * now
                W[at] = W[at] + P[at] - now

        for j, name in enumerate(('mem', *names)):
            # 2   v̂ = unit(v + λ M_ξ(v))              for every memory M its own value, and tanh(g_ξ·v) for every gate
            value = unit(own['v'] + layer.blend[i, j] * M(ξ, name, own['v'])[0]) if o.self_values else own['v']
            # 3   e = v̂ at the output layer,  W2_ξ k + ḣ(W2_ξ k) ⊙ W1_ξᵀ (v̂ - M_ξ(k)) at the hidden layer
            answer, x, u = M(ξ, name, k)
            l2, dot = (answer - value).square().sum() / 2, -(answer @ value)
            inner, outer = (l2 if o.objective == 'l2' or regress else dot for regress in (o.dgd, False))
            write(('in', name), o.dgd * u - grad(inner, u)[0], k)
            write(('out', name), -grad(outer, answer)[0], x, r=0 if name == 'mem' else k)
        if 'g' in o.adaptive:                           # e = v̂ here too; in l2 without DGD, v̂ less the answer at ξ
            u = ξ['in', 'gates'] @ k
            write(('in', 'gates'), (ξ['in', 'gates'] @ own['v']).tanh() - (o.objective == 'l2' and not o.dgd) * u, k)

        # 5   y = M_mem,t-1(q)
        y.append(M({'after': W, 'before': before, 'start': ξ}[o.memory_read], 'mem', own['q'])[0])
    return torch.stack(y)


def head_weights(layer, i):
    """What head i has learned: every matrix of its memories, and what is added to its write gate for each."""
    start, names = {name: W[i] for name, W in layer.starts().items()}, ['mem', *generated(layer.config)]
    W_0 = {('in', name): W2 for name, W2 in zip(names, start['W2'].split(layer.out_0.shape[3]))}
    W_0 |= {('in', 'gates'): start['W2'][-2:]} if 'g' in layer.config.adaptive else {}
    out = [('out', name) for name in names]
    shift = dict.fromkeys(W_0, layer.beta_shift[i, 0]) | dict(zip(out, layer.beta_shift[i, 1:]))
    return W_0 | dict(zip(out, [start['U'], *start.get('W1', ())])), shift


# -----------------------------------------------------------------------------
# the layer


class DeepMemory(MemoryLayer):
    """
    In each head one memory that the queries read and others that make keys, values and gates of x, all written at every
    token. As a chunk generates everything from the memories at its start, three recurrences are left (kernels.py).

    paper: weights decay to zero    here: to their learned start    because a start that fades teaches nothing: the
    state is the difference from it, empty before the first token, and the recurrence runs on the difference

    state   W2 (B, H, R, d), U (B, H, d, d + m), W1 (B, H, M, d, m): differences from the start; with _xi, the same at
            the chunk's start; with _p, their momentum; place, tokens since the start of the (larger) chunk; conv
    """
    groups = {'conv': 'vector', 'beta_shift': 'vector', 'blend': 'vector', 'W2_0': 'start', 'gates_0': 'start',
              'out_0': 'start'}

    def __init__(self, config):
        super().__init__(config)
        D, H, M = config.n_embd, config.n_head, len(generated(config))
        self.config, d, m = config, D // H, config.memory_hidden or D // H // 2
        self.alpha, self.beta = nn.Linear(D, H) if config.forget else None, nn.Linear(D, H)
        self.mu = nn.Linear(D, H) if config.memory_momentum else None
        self.W2_0 = nn.Parameter(torch.empty(H, (1 + M) * m, d))
        self.gates_0 = nn.Parameter(torch.empty(H, 2, d)) if 'g' in config.adaptive else None
        self.out_0 = nn.Parameter(torch.empty(H, 1 + M, d, m))
        self.beta_shift = nn.Parameter(torch.empty(H, 2 + M))
        self.blend = nn.Parameter(torch.empty(H, 1 + M)) if config.self_values else None

    def init_memory(self):
        """Gates move only with what is read; a value starts as v, not as what a still empty memory answers to it."""
        self.W2_0.normal_()             # a key of norm 1 gives pre-activations of size 1
        self.out_0.zero_()              # an answer from the start, the same for all keys, hides what is recalled
        # those that generate hardly move at first: a key that moves from the start is no key
        shift = self.config.generate_shift                          # first layers and gates: -3, or more if that is
        self.beta_shift[:, 0], self.beta_shift[:, 1], self.beta_shift[:, 2:] = max(-3, shift), 0, shift
        mu = (None, None) if self.mu is None else (self.mu.weight, self.mu.bias)                    # momentum 0.12
        for p, value in ((self.gates_0, 0), (self.blend, 0.1), (mu[0], 0), (mu[1], -2)):
            if p is not None:
                p.fill_(value)

    def starts(self):
        """What the memories hold before the first token: {'W2': (H, R, d), 'U': (H, d, d + m), 'W1': (H, M, d, m)}."""
        W2_0 = self.W2_0 if self.gates_0 is None else torch.cat([self.W2_0, self.gates_0], dim=1)
        U_0 = F.pad(self.out_0[:, 0], (self.W2_0.shape[2], 0))      # the linear part starts empty: [0, out_0]
        return {'W2': W2_0, 'U': U_0} | ({'W1': self.out_0[:, 1:]} if self.out_0.shape[1] > 1 else {})

    def init_state(self, batch_size, device=None):
        """Nothing written yet. In training it requires a gradient, as later states do: one compiled graph for both."""
        options = {'device': device, 'dtype': self.W2_0.dtype, 'requires_grad': torch.is_grad_enabled()}
        state = {name: torch.zeros(batch_size, *x.shape, **options) for name, x in self.starts().items()}
        speed = {f'{name}_p': x.clone() for name, x in state.items()} if self.config.memory_momentum else {}
        tail = torch.zeros(batch_size, len(self.conv) - 1, self.conv.shape[1], **options)
        return state | anchored(state) | speed | {'place': 0, 'conv': tail}

    def forward(self, x, state=None):
        gates = [None if gate is None else at_least_float32(gate(x)) for gate in (self.alpha, self.beta, self.mu)]
        with torch.autocast(x.device.type, enabled=False):
            y, state = self.read([self.qkv(x), *gates], state)
        return self.emit(y, x), state

    @torch.compiler.disable(recursive=False)        # several_chunks alone is compiled: per shape, not per call
    def read(self, inputs, state):
        """Chunk after chunk. inputs: qkv (B, T, 2 or 3 D), alpha, beta, mu (B, T, H) or None -> y (B, H, T, d), state"""
        o, state, y = self.config, dict(state or self.init_state(len(inputs[0]), inputs[0].device)), []
        place, weights = state.pop('place'), Weights(o, self.starts(), self.conv, self.beta_shift, self.blend)
        sizes = parts(o, *inputs[0].shape[:2], place, inputs[0].device)
        # split, because the backward of every slice x[:, t:t + n] would fill a gradient of x's size with zeros; the
        # gates by heads, (B, T, H) -> (B, H, T), in memory as well, as the loops of a chunk are over tokens. Not by a
        # function shared with several_chunks: called from here, torch would compile it for itself, and that is slower
        qkv, *gates = inputs
        gates = (repeat(None) if x is None else x.mT.contiguous().split(sizes, dim=2) for x in gates)
        for size, *part in zip(sizes, qkv.split(sizes, dim=1), *gates):
            shifts = self.beta_shift.expand(-(-size // o.memory_chunk), -1, -1)     # one for each chunk of the part
            y_part, new = several_chunks(weights._replace(beta_shift=shifts), *part, state, fresh=place == 0)
            y.append(y_part)
            state |= new
            place = (place + size) % o.projection_chunk
            if place == 0:                                          # every memory starts a chunk
                state |= anchored(state)
            elif place % o.memory_chunk == 0:                       # the one that is read does
                W2, W2_xi = (state[name].tensor_split([self.out_0.shape[3]], dim=2) for name in ('W2', 'W2_xi'))
                state |= {'W2_xi': torch.cat([W2[0], W2_xi[1]], dim=2), 'U_xi': state['U']}
        return torch.cat(y, dim=2), state | {'place': place}

    def flops(self, T):
        """Forward FLOPs per token beyond the weights, half a tile's keys seen on average; momentum is not counted."""
        H, M, d, m = self.out_0.shape
        M, R = M - 1, self.starts()['W2'].shape[1]
        C = min(T, self.config.memory_chunk, self.tile)
        before = 2 * M * d * m + 3 * d * R + 2 * d * d + 4 * (1 + M) * d * m    # generating, comparing
        erase = 1 - C / min(T, self.config.memory_chunk)            # what the first tile erases was found by comparing
        W2 = (1 + erase) * d * R + 2 * d * m + C / 2 * (2 * d + R + m)          # with the state, and within the tile
        U = (2 + erase) * d * (d + m) + d * m + C / 2 * (4 * d + 2 * m)
        return 2 * H * (before + W2 + U + M * ((1 + erase) * d * m + C / 2 * (d + m)))


def anchored(state):
    """Every memory as it stands is the one that a new chunk generates from and compares with."""
    return {f'{name}_xi': state[name] for name in ('W2', 'U', 'W1') if name in state}


# -----------------------------------------------------------------------------
# a chunk at once: generate, compare, write and read


class Weights(NamedTuple):      # what training has learned, for all heads of a layer
    o: object                   # the switches: Config
    start: dict                 # {'W2': (H, R, d), 'U': (H, d, d + m), 'W1': (H, M, d, m)}
    conv: torch.Tensor          # (W, 3 D)
    beta_shift: torch.Tensor    # (H, 2 + M)
    blend: torch.Tensor         # (H, 1 + M) or None


def chunk(weights, qkv, alpha, beta, mu, state, fresh):
    """
    One chunk, or a part of one: the five equations for all its tokens.
    qkv                 (B, C, 2 D or 3 D) what the streams are made of
    alpha, beta, mu     (B, H, C) the gates before their sigmoid; alpha None forgets nothing, mu None is no momentum
    state               as in DeepMemory; fresh, whether it is the chunk's start for every memory
    returns y (B, H, C, d), and the state after the last token, without its _xi
    """
    xi = {name: W + state[f'{name}_xi'] for name, W in weights.start.items()}       # the memories at the chunk's start
    q, k, v, alpha, beta, tail = generate(weights, xi, qkv, alpha, beta, state['conv'])
    s, e, v_old = compare(weights, xi, k, v)
    v_old = v_old if fresh and mu is None else {}
    mu = None if mu is None else torch.sigmoid(mu)
    writes = {name: (s[name], e[name], c, v_old.get(name)) for name, c in step_sizes(weights, beta, s).items()}
    y, new = write_and_read(weights, xi, state, writes, alpha, mu, q)
    return y, new | {'conv': tail.to(state['conv'].dtype)}


def generate(weights, xi, qkv, alpha, beta, tail):
    """
    1   Queries, keys and values of norm 1, three of (B, H, C, d), and gates (B, H, C), by the memories that make them:
        retention as such, the write gate before its sigmoid. And the convolution's new tail.
    """
    o, m = weights.o, xi['U'].shape[-1] - xi['U'].shape[-2]
    q, z, v, tail = qkv_streams(qkv, weights.conv, tail, o.n_head)
    v = unit(v)
    if 'g' in o.adaptive:
        shift = o.gate_gain * few_rows(z, xi['W2'][:, :, -2:])                      # (B, H, C, 2)
        alpha, beta = alpha + shift[..., 0] if o.forget else None, beta + shift[..., 1]
    streams, names = {'q': q, 'k': z, 'v': v}, generated(o)
    if names:
        x = torch.stack([streams[name] for name in names], dim=2)                   # (B, H, M, C, d)
        W2 = xi['W2'][:, :, m:(1 + len(names)) * m].unflatten(2, (-1, m))           # (B, H, M m, d) -> (B, H, M, m, d)
        x = unit(x + matmul_nt(hidden(matmul_nt(x, W2)), xi['W1']))     # (.., C, d) x (.., d, m), (C, m) x (m, d)
        streams |= zip(names, x.unbind(2))
    return *streams.values(), retain(alpha, o.gate_floor) if o.forget else None, beta, tail


def compare(weights, xi, k, v):
    """
    2, 3   What every layer is to write at the keys k (B, H, C, d), by name: its input s (.., C, Dk), what is written
           e (.., C, Dv), and what xi - start answers to s, v_old (.., C, Dv), if that is erased.
    """
    o, start, d, M = weights.o, weights.start, k.shape[-1], len(generated(weights.o))
    m = start['U'].shape[-1] - d

    # what the 1 + M memories answer to the values, and to the keys
    asked = torch.cat([v, k], dim=2)                                                # (B, H, 2 C, d)
    W2, W_gates = xi['W2'].tensor_split([(1 + M) * m], dim=2)
    gates = few_rows(asked, W_gates) if 'g' in o.adaptive else None                 # (B, H, 2 C, 2)
    u = matmul_nt(asked, W2).unflatten(-1, (1 + M, m)).transpose(2, 3)              # (.., d) x (d, (1 + M) m), split
    W1 = reads_hidden(xi, d)                                                        # (B, H, 1 + M, d, m)
    linear = matmul_nt(asked, xi['U'][..., :d])                                     # (.., 2 C, d) x (.., d, d)
    h = hidden(u)                                                                   # (B, H, 1 + M, 2 C, m)
    is_read = (torch.arange(1 + M, device=k.device) == 0)[:, None, None]            # the memory that is read is first
    y = torch.where(is_read, linear[:, :, None], asked[:, :, None]) + matmul_nt(h, W1)  # (.., 2 C, m) x (.., m, d)
    (_, u_k), (_, h), (y_v, y_k) = (x.chunk(2, dim=3) for x in (u, h, y))

    # the value that each of them makes, and what is missing to it; with DGD the dot product, too, regresses on it
    target = v[:, :, None].expand_as(y_v)                                           # (B, H, 1 + M, C, d)
    if o.self_values:
        target = unit(v[:, :, None] + weights.blend[:, :, None, None] * y_v)
    regress = int(o.dgd or o.objective == 'l2')
    error = target - regress * y_k
    e = error if o.objective == 'l2' else target
    e_W2 = mlp_memory_grad(W1, u_k, error).transpose(2, 3).flatten(3)               # (B, H, C, (1 + M) m)
    if gates is not None:
        gates_v, gates_k = gates.chunk(2, dim=2)    # a gate's own value is its row at v, squashed
        e_W2 = torch.cat([e_W2, torch.tanh(gates_v) - regress * gates_k], dim=-1)   # (B, H, C, R)

    # what is erased is all that a layer answers, its start's part included; a first layer moves from where it is
    v_old = {}
    if o.dgd:
        v_old['W2'] = matmul_nt(k, xi['W2'] - start['W2'])                          # (.., C, d) x (.., d, R)
        e_W2 = e_W2 + v_old['W2']
        skip = torch.where(is_read, 0, k[:, :, None])                               # what is read starts without U k
        y_start = skip + h @ reads_hidden(start, d).mT                              # (.., C, m) x (.., m, d)
        e, moved = e - y_start, y_k - y_start
        v_old |= {'U': moved[:, :, 0], 'W1': moved[:, :, 1:]}
    (e_U, e_W1), (h_read, h) = (x.tensor_split([1], dim=2) for x in (e, h))
    x = torch.cat([k, h_read[:, :, 0]], dim=-1)                                     # (B, H, C, d + m)
    return {'W2': k, 'U': x, 'W1': h}, {'W2': e_W2, 'U': e_U[:, :, 0], 'W1': e_W1}, v_old


def reads_hidden(weights, d):
    """The columns of all output layers that read the hidden layers: U (.., d, d + m), W1 (.., M, d, m) or missing."""
    return torch.cat([weights['U'][..., d:].unsqueeze(-3)] + ([weights['W1']] if 'W1' in weights else []), dim=-3)


def step_sizes(weights, beta, s):
    """
    {name: (B, H, C), of W1 (B, H, M, C)}: shares of the proximal step 1 / |s|^2; above 1 they flip what is stored.
    Where nothing is erased, 2 / C keeps the errors of C equal tokens, all taken at once, from overshooting.
    """
    o, shift = weights.o, weights.beta_shift
    most = (2.0 if o.negative_eigenvalues else 1.0) * (1 if o.dgd or o.objective == 'dot' else 2 / o.projection_chunk)
    beta, shift = beta + shift[:, 1, None], shift - shift[:, 1:2]   # a floor closes all that a head writes together
    steps = {'W2': most * write_rate(beta, o.gate_floor, shift[:, 0, None]),                        # keys have norm 1
             'U': most * write_rate(beta, o.gate_floor) / s['U'].square().sum(-1).clamp(min=1)}
    if shift.shape[1] > 2:
        c = most * write_rate(beta[:, :, None], o.gate_floor, shift[:, 2:, None])                   # (B, H, M, C)
        steps['W1'] = c / s['W1'].square().sum(-1).clamp(min=1e-6)
    return steps


def write_and_read(weights, xi, state, writes, alpha, mu, q):
    """4, 5   y (B, H, C, d), read with q after each token's write, and the new state; writes {name: s, e, c, v_old}"""
    o, start, d, new = weights.o, weights.start, q.shape[-1], {}
    m = start['U'].shape[-1] - d

    def write(name, q=None, rows=None):
        """One recurrence; its first rows are read with q."""
        s, e, c, v_old = writes[name]
        a, momentum = (x if x is None or s.dim() == 4 else x[:, :, None] for x in (alpha, mu))      # W1: (B, H, 1, C)
        b = None if not o.dgd else c if a is None else a * c
        S = state[name] if mu is None else (state[name], state[f'{name}_p'])
        c = c if mu is None else c * (1 - momentum)     # a write adds up to 1 / (1 - mu) of itself, an erasure does not
        rule = recall_before if q is not None and o.memory_read == 'before' else delta_rule
        y, S = rule(q, s, e, a, b, c, S, o.tile, momentum, rows, v_old)
        new.update({name: S} if mu is None else {name: S[0], f'{name}_p': S[1]})
        return y

    if o.memory_read == 'start':
        write('W2'), write('U')
        y = mlp_memory(xi['W2'][:, :, :m], xi['U'], q)[0]
    else:
        u = write('W2', q, rows=m)                                                  # (B, H, C, m)
        x = torch.cat([q, hidden(u + q @ start['W2'][:, :m].mT)], dim=-1)           # (B, H, C, d + m)
        y = write('U', x) + x[..., d:] @ start['U'][..., d:].mT                     # (.., C, m) x (.., m, d)
    if 'W1' in writes:
        write('W1')
    return y, new


# -----------------------------------------------------------------------------
# for speed alone. What each gains, as a share of a layer's training step on a CPU before (results/speed.md):
#   0.85    recurrences run over tiles of 32 tokens, not whole chunks (--tile): masks and inverses are smaller
#   0.95    all 1 + M memories generate and compare in one batch: W2 and W1 hold them stacked
#   1.00    the backward computes a chunk again, in the place of keeping it: as fast, and a third less memory
#   0.90    several chunks a call, for long sequences of few rows; 0.97 for their backwards one at a time
#   0.97    the gates laid out by heads, their two rows as sums (few_rows); 0.99 what the first tile erases is v_old


def few_rows(x, W):
    """x W^T, x (.., T, d), W (.., rows, d), as sums: a product of two columns takes as long as one of sixteen."""
    return torch.stack([(x * w).sum(-1) for w in W.split(1, dim=-2)], dim=-1)       # (.., T, rows)


def parts(o, B, T, place, device):
    """
    The sizes of the parts in which T tokens are read: up to the chunk's end, then whole chunks, then the rest. Few rows
    are done before the next call is made: they take several chunks a call, no more than the cache holds, and none on a
    GPU, where nobody has measured it.
    """
    C, n = o.memory_chunk, 1
    if o.projection_chunk == C and device.type == 'cpu':
        whole = chunk_sizes(T, C, place).count(C)
        n = max(1, min(256 // (B * C), whole // 16))
        n = n if whole % n == 0 else 1
    return chunk_sizes(T, C, place, n)


def several_chunks(weights, qkv, alpha, beta, mu, state, fresh):
    """
    One chunk after the other, which compiled keep of each only what goes in: the backward computes the rest again. Two
    things let it do so one chunk at a time, and not for all first, which is more than the cache holds: what a chunk
    returns is no view (a view is not kept for the next one), and weights.beta_shift (n, H, 2 + M) has a copy for each
    (the sum of one's gradients would be fused with its terms, of which the last comes from the first chunk).
    """
    y, new, C = [], {}, weights.o.memory_chunk
    gates = (repeat(None) if x is None else x.split(C, dim=2) for x in (alpha, beta, mu))
    for shift, *part in zip(weights.beta_shift.unbind(), qkv.split(C, dim=1), *gates):
        inputs = weights._replace(beta_shift=shift), *part, state | new | anchored(new), fresh
        if torch.compiler.is_compiling():
            y_part, new = checkpoint(chunk, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            y_part, new = chunk(*inputs)
        y.append(y_part)
    return torch.cat(y, dim=2) if len(y) > 1 else y[0], new


# -----------------------------------------------------------------------------
# python titans.py


def main():
    from types import SimpleNamespace
    torch.manual_seed(0)
    config = dict(n_head=2, n_embd=16, conv_width=4, share_qk=True, tile=8, memory_chunk=16, projection_chunk=16,
                  memory_hidden=0, adaptive='g', self_values=True, objective='dot', dgd=True, forget=True,
                  memory_momentum=False, memory_read='before', negative_eigenvalues=False, gate_floor=0.0,
                  generate_shift=-8.0, gate_gain=1.0)                                        # Config's defaults
    print('100 tokens in float64, the largest difference between the cell on the blackboard and chunks of 16')
    for mixer, switches in DEEP.items():
        layer, x = DeepMemory(SimpleNamespace(**config | switches)).double(), torch.randn(100, 16).double()
        with torch.no_grad():
            layer.init_weights(branches=2)
            for p in layer.parameters():                # away from the start, so that everything has an effect
                p += 0.3 * torch.randn_like(p)
        print(f'{mixer:<10}{(layer(x[None])[0][0] - cell_ref(layer, x)).abs().max().item():.0e}')


if __name__ == '__main__':
    main()
