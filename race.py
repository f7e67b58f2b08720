"""
Races: memories in models of equal size learn one puzzle (puzzles.py, formal.py), and are asked at 1, 2, 4 and 8 times
the length that they were trained at.

    python race.py                                          parity, a short race, under a minute
    python race.py --mixers=hope --negative_eigenvalues=true        ... by a memory that can turn round what it holds
    python race.py --task=shift --mixers=hope,gated_deltanet,attention,lstm --seeds=3 --json=shift.json
    python race.py --task=recall --n_pairs=8 --length=128 --max_steps=1000 --learning_rate=5e-3
    python race.py --task=s3 --quick                        the same tiny: that it runs, not how well

Every model has two layers and as nearly as its MLP's width allows the same number of parameters. One line per
evaluation; a model stops once 99 % is right (--stop_at). What is printed in the end are means over the seeds, with two
standard errors where there are several; --json=FILE has every number. Any knob of the model is --key=value.

A model begins with rows of --first_length, of recall with --first_pairs pairs in rows that are shorter by as much, as
many tokens per step, and goes on to twice as many when 90 % is right: whole rows show too little of what is to be
learned, if the answer at each place needs what was found out at all places before it.

Does NOT include: a learning-rate search, text (train.py), needles (eval_niah.py).
"""
import json
import math
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass

import torch

from cli import UsageError, atomic_write, build, check, git_commit, one_line_errors, read_args, words
from formal import ALL_PUZZLES
from machine import compiled, describe
from metrics import mean_and_error
from model import MIXERS, Config, equal_model
from optim import param_groups
from puzzles import Recall

TIMES = 1, 2, 4, 8                      # the training length, in the end
SMALL = dict(n_layer=2, n_head=1, n_embd=64)
QUICK = dict(max_steps=20, eval_every=10, batch_size=8)
OF_RECALL = 'n_pairs', 'first_pairs', 'keys'


@dataclass
class Race:
    """The race"""
    task: str = 'parity'                # recall | shift | .. (puzzles.py), parity | .. (formal.py)
    mixers: str = 'hope,attention,lstm' # who takes part
    length: int = 0                     # tokens of a training row (0 = 32, or the fewest that it needs; recall: these)
    first_length: int = 0               # ... to begin with, then twice as many, up to length (0 = as suits the task)
    batch_size: int = 32                # rows per step
    max_steps: int = 200                # at most
    stop_at: float = 0.99               # ... a model stops once so much is right, of whole words where there are any
    learning_rate: float = 1e-2         # AdamW; 50 steps of warm-up, then a straight line to 0 at max_steps
    start_lr: float = 0.1               # of what memories hold before the first token, as a fraction of it
    eval_every: int = 25                # steps between evaluations, each on 2,048 answers or more
    n_pairs: int = 4                    # recall: pairs to remember
    first_pairs: int = 0                # ... to begin with, then twice as many, up to n_pairs (0 = two, or three, ..)
    keys: int = 32                      # ... keys in the vocabulary, and as many values
    compile: bool = False               # torch.compile
    threads: int = 1                    # CPU threads
    seed: int = 0                       # of the weights and the rows
    seeds: int = 1                      # runs of each model, with this seed and the next ones
    quick: bool = False                 # 20 small steps: that it runs
    json: str = ''                      # a file for the numbers

    def __post_init__(self):
        tasks = 'recall', *ALL_PUZZLES
        check(self.task in tasks, f"--task must be one of {', '.join(tasks)}, not '{self.task}'")
        check(not os.path.isdir(self.json), f'--json={self.json} is a folder; a file is needed')
        words('mixers', self.mixers, MIXERS, joined=True)
        for name in ('n_pairs', 'batch_size', 'max_steps', 'eval_every', 'threads', 'seeds'):
            check(getattr(self, name) >= 1, f'--{name} must be at least 1, not {getattr(self, name)}')
        check(1e-300 < self.learning_rate < math.inf, f'--learning_rate must be above 0, not {self.learning_rate}')
        check(self.start_lr >= 0, f'--start_lr must be at least 0, not {self.start_lr}')
        check(0 <= self.seed < 2**62, f'--seed must be at least 0 and below 2^62, not {self.seed}')
        check(self.n_pairs <= self.keys, f'--n_pairs={self.n_pairs} needs as many --keys, not {self.keys}')
        shortest = make_task(self).shortest
        self.length = self.length or (shortest if self.task == 'recall' else max(32, shortest))
        check(self.length >= shortest, f'--length must be at least {shortest} for --task={self.task}'
              + f' and n_pairs = {self.n_pairs}' * (self.task == 'recall') + f', not {self.length}')
        self.first_pairs = self.first_pairs or halved(self.n_pairs, 2)
        self.first_length = self.first_length or halved(self.length, make_task(self).begin_with or self.length)
        name, first, last = ('pairs', self.first_pairs, self.n_pairs) if self.task == 'recall' else (
            'length', self.first_length, self.length)
        self.easier = last // max(1, first)                             # so many times easier it begins
        check(first * self.easier == last and self.easier & (self.easier - 1) == self.length % self.easier == 0,
              f'--first_{name}={first} must double to {last}, and --length shrink with it')
        check(self.length // self.easier >= shortest or name == 'pairs',
              f'--first_length must be at least {shortest}, not {first}')


def make_task(race, easier=1):
    """The task with the smallest vocabulary. Of recall: keys are the first tokens, then values, then one for gaps."""
    if race.task != 'recall':
        return ALL_PUZZLES[race.task]()
    keys = torch.arange(race.keys)
    return Recall(race.n_pairs // easier, keys, keys + race.keys, 2 * race.keys)


def halved(n, least):
    """n cut in halves, as long as they are whole and not below the least."""
    while n % 2 == 0 and n >= 2 * least:
        n //= 2
    return n


def vocabulary(race):
    return 2 * race.keys + 1 if race.task == 'recall' else len(make_task(race).symbols)


def questions(task, length):
    """Rows of an evaluation: 99 % has to be told from 98 %, which takes some 2,000 answers."""
    asked = (task.batch(16, length, torch.Generator())[1] >= 0).sum().item() / 16
    return max(64, math.ceil(2048 / asked))


def run(mixer, seed, race, knobs, parameters):
    """One model with one seed -> all that is to be known of it."""
    torch.manual_seed(seed)
    model = equal_model(mixer, knobs, parameters)
    step_model = compiled(model) if race.compile else model
    optimizer = torch.optim.AdamW(param_groups(model, 0.0, race.start_lr), betas=(0.9, 0.95))
    rng = torch.Generator().manual_seed(seed)
    start, stopped, easier, curve = time.perf_counter(), None, race.easier, []
    for step in range(1, race.max_steps + 1):
        for group in optimizer.param_groups:
            group['lr'] = race.learning_rate * min(step / 50, 1 - (step - 1) / race.max_steps) * group['lr_scale']
        task, length = make_task(race, easier), race.length // easier
        idx, targets, weights = task.batch(race.batch_size * easier, length, rng)
        loss = step_model(idx, targets, weights=weights)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % race.eval_every == 0 or step == race.max_steps:
            n = questions(task, length)
            right = task.report(model, length, n, n)
            curve.append({'step': step, 'length': length, 'loss': loss.item(), 'right': right})
            print(f'{mixer:<16} seed {seed} step {step:>6,} | length {length:>4} | loss {loss.item():.3f} | right, %: '
                  + '  '.join(f'{what} {100 * share:.1f}' for what, share in right.items()), flush=True)
            if easier == 1 and min(right.values()) >= race.stop_at:
                stopped = step
                break
            if easier > 1 and min(right.values()) >= 0.9:
                easier //= 2
    task = make_task(race)
    right = {times: task.report(model, times * race.length, 64) for times in TIMES}
    return {'mixer': mixer, 'seed': seed, 'parameters': model.num_params(), 'stopped_at': stopped, 'right': right,
            'seconds': time.perf_counter() - start, 'curve': curve}


def in_percent(shares):
    """Shares of several seeds -> their mean in %, and two standard errors of it where there are several."""
    mean, error = mean_and_error(shares)
    return f'{100 * mean:.1f}' + (f' ±{200 * error:.1f}' if error is not None else '')


def table(runs, chance):
    """What was right in the end, a block for each thing that is reported, a row for each memory. -> its lines"""
    lines, columns = [], ''.join(f'{times}x'.rjust(13) for times in TIMES)
    for what in runs[0]['right'][1]:
        lines += ['', f"{f'right, %: {what}':<26}{'stops at step':>14}{columns}"]
        for mixer in dict.fromkeys(run['mixer'] for run in runs):
            own = [run for run in runs if run['mixer'] == mixer]
            steps = ','.join(str(run['stopped_at'] or '-') for run in own)
            cells = [in_percent([run['right'][times][what] for run in own]) for times in TIMES]
            lines.append(f'{mixer:<26}{steps:>14}' + ''.join(cell.rjust(13) for cell in cells))
        if what != 'whole words':                           # of which chance has none
            lines.append(f"{'chance':<40}" + ''.join(f'{100 * chance[times]:.1f}'.rjust(13) for times in TIMES))
    return lines


def main():
    given = read_args([Race, Config], sys.argv[1:], hidden=('vocab_size', 'block_size', 'mixer'))
    race, = build([Race], (QUICK if given.get('quick') else {}) | given)
    if race.task != 'recall' and {*given} & {*OF_RECALL}:
        raise UsageError(f"--{', --'.join(OF_RECALL)} are for --task=recall")
    if race.task == 'recall' and 'first_length' in given:
        raise UsageError('--task=recall begins with --first_pairs, and has no --first_length')
    torch.set_num_threads(race.threads)
    torch.set_flush_denormal(True)
    own = {name: x for name, x in given.items() if name in Config.__dataclass_fields__}
    knobs = {**SMALL, **own, 'vocab_size': vocabulary(race), 'block_size': max(TIMES) * race.length}
    parameters = equal_model('hope', knobs).num_params()
    about = {'command': shlex.join(sys.argv), 'commit': git_commit(), 'torch': torch.__version__,
             'python': platform.python_version(), 'machine': describe('cpu'), 'race': asdict(race), 'model': knobs}
    print(f"python {about['command']}\n{race.task}, rows of {race.length} | {parameters:,} parameters | "
          f"{about['machine']} | torch {torch.__version__} | commit {about['commit']}")
    task = make_task(race)
    chance = {times: task.chance(times * race.length) for times in TIMES}
    runs = [run(mixer, seed, race, knobs, parameters)
            for mixer in race.mixers.split(',') for seed in range(race.seed, race.seed + race.seeds)]
    print('\n'.join(table(runs, chance)))
    if race.json:
        with atomic_write(race.json) as file:
            file.write(json.dumps({**about, 'chance': chance, 'runs': runs}, indent=1).encode())
        print(f'\nwritten to {race.json}')


if __name__ == '__main__':
    one_line_errors()
    main()
