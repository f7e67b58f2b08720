"""
Recall in miniature: a race in multi-query associative recall, the task on which memories differ most. A sequence shows
key-value pairs, then asks for each of them once, in random order and at random gaps (tasks.py):

    k1 v1 k2 v2 ... kP vP  _ _ k2 v2 _ _ _ _ k1 v1 _ _          the value after each second k is to be predicted

    python mqar.py                                          a short race, under a minute
    python mqar.py --mixers=hope,gated_deltanet --n_pairs=8 --length=128 --max_steps=1000 --learning_rate=5e-3

A model begins with --first_pairs pairs in shorter sequences, as many tokens and questions per step, and goes on to
twice as many when it recalls 90 %. From nothing, 32 pairs show too little of what there is to learn.

Every model has two layers and as nearly as its MLP's width allows the same number of parameters.
One line per evaluation; a model stops once it recalls 99 %. Then its recall at 1, 2, 4 and 8 times the training length,
with as many pairs. Any knob of the model is --key=value.

Does NOT include: a learning-rate search, more than one seed per call.
"""
import math
import sys
import time
from dataclasses import dataclass

import torch

from cli import build, check, one_line_errors, read_args, words
from machine import compiled
from model import MIXERS, Config, equal_model
from optim import param_groups
from tasks import Recall


@dataclass
class Race:
    """The race"""
    mixers: str = 'attention,gated_deltanet,hope'   # who takes part
    n_pairs: int = 4                    # pairs to remember
    first_pairs: int = 2                # ... to begin with, then twice as many, up to n_pairs (0 = n_pairs)
    length: int = 16                    # tokens of a training sequence
    keys: int = 32                      # keys in the vocabulary, and as many values
    batch_size: int = 32                # sequences per step
    max_steps: int = 200                # at most
    learning_rate: float = 1e-2         # AdamW; 50 steps of warm-up, then a straight line to 0 at max_steps
    start_lr: float = 0.1               # of what memories hold before the first token, as a fraction of it
    eval_every: int = 50                # steps between evaluations, each on 2,048 questions
    compile: bool = False               # torch.compile
    threads: int = 1                    # CPU threads
    seed: int = 0                       # of the weights and the sequences

    def __post_init__(self):
        words('mixers', self.mixers, MIXERS, joined=True)
        for name in ('n_pairs', 'batch_size', 'max_steps', 'eval_every', 'threads'):
            check(getattr(self, name) >= 1, f'--{name} must be at least 1, not {getattr(self, name)}')
        check(1e-300 < self.learning_rate < math.inf, f'--learning_rate must be above 0, not {self.learning_rate}')
        check(self.start_lr >= 0, f'--start_lr must be at least 0, not {self.start_lr}')
        check(0 <= self.seed < 2**63, f'--seed must be at least 0 and below 2^63, not {self.seed}')
        check(self.n_pairs <= self.keys, f'--n_pairs={self.n_pairs} needs as many --keys, not {self.keys}')
        self.first_pairs = self.first_pairs or self.n_pairs
        times = self.n_pairs // max(1, self.first_pairs)
        check(self.n_pairs == times * self.first_pairs and times & (times - 1) == 0 and self.length % times == 0,
              f'--first_pairs={self.first_pairs} must double to --n_pairs={self.n_pairs}, and --length shrink with it')
        check(4 * self.n_pairs <= self.length, f'--length must be at least 4 x n_pairs = {4 * self.n_pairs}')


SMALL = dict(n_layer=2, n_head=1, n_embd=64)


def pairs(race, times=1):
    """The task with n_pairs / times pairs: keys are the first tokens, then come the values, and one for the gaps."""
    return Recall(race.n_pairs // times, torch.arange(race.keys), torch.arange(race.keys, 2 * race.keys), 2 * race.keys)


def share_right(task, model, length, n):
    share, = task.report(model, length, batch_size=n, n=n).values()
    return share


def run(mixer, race, knobs, parameters):
    torch.manual_seed(race.seed)
    model = equal_model(mixer, knobs, parameters)
    step_model = compiled(model) if race.compile else model
    groups = param_groups(model, 0.0, race.start_lr)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    rng = torch.Generator().manual_seed(race.seed)
    start, learned, times = time.perf_counter(), None, race.n_pairs // race.first_pairs
    for step in range(1, race.max_steps + 1):
        for group in optimizer.param_groups:
            group['lr'] = race.learning_rate * min(step / 50, 1 - (step - 1) / race.max_steps) * group['lr_scale']
        task, length = pairs(race, times), race.length // times
        idx, targets, weights = task.batch(race.batch_size * times, length, rng)
        loss = step_model(idx, targets, weights=weights)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % race.eval_every == 0 or step == race.max_steps:
            # 99 % has to be told from 98 %: about 2,000 questions
            share = share_right(task, model, length, max(64, 2048 // task.n_pairs))
            print(f'{mixer:<16} step {step:>6,} | pairs {task.n_pairs:>3} | loss {loss.item():.3f} '
                  f'| recall {100 * share:5.1f} %', flush=True)
            if times == 1 and share >= 0.99:
                learned = step
                break
            if times > 1 and share >= 0.9:
                times //= 2
    longer = ''.join(f'{100 * share_right(pairs(race), model, n * race.length, 64):8.1f}' for n in (1, 2, 4, 8))
    return (f'{mixer:<16}{model.num_params():>12,}{learned or "-":>14}{longer}'
            f'{time.perf_counter() - start:>10.0f}')


def main():
    given = read_args([Race, Config], sys.argv[1:], hidden=('vocab_size', 'block_size', 'mixer'))
    race, = build([Race], given)
    torch.set_num_threads(race.threads)
    torch.set_flush_denormal(True)
    knobs = {**SMALL, **given, 'vocab_size': 2 * race.keys + 1, 'block_size': 8 * race.length}
    parameters = equal_model('hope', knobs).num_params()
    rows = [run(mixer, race, knobs, parameters) for mixer in race.mixers.split(',')]
    print(f"\n{race.n_pairs} pairs in {race.length} tokens; guessing among the values shown is right in "
          f"{100 / race.n_pairs:.1f} %. Recall in % at 1, 2, 4, 8 times the length")
    print(f"{'mixer':<16}{'parameters':>12}{'99 % at step':>14}{'1x':>8}{'2x':>8}{'4x':>8}{'8x':>8}{'seconds':>10}")
    print('\n'.join(rows))


if __name__ == '__main__':
    one_line_errors()
    main()
