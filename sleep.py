"""
Sleep: what several levels learned in the day becomes one level's, so that the others are free again (the paper's
follow-up, "Language Models Need Sleep": memory consolidation).

A reader that learns (sample.py --learn) keeps a text in each of its slow levels (evidence.py). Once all are taken, a
new text must take another's place. Asleep nothing is read, and no text was stored that could be read again:

    1   every level that holds something new dreams, and that of the last night: it writes texts by itself, with its own
        weights, from what it keeps of the recurrent memories; of each level as many as its share of what was saved
    2   one level, at first the mean of those that learned by day, learns to answer on each dream as the level does that
        dreamed it: down the gradient of KL(dreamer || it), for its MLPs. Of recurrent memories it keeps the mean of all
        that dream, each counted alike: side by side in one matrix most of each can be read, and what a long text has
        saved does not drown a short one. Where there is one dreamer alone, it is what that one is
    3   it is the slowest but for the start, --cms_chunks=128,change,change,night, and stays as it is until the next
        night. By day the fast level begins as it, so that what is learned comes on top; the slow ones are at the start
        again

    python sample.py --learn --memory=me.pt --score=book.txt        a day
    python sleep.py --memory=me.pt                                  a night: its dreams, and what is left of each level
    python sample.py --learn --sleep_every=16384 --score=book.txt   a night after every so many tokens
    python sleep.py                                                 three sources in turn, and a night, in miniature

Does NOT include: the paper's second stage (dreams that are rewarded by a probe), experts that grow with every sleep,
imitation by reinforcement, the optimizer clock.

paper: a level's knowledge moves into new low-rank experts of the next slower one, pair by pair. here: all levels at
once into one of full rank, because the start stays as it is and is read beside it: nothing has to be protected.
"""
import contextlib
import os
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn

from cli import (UsageError, UserError, build, check, clear, locked, one_line_errors, plain, print_block, read_args,
                 show_status)
from cms import NIGHT, Learner, between_texts, empty_state, learn, transitions, weights_of
from evidence import resumed, with_start
from machine import (describe_levels, load_checkpoint, load_learner, load_memory, load_tokenizer, owner,
                     pick_checkpoint, pick_device, save_memory)
from model import Config, Hope, sample

BATCH = 4               # dreams of a step


# -----------------------------------------------------------------------------
# a level by itself


def level_of(model, state, level):
    """
    What a level knows, of a state between texts: its MLPs' weights, {'0.0.up': (1, 2 h, D), ..}, and what it keeps of
    the mixers' state, [{name: (1, ..)}, ..]. The last level is the start.
    """
    moved = state['delta']
    weights = {name: p.detach()[None] + (moved[name][:, level] if level < moved[name].shape[1] else 0)
               for name, (_, p) in weights_of(model).items()}
    return weights, [{name: x[level:level + 1] for name, x in block.items()} for block in state['kept']]


def begin(model, kept, n):
    """The mixers' state of n rows that begin with what a level keeps."""
    return [resumed(empty, {name: x.expand(n, *x.shape[1:]) for name, x in block.items()})
            for empty, block in zip(model.init_state(n), kept)]


def dream(model, known, first, n, length, generator):
    """n texts that a level (level_of) writes by itself: tokens (n, 1 + length), each begun with the token `first`."""
    weights, kept = known
    state, token = begin(model, kept, n), torch.full((n, 1), first, device=model.embed.weight.device)
    text = [token]
    for _ in range(length):
        logits, _, state = model(token, state=state, fast=weights)
        token = sample(logits[:, -1], generator=generator)[:, None]                # (n, V) -> (n, 1)
        text.append(token)
    return torch.cat(text, dim=1)


def answers(model, known, idx):
    """Log probabilities (n, T, V) of a level at dreams (n, T)."""
    weights, kept = known
    return model(idx, state=begin(model, kept, len(idx)), fast=weights)[0].log_softmax(-1)


def divergence(model, dreamer, learner, idx):
    """KL(dreamer || learner) at idx (n, T), mean over tokens, in nats."""
    with torch.no_grad():
        log_p = answers(model, dreamer, idx)
    return (log_p.exp() * (log_p - answers(model, learner, idx))).sum(-1).mean()


# -----------------------------------------------------------------------------
# a night


def night_level(state):
    """The number of the level that is made in sleep: behind the fast one and the slow ones, where there is one."""
    return len(state['book']['saved'][0])


def dreamers(state):
    """
    {level: nats that it has saved}, of a state between texts: of the levels that hold something new, weights or a
    recurrent memory that are neither the start's nor the last night's, and, if there are any, of the last night's
    level. The fast one, level 0, knows best what was read last, and counts as much at least as the slow levels on
    average.
    """
    book, night = state['book'], night_level(state)     # where there is no such level, that row is the start
    saved = [max(nats, 1.0) for nats in book['saved'][0].tolist() + book['slept'].tolist()]
    held = [with_start(x)[0] for x in state['delta'].values()] + [x for block in state['kept'] for x in block.values()]
    known = [level for level in range(night + 1) if any(x[level].any() for x in held)]
    new = [level for level in known if any((x[level] != x[night]).any() for x in held)]
    slow = [saved[level] for level in new if level]
    saved[0] = max(saved[0], sum(slow) / max(1, len(slow)))
    return {level: saved[level] for level in known if new and level in (*new, night)}


@torch.no_grad()
def asleep(model, state, first, n_dreams=128, length=256, steps=100, rate=3e-3, seed=0, note=lambda text: None):
    """
    The state of one stream of copies after a night, and what came of it.

    model       its last clock is 'night'
    state       as cms.learn returns it, also of a model whose last clock was 'change'
    first       the token that dreams begin with
    n_dreams    of all levels together, and 16 of each at least, length tokens each; an eighth is not learned from
    rate        of Adam, after ten steps; it falls to 0
    returns     the new state, with no text before it, or the old one if no level holds anything new; and a list of
                {'level', 'share', 'dreams' (tokens), 'start', 'mean', 'left': nats by which the start, what the night
                begins with, and the level that learned miss the dreamer, on dreams not learned from}
    """
    assert len(state['pending']) == 1, f"one stream sleeps at a time, not {len(state['pending'])}"
    assert model.config.chunks[-1] == NIGHT, f'nothing moves in sleep with --cms_chunks={model.config.cms_chunks}'
    day = between_texts(model, state)
    saved = dreamers(day)
    if not saved:
        return state, []
    total = sum(saved.values())
    shares = {level: nats / total for level, nats in saved.items()}
    generator = torch.Generator(device=model.embed.weight.device).manual_seed(seed)
    known = {level: level_of(model, day, level) for level in shares}
    texts = {}
    for level, share in shares.items():
        note(f'level {level} dreams')
        texts[level] = dream(model, known[level], first, max(16, round(share * n_dreams)), length, generator)

    by_day = {level: share for level, share in shares.items() if level < night_level(day)}
    weights = {name: sum(share * known[level][0][name] for level, share in by_day.items()) / sum(by_day.values())
               for name in weights_of(model)}
    kept = [{name: sum(its[i][name] for _, its in known.values()) / len(known) for name in block}
            for i, block in enumerate(day['kept'])]
    probes = {level: text[:len(text) // 8] for level, text in texts.items()}
    start = level_of(model, day, len(model.config.chunks))
    def missed(level, known_now): return divergence(model, known[level], known_now, probes[level]).item()
    found = [{'level': level, 'share': share, 'dreams': texts[level], 'start': missed(level, start),
              'mean': missed(level, (weights, kept))} for level, share in shares.items()]
    texts_to_learn = {level: text[len(text) // 8:] for level, text in texts.items()}
    if len(known) > 1:
        weights = distil(model, known, texts_to_learn, shares, weights, kept, steps, rate, generator, note)
    for row in found:
        row['left'] = missed(row['level'], (weights, kept))
    learned = state['learned'] + state['pending'].shape[1]      # what was pending is forgotten
    return morning(model, learned, weights, kept, total), found


def distil(model, known, texts, shares, weights, kept, steps, rate, generator, note):
    """
    The weights (level_of) after so many steps down KL(dreamer || learner) on texts. What is kept of the recurrent
    memories stays as it is: no dream is about all that they hold, and Adam would overwrite what none is about.
    """
    weights = {name: x.clone().requires_grad_() for name, x in weights.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=rate, betas=(0.9, 0.95))
    levels, chances = list(shares), torch.tensor(list(shares.values()), device=generator.device)
    for step in range(steps):
        level = levels[torch.multinomial(chances, 1, generator=generator).item()]
        rows = torch.randint(len(texts[level]), (BATCH,), generator=generator, device=generator.device)
        with torch.enable_grad():
            loss = divergence(model, known[level], (weights, kept), texts[level][rows])
        optimizer.param_groups[0]['lr'] = rate * min(1, (step + 1) / 10) * (1 - step / steps)
        for p, grad in zip(weights.values(), torch.autograd.grad(loss, [*weights.values()])):
            p.grad = grad
        optimizer.step()
        note(f'step {step + 1} of {steps}')
    return {name: x.detach() for name, x in weights.items()}


def morning(model, learned, weights, kept, saved):
    """
    The state in which the last level before the start holds what was learned in the night, and the fast one begins
    there: what it learns next comes on top. All others are at the start.
    """
    new = empty_state(model, 1)
    level = night_level(new)
    for name, (_, p) in weights_of(model).items():
        new['delta'][name][:, [0, level]] = weights[name] - p.detach()
    for block, its in zip(new['kept'], kept):
        block |= {name: torch.cat([x, block[name][1:level], x, block[name][level + 1:]]) for name, x in its.items()}
    new['book']['slept'] = torch.full_like(new['book']['slept'], saved)
    # the fast level begins as if it had read what is kept
    return between_texts(model, new | {'recurrent': new['kept']}) | {'learned': learned}


class Sleeper(nn.Module):
    """
    A Learner of one stream that sleeps after every so many tokens: called as the model is, its state is the Learner's.
    first, seed: as in asleep.
    """
    def __init__(self, learner, every, first, seed=0):
        super().__init__()
        C, clocks = learner.config.chunks[0], learner.config.cms_chunks
        if learner.config.chunks[-1] != NIGHT:
            raise UsageError(f'sleep needs a level that it makes, as in --cms_chunks=128,change,night, not {clocks}; '
                             'python sleep.py --memory=FILE makes one of the last')
        if every % C:
            raise UsageError(f'who learns from {C} tokens at a time sleeps after a multiple of them, not after {every}')
        self.learner, self.model, self.config, self.every = learner, learner.model, learner.config, every
        self.first, self.seed = first, seed

    def forward(self, idx, targets=None, state=None, weights=None):
        logits, t = [], 0
        while t < idx.shape[1]:
            awake = (state['learned'] + state['pending'].shape[1]) % self.every if state else 0
            part = idx[:, t:t + self.every - awake]
            part_logits, _, state = self.learner(part, state=state)
            logits, t = [*logits, part_logits], t + part.shape[1]
            if awake + part.shape[1] == self.every:
                state = self.sleep(state)
        logits = torch.cat(logits, dim=1)
        return logits, self.model.loss(logits, targets, weights), state

    def sleep(self, state):
        """The state after a night."""
        return asleep(self.model, state, self.first, seed=self.seed + state['learned'])[0]


# -----------------------------------------------------------------------------
# python sleep.py


@dataclass
class Sleep:
    """The night"""
    memory: str = ''                    # the file that sample.py --learn --memory keeps ('' = show it in miniature)
    out_dir: str = 'out'                # the folder of the checkpoint
    best: bool = False                  # the checkpoint of the lowest validation loss, not the last
    dreams: int = 128                   # texts that are dreamed, of all levels together
    length: int = 256                   # their tokens
    steps: int = 100                    # of learning from them
    rate: float = 3e-3                  # of Adam, at first; it falls to 0
    seed: int = 1337                    # of the dreams
    device: str = 'auto'                # cpu | cuda | mps; auto is cuda where there is one

    def __post_init__(self):
        for name in ('dreams', 'length'):
            check(getattr(self, name) >= 1, f'--{name} must be at least 1, not {getattr(self, name)}')
        for name in ('steps', 'rate', 'seed'):
            check(0 <= getattr(self, name) < 2 ** 63, f'--{name} must be at least 0, not {getattr(self, name)}')


def miniature():
    """A tiny model of one source of symbols reads two others; what is left of them after a night, with no context."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    V, n = 16, 2048
    config, = build([Config], dict(vocab_size=V, n_layer=2, n_head=2, n_embd=32, block_size=256, mixer='gated_deltanet',
                                   cms_chunks='32,change,night', cms_topology='copies', cms_step=2.0))
    model, sources = Hope(config), {name: transitions(n + 256, V) for name in 'abc'}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x in sources['a'][:n].view(-1, 4, 64).repeat(6, 1, 1):
        loss = model(x[:, :-1], x[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    reader, state = Learner(model, moves=False), None

    def show(what, state):
        rested = state and between_texts(model, state)
        losses = [reader(x[None, n:-1], x[None, n + 1:], rested)[1] for x in sources.values()]
        print(f'{what:<30}' + ''.join(f'{loss.item():7.2f}' for loss in losses))
    print(f"{'nats per symbol of':<30}" + ''.join(f'{name:>7}' for name in sources))
    with torch.no_grad():
        show('trained on a', None)
        for name in 'bc':
            state = learn(model, sources[name][None, :n], state)[1]
            show(f'has read {name}', state)
        state, found = asleep(model, state, 0, length=64, steps=60)
        show(f"has dreamed of levels {', '.join(str(row['level']) for row in found)}", state)


def main():
    one_line_errors()
    given = read_args([Sleep], sys.argv[1:])
    args, = build([Sleep], given)
    torch.set_flush_denormal(True)                      # as in training
    if not args.memory:
        if given:
            raise UsageError('give the file that sample.py --learn keeps, --memory=FILE, or nothing at all')
        return miniature()
    if not os.path.exists(args.memory):
        raise UserError(f'there is no memory file {args.memory} yet; python sample.py --learn --memory=FILE keeps one')
    device = pick_device(args.device)
    path = pick_checkpoint(args.out_dir, args.best)
    checkpoint = load_checkpoint(path)
    with contextlib.ExitStack() as hold:
        hold.enter_context(locked(args.memory))
        whose = owner(checkpoint)
        saved = load_memory(args.memory, whose, device=device)
        chunks = saved['cms_chunks'].split(',')
        if 'kept' not in saved['state'] or len(chunks) < 3 or chunks[-1] not in ('change', 'night'):
            raise UserError(f"{args.memory} was kept with --cms_chunks={saved['cms_chunks']} --cms_share="
                            f"{saved['cms_share']}; sleep needs two levels that keep, as in 128,change,change")
        day, night = (load_learner(checkpoint, device, ','.join([*chunks[:-1], last]), share=saved['cms_share']).eval()
                      for last in (chunks[-1], 'night'))
        enc = load_tokenizer(checkpoint, path)
        print('before')
        print_block(**describe_levels(day.model, saved['state']))
        state, found = asleep(night.model, saved['state'], enc.eot_token, args.dreams, args.length, args.steps,
                              args.rate, args.seed, lambda text: show_status(f'asleep: {text}'))
        if not found:
            print(f'{args.memory}: no level holds anything new; nothing to dream of')
            return
        print(f'{clear(sys.stdout)}dreams')
        for row in found:
            text = enc.decode([i for i in row['dreams'][0].tolist() if i != enc.eot_token], errors='replace')
            print(f"    level {row['level']}, {row['share']:.0%}: | {' '.join(plain(text).split())[:80]}")
        print('nats per token by which a dream is missed: by the start, by the mean of the day, after the night')
        for row in found:
            print(f"    level {row['level']}: {row['start']:.3f}, {row['mean']:.3f}, {row['left']:.3f}; "
                  f"{100 * (1 - row['left'] / max(row['start'], 1e-9)):.0f} % is left of it")
        print('after')
        print_block(**describe_levels(night.model, state))
        save_memory(args.memory, whose, night, saved['next'], state)
        print_block(memory=args.memory)


if __name__ == '__main__':
    main()
