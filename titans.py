"""
Memories with a hidden layer. Read from the top: the cell as one would write it on a blackboard (cell_ref), then the same
numbers for a chunk of tokens at once, in four functions, and last what is there for speed alone.

    hope        writes its own keys, values and gates while it reads: self-modifying       Nested Learning 2025
    titans      keys, values and gates come from the input; momentum                       Behrouz 2024
    ttt_mlp     ... without momentum and without forgetting                                Sun 2024

    y, state = DeepMemory(config)(x, state)     x, y (B, T, D)
    python titans.py        the two forms beside each other: differences, and the time that each takes

Does NOT include: memories deeper than two layers, gates per channel, attention beside the memory (Titans' MAC, MAG).

Glossary (paper: "Self-Referential Titans", "Fast and Parallelizable Training"; column vectors, y = W x)
    paper           here            shape               meaning
    x_t             x               (B, T, D)           the layer's input; q, z, v (B, H, T, d) are the streams made of it
    M_memory        W2[:m], U       (m, d), (d, d + m)  the memory that is read, M(s) = U [s; hidden(W2 s)]
    M_k, M_v, M_q   W2[m:], W1      (M m, d), (M, d, m) those that generate, M(s) = s + W1 hidden(W2 s)
    M_alpha, M_eta  W2[-2:]         (2, d)              the rows that move the gates: linear memories of one number
    alpha, eta      alpha, beta     (B, H, T)           retention and write gate, before their sigmoid in `inputs`
    -               beta_shift      (H, 2 + M)          added to beta: for first layers and gates, for U, for each W1
    v^              target          (B, H, 1 + M, C, d) the value that each memory makes of v for itself
    -               blend (lambda)  (H, 1 + M)          how much of that value is its own answer
    mu              mu              (B, H, T)           decay of the momentum
    xi              *_xi            of each matrix      as it stood at the chunk's start; *_0 is the learned start
    B batch, H heads, T time, C chunk, D model width, d = D / H, m hidden units, M memories that generate, R rows of W2
"""
from itertools import repeat
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import at_least_float32, delta_rule, hidden, matmul_nt, mlp_memory, mlp_memory_grad
from memory import MemoryLayer, qkv_streams, retain, unit, write_rate

TITANS = dict(adaptive='', self_values=False, objective='l2', dgd=False)        # what makes titans titans: Config's fields
DEEP = {'hope': {}, 'titans': TITANS | {'memory_momentum': True}, 'ttt_mlp': TITANS | {'forget': False}}


def generated(o):
    """The streams that have a memory of their own, in the order of that memory's place in W2 and W1."""
    return [name for name in 'kvq' if name in o.adaptive]


# -----------------------------------------------------------------------------
# the cell on a blackboard


def cell_ref(layer, x):
    """
    The whole cell for one sequence, x (T, D) -> y (T, D): a token at a time, the weights themselves, inner gradients by
    autograd. Everything below is tested against it. ' is what has decayed, xi the start of the token's chunk.

    1   k = unit(M_k,ξ(z))     v = unit(M_v,ξ(v))     α = sigmoid(a·x + g_α,ξ·z)     β = sigmoid(b·x + g_β,ξ·z)       generate
    2   v̂ = unit(v + λ M_ξ(v))              for every memory M its own value, and tanh(g_ξ·v) for every gate
    3   e = v̂ at the output layer,  W2_ξ k + h'(W2_ξ k) ⊙ W1_ξᵀ (v̂ - M_ξ(k)) at the hidden layer         the inner gradient
    4   W ← W' + β' (e - W' s) sᵀ / |s|²,   W' = W_0 + α (W - W_0),   s the layer's input                    write
    5   y = M_mem,t(q)                                                                                       read
    """
    q, z, v, _ = qkv_streams(layer.qkv(x)[None], layer.conv, None, layer.n_head)    # three of (1, H, T, d)
    gates = [[None] * layer.n_head if gate is None else gate(x).mT for gate in (layer.alpha, layer.beta, layer.mu)]
    y = [head_ref(layer, i, q[0, i], z[0, i], unit(v)[0, i], *(gate[i] for gate in gates)) for i in range(layer.n_head)]
    return layer.emit(torch.stack(y)[None], x[None])[0]                             # H of (T, d) -> (T, D)


def head_ref(layer, i, q, z, v, a, b, mu):
    """cell_ref for head i: q, z, v (T, d), a, b, mu (T,) the gates before their sigmoid -> y (T, d)."""
    o, names, y = layer.config, generated(layer.config), []
    m, learned = layer.out_0.shape[3], {name: start[i] for name, start in layer.starts().items()}
    W_0 = {('in', 'mem'): learned['W2'][:m], ('out', 'mem'): learned['U']}
    for j, name in enumerate(names):
        W_0 |= {('in', name): learned['W2'][m + j * m:2 * m + j * m], ('out', name): learned['W1'][j]}
    W_0 |= {('in', 'gates'): learned['W2'][-2:]} if 'g' in o.adaptive else {}
    shift = dict.fromkeys(W_0, layer.beta_shift[i, 0]) | dict(zip([('out', n) for n in ('mem', *names)],
                                                                  layer.beta_shift[i, 1:]))
    W, P = dict(W_0), {name: torch.zeros_like(start) for name, start in W_0.items()}

    def M(weights, name, s):
        """M(s), and the input of its output layer."""
        h = hidden(weights['in', name] @ s)
        x = torch.cat([s, h]) if name == 'mem' else h
        return weights['out', name] @ x + (0 if name == 'mem' else s), x

    def write(at, G, s, kept_answer):
        """4  one step down the gradient -G at the input s; DGD erases the answer to s, but for kept_answer."""
        share = write_rate(beta + shift['out', 'mem'], o.gate_floor, shift[at] - shift['out', 'mem'])
        share = share * (2 if o.negative_eigenvalues else 1) / s.square().sum()
        if o.objective == 'l2' and not o.dgd:       # the gradients of a chunk add up: C equal ones must not overshoot
            share = share * 2 / o.projection_chunk
        old = alpha * (W[at] - W_0[at])                                         # W' - W_0
        step = share * (G - o.dgd * torch.outer(W_0[at] @ s - kept_answer, s))
        if mu is not None:                          # what was written before erases what it has left at once
            step = P[at] = mu[t].sigmoid() * P[at] + (1 - mu[t].sigmoid()) * step
        W[at] = W_0[at] + old + step - share * o.dgd * torch.outer(old @ s, s)

    for t in range(len(q)):
        if t % o.memory_chunk == 0:
            xi = dict(W) if t % o.projection_chunk == 0 else xi | {at: W[at] for at in W if at[1] == 'mem'}

        # 1  generate
        own = {'k': z[t], 'v': v[t], 'q': q[t]}
        own |= {name: unit(M(xi, name, own[name])[0]) for name in names}
        g = xi['in', 'gates'] @ z[t] if 'g' in o.adaptive else (0, 0)
        alpha, beta = retain(a[t] + g[0], o.gate_floor) if o.forget else 1, b[t] + g[1]

        for j, name in enumerate(('mem', *names)):
            # 2  the memory's own value
            target = unit(own['v'] + layer.blend[i, j] * M(xi, name, own['v'])[0]) if o.self_values else own['v']
            # 3  the inner gradients at the chunk's start; of copies, for the value was made by the same weights
            copy = {(at, name): xi[at, name].clone() for at in ('in', 'out')}
            answer, x = M(copy, name, own['k'])
            l2, dot = (answer - target).square().sum() / 2, -(answer @ target)
            G_in, = torch.autograd.grad(l2 if o.dgd or o.objective == 'l2' else dot, copy['in', name], create_graph=True)
            G_out, = torch.autograd.grad(l2 if o.objective == 'l2' else dot, copy['out', name], create_graph=True)
            write(('in', name), -G_in, own['k'], xi['in', name] @ own['k'])
            write(('out', name), -G_out, x, 0 if name == 'mem' else -own['k'])
        if 'g' in o.adaptive:
            answer = xi['in', 'gates'] @ own['k']
            error = (xi['in', 'gates'] @ own['v']).tanh() - (o.dgd or o.objective == 'l2') * answer
            write(('in', 'gates'), torch.outer(error, own['k']), own['k'], answer)

        # 5  read, after the write
        y.append(M(W if o.memory_read == 'after' else xi, 'mem', own['q'])[0])
    return torch.stack(y)


# -----------------------------------------------------------------------------
# the layer


class DeepMemory(MemoryLayer):
    """
    Memories with a hidden layer, which may make their own keys, values and gates, and learn to while they read (paper:
    "Self-Referential Titans").

    Each head holds one memory that the queries read, and others that turn the streams of x into keys and values. At
    every token all of them are written, at that token's key, each with a value that it made itself. So what a token
    does to the memory depends on what the memory has become. Within a chunk everything is generated by the memories as
    they stood at its start; what is left are three linear recurrences (W2, U, W1), which kernels.py runs in parallel.

    paper: weights decay to zero    here: to their learned start    because a start that fades teaches nothing: the
    state is the difference from it, empty before the first token, and the recurrence runs on the difference

    state   W2 (B, H, R, d), U (B, H, d, d + m), W1 (B, H, M, d, m): differences from the start; with _xi, the same at
            the start of the last chunk; with _p, their momentum; place, tokens since the (larger) chunk began; conv
    """
    groups = {'conv': 'vector', 'beta_shift': 'vector', 'blend': 'vector', 'W2_0': 'start', 'gates_0': 'start',
              'out_0': 'start'}

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
        self.out_0 = nn.Parameter(torch.empty(H, 1 + M, d, m))
        self.beta_shift = nn.Parameter(torch.empty(H, 2 + M))
        self.blend = nn.Parameter(torch.empty(H, 1 + M)) if config.self_values else None

    def init_memory(self):
        """
        W2_0        normal, std 1: a key of norm 1 gives pre-activations of size 1
        out_0       0: what is read was written while reading, what is made starts as what it is made from. An answer
                    from the start, the same for all keys, hides what is recalled (results/README.md, "Recall")
        gates_0     0: the gates move only with what is read
        beta_shift  -3 for first layers, 0 for the memory that is read, -8 for those that generate: a key that moves
                    from the start is no key
        blend       0.1: a value starts as v, not as what a still empty memory answers to it
        mu          weight 0, bias -2: momentum 0.12
        """
        self.W2_0.normal_()
        self.out_0.zero_()
        if self.gates_0 is not None:
            self.gates_0.zero_()
        self.beta_shift[:, 0], self.beta_shift[:, 1], self.beta_shift[:, 2:] = -3, 0, -8
        if self.blend is not None:
            self.blend.fill_(0.1)
        if self.mu is not None:
            self.mu.weight.zero_()
            self.mu.bias.fill_(-2)

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
        tail = torch.zeros(batch_size, len(self.conv) - 1, self.qkv.out_features, **options)
        return state | anchored(state) | speed | {'place': 0, 'conv': tail}

    def forward(self, x, state=None):
        gates = [None if gate is None else at_least_float32(gate(x)) for gate in (self.alpha, self.beta, self.mu)]
        with torch.autocast(x.device.type, enabled=False):
            y, state = self.read([self.qkv(x), *gates], state or self.init_state(len(x), x.device))
        return self.emit(y, x), state

    @torch.compiler.disable(recursive=False)
    def read(self, inputs, state):
        """
        Chunk after chunk. inputs: qkv (B, T, 3 D), alpha, beta, mu (B, T, H) or None -> y (B, H, T, d), state
        Under torch.compile only several_chunks is compiled: once per shape, not once per call.
        """
        o, state, y = self.config, dict(state), []
        place, learned = state.pop('place'), Learned(o, self.starts(), self.conv, self.beta_shift, self.blend)
        sizes = self.sizes(*inputs[0].shape[:2], place, inputs[0].device)
        # split, because the backward of every slice x[:, t:t + n] would fill a gradient of x's size with zeros; the
        # gates by heads, (B, T, H) -> (B, H, T), in memory as well, as the loops of a chunk are over tokens. Not by a
        # function shared with several_chunks: called from here, torch would compile it for itself, and that is slower
        qkv, *gates = inputs
        gates = (repeat(None) if x is None else x.mT.contiguous().split(sizes, dim=2) for x in gates)
        for size, *part in zip(sizes, qkv.split(sizes, dim=1), *gates):
            shifts = self.beta_shift.expand(-(-size // o.memory_chunk), -1, -1)     # one for each chunk of the part
            y_part, new = several_chunks(learned._replace(beta_shift=shifts), *part, state, fresh=place == 0)
            y.append(y_part)
            state |= new
            place = (place + size) % o.projection_chunk
            if place == 0:                                          # every memory starts a chunk
                state |= anchored(state)
            elif place % o.memory_chunk == 0:                       # the one that is read does
                m = self.out_0.shape[3]
                W2_xi = torch.cat([state['W2'][:, :, :m], state['W2_xi'][:, :, m:]], dim=2)
                state |= {'W2_xi': W2_xi, 'U_xi': state['U']}
        return torch.cat(y, dim=2), state | {'place': place}

    def sizes(self, B, T, place, device):
        """The parts in which T tokens are read: up to the chunk's end, then whole chunks, then the rest."""
        C = self.config.memory_chunk
        first = min(-place % C, T)
        whole, rest = divmod(T - first, C)
        n = chunks_per_call(self.config, B, whole, device)
        return [first] * (first > 0) + whole // n * [n * C] + [rest] * (rest > 0)

    def flops(self, T):
        """Forward FLOPs per token beyond the weights, half a tile's keys seen on average; momentum is not counted."""
        H, M, d, m = self.out_0.shape
        M, R = M - 1, self.starts()['W2'].shape[1]
        C = min(T, self.config.memory_chunk, self.tile)
        generate = 2 * M * d * m
        compare = 3 * d * R + 2 * d * d + 4 * (1 + M) * d * m       # at the value, at the key, and from the start
        erase = 1 - C / min(T, self.config.memory_chunk)            # what the first tile erases was found by comparing
        write_W2 = (1 + erase) * d * R + 2 * d * m + C / 2 * (2 * d + R + m)   # with the state, and within the tile
        write_U = (2 + erase) * d * (d + m) + d * m + C / 2 * (4 * d + 2 * m)
        write_W1 = M * ((1 + erase) * d * m + C / 2 * (d + m))
        return 2 * H * (generate + compare + write_W2 + write_U + write_W1)


def anchored(state):
    """Every memory as it stands is the one that a new chunk generates from and compares with."""
    return {f'{name}_xi': state[name] for name in ('W2', 'U', 'W1') if name in state}


# -----------------------------------------------------------------------------
# a chunk at once: generate, compare, write and read


class Learned(NamedTuple):
    """What training has learned, for all heads of a layer, and the switches."""
    o: object                   # Config
    start: dict                 # {'W2': (H, R, d), 'U': (H, d, d + m), 'W1': (H, M, d, m)}
    conv: torch.Tensor          # (W, 3 D)
    beta_shift: torch.Tensor    # (H, 2 + M)
    blend: torch.Tensor         # (H, 1 + M) or None


class Write(NamedTuple):
    """What a chunk writes in one matrix, relative to the learned start."""
    s: torch.Tensor             # (.., C, Dk) the layer's input
    e: torch.Tensor             # (.., C, Dv) the inner gradient, without its outer product with s
    v_old: torch.Tensor         # (.., C, Dv) what xi - start answers to s, if that is erased, else None


def chunk(learned, qkv, alpha, beta, mu, state, fresh):
    """
    One chunk, or a part of one: cell_ref's five lines for all its tokens.

    qkv                 (B, C, 3 D) what the streams are made of
    alpha, beta, mu     (B, H, C) the gates before their sigmoid; alpha None forgets nothing, mu None is no momentum
    state               the difference of every memory from its start, now and (_xi) at the chunk's start; conv the tail
    fresh               whether now is the chunk's start, for every memory
    returns y (B, H, C, d), and the differences and the tail after the last token
    """
    xi = {name: W + state[f'{name}_xi'] for name, W in learned.start.items()}       # the memories at the chunk's start
    q, k, v, alpha, beta, tail = generate(learned, xi, qkv, alpha, beta, state['conv'])
    writes = compare(learned, xi, k, v)
    if not fresh or mu is not None:
        writes = {name: write._replace(v_old=None) for name, write in writes.items()}
    mu = None if mu is None else torch.sigmoid(mu)
    y, new = write_and_read(learned, xi, state, writes, step_sizes(learned, beta, writes), alpha, mu, q)
    return y, new | {'conv': tail.to(state['conv'].dtype)}


def generate(learned, xi, qkv, alpha, beta, tail):
    """
    1   Queries, keys and values of norm 1, three of (B, H, C, d), and gates (B, H, C), by the memories that make them:
        retention as such, the write gate before its sigmoid. And the convolution's new tail.
    """
    o, m = learned.o, xi['U'].shape[-1] - xi['U'].shape[-2]
    q, z, v, tail = qkv_streams(qkv, learned.conv, tail, o.n_head)
    v = unit(v)
    if 'g' in o.adaptive:
        shift = few_rows(z, xi['W2'][:, :, -2:])                                    # (B, H, C, 2)
        alpha, beta = alpha + shift[..., 0] if o.forget else None, beta + shift[..., 1]
    streams, names = {'k': z, 'v': v, 'q': q}, generated(o)
    if names:
        x = torch.stack([streams[name] for name in names], dim=2)                   # (B, H, M, C, d)
        W2 = xi['W2'][:, :, m:(1 + len(names)) * m].unflatten(2, (-1, m))           # (B, H, M m, d) -> (B, H, M, m, d)
        x = unit(x + matmul_nt(hidden(matmul_nt(x, W2)), xi['W1']))     # (.., C, d) x (.., d, m), (C, m) x (m, d)
        streams |= zip(names, x.unbind(2))
    alpha = retain(alpha, o.gate_floor) if o.forget else None
    return streams['q'], streams['k'], streams['v'], alpha, beta, tail


def compare(learned, xi, k, v):
    """
    2, 3   What every layer is to write at the keys k (B, H, C, d): {'W2': Write of (C, d) and (C, R), 'U': (C, d + m)
           and (C, d), 'W1': (M, C, m) and (M, C, d)}. With DGD the dot product, too, regresses on the value.
    """
    o, start, d, M = learned.o, learned.start, k.shape[-1], len(generated(learned.o))
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

    # the value that each of them makes, and what is missing to it
    target = unit(v[:, :, None] + learned.blend[:, :, None, None] * y_v) if o.self_values \
        else v[:, :, None].expand_as(y_v)
    regress = int(o.dgd or o.objective == 'l2')
    error = target - regress * y_k                                                  # (B, H, 1 + M, C, d)
    e = error if o.objective == 'l2' else target
    e_W2 = mlp_memory_grad(W1, u_k, error).transpose(2, 3).flatten(3)               # (B, H, C, (1 + M) m)
    if gates is not None:
        gates_v, gates_k = gates.chunk(2, dim=2)    # a gate's own value is its row at v, squashed
        e_W2 = torch.cat([e_W2, torch.tanh(gates_v) - regress * gates_k], dim=-1)   # (B, H, C, R)

    # what is erased is all that a layer answers, its start's part included; a first layer moves from where it is
    old = dict.fromkeys(('W2', 'U', 'W1'))
    if o.dgd:
        old['W2'] = matmul_nt(k, xi['W2'] - start['W2'])                            # (.., C, d) x (.., d, R)
        e_W2 = e_W2 + old['W2']
        skip = torch.where(is_read, 0, k[:, :, None])                               # what is read starts without U k
        y_start = skip + h @ reads_hidden(start, d).mT                              # (.., C, m) x (.., m, d)
        e, moved = e - y_start, y_k - y_start
        old |= {'U': moved[:, :, 0], 'W1': moved[:, :, 1:]}
    e_U, e_W1 = e.tensor_split([1], dim=2)
    h_read, h = h.tensor_split([1], dim=2)
    writes = {'W2': Write(k, e_W2, old['W2']), 'U': Write(torch.cat([k, h_read[:, :, 0]], dim=-1), e_U[:, :, 0], old['U'])}
    return writes | ({'W1': Write(h, e_W1, old['W1'])} if M else {})


def reads_hidden(weights, d):
    """The columns of all output layers that read the hidden layers: U (.., d, d + m), W1 (.., M, d, m) or missing."""
    return torch.cat([weights['U'][..., d:].unsqueeze(-3)] + ([weights['W1']] if 'W1' in weights else []), dim=-3)


def step_sizes(learned, beta, writes):
    """
    {name: (B, H, C), of W1 (B, H, M, C)}: shares of the proximal step 1 / |s|^2; above 1 a token flips what is stored.
    The errors of a chunk are all taken before one of them is followed: 2 / C keeps C equal ones from overshooting where
    nothing is erased.
    """
    o, shift = learned.o, learned.beta_shift
    most = (2.0 if o.negative_eigenvalues else 1.0) * (2 / o.projection_chunk if o.objective == 'l2' and not o.dgd else 1)
    beta, shift = beta + shift[:, 1, None], shift - shift[:, 1:2]   # a floor closes all that a head writes together
    steps = {'W2': most * write_rate(beta, o.gate_floor, shift[:, 0, None]),                        # keys have norm 1
             'U': most * write_rate(beta, o.gate_floor) / writes['U'].s.square().sum(-1).clamp(min=1)}
    if 'W1' in writes:
        c = most * write_rate(beta[:, :, None], o.gate_floor, shift[:, 2:, None])                   # (B, H, M, C)
        steps['W1'] = c / writes['W1'].s.square().sum(-1).clamp(min=1e-6)
    return steps


def write_and_read(learned, xi, state, writes, steps, alpha, mu, q):
    """4, 5   y (B, H, C, d), each token's read with q after its own write, and the new state of all matrices."""
    o, start, d, new = learned.o, learned.start, q.shape[-1], {}
    m = start['U'].shape[-1] - d

    def write(name, q=None, rows=None):
        """One recurrence; its first rows are read with q."""
        (s, e, v_old), c = writes[name], steps[name]
        a, momentum = (x if x is None or s.dim() == 4 else x[:, :, None] for x in (alpha, mu))      # W1: (B, H, 1, C)
        b = None if not o.dgd else c if a is None else a * c
        S = state[name] if mu is None else (state[name], state[f'{name}_p'])
        c = c if mu is None else c * (1 - momentum)     # a write adds up to 1 / (1 - mu) of itself, what is erased not
        y, S = delta_rule(q, s, e, a, b, c, S, o.tile, momentum, rows, v_old)
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
# for speed alone (gains of a training step on a CPU; results/speed.md)
#
# a chunk in tiles of 32 tokens (--tile): 0.85 of the time, for masks and inverses are half and a quarter as large
# what the first tile erases is known from comparing (Write.v_old): 0.99
# the backward computes a chunk again (several_chunks): 0.86 of the time at 512 tokens, and a fraction of the memory
# several chunks a call (chunks_per_call): 0.9 for long sequences of few rows
# two rows as sums (few_rows): 0.98


def few_rows(x, W):
    """x W^T, x (.., T, d), W (.., rows, d), as sums: a product of two columns takes as long as one of sixteen."""
    return torch.stack([(x * w).sum(-1) for w in W.split(1, dim=-2)], dim=-1)       # (.., T, rows)


def chunks_per_call(o, B, whole, device):
    """
    Few rows are done before the next call is made: a long sequence takes several chunks a call. More compile for
    longer, and more rows no longer fit the cache. On a GPU nobody has measured it.
    """
    if o.projection_chunk != o.memory_chunk or device.type != 'cpu':
        return 1
    n = max(1, min(256 // (B * o.memory_chunk), whole // 16))
    return n if whole % n == 0 else 1


def several_chunks(learned, qkv, alpha, beta, mu, state, fresh):
    """
    chunk, or several of them one after the other, which compiled keep of a chunk only what goes in. The backward
    computes the rest again, in about the time in which it could have been read back.

    Two things let it compute one chunk again at a time, and not all of them first, which is more than the cache holds:
    what a chunk returns is no view (a view is not kept for the next chunk), and learned.beta_shift (n, H, 2 + M) has a
    copy for each (the sum of one's gradients would be fused with its terms, of which the last comes from the first).
    """
    y, new, C = [], {}, learned.o.memory_chunk
    gates = (repeat(None) if x is None else x.split(C, dim=2) for x in (alpha, beta, mu))
    for shift, *part in zip(learned.beta_shift.unbind(), qkv.split(C, dim=1), *gates):
        inputs = learned._replace(beta_shift=shift), *part, state | new | anchored(new), fresh
        if torch.compiler.is_compiling():
            y_part, new = checkpoint(chunk, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            y_part, new = chunk(*inputs)
        y.append(y_part)
    return torch.cat(y, dim=2) if len(y) > 1 else y[0], new


# -----------------------------------------------------------------------------
# python titans.py


def main():
    import time
    from types import SimpleNamespace
    torch.manual_seed(0)
    torch.set_num_threads(1)
    switches = dict(n_head=2, n_embd=16, tile=8, conv_width=4, gate_floor=0.0, memory_hidden=0, memory_chunk=16,
                    projection_chunk=16, adaptive='kvg', self_values=True, objective='dot', dgd=True, forget=True,
                    memory_momentum=False, memory_read='after', negative_eigenvalues=False)
    print('100 tokens, float64: the cell on the blackboard (cell_ref) beside chunks of 16 tokens')
    print(f"{'':<10}{'largest difference: output, gradients':>40}{'seconds':>10}{'chunks':>9}")
    for mixer, what in DEEP.items():
        layer = DeepMemory(SimpleNamespace(mixer=mixer, **switches | what)).double()
        with torch.no_grad():
            layer.init_weights(branches=2)
            for p in layer.parameters():                # away from the start, so that everything has an effect
                p += 0.3 * torch.randn_like(p)
        x, results = torch.randn(100, 16, dtype=torch.float64, requires_grad=True), []
        for f in (lambda: cell_ref(layer, x), lambda: layer(x[None])[0][0]):
            start = time.perf_counter()
            y = f()
            grads = torch.autograd.grad(y.cos().sum(), [x, *layer.parameters()])
            results.append((y, grads, time.perf_counter() - start))
        (y_ref, grads_ref, slow), (y, grads, fast) = results
        worst = max((a - b).abs().max().item() for a, b in zip(grads, grads_ref))
        print(f'{mixer:<10}{(y - y_ref).abs().max().item():>28.0e}{worst:>12.0e}{slow:>10.2f}{fast:>9.2f}')


if __name__ == '__main__':
    main()
