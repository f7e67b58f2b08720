"""
Continuum memory: a chain of MLPs in the place of one, each with a clock of its own (paper: "Continuum Memory System").

A Transformer's MLP learns in training and never again. Here level l of K moves every C_l ticks, with the mean of the
gradients gathered since (eq. 71): fast levels follow what is read, slow ones keep what lasts. One rule, two clocks:

    optimizer clock   a tick is a step of training: --cms_periods=1,2,4,8. Period 1 everywhere is an ordinary model
    token clock       a tick is a token that was read: --cms_chunks=64,256,1024,4096. Every stream has fast weights of
                      its own that start as the learned ones, theta_0, and move down the gradient of the loss on the
                      tokens just read. `learn` is that, in training, scoring and sampling

    python cms.py     which level moves when; then two alternating sources, read by a static MLP and by the levels

Does NOT include: other inner optimizers than gradient descent and DGD, fast weights for anything but the MLPs.

Glossary
    paper           here            shape               meaning
    f_l             periods, chunks K each              ticks between two moves of level l, the fastest level first
    theta^(l)       up, out         (2 h, D), (D, h)    the weights of a level of hidden width h, all blocks together
    theta - theta_0 delta           (B, 2 h, D), ...    how far a stream's own weights have moved
    eta^(l)         log_step        (K,)                inner step size of a level, learned in log space
    C               chunks[0]       tokens that are read with the same weights
    B batch, T time, D model width, h hidden width, K levels, L blocks
"""
import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cli import check

TOPOLOGIES = ('sequential', 'independent', 'nested', 'stacked')


def clock(name, text, lowest):
    """'1,2,4,8' -> (1, 2, 4, 8), each a multiple of the one before; 0, where allowed, is a level that never moves."""
    ticks = tuple(int(n) if n.isdecimal() else -1 for n in text.split(','))
    check(min(ticks) >= lowest, f"--{name} takes whole numbers with commas between, as in 1,2,4,8, not '{text}'")
    moving = [n for n in ticks if n]
    check(not any(slow % fast for fast, slow in zip(moving, moving[1:])),
          f'--{name} goes from fast to slow, each a multiple of the one before it, not {text}')
    return ticks


def level_of(config, block, i):
    """The level of the i-th MLP of that block: its place in the chain, or, stacked, its block's share of the depth."""
    return block * config.n_level // config.n_layer if config.cms_topology == 'stacked' else i


# -----------------------------------------------------------------------------
# the chain


class Erasing(torch.autograd.Function):
    """
    x (B, T, n) through each stream's own W (B, m, n). What Delta Gradient Descent adds to the gradient of W, that a
    token erases what delta, the part of W learned while reading, answers to it, is the gradient of `erased`.
    paper: all of W is erased    here: delta alone            because what training learned is not the stream's to erase
    paper: one rate for both     here: erases rate / |x|^2    because a rate that writes enough erases more than all
    """
    @staticmethod
    def forward(ctx, x, W, delta, erased):
        ctx.save_for_backward(x, W, delta)
        return linear(x, W)

    @staticmethod
    def backward(ctx, g):                                       # g (B, T, m), of a mean over T tokens
        x, W, delta = ctx.saved_tensors
        answer = x @ delta.mT / x.square().sum(-1, keepdim=True).clamp(min=1e-6) / x.shape[1]   # (B, T, m)
        return g @ W, g.mT @ x, None, answer.mT @ x             # (B, m, T) x (B, T, n) -> (B, m, n)


def linear(x, W):
    """x (B, T, n) through a matrix (m, n), through each stream's own (B, m, n), or through what Erasing takes."""
    if isinstance(W, tuple):
        return Erasing.apply(x, *(M.to(x.dtype) for M in W))
    if W.dim() == 3 and len(W) == 1:                            # one stream: the very product of the static model
        W = W[0]
    return F.linear(x, W) if W.dim() == 2 else x @ W.mT.to(x.dtype)         # (B, T, n) x (B, n, m)


class MLP(nn.Module):
    """One level: SwiGLU, two thirds of the usual 4 D hidden width, because it has three matrices, not two."""
    def __init__(self, D, h):
        super().__init__()
        self.norm = nn.RMSNorm(D, eps=1e-6)
        self.up = nn.Linear(D, 2 * h, bias=False)
        self.out = nn.Linear(h, D, bias=False)

    def forward(self, x, up=None, out=None):
        """x (B, T, D) -> (B, T, D); up (B, 2 h, D), out (B, D, h): weights of each stream in the place of its own."""
        gate, value = linear(self.norm(x), self.up.weight if up is None else up).chunk(2, dim=-1)      # two of (B, T, h)
        return linear(F.silu(gate) * value, self.out.weight if out is None else out)


class CMS(nn.Module):
    """
    The levels of one block. The hidden width of one MLP is split over them, so their parameters are those of one MLP.

    sequential      one after the other, each a residual step (eq. 73)
    independent     side by side, a learned weighted sum that starts as the mean (eq. 74)
    nested          as sequential; while reading, a level starts again when the next slower one moves (eq. 72)
    stacked         one MLP per block, the blocks spread over the levels: level stacking of a Transformer (7.3)
    """
    def __init__(self, config):
        super().__init__()
        n, h = 1 if config.cms_topology == 'stacked' else config.n_level, config.n_hidden
        self.levels = nn.ModuleList(MLP(config.n_embd, h * (i + 1) // n - h * i // n) for i in range(n))
        self.mix = nn.Parameter(torch.empty(n)) if config.cms_topology == 'independent' else None

    def forward(self, x, fast=None):
        """x (B, T, D) -> (B, T, D), the residual stream after all levels; fast: {'0.up': (B, 2 h, D), ...} or None."""
        fast, total = fast or {}, x
        for i, level in enumerate(self.levels):
            y = level(x, fast.get(f'{i}.up'), fast.get(f'{i}.out'))
            if self.mix is None:
                x = total = x + y
            else:
                total = total + self.mix[i] * y
        return total


def weights_of(model):
    """[(level, block, '0.up', parameter), ...] over the matrices of all levels."""
    return [(level_of(model.config, b, i), b, f'{i}.{name}', getattr(mlp, name).weight)
            for b, block in enumerate(model.blocks) for i, mlp in enumerate(block.cms.levels) for name in ('up', 'out')]


# -----------------------------------------------------------------------------
# the optimizer clock


@contextlib.contextmanager
def moving(model, step):
    """
    Around a step of the optimizer, counted from 0: only the levels that move show their gradients, the mean of those
    gathered since they last did. The others' are out of sight of clipping, optimizer and zero_grad, and grow on.
    yields a dict that afterwards holds how far each level moved, {level: norm of the change}; empty with one level
    """
    periods, weights, moved = model.config.periods, weights_of(model), {}
    ticking = [level for level, period in enumerate(periods) if (step + 1) % period == 0]
    held = [(p, p.grad) for level, _, _, p in weights if level not in ticking]
    for p, _ in held:
        p.grad = None
    for level, _, _, p in weights:
        if level in ticking and periods[level] > 1:
            p.grad /= periods[level]
    before = [(level, p, p.detach().clone()) for level, _, _, p in weights if level in ticking and len(periods) > 1]
    yield moved
    for p, grad in held:
        p.grad = grad
    for level in ticking if before else ():
        squares = sum((p.detach() - old).square().sum() for owner, p, old in before if owner == level)
        moved[level] = squares.sqrt().item()


# -----------------------------------------------------------------------------
# the token clock


def start_memory(model, batch_size):
    """
    What `learn` goes on from: nothing read, every level at theta_0.

    state, anchor       the recurrent state now, and at the start of the unfinished chunk `pending` (B, n)
    delta, gathered     per block {'0.up': (B, 2 h, D), ...}: how far a stream's weights moved, its gradients since
    learned             tokens that the weights have learned from; trace, where it stands, saves reading a chunk twice
    """
    device = model.embed.weight.device
    zeros = [{} for _ in model.blocks]
    for level, b, name, p in weights_of(model):
        if model.config.chunks[level]:
            zeros[b][name] = p.new_zeros(batch_size, *p.shape)
    state, pending = model.init_state(batch_size, device), torch.empty(batch_size, 0, dtype=torch.long, device=device)
    return {'state': state, 'anchor': state, 'pending': pending, 'delta': zeros, 'gathered': zeros, 'learned': 0}


def learn(model, idx, memory=None):
    """
    Read on, and learn from what is read: level l moves every chunks[l] tokens (eq. 71).

    idx (B, T) token ids; memory as returned, or None to start at theta_0
    returns logits (B, T, V), each made by weights that have not seen what it predicts, and the new memory

    A chunk of C = chunks[0] tokens is read with the same weights. Once the token after it is known, every level
    gathers the gradient of its mean loss, and the levels whose time it is move. What a stream learns is its own. An
    unfinished chunk waits in the memory, so that any split of a stream gives the same, to rounding.

    In training mode and with gradients enabled all of it can be differentiated, theta_0 and log_step are
    meta-learned: to first order (the inner gradient is a constant), or through it with cms_meta=second.
    """
    assert idx.dim() == 2, f'idx must be (B, T), got {tuple(idx.shape)}'
    assert model.config.chunks, 'the model has no token clock: give it cms_chunks'
    training, C, t, out = model.training and torch.is_grad_enabled(), model.config.chunks[0], 0, []
    memory = memory or start_memory(model, len(idx))
    fast, logits = memory.get('trace') or (fast_weights(model, memory['delta'], training), None)
    while t < idx.shape[1]:
        if memory['pending'].shape[1] == C:                     # a whole chunk was read, and here is the token after it
            targets = torch.cat([memory['pending'][:, 1:], idx[:, t:t + 1]], dim=1)             # (B, C)
            if logits is None:                                  # it was read in parts: once more as a whole
                with torch.enable_grad():
                    logits = model(memory['pending'], state=memory['anchor'], fast=fast)[0]
            memory = move(model, memory, fast, logits, targets, training)
            fast = fast_weights(model, memory['delta'], training)
        part = idx[:, t:t + C - memory['pending'].shape[1]]     # up to the chunk's end
        t, whole = t + part.shape[1], part.shape[1] == C
        with torch.set_grad_enabled(training or whole), attention_backend(model.config, training):
            logits, _, state = model(part, state=memory['state'], fast=fast)
        out.append(logits if training else logits.detach())
        memory = memory | {'state': state if training else detached(state),
                           'pending': torch.cat([memory['pending'], part], dim=1)}
        logits = logits if whole else None
    return torch.cat(out, dim=1), memory | {'trace': logits is not None and (fast, logits)}


def attention_backend(config, training):
    """The fused attention kernels have no second derivative; the plain one has."""
    return sdpa_kernel(SDPBackend.MATH) if training and config.cms_meta == 'second' else contextlib.nullcontext()


def detached(layers):
    """A list of dicts with its tensors cut from the graph."""
    return [{name: x.detach() if torch.is_tensor(x) else x for name, x in layer.items()} for layer in layers]


def fast_weights(model, delta, training):
    """theta_0 + delta of every stream, a list over blocks of {'0.up': (B, 2 h, D), ...}; with DGD what Erasing takes"""
    fast = [{} for _ in model.blocks]
    for _, b, name, p in weights_of(model):
        if name in delta[b]:
            W = p + delta[b][name] if training else (p.detach() + delta[b][name]).requires_grad_()
            fast[b][name] = W
            if model.config.cms_inner == 'dgd':
                fast[b][name] = W, delta[b][name], torch.zeros_like(W, requires_grad=True)
    return fast


def move(model, memory, fast, logits, targets, training):
    """
    Gather the gradient of a chunk's mean loss, logits (B, C, V) against targets (B, C), and move the levels whose time
    it is -> the memory at the start of the next chunk.
    """
    o, C = model.config, targets.shape[1]
    weights = [(level, (b, name)) for level, b, name, _ in weights_of(model) if name in fast[b]]
    delta = {key: memory['delta'][key[0]][key[1]] for _, key in weights}
    gathered = {key: memory['gathered'][key[0]][key[1]] for _, key in weights}
    own = [fast[b][name] for _, (b, name) in weights]
    inputs = own if o.cms_inner == 'gd' else [W for W, _, _ in own] + [erased for _, _, erased in own]
    # the sum over the streams: what one reads has no part in the gradient of another's weights
    with torch.enable_grad():
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction='sum') / C
        second = training and o.cms_meta == 'second'
        grads = torch.autograd.grad(loss, inputs, retain_graph=training, create_graph=second)
    learned = memory['learned'] + C
    for i, (_, key) in enumerate(weights):                      # with DGD, what is written and what is erased
        gathered[key] = gathered[key] + sum(grads[i::len(weights)])
    for level, ticks in enumerate(o.chunks):
        if not ticks or learned % ticks:
            continue
        mine = [key for owner, key in weights if owner == level]
        mean = {key: gathered[key] * (C / ticks) for key in mine}
        norm = sum(g.square().sum((1, 2), keepdim=True) for g in mean.values()).sqrt()         # (B, 1, 1)
        step = model.log_step[level].exp() * o.cms_clip / norm.clamp(min=o.cms_clip)
        for key in mine:
            delta[key] = delta[key] - step * mean[key]          # (B, m, n)
            gathered[key] = torch.zeros_like(mean[key])
        if o.cms_topology == 'nested':
            delta |= {key: torch.zeros_like(delta[key]) for owner, key in weights if owner < level}
    new = {'delta': [{} for _ in fast], 'gathered': [{} for _ in fast]}
    for _, (b, name) in weights:
        new['delta'][b][name], new['gathered'][b][name] = delta[b, name], gathered[b, name]
    if not training or o.cms_truncate and learned % (o.cms_truncate * C) == 0:
        new = {name: detached(layers) for name, layers in new.items()}
    return memory | new | {'learned': learned, 'pending': targets[:, :0], 'anchor': memory['state']}


class Learner(nn.Module):
    """The model on its token clock, called as the model is: (idx, targets) -> logits, loss, memory."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets, memory=None):
        logits, memory = learn(self.model, idx, memory)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1), memory


# -----------------------------------------------------------------------------
# python cms.py


def main():
    from model import Config, Hope
    torch.manual_seed(0)
    torch.set_num_threads(1)
    o = Config(vocab_size=16, n_layer=1, n_head=2, n_embd=32, n_hidden=96, mixer='gla', cms_chunks='16,64,256', cms_step=1.0)
    print('which level moves as the token is read (the last target of a chunk is the token after it)')
    ticks = range(o.chunks[0], 2 * o.chunks[-1] + 1, o.chunks[0])
    for level, chunk in enumerate(o.chunks):
        print(f'level {level}, every {chunk:>3} tokens  ' + ''.join('*' if t % chunk == 0 else '.' for t in ticks))

    def source(n, noise=0.1):
        """n tokens, each a fixed function of the one before it, one time in ten any token at all."""
        then, token = torch.randperm(16).tolist(), 0
        while True:
            tokens = []
            for _ in range(n):
                token = then[token] if torch.rand(()) > noise else int(torch.randint(16, ()))
                tokens.append(token)
            yield torch.tensor([tokens])

    n, rounds = 512, 4
    known, a, b = (source(n) for _ in range(3))
    model = Hope(o)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):                                         # a plain training on one source
        x = next(known)
        loss = model(x[:, :-1], x[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f'\nloss in nats of a model trained on one source to {loss.item():.2f}, as it reads two others in turn, '
          f'{n} tokens each')
    text = torch.cat([next(s) for _ in range(rounds) for s in (a, b)], dim=1)
    print(f"{'':<28}" + ''.join(f'{name:>7}' for _ in range(rounds) for name in 'ab'))
    for name, chunks in (('no level moves', ''), ('level 0 moves', '16,0,0'), ('all levels move', '16,64,256')):
        o.cms_chunks = chunks
        with torch.no_grad():
            logits = (learn if chunks else Hope.forward)(model.eval(), text[:, :-1])[0]
        losses = F.cross_entropy(logits[0], text[0, 1:], reduction='none').split(n)
        print(f'{name:<28}' + ''.join(f'{part.mean().item():7.2f}' for part in losses))


if __name__ == '__main__':
    main()
