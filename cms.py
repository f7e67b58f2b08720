"""
Continuum memory: a chain of MLPs in the place of one, each with a clock of its own (paper: "Continuum Memory System").

A Transformer's MLP learns in training and never again. Here level l of K moves every C_l ticks, with the mean of the
gradients gathered since (eq. 71): fast levels follow what is read, slow ones keep what lasts. One rule, two clocks:

    optimizer clock   a tick is a step of training: --cms_periods=1,2,4,8. Period 1 everywhere is an ordinary model
    token clock       a tick is a token that was read: --cms_chunks=64,256,1024,4096. Every stream has weights of its
                      own, theta_0 at first, that move down the gradient of the loss on the tokens just read

With --cms_topology=copies, which sample.py --learn takes, levels do not share the width: each has weights for all MLPs,
the start theta_0 is the slowest, and what they say is mixed by evidence (evidence.py), so that nothing is overwritten
that still helps: a slow level, --cms_chunks=128,change,change, follows the fast one while it recognises the text. It
keeps what the recurrent memories held as well, and reads other text from there.

    logits, loss, state = Learner(model)(idx, targets, state)       on the token clock, called as the model is
    python cms.py     which level moves when; then two alternating sources, read by a static MLP and by the levels

Does NOT include: inner optimizers other than gradient descent, fast weights for anything but the MLPs.

Glossary
    paper           here            shape               meaning
    f_l             periods, chunks K each              ticks between two moves of level l, the fastest level first
    theta^(l)       up, out         (2 h, D), (D, h)    the weights of a level of hidden width h, all blocks together
    theta - theta_0 delta           (B, 2 h, D), ...    how far a stream's own weights have moved
    eta^(l)         log_step        (K,)                inner step size of a level, learned in log space
    B batch, T time, C = chunks[0] tokens that are read with the same weights, D model width, K levels; R rows for each
    stream: 1, or of copies K + 1, with theta_0 as the last
"""
import contextlib
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from cli import check
from evidence import copied, empty_book, judge, n_rows, read_out, resumed, with_fastest, with_start

TOPOLOGIES = ('sequential', 'independent', 'nested', 'stacked', 'copies')
CHANGE, NIGHT = -1, -2  # the clocks of a level that moves by evidence (evidence.py), and of one that does in sleep


def parse_clock(name, text, lowest):
    """
    '1,2,4,8' -> (1, 2, 4, 8), each a multiple of the one before. Where 0 is allowed, it is a level that never moves,
    and 'change' and 'night', of all but the first, are the clocks above.
    """
    words = {'change': CHANGE, 'night': NIGHT} if not lowest else {}
    ticks = tuple(int(n) if n.isdecimal() and len(n) < 19 else words.get(n, -9) if i else -9
                  for i, n in enumerate(text.split(',')))
    check(not any(n < lowest and n not in (CHANGE, NIGHT) for n in ticks),
          f"--{name} takes whole numbers with commas between, as in 1,2,4,8, not '{text}'")
    moving = [n for n in ticks if n > 0]
    check(not any(slow % fast for fast, slow in zip(moving, moving[1:])),
          f'--{name} goes from fast to slow, each a multiple of the one before it, not {text}')
    return ticks


# -----------------------------------------------------------------------------
# the chain


def linear(x, W):
    """x (B, T, n) through a matrix (m, n), or through each stream's own (B, m, n)."""
    W = W[0] if W.dim() == 3 and len(W) == 1 else W             # one stream: the very product of the static model
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
        x = self.norm(x)
        gate, value = (self.up(x) if up is None else linear(x, up)).chunk(2, dim=-1)            # two of (B, T, h)
        x = F.silu(gate) * value
        return self.out(x) if out is None else linear(x, out)


class CMS(nn.Module):
    """
    The levels of one block. The hidden width of one MLP is split over them, so their parameters are those of one MLP.

    sequential      one after the other, each a residual step (eq. 73)
    independent     side by side, a learned weighted sum that starts as the mean (eq. 74)
    nested          as sequential; while reading, a level starts again when the next slower one moves (eq. 72)
    stacked         one MLP per block, the blocks spread over the levels: level stacking of a Transformer (7.3)
    copies          one MLP per block; while reading, each level has weights of its own for all of them (below)
    """
    def __init__(self, config, block):
        super().__init__()
        self.block = block
        n, h = 1 if config.cms_topology in ('stacked', 'copies') else config.n_level, config.n_hidden
        self.levels = nn.ModuleList(MLP(config.n_embd, h * (i + 1) // n - h * i // n) for i in range(n))
        self.mix = nn.Parameter(torch.empty(n)) if config.cms_topology == 'independent' else None

    def init_weights(self, branches):
        """up normal, std 1 / sqrt(D); out normal, std 1 / sqrt(h branches); mix 1 / levels: a mean."""
        if self.mix is not None:
            self.mix.fill_(1 / len(self.mix))
        for level in self.levels:
            D, h = level.out.weight.shape
            level.up.weight.normal_(std=D ** -0.5)
            level.out.weight.normal_(std=(h * branches) ** -0.5)

    def forward(self, x, fast=None):
        """x (B, T, D) -> (B, T, D), the residual stream after all levels; fast: as from fast_weights, or None."""
        total = x
        for i, level in enumerate(self.levels):
            # torch.compile makes one code for all blocks, as long as none of them reads its own number
            own = [fast.get(f'{self.block}.{i}.{name}') for name in ('up', 'out')] if fast else []
            total = total + (level(total, *own) if self.mix is None else self.mix[i] * level(x, *own))
        return total


def levels_of(model):
    """[('block.place', level, its MLP there)]; the level is the place in the chain or, stacked, the depth."""
    o, stacked = model.config, model.config.cms_topology == 'stacked'
    return [(f'{b}.{i}', b * o.n_level // o.n_layer if stacked else i, mlp)
            for b, block in enumerate(model.blocks) for i, mlp in enumerate(block.cms.levels)]


def weights_of(model):
    """What the token clock moves, {'block.place.up': (level, parameter), ...}."""
    return {f'{place}.{name}': (level, getattr(mlp, name).weight)
            for place, level, mlp in levels_of(model) for name in ('up', 'out')}


# -----------------------------------------------------------------------------
# the optimizer clock


@contextlib.contextmanager
def moving(model, step):
    """
    Around a step of the optimizer, counted from 0: only the levels that move show their gradients, the mean of those
    gathered since they last did. The others' are out of sight of clipping, optimizer and zero_grad, and grow on.
    yields a dict that afterwards holds {level: norm of the change of its first MLP}; empty with one level
    """
    periods, held, before, moved = model.config.periods, [], {}, {}
    for _, level, mlp in levels_of(model):
        if (step + 1) % periods[level]:
            held += [(p, p.grad) for p in mlp.parameters()]
            mlp.zero_grad(set_to_none=True)
            continue
        if periods[level] > 1:
            for p in mlp.parameters():
                p.grad /= periods[level]
        if len(periods) > 1 and level not in before:
            before[level] = mlp, [p.detach().clone() for p in mlp.parameters()]
    yield moved
    for p, grad in held:
        p.grad = grad
    for level, (mlp, old) in before.items():
        moved[level] = sum((p.detach() - q).square().sum() for p, q in zip(mlp.parameters(), old)).sqrt().item()


# -----------------------------------------------------------------------------
# the token clock


def empty_state(model, batch_size):
    """
    What `learn` goes on from: nothing read, every level at theta_0.

    recurrent, anchor   the mixers' state now, and at the start of the unfinished chunk `pending` (B, n)
    delta, gathered     {'0.0.up': (B, 2 h, D), ...}: how far a stream's weights have moved, and its gradients since; of
                        copies delta is (B, K, 2 h, D), the fastest level first, and nothing is gathered
    learned             tokens that the weights have learned from; trace, where it stands, saves work: the weights of
                        now, and what a whole chunk was read as
    kept                of copies: what is kept of the mixers' state by each level
    log_w, said, book   of copies that are read out: evidence.py; said (B, R, V), what the rows say of the next token
    """
    o, device, weights, R = model.config, model.embed.weight.device, weights_of(model), n_rows(model.config)
    recurrent = model.init_state(batch_size * R, device)
    state = {'recurrent': recurrent, 'anchor': recurrent, 'learned': 0, 'gathered': {},
             'pending': torch.empty(batch_size, 0, dtype=torch.long, device=device)}
    if R == 1:
        zeros = {name: p.new_zeros(batch_size, *p.shape) for name, (level, p) in weights.items() if o.chunks[level]}
        return state | {'delta': zeros, 'gathered': zeros}
    zeros = model.embed.weight.new_zeros(batch_size, R, o.vocab_size)
    return state | {'delta': {name: p.new_zeros(batch_size, R - 1, *p.shape) for name, (_, p) in weights.items()},
                    'log_w': zeros[:, :, 0].log_softmax(1), 'said': zeros, 'kept': [*map(lasting, recurrent)],
                    'book': empty_book(batch_size, o.chunks.count(CHANGE), o.chunks.count(NIGHT), device)}


def lasting(block):
    """
    Of a mixer's empty state, what a level keeps of it: tensors, but for what a memory was at its chunk's start (_xi).
    Nothing of attention, whose state grows.
    """
    return {} if 'kv' in block else {name: x for name, x in block.items() if torch.is_tensor(x) and name[-3:] != '_xi'}


def learn(model, idx, state=None, moves=True):
    """
    Read on, and learn from what is read: level l moves every chunks[l] tokens (eq. 71).

    idx (B, T) token ids; state as returned, or None to start at theta_0; moves: False reads with the levels as they are
    returns logits (B, T, V), each made by weights that have not seen what it predicts, and the new state

    A chunk of C = chunks[0] tokens is read with the same weights. Once the token after it is known, every level
    gathers the gradient of its mean loss, and the levels whose time it is move. What a stream learns is its own. An
    unfinished chunk waits in the state, so that any split of a stream gives the same, to rounding. In training theta_0
    and log_step are meta-learned, to first order: the inner gradient is a constant.

    Copies are read as R rows for each stream, and what they say is mixed by evidence.
    """
    assert idx.dim() == 2, f'idx must be (B, T), got {tuple(idx.shape)}'
    assert model.config.chunks, 'the model has no token clock: give it cms_chunks'
    assert not torch.is_inference_mode_enabled(), 'learning takes gradients: use torch.no_grad, not inference_mode'
    training, C, t, out = model.training and torch.is_grad_enabled(), model.config.chunks[0], 0, []
    R = n_rows(model.config)
    assert R == 1 or not training, 'copies are for reading: train with another --cms_topology'
    state = state or empty_state(model, len(idx))
    fast, logits = state.get('trace') or (fast_weights(model, state['delta'], training), None)
    def rows(idx): return idx.repeat_interleave(R, dim=0)       # (B, T) -> (B R, T)
    while t < idx.shape[1]:
        if moves and state['pending'].shape[1] == C:            # a whole chunk was read, and here is the token after it
            targets = torch.cat([state['pending'][:, 1:], idx[:, t:t + 1]], dim=1)              # (B, C)
            if logits is None:                                  # it was read in parts: once more as a whole
                with torch.enable_grad():
                    logits = model(rows(state['pending']), state=state['anchor'], fast=fast)[0]
            state = move(model, state, fast, logits, targets, training) if R == 1 else \
                move_copies(model, state, fast, logits, targets)
            fast = fast_weights(model, state['delta'], training)
        part = idx[:, t:t + C - state['pending'].shape[1]] if moves else idx        # up to the chunk's end
        t, whole = t + part.shape[1], moves and part.shape[1] == C
        with torch.set_grad_enabled(training or whole):
            logits, _, recurrent = model(rows(part), state=state['recurrent'], fast=fast)
        if R == 1:
            out.append(logits if training else logits.detach())
        else:
            mixed, state = read_out(model.config, logits.detach(), part, state)
            out.append(mixed)
        state = state | {'recurrent': recurrent if training else [*map(detached, recurrent)]}
        if moves:
            state = state | {'pending': torch.cat([state['pending'], part], dim=1)}
        logits = logits if whole else None
    return torch.cat(out, dim=1), state | {'trace': (logits is not None or not training) and (fast, logits)}


def detached(tensors):
    return {name: x.detach() if torch.is_tensor(x) else x for name, x in tensors.items()}


def fast_weights(model, delta, training):
    """theta_0 + delta of every stream, {'0.0.up': (B, 2 h, D), ...}; of copies (B R, 2 h, D), the last row theta_0."""
    weights = weights_of(model)
    if n_rows(model.config) > 1:
        delta = {name: with_start(moved).flatten(0, 1) for name, moved in delta.items()}
    if training:
        return {name: weights[name][1] + moved for name, moved in delta.items()}
    return {name: (weights[name][1].detach() + moved).requires_grad_() for name, moved in delta.items()}


def clipped(o, grads):
    """Gradients of a level, {name: (B, m, n)}, of norm at most cms_clip in each stream."""
    square = sum(g.square().sum((1, 2), keepdim=True) for g in grads.values())                  # (B, 1, 1)
    scale = o.cms_clip / square.clamp(min=o.cms_clip ** 2).sqrt()
    return {name: scale * g for name, g in grads.items()}


def move(model, state, fast, logits, targets, training):
    """
    Gather the gradient of a chunk's mean loss, logits (B, C, V) against targets (B, C), and move the levels whose time
    it is -> the state at the start of the next chunk.
    """
    o, C, weights = model.config, targets.shape[1], weights_of(model)
    delta, gathered, learned = dict(state['delta']), dict(state['gathered']), state['learned'] + C
    with torch.enable_grad():
        # the sum over the streams: what one reads has no part in the gradient of another's weights
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction='sum') / C
        grads = torch.autograd.grad(loss, [*fast.values()], retain_graph=True)
    for name, grad in zip(fast, grads):
        gathered[name] = gathered[name] + grad
    for level, ticks in enumerate(o.chunks):
        if not ticks or learned % ticks:
            continue
        mine = [name for name in fast if weights[name][0] == level]
        mean = clipped(o, {name: gathered[name] * (C / ticks) for name in mine})
        for name in mine:
            delta[name] = delta[name] - model.log_step[level].exp() * mean[name]                # (B, m, n)
            gathered[name] = torch.zeros_like(mean[name])
        if o.cms_topology == 'nested':
            delta |= {name: torch.zeros_like(delta[name]) for name in fast if weights[name][0] < level}
    recurrent = state['recurrent']
    if not training or o.cms_truncate and learned % (o.cms_truncate * C) == 0:
        delta, gathered, recurrent = detached(delta), detached(gathered), [*map(detached, recurrent)]
    return state | {'delta': delta, 'gathered': gathered, 'learned': learned, 'pending': targets[:, :0],
                    'recurrent': recurrent, 'anchor': recurrent}


# copies: levels with weights of their own for the same MLPs, the start that training learned as the slowest


def move_copies(model, state, fast, logits, targets):
    """
    As move, of copies: logits (B R, C, V). The fastest level takes a step. A slower one becomes what a faster one is,
    which is the sum of its steps: on its clock, the next faster; with the clock 'change' as evidence.judge says, and
    whenever it is asked, all but the fastest read on from what they keep.
    """
    o, (B, C), R = model.config, targets.shape, n_rows(model.config)
    stream, learned = torch.arange(B, device=targets.device), state['learned'] + C
    with torch.enable_grad():
        nats = F.cross_entropy(logits.unflatten(0, (B, R)).permute(0, 3, 1, 2),                 # (B, V, R, C)
                               targets[:, None].expand(B, R, C), reduction='none')
        source, book = None, state['book']
        if CHANGE in o.chunks:
            source, book = judge(book, nats.detach().mean(2), C)
        # the fastest level goes on as this row, from this chunk on
        learner = torch.zeros(B, dtype=torch.long, device=targets.device) if source is None else source[:, 0]
        loss = nats[stream, learner].sum() / C
        grads = torch.autograd.grad(loss, [*fast.values()], retain_graph=True)                  # (B R, m, n)
    grads = {name: grad.unflatten(0, (B, R))[stream, learner] for name, grad in zip(fast, grads)}
    state = state if source is None else copied(state, source, restart=True)
    step = model.log_step[0].detach().exp()
    delta = {name: torch.cat([state['delta'][name][:, :1] - step * grad[:, None], state['delta'][name][:, 1:]], dim=1)
             for name, grad in clipped(o, grads).items()}
    state = state | {'delta': delta, 'book': book, 'learned': learned, 'pending': targets[:, :0]}
    for level in reversed(range(1, R - 1)):
        if o.chunks[level] > 0 and learned % o.chunks[level] == 0:
            source = torch.arange(R, device=targets.device).expand(B, R).clone()
            source[:, level] = level - 1
            state = copied(state, source)
    return state | {'anchor': state['recurrent']}


def between_texts(model, state):
    """
    The state of copies when a text has ended: each level reads on from what it keeps. Nobody is believed more than
    others.
    """
    empty = empty_state(model, len(state['pending']))
    kept = with_fastest(state['kept'], state['recurrent'], n_rows(model.config))
    recurrent = [*map(resumed, empty['recurrent'], kept)]
    return empty | {'recurrent': recurrent, 'anchor': recurrent, 'kept': kept, 'delta': state['delta'],
                    'book': state['book']}


class Learner(nn.Module):
    """
    A reader that learns while it reads: called as the model is, and its state is that of `learn`. With moves=False it
    reads on with what it has learned, and learns no more.
    """
    def __init__(self, model, moves=True):
        super().__init__()
        self.model, self.config, self.moves = model, model.config, moves

    def forward(self, idx, targets=None, state=None, weights=None):
        logits, state = learn(self.model, idx, state, self.moves)
        return logits, self.model.loss(logits, targets, weights), state


# -----------------------------------------------------------------------------
# python cms.py


def transitions(n, vocab, noise=0.1):
    """(n,) tokens, each a function, drawn once, of the one before it, or, one time in ten, any token."""
    then, tokens = torch.randperm(vocab).tolist(), [0]
    while len(tokens) < n:
        tokens.append(then[tokens[-1]] if torch.rand(()) > noise else int(torch.randint(vocab, ())))
    return torch.tensor(tokens)


class Tiny(nn.Module):
    """What `learn` asks of a model and no more: an embedding, one block of levels, a head. It mixes no tokens."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList([nn.ModuleDict({'cms': CMS(config, block=0)})])
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.log_step = nn.Parameter(torch.zeros(config.n_level))
        with torch.no_grad():
            self.blocks[0].cms.init_weights(branches=config.n_level)

    def init_state(self, batch_size, device=None):
        return []

    def forward(self, idx, state=None, fast=None):
        x = self.blocks[0].cms(self.embed(idx), fast)           # (B, T) -> (B, T, D)
        return self.head(x), None, state                        # (B, T, D) -> (B, T, V)


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    clocks = (16, 64, 256)
    print('which level moves when: a column is 16 tokens')
    for level, chunk in enumerate(clocks):
        print(f'level {level}, every {chunk:>3} tokens  ' + ''.join('.*'[t % chunk == 0] for t in range(16, 1025, 16)))

    n, V = 512, 16
    model = Tiny(SimpleNamespace(vocab_size=V, n_layer=1, n_embd=32, n_hidden=96, n_level=3, chunks=clocks,
                                 cms_topology='sequential', cms_clip=1.0, cms_truncate=0))
    def source(parts): return transitions(parts * n, V).view(parts, n)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x in source(60).split(1):                               # a plain training on one source
        loss = F.cross_entropy(model(x[:, :-1])[0][0], x[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f'\na model trained on one source, to {loss.item():.2f} nats, reads two others in turn, {n} tokens each')
    text = torch.stack([source(4), source(4)], dim=1).view(1, -1)                       # a b a b a b a b
    print(f"{'':<28}" + 4 * f"{'a':>7}{'b':>7}")
    for name, chunks in (('no level moves', (0, 0, 0)), ('level 0 moves', (16, 0, 0)), ('all levels move', clocks)):
        model.config.chunks = chunks
        with torch.no_grad():
            logits = learn(model.eval(), text[:, :-1])[0] if any(chunks) else model(text[:, :-1])[0]
        losses = F.cross_entropy(logits[0], text[0, 1:], reduction='none').split(n)
        print(f'{name:<28}' + ''.join(f'{part.mean().item():7.2f}' for part in losses))


if __name__ == '__main__':
    main()
