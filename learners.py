"""
Learners: what reads one text after another, in as many ways as people have tried (eval_continual.py compares them).

    learner = make('hope-3', checkpoint, {'clock': 1.0}, base)      base: its corpus, for those who keep some of it
    learner.learn(text)                                             text.tokens (1-D), text.name, text.night
    reader, state = learner.to_score()                              what it has become, to be read with

    nothing     the model as it is                          joint       fine-tuned on all of it at once: the ceiling
    icl         its state goes on, its weights stay         clock       its MLPs learn as it reads: one level (cms.py)
    finetune    AdamW, all weights                          hope-N      ... and N slow levels that keep, read out by
    ewc         ... held by the Fisher information                      evidence (evidence.py), from what each keeps
    replay-P    ... beside P % of all that was read before, the base model's corpus among it
    clocks      as hope-3, but its slow levels follow every 2,048, 16,384 and 65,536 tokens, whatever is read
    sleep-N     as hope-N, and after every 16,384 tokens its levels become one that stays (sleep.py); of facts
                and days after every passage as well
                (of all N and P, eval_continual.py has those in LEARNERS)

and, of intents, on what the frozen model makes of a request:

    means           the nearest mean of a class, by the covariance that all classes share
    least-squares   a linear memory of names whose answers do not depend on the order (memory.py)
    ridge           what that must equal: ridge regression on all requests together

Does NOT include: learners that are told which text they are asked about.
"""
import math
import random

import torch
import torch.nn.functional as F

from cli import show_status
from cms import Learner, between_texts
from machine import load_learner, load_model
from memory import least_squares, no_pairs
from model import state_bytes
from sleep import Sleeper

LEARNERS = ('nothing', 'icl', 'finetune', 'ewc', 'replay-1', 'replay-5', 'joint', 'clock', 'clocks', 'hope-0', 'hope-1',
            'hope-2', 'hope-3', 'sleep-1')
ON_FEATURES = ('means', 'least-squares', 'ridge')
STEPS = {'finetune': (1e-3, 2e-3, 4e-3, 8e-3, 16e-3), 'ewc': (1, 10, 100, 1e3, 1e4), 'clock': (0.1, 0.3, 1, 2, 4)}
AS_THEY_READ = ('clock', 'clocks', 'hope', 'sleep')     # kinds that learn so
WINDOW = 256                    # tokens of a step of fine-tuning
DAY = 16384                     # tokens between two nights of sleep-N


def steps_for(name, chosen):
    """Of the steps that were chosen, {'finetune', 'ewc', 'clock'}, those that a learner uses."""
    uses = dict.fromkeys(('nothing', 'icl', *ON_FEATURES), []) | dict.fromkeys(AS_THEY_READ, ['clock'])
    uses['ewc'] = ['finetune', 'ewc']
    kinds = uses.get(name, uses.get(name.partition('-')[0], ['finetune']))
    return {kind: chosen[kind] for kind in kinds if kind in chosen}


def make(name, checkpoint, steps, base):
    """A learner with the steps that it uses."""
    if name in ON_FEATURES:
        return OnFeatures(name, checkpoint)
    if name.partition('-')[0] in ('nothing', 'icl', *AS_THEY_READ):
        return Stream(name, checkpoint, steps.get('clock', 0.0))
    return FineTuned(name, checkpoint, steps['finetune'], base, steps.get('ewc', 0.0))


@torch.no_grad()
def read(reader, tokens, state=None, what=None):
    """
    tokens (T,) through a reader, from a state -> losses of all but the first, (T - 1,), the tokens that it thought most
    likely in their places, and its state. what: said on a terminal meanwhile.
    """
    losses, said = [], []
    for i in range(0, len(tokens) - 1, 512):
        idx, targets = tokens[i:i + 512], tokens[i + 1:i + 513]
        logits, _, state = reader(idx[:len(targets)][None], None, state)
        losses.append(F.cross_entropy(logits[0], targets, reduction='none'))
        said.append(logits[0].argmax(-1))
        if what:
            show_status(f'{what} {i + len(targets):,} of {len(tokens):,} tokens')
    return torch.cat(losses), torch.cat(said), state


class Stream:
    """nothing, icl, clock, clocks, hope-N, sleep-N: one stream that goes on, of a reader that may learn from it."""
    def __init__(self, name, checkpoint, step):
        self.name, self.state = name, None
        kind, _, levels = name.partition('-')
        if kind in AS_THEY_READ:
            slow = ['2048', '16384', '65536'] if kind == 'clocks' else ['change'] * int(levels or 0)
            slow += ['night'] * (kind == 'sleep')
            chunks, share = ','.join(['128', *slow]), 0.0 if kind == 'clock' else -1.0
            self.reader = load_learner(checkpoint, chunks=chunks, step=step, share=share).eval()
            self.scorer = Learner(self.reader.model, moves=False).eval()
            if kind == 'sleep':                         # the last token of every tokenizer is the end of a text
                self.reader = Sleeper(self.reader, DAY, first=self.reader.config.vocab_size - 1)
        else:
            self.reader = self.scorer = load_model(checkpoint).eval()

    def learn(self, text):
        if self.name != 'nothing':
            self.state = read(self.reader, text.tokens, self.state, f'{self.name} reads {text.name}:')[2]
        if self.name.startswith('sleep') and text.night:
            self.state = self.reader.sleep(self.state)

    def to_score(self):
        """What it has read last is all the context that icl and clock have; with levels, each has what it keeps."""
        if self.name in ('nothing', 'icl', 'clock') or self.state is None:
            return self.scorer, self.state
        return self.scorer, between_texts(self.reader.model, self.state)

    def bytes(self):
        """Of all that it remembers."""
        return state_bytes(self.state)


class FineTuned:
    """finetune, ewc, replay-P, joint: AdamW on windows of the text, in order, with a rate that falls with each text."""
    def __init__(self, name, checkpoint, step, base, strength=0.0):
        self.name, self.step, self.strength, self.model = name, step, strength, load_model(checkpoint)
        self.share = int(name[7:]) / 100 if name.startswith('replay') else 0.0
        self.kept, self.fisher, self.anchor = [], None, None
        if self.strength:
            self.add_fisher(base)
        self.remember(base, self.share / 0.05)

    def windows(self, tokens):
        """Pieces of WINDOW tokens and the one after, the last one of what is left."""
        return [tokens[i:i + WINDOW + 1] for i in range(0, len(tokens) - 1, WINDOW)]

    def loss(self, window):
        return self.model(window[None, :-1], window[None, 1:])[1]

    def learn(self, text, together=()):
        """together: windows of other texts that are read at the same time, for joint."""
        torch.manual_seed(0)
        params = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=self.step, betas=(0.9, 0.95), weight_decay=0.0)
        windows = self.windows(text.tokens) + [*together]
        if together:
            random.Random(0).shuffle(windows)
        warm_up = max(1, min(10, len(windows) // 4))    # a short passage is one step or two
        for i, window in enumerate(windows):
            lr = self.step * min(1, (i + 1) / warm_up) * max(0.05, 1 - i / len(windows))
            for group in optimizer.param_groups:
                group['lr'] = lr
            loss = self.loss(window)
            if self.share and self.kept:
                loss = (loss + self.loss(random.Random(i).choice(self.kept))) / 2
            if self.strength:
                loss = loss + self.strength / 2 * sum(
                    (f * (p - a).square()).sum() for f, p, a in zip(self.fisher, params, self.anchor))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            show_status(f'{self.name} reads {text.name}: {i + 1} of {len(windows)} steps')
        if self.strength:
            self.add_fisher(text)
        self.remember(text, self.share)

    def remember(self, text, share):
        """replay: a share of a text's windows, one at least."""
        windows = self.windows(text.tokens)
        self.kept += random.Random(0).sample(windows, math.ceil(share * len(windows)))

    def add_fisher(self, text):
        """Online EWC: squared gradients of a text's loss, added up, around where the weights are now."""
        params, windows = [p for p in self.model.parameters() if p.requires_grad], self.windows(text.tokens)
        fisher = [torch.zeros_like(p) for p in params]
        for window in windows[:64]:
            for f, g in zip(fisher, torch.autograd.grad(self.loss(window), params, allow_unused=True)):
                f += 0 if g is None else WINDOW * g.square() / len(windows[:64])
        self.fisher = fisher if self.fisher is None else [old + f for old, f in zip(self.fisher, fisher)]
        self.anchor = [p.detach().clone() for p in params]

    def to_score(self):
        return self.model.eval(), None

    def bytes(self):
        """Of all that has changed, and all that it keeps."""
        weights = [*self.model.parameters(), *(self.fisher or []), *(self.anchor or [])]
        return state_bytes(weights) + 2 * sum(map(len, self.kept))


class OnFeatures:
    """means, least-squares, ridge, on features of a request: the mean of what the frozen model's head reads, and 1."""
    def __init__(self, name, checkpoint):
        self.name, self.model, self.known = name, load_model(checkpoint).eval(), []
        D = self.model.config.n_embd + 1
        self.state, self.read, self.weights = no_pairs(1, D, 0), [], None

    @torch.no_grad()
    def features(self, prompt):
        """Token ids -> (D + 1,)."""
        seen = []
        hook = self.model.norm.register_forward_hook(lambda module, args, out: seen.append(out[0].mean(0)))
        self.model(torch.tensor([prompt]))
        hook.remove()
        return torch.cat([seen[0], torch.ones(1)])

    def learn(self, text):
        self.known += [name for name in text.names if name not in self.known]
        x = torch.stack([self.features(prompt) for prompt, _ in text.pairs])                    # (T, D + 1)
        which = torch.tensor([self.known.index(name) for _, name in text.pairs])
        self.weights = None
        if self.name == 'least-squares':                # names that nobody had: rows of zeros, as if there all along
            self.state['S'] = F.pad(self.state['S'], (0, 0, 0, len(self.known) - self.state['S'].shape[1]))
            for part, its in zip(x.split(64), which.split(64)):
                self.state = least_squares(part[None], F.one_hot(its, len(self.known))[None].float(), self.state)
        else:
            self.read.append((x, which))

    def solved(self):
        """(names, D + 1): how much a request's features speak for each name."""
        if self.name == 'least-squares':
            return self.state['S'][0]
        x, which = (torch.cat(parts).double() for parts in zip(*self.read))
        y = F.one_hot(which.long(), len(self.known)).double()                                   # (T, names)
        gram = x.mT @ x
        if self.name == 'ridge':
            return torch.linalg.solve(gram + torch.eye(len(gram), dtype=x.dtype), x.mT @ y).mT.float()
        means = y.mT @ x / y.sum(0)[:, None]                                                    # (names, D + 1)
        within = (gram - (y.sum(0)[:, None] * means).mT @ means) / len(x)
        W = torch.linalg.solve(within + 1e-3 * torch.eye(len(gram), dtype=x.dtype), means.mT).mT
        W[:, -1] = -(W * means)[:, :-1].sum(1) / 2      # half of the mean's own answer, in the place of the constant's
        return W.float()

    def choose(self, prompt, names):
        """The name that a prompt's features speak for, and how much."""
        self.weights = self.solved() if self.weights is None else self.weights
        said = self.weights @ self.features(prompt)
        places = [self.known.index(name) for name in names]
        best = said[places].argmax().item()
        return names[best], said[places][best].item()

    def to_score(self):
        return self, None

    def bytes(self):
        """Of what it remembers; ridge keeps all, means could do with sums."""
        return state_bytes(self.state if self.name == 'least-squares' else [[*pair] for pair in self.read])
