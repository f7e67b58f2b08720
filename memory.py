"""
Associative memories: a map from keys to values that is learned while reading. Objective x learning rule x architecture.

Every memory here is a layer with one signature, y, state = layer(x, state): x (B, T, D) goes in, y (B, T, D) comes out,
and the state holds all it remembers; None starts empty. A sequence may be cut anywhere: whole == any split == one token
at a time.

    linear          keeps every key-value pair in one sum                                       Katharopoulos 2020
    retnet          ... and forgets at a fixed rate per head                                    Sun 2023
    mamba2          ... and learns when to forget, with one gate per head (its scalar form)     Dao & Gu 2024
    deltanet        erases the old answer to a key before it writes the new one                 Yang 2024
    gated_deltanet  ... and learns when to forget                                               Yang 2025
    ttt             a step of gradient descent on |S k - v|^2 taken at the chunk's start        Sun 2024
    ttt_mlp         ... with a hidden layer                                                     Sun 2024
    titans          ... with momentum, and forgetting                                           Behrouz 2024
    hope            ... and it writes its own step sizes, or keys and values: self-modifying    Nested Learning 2025
    hope_light      ... its output layer alone is written, its step sizes alone are its own     (light.py)
    lstm            keeps a number a unit, and sees what it said before (lstm.py)               Hochreiter 1997
    attention       keeps the pairs themselves, the last block_size of them (attention.py)      Vaswani 2017

All but the last two are one recurrence (kernels.py) with different rates. `remember` is where the linear ones differ;
those with a hidden layer, ttt_mlp, titans and hope, are two such recurrences or three (titans.py, light.py).

    python memory.py           how well each of them recalls stored pairs as their number grows past the key width

A new linear one is a name in RECURRENT, a case in `remember`, the gates that it takes (Recurrent), and the formula of
its paper, a function of that name in tests/test_memory.py, which it is tested against. Any other is a layer like
attention.py's: init_weights(branches) fills every parameter, init_state and forward keep a flat dict of tensors, batch
first, which nobody changes in place; flops(T) counts per token what is no weight matrix; `groups` names parameters of
two axes that are no matrices (optim.param_groups). model.MIXERS names it, and the tests take it up from there: python
-m pytest -q -k NAME.

Does NOT include: feature maps and denominators of linear attention, RetNet's rotation, gates per channel (GLA, KDA).

Glossary (paper: "Associative Memory")
    paper           here        shape               meaning
    x_t             x           (B, T, D)           the layer's input
    q, k, v         q, k, v     (B, H, T, Dk)       query, key, value; Dv = Dk = D / H; recurrent q and k have norm 1
    M_t             S           (B, H, Dv, Dk)      a linear memory
    alpha_t         alpha       (B, H, T)           retention gate in (0, 1)
    eta_t           beta        (B, H, T)           write gate in (0, 1)
    B batch, H heads, T time, D model width, Dk key width, Dv value width
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import at_least_float32, causal_conv, delta_rule, product_type

RECURRENT = ('linear', 'retnet', 'mamba2', 'deltanet', 'gated_deltanet', 'ttt')
TTT_CHUNK = 16      # tokens that share one gradient step's starting point in ttt, as in its paper


# -----------------------------------------------------------------------------
# the family: who writes, keeps and erases how much


def remember(rule, q, k, v, alpha, beta, state, tile):
    """
    Store the pairs (k, v) one after the other in the memory that `rule` names, and read it with q after each write.

    q, k (B, H, T, Dk), v (B, H, T, Dv), alpha, beta (B, H, T) gates in (0, 1), of which each rule takes what it needs
    state {'S': (B, H, Dv, Dk), ...}, as returned; read-only
    returns y (B, H, T, Dv) and the new state
    """
    products = product_type(k)
    match rule:     #                     retention    erase            write               of e =
        case 'linear':          a, b, c = None,        None,            None                # v
        case 'retnet':          a, b, c = alpha,       None,            None                # v, alpha fixed
        case 'mamba2':          a, b, c = alpha,       None,            -alpha.log()        # v, c the step in time
        case 'deltanet':        a, b, c = None,        beta,            beta                # v
        case 'gated_deltanet':  a, b, c = alpha,       alpha * beta,    beta                # v
        case 'ttt':             a, b, c = None,        None,            beta * 2 / TTT_CHUNK    # v - S_xi k
        case _: raise ValueError(f'unknown rule {rule!r}')
    if rule != 'ttt':
        y, S = delta_rule(q, k, v, a, b, c, state['S'], tile, products=products)
        return y, {'S': S}

    # ttt: what is written depends on the memory at its chunk's start, so the chunks are read one after the other
    S, S_xi, place, y = state['S'], state['S_xi'], state['place'], []
    sizes = chunk_sizes(k.shape[2], TTT_CHUNK, place)
    for q, k, v, c in zip(*(x.split(sizes, dim=2) for x in (q, k, v, c))):
        with torch.autocast(k.device.type, enabled=False):
            k_part = at_least_float32(k)
            e = v - k_part @ S_xi.mT.to(k_part.dtype)               # (B, H, C, Dk) x (B, H, Dk, Dv) -> (B, H, C, Dv)
        y_part, S = delta_rule(q, k, e, a, b, c, S, TTT_CHUNK, products=products)
        y.append(y_part)
        place = (place + k.shape[2]) % TTT_CHUNK
        S_xi = S if place == 0 else S_xi
    return torch.cat(y, dim=2), {'S': S, 'S_xi': S_xi, 'place': place}


def chunk_sizes(T, C, place, n=1):
    """
    The parts in which T tokens are read, the first of them `place` tokens into a chunk of C: up to that chunk's end,
    whole chunks, n at a time, of which there must be a multiple, and the rest.
    """
    first = min(-place % C, T)
    whole, rest = divmod(T - first, C)
    return [first] * (first > 0) + whole // n * [n * C] + [rest] * (rest > 0)


def write_rate(x, floor, offset=0):
    """
    sigmoid(x + offset), a share of the full step. With a floor, tokens at which sigmoid(x) is below it write nothing,
    at any offset, and what is above is stretched. Meant for a trained model: gates that learn with it settle above.
    paper: gates in (0, 1)    here: 0 below a floor    because whatever is written erases, a sigmoid never closes, and
    over a haystack of 32,768 tokens a hundredth of a step per token is enough to erase a needle
    """
    if not floor:
        return torch.sigmoid(x + offset)
    shut = torch.sigmoid(x.new_full((), math.log(floor / (1 - floor))) + offset)
    return ((torch.sigmoid(x + offset) - shut) / (1 - shut)).clamp(min=0)


def retain(x, floor):
    """Retention sigmoid(x). With a floor for the gates, what forgets less than a hundredth of it keeps everything."""
    kept = torch.sigmoid(x)
    return (kept / (1 - floor / 100)).clamp(max=1) if floor else kept


def recall_before(q, k, e, a, b, c, state, tile, mu=None, rows=None, v_old=None, products=None):
    """kernels.delta_rule, but every token is read before its own write: from the memory after the token before it."""
    S = state if mu is None else state[0]
    first = q[..., :1, :] @ S[..., :rows, :].mT                                     # (.., 1, Dk) x (.., Dk, Dv)
    q = torch.cat([q[..., 1:, :], q[..., -1:, :]], dim=-2)
    y, state = delta_rule(q, k, e, a, b, c, state, tile, mu, rows, v_old, products)
    return torch.cat([first, y[..., :-1, :]], dim=-2), state


def unit(x):
    """x with its last axis scaled to norm 1."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp(min=1e-12))


def qkv_streams(qkv, conv, tail, H):
    """
    qkv (B, T, 3 D), or (B, T, 2 D) where q and k are made of the same, the convolution and its tail
    -> q, k (of norm 1), v (B, H, T, Dk), and the new tail
    """
    B, T, D = *qkv.shape[:2], conv.shape[1] // 3
    qkv = torch.cat([qkv[..., :D], qkv], dim=-1) if qkv.shape[-1] == 2 * D else qkv
    qkv, tail = causal_conv(qkv, conv, tail)                                        # (B, T, 3 D)
    q, k, v = (x.view(B, T, H, -1).transpose(1, 2) for x in F.silu(qkv).chunk(3, dim=-1))   # three of (B, H, T, Dk)
    q, k, v = map(at_least_float32, (q, k, v))                                      # a norm of 1 is not 1 in bfloat16
    return unit(q), unit(k), v, tail


class MemoryLayer(nn.Module):
    """
    What stands around every recurrent memory: projections, a short convolution, and a gated norm on what is read.
    paper: Titans' block, "SiLU after q, k, v; L2-normalised q, k; depth-wise convolution; output normalised and gated".
    here:  q and k are the same projection, each by a convolution of its own (share_qk)
    because a memory finds what stood behind a context if it is asked with what it was told with. With two projections
    that has to be learned first, and from text it was not (results/records.md).
    """
    groups = {'conv': 'vector'}                                     # optim.param_groups

    def __init__(self, config):
        super().__init__()
        D, H = config.n_embd, config.n_head
        self.n_head, self.tile, self.gate_floor = H, config.tile, config.gate_floor
        self.qkv = nn.Linear(D, (2 if config.share_qk else 3) * D, bias=False)
        self.conv = nn.Parameter(torch.empty(config.conv_width, 3 * D))
        self.gate = nn.Linear(D, D, bias=False)                     # the output gate
        self.norm = nn.RMSNorm(D // H, eps=1e-6)
        self.out = nn.Linear(D, D, bias=False)
        self.alpha = self.beta = None                               # retention and write gate, where a memory has them

    def init_weights(self, branches):
        """
        conv            normal, std 0.3; of q and v the last tap (the token itself) 1 more; k's is q's, a token earlier:
                        a key begins as the query of the token before, so that a query finds what stood behind its like
        qkv, gate       normal, std 1 / sqrt(D), k's as q's; out: 1 / sqrt(D branches), as all that a branch ends in
        alpha           weight 0; bias log(n - 1) with n from 32 to 1,024 over the heads: they retain for n tokens
        beta            weight 0, bias 0: write rate 1/2
        """
        D, H = self.out.in_features, self.n_head
        self.conv.normal_(std=0.3)
        q, k, v = self.conv.chunk(3, dim=1)                                         # three of (W, D)
        q[-1] += 1
        v[-1] += 1
        k.copy_(q.roll(-1, dims=0))
        self.init_memory()
        self.qkv.weight.normal_(std=D ** -0.5)
        self.qkv.weight[-2 * D:-D] = self.qkv.weight[:D]                            # where they share it, itself
        self.gate.weight.normal_(std=D ** -0.5)
        self.out.weight.normal_(std=(D * branches) ** -0.5)
        if self.alpha is not None:
            self.alpha.weight.zero_()
            self.alpha.bias.copy_((torch.logspace(5, 10, H, base=2) - 1).log())
        if self.beta is not None:
            self.beta.weight.zero_()
            self.beta.bias.zero_()

    def init_memory(self):
        """What the memory itself has learned before it reads: nothing."""

    def emit(self, y, x):
        """What was read (B, H, T, Dv), normed, gated by the layer's input x (B, T, D) and projected -> (B, T, D)."""
        y = self.norm(at_least_float32(y)).transpose(1, 2).reshape(x.shape)         # (B, H, T, Dv) -> (B, T, D)
        return self.out(y * F.silu(self.gate(x)))


class Recurrent(MemoryLayer):
    """The layer around `remember`: a linear memory and the gates that its rule takes."""
    def __init__(self, config):
        super().__init__(config)
        D, H = config.n_embd, config.n_head
        self.rule = config.mixer
        self.alpha = nn.Linear(D, H) if self.rule in ('mamba2', 'gated_deltanet') else None
        self.beta = nn.Linear(D, H) if self.rule in ('deltanet', 'gated_deltanet', 'ttt') else None
        decay = 1 - 2.0 ** (-5 - torch.arange(H)) if self.rule == 'retnet' else None        # as in RetNet's paper
        self.register_buffer('decay', decay, persistent=False)

    def init_state(self, batch_size, device=None):
        """An empty memory: a flat dict of tensors (and, for ttt, the place inside the chunk)."""
        D, H = self.out.in_features, self.n_head
        S = torch.zeros(batch_size, H, D // H, D // H, device=device)
        state = {'S': S, 'conv': torch.zeros(batch_size, len(self.conv) - 1, 3 * D, device=device)}
        return state | ({'S_xi': S, 'place': 0} if self.rule == 'ttt' else {})

    def forward(self, x, state=None):
        B, T, D = x.shape
        H = self.n_head
        state = state or self.init_state(B, x.device)
        q, k, v, tail = qkv_streams(self.qkv(x), self.conv, state['conv'], H)           # three of (B, H, T, Dk)

        # gates: (B, T, D) -> (B, T, H) -> (B, H, T), in float32 because a retention of 0.999 is 1 in bfloat16
        alpha = beta = None
        if self.alpha is not None:
            alpha = retain(at_least_float32(self.alpha(x)), self.gate_floor).mT
        if self.beta is not None:
            beta = write_rate(at_least_float32(self.beta(x)), self.gate_floor).mT
        if self.decay is not None:
            alpha = self.decay[:, None].expand(B, H, T)

        y, memory = remember(self.rule, q, k, v, alpha, beta, state, self.tile)
        return self.emit(y, x), memory | {'conv': tail}

    def flops(self, T):
        """
        Forward FLOPs per token beyond the weights: in a tile, half its keys seen on average, and with the state, which
        long sequences pass twice, in groups of tiles: that is not counted.
        """
        D, Dk = self.out.in_features, self.out.in_features // self.n_head
        tile = min(T, TTT_CHUNK if self.rule == 'ttt' else self.tile)
        erases = self.rule in ('deltanet', 'gated_deltanet')
        within = 2 * D * tile / 2 * (4 if erases else 2)                            # q k^T, scores v; k k^T, inverse
        return within + 2 * D * Dk * (2 if self.beta is None else 3)                # read, write; the old answer


# -----------------------------------------------------------------------------
# a memory whose answers do not depend on the order in which it was written


def no_pairs(B, Dk, Dv, ridge=1.0, dtype=None):
    """The state of least_squares before any pair: S (B, Dv, Dk), P (B, Dk, Dk)."""
    return {'S': torch.zeros(B, Dv, Dk, dtype=dtype), 'P': torch.eye(Dk, dtype=dtype).expand(B, Dk, Dk) / ridge}


def least_squares_ref(k, v, state):
    """
    The delta rule with all keys so far in the place of one, pair by pair (recursive least squares): it erases along
    P k, where P is the inverse of ridge I + the sum of k k^T, and so a pair leaves the answers to all former keys as
    they have to be. S minimises the sum of |S k - v|^2 + ridge |S|^2, whatever the order of the pairs.
    paper: DGD, S_t = S_{t-1} (I - beta k k^T) + beta v k^T    here: P k / (1 + k^T P k) for beta k

    k (B, T, Dk), v (B, T, Dv), state as no_pairs or this returned it; returns the new state
    """
    S, P = state['S'], state['P']
    for k_t, v_t in zip(k.unbind(1), v.unbind(1)):
        Pk = (P @ k_t[..., None])[..., 0]                                                       # (B, Dk)
        gain = Pk / (1 + (k_t * Pk).sum(-1, keepdim=True))                                      # (B, Dk)
        e = v_t - (S @ k_t[..., None])[..., 0]                                                  # (B, Dv)
        S, P = S + e[..., None] * gain[:, None], P - gain[..., None] * Pk[:, None]
    return {'S': S, 'P': P}


def least_squares(k, v, state):
    """least_squares_ref, all T pairs at once (Woodbury)."""
    S, P = state['S'], state['P']
    kP = k @ P                                                                                  # (B, T, Dk)
    gain = torch.linalg.solve(torch.eye(k.shape[1], dtype=k.dtype) + kP @ k.mT, kP)             # (B, T, Dk)
    return {'S': S + (v - k @ S.mT).mT @ gain, 'P': P - kP.mT @ gain}                           # (B, Dv, T) (B, T, Dk)


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
        _, state = remember(rule, k, k, values, alpha, beta, {'S': S, 'S_xi': S, 'place': 0}, tile=64)
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
