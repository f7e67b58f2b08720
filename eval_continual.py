"""
Does a model learn one thing after another without losing what it knew?

    python eval_continual.py                            three new kinds of text, one after the other (domains)
    python eval_continual.py --protocol=languages       two invented languages (languages.py)
    python eval_continual.py --protocol=intents         150 classes of requests, fifteen at a time (intents.py)
    python eval_continual.py --protocol=facts           facts told once, asked for 10,000 tokens later (facts.py)
    python eval_continual.py --quick                    the same in under two minutes, with tiny models: that it runs
    python eval_continual.py --learners=finetune,hope-3 --seeds=1

Each protocol has a base model of its own: of Python source, of languages' first lines, of English, of questions on a
passage. What is read and how it is scored stands in protocols.py.

Those who learn stand in learners.py; hope-N is --learn of sample.py with N slow levels (evidence.py), sleep-N sleeps as
well (sleep.py). All read the same tokens once. finetune and clock have the best of five step sizes by what they gain on
a text that is not scored; replay and joint have finetune's, hope and sleep clock's, ewc the best of five strengths by
gain less loss.

R[i, j] is the score on j after reading i, 0 the base text; gained R[j, j] - b_j, b_j before any; lost, of the base in
the end; kept, the share of what j alone gains that is left in the end (of intents, of what it had when it was read; of
facts, after other text). What is scored is never read. Base models are trained once, into OUT_DIR, where each result is
kept: what was interrupted goes on. OUT_DIR/PROTOCOL.json has it all.

Does NOT include: task labels or boundaries for hope and clock (finetune, ewc and replay are told them).
"""
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

from cli import (UserError, atomic_write, build, check, clear, git_commit, numbers, one_line_errors, read_args,
                 read_file, words)
from learners import LEARNERS, ON_FEATURES, STEPS, make, steps_for
from machine import describe, load_checkpoint, load_tokenizer, owner
from protocols import BASES, DOMAINS, score, texts

one_line_errors()
HERE = os.path.dirname(os.path.abspath(__file__))
CODE = [f'{name}.py' for name in 'eval_continual protocols learners cms evidence sleep memory languages intents facts '
        'corpora'.split()]


@dataclass
class Continual:
    """The evaluation"""
    protocol: str = 'domains'           # domains | languages | intents | facts
    learners: str = ''                  # which of them, as in icl,hope-3 ('' = all)
    seeds: int = 3                      # base models, each with texts of its own
    domains: str = DOMAINS              # texts: what --data of train.py takes, of a package with its suffix
    n_bytes: int = 50_000               # domains: of each text that is read; a fifth as much is scored
    n_languages: int = 2                # languages: how many are read, one after the other
    n_lines: int = 600                  # languages: of each that is read; a sixth as many are scored
    n_tasks: int = 10                   # intents: how many parts of fifteen are read, one after the other
    n_requests: int = 30                # intents: of each intent that are read; a tenth as many are scored
    facts: str = '1,20,200'             # facts: how many a passage has
    n_readings: int = 1                 # facts: how often it is read, one time after the other
    out_dir: str = 'out-continual'      # where base models and results are kept
    json: str = ''                      # the file of results ('' = OUT_DIR/PROTOCOL.json)
    quick: bool = False                 # tiny models, little text, one seed: whether it works, not how well

    def __post_init__(self):
        check(self.protocol in BASES, f"--protocol is one of {', '.join(BASES)}, not '{self.protocol}'")
        theirs = LEARNERS + ON_FEATURES * (self.protocol == 'intents')
        self.learners = self.learners or ','.join(theirs)
        words('learners', self.learners, theirs)
        self.n_facts = numbers('facts', self.facts)
        for name in ('seeds', 'n_bytes', 'n_languages', 'n_lines', 'n_tasks', 'n_requests', 'n_readings'):
            check(getattr(self, name) >= 1, f'--{name} must be at least 1, not {getattr(self, name)}')
        check(self.n_languages <= 26, f'--n_languages must be at most 26, not {self.n_languages}')
        check(self.n_tasks <= 10, f'--n_tasks must be at most 10, not {self.n_tasks}')
        check(self.n_requests <= 60, f'--n_requests must be at most 60, not {self.n_requests}')
        check(max(self.n_facts) <= 1000, f'--facts must be at most 1000, not {max(self.n_facts)}')
        check(not os.path.isdir(self.json), f'--json={self.json} is a folder; a file is needed')
        if self.quick:
            self.seeds, self.n_bytes, self.n_lines = 1, min(self.n_bytes, 6_000), min(self.n_lines, 30)
            self.n_tasks, self.n_requests, self.n_facts = min(self.n_tasks, 2), min(self.n_requests, 3), [1, 20]


given = read_args([Continual], sys.argv[1:])
args, = build([Continual], given)
torch.set_flush_denormal(True)                          # as in training
COMMIT = git_commit()                                   # of the code that runs, whatever comes after it is read


# -----------------------------------------------------------------------------
# base models


TINY = dict(n_embd=32, n_layer=1, max_steps=30, batch_size=2, block_size=128, eval_every=30, compile=False)


def train(folder, **options):
    """A base model in OUT_DIR/folder, trained by train.py unless it is there -> the path of its checkpoint."""
    out = os.path.join(args.out_dir, folder)
    path = os.path.join(out, 'ckpt.pt')

    def whole():
        if not os.path.exists(path):
            return False
        checkpoint = load_checkpoint(path)
        its = checkpoint['config'] | checkpoint['run']
        asked = options.keys() - {'init_from', 'compile'}           # where a model began may have moved
        if other := sorted(name for name in asked if str(its[name]) != str(options[name])):
            raise UserError(f"{out} holds a base model of another {', '.join(other)}; give another --out_dir")
        return checkpoint['step'] >= checkpoint['run']['max_steps']
    options |= {'sample_tokens': 0} | (TINY if args.quick else {})
    if not whole():
        command = ['train.py', *(f'--{name}={value}' for name, value in (options | {'out_dir': out}).items())]
        command = ['train.py', '--resume', f'--out_dir={out}'] if os.path.exists(path) else command
        print(f"python {' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, os.path.join(HERE, command[0]), *command[1:]],
                              stdout=None if sys.stdout.isatty() else subprocess.DEVNULL)
        if done.returncode or not whole():
            raise UserError(f'the base model could not be trained into {out}')
    return path


def base_model(seed):
    """The checkpoint that the learners of a seed begin with, and its tokenizer."""
    folder = f"{args.protocol}-{seed}{'-quick' * args.quick}"
    path = None
    for stage, options in BASES[args.protocol]:
        path = train(folder + stage, seed=seed, **options, **({'init_from': path} if path else {}))
    checkpoint = load_checkpoint(path)
    return checkpoint, load_tokenizer(checkpoint, path)


# -----------------------------------------------------------------------------
# a cell: one learner, one seed


def kept_result(key, make_result):
    """A result from OUT_DIR, or made and kept there. key: all that it depends on."""
    about = json.dumps({**key, 'args': dataclasses.asdict(args) | {'facts': args.n_facts} | dict.fromkeys(
        ('learners', 'seeds', 'out_dir', 'json'))})
    about += ''.join(hashlib.sha256(read_file(os.path.join(HERE, file))).hexdigest() for file in CODE)
    path = os.path.join(args.out_dir, 'results', hashlib.sha256(about.encode()).hexdigest()[:20] + '.json')
    if os.path.exists(path):
        return json.loads(read_file(path))
    result = make_result()
    if isinstance(result, dict):
        result['commit'] = COMMIT
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(result).encode())
    return result


def main_score(scores):
    """The one number of a score that is larger where it is better."""
    return -scores['bpb'] if 'bpb' in scores else scores['right']


def choose(kind, checkpoint, enc, base, text, chosen):
    """[(step, gain on the text that is not scored, loss of the base)] for each of five steps."""
    steps = steps_for(kind, chosen)

    def measure():
        rows = []
        for step in STEPS[kind]:
            learner = make(kind, checkpoint, steps | {kind: step}, base)
            before = [main_score(score(x, *learner.to_score(), enc, x.names)) for x in (text, base)]
            learner.learn(text)
            now = [main_score(score(x, *learner.to_score(), enc, x.names)) for x in (text, base)]
            rows.append([step, now[0] - before[0], before[1] - now[1]])
        return rows
    return kept_result({'steps of': kind, 'with': steps, 'by': text.name, 'model': owner(checkpoint)}, measure)


def run(name, seed, checkpoint, enc, todo, chosen):
    """R and what follows from it, of one learner."""
    (base, *tasks), steps = todo, steps_for(name, chosen)
    measure = read_passages if args.protocol == 'facts' else read_in_turn

    def measured():
        start = time.perf_counter()
        R, alone, learner = measure(lambda: make(name, checkpoint, steps, base), enc, base, tasks, name == 'joint')
        return {'R': R, 'alone': alone, 'seconds': time.perf_counter() - start, 'state_bytes': learner.bytes(),
                'passes': args.n_readings if args.protocol == 'facts' else 1}
    found = kept_result({'run': name, 'seed': seed, 'steps': steps, 'model': owner(checkpoint)}, measured)
    values, alone = [[x and main_score(x) for x in row] for row in found['R']], [main_score(x) for x in found['alone']]
    if args.protocol == 'facts':                        # each column has been read by itself: before, read, other text
        return found | metrics([values[0], *[values[1]] * len(alone), values[2]], alone, 0)
    return found | metrics(values, alone, int(bool(base.scored)), at_once=name == 'joint')


def read_in_turn(fresh, enc, base, tasks, at_once):
    """
    Scores R of all texts before any is read and after each (of intents of the last one and, in the end, of all), those
    of each when it alone was read (of intents, after it was), and the learner. fresh() makes one; at_once: all texts
    are read together, and as much of the base text as of one of them.
    """
    def scores(learner, i):
        names = [name for text in tasks[:i] for name in text.names]
        return [score(text, *learner.to_score(), enc, names) if text.unit != 'intents' or i in (0, j, len(tasks)) else
                None for j, text in enumerate([base, *tasks]) if text.scored]
    learner = fresh()
    R = [scores(learner, 0)]
    for i, text in enumerate(tasks):
        if not at_once:
            learner.learn(text)
        elif i == 0:
            more = [window for other in tasks[1:] for window in learner.windows(other.tokens)]
            learner.learn(text, more + learner.windows(base.tokens)[:len(learner.windows(text.tokens))])
        R.append(scores(learner, i + 1))
    if args.protocol == 'intents':
        return R, [R[j + 1][j] for j in range(len(tasks))], learner
    alone = [R[1][-len(tasks)]]
    for text in tasks[1:]:
        other = fresh()
        if not at_once:
            other.learn(text)
        alone.append(score(text, *other.to_score(), enc))
    return R, alone, learner


def read_passages(fresh, enc, base, tasks, at_once):
    """
    As read_in_turn, of facts: a column for each number of them, a row before a passage is read, after it, and after
    other text; means over its passages. at_once: other text is read together with it.
    """
    R, learner = [[], [], []], None
    for text in tasks:
        rows = []
        for passage in text.passages:
            learner = fresh()
            def now(): return score(passage, *learner.to_score(), enc)['right']
            rows.append([now()])
            learner.learn(passage, *[learner.windows(base.tokens)] * at_once)
            rows[-1].append(now())
            if not at_once:
                learner.learn(base)
            rows[-1].append(now())
        for row, values in zip(R, zip(*rows)):
            row.append({'right': sum(values) / len(values)})
    return R, R[1], learner


def metrics(R, alone, first, at_once=False):
    """
    R       rows of scores, before any text and after each, larger is better; the base text's first, if first = 1
    alone   the score of each text after it alone was read
    returns {'gained': by each text when it was read, 'kept': its share in the end, 'lost': of the base}
    """
    n, before, last = len(alone), R[0][first:], R[-1][first:]
    lost = R[0][0] - R[-1][0] if first else 0.0
    if at_once:                                         # all texts were read together: there is no before and after
        return {'gained': [last[j] - before[j] for j in range(n)], 'kept': [1.0] * n, 'lost': lost}
    return {'gained': [R[j + 1][first + j] - before[j] for j in range(n)], 'lost': lost,
            'kept': [(last[j] - before[j]) / (alone[j] - before[j]) if alone[j] > before[j] else 0.0
                     for j in range(n)]}


# -----------------------------------------------------------------------------
# what follows from all of them


UNITS = {'domains': 'bits per byte', 'languages': '% of meanings right', 'intents': '% of requests right',
         'facts': '% of questions answered'}
PASSAGE = ('before', 'read', 'other text')      # rows of facts

def mean_and_error(values):
    """The mean of one number per seed, and its standard error (None of one seed)."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((x - mean) ** 2 for x in values) / max(1, len(values) - 1) / len(values))
    return mean, spread if len(values) > 1 else None


def summary(runs):
    """{'gained', 'kept', 'kept_first', 'lost', 'final': (mean, standard error)} over seeds, means over texts."""
    def mean(values): return sum(values) / len(values)
    rows = {'gained': [mean(r['gained']) for r in runs], 'kept': [mean(r['kept']) for r in runs],
            'kept_first': [mean(r['kept'][:-1] or r['kept']) for r in runs], 'lost': [r['lost'] for r in runs],
            'final': [mean([main_score(x) for x in r['R'][-1]]) for r in runs]}
    return {name: mean_and_error(values) for name, values in rows.items()}


def claim(text, numbers, low=0.0):
    """A claim that a number is above low: it holds beyond two standard errors, does not, or cannot be told."""
    mean, error = mean_and_error(numbers)
    margin = 2 * error if error is not None else math.inf
    holds = True if mean - margin > low else False if mean + margin < low else None
    return {'claim': text, 'holds': holds, 'numbers': {'mean': mean, 'standard_error': error, 'asked': low}}


def verdicts(found):
    """What the paper claims, and what was asked of the levels here, where the learners for it were run."""
    def pairs(a, b, value): return [value(x) - value(y) for x, y in zip(found[a], found[b])]
    def first_ones(r): return summary([r])['kept_first'][0]
    def final(r): return summary([r])['final'][0]
    def gained(r): return sum(r['gained']) / len(r['gained'])
    out, levels = [], [name for name in ('icl', 'hope-1', 'hope-2', 'hope-3') if name in found]
    for a, b in zip(levels, levels[1:]):
        out.append(claim(f'{b} ends better than {a}, mean over all that is scored', pairs(b, a, final)))
    for rival in found:
        if 'hope-3' in found and rival not in ('nothing', 'hope-3', *levels[-2:-1]):
            out.append(claim(f'hope-3 ends better than {rival}', pairs('hope-3', rival, final)))
    if 'hope-3' in found and args.protocol in ('domains', 'languages'):
        out.append(claim('hope-3 keeps 90 % of its gain on all but the last',
                         [first_ones(r) for r in found['hope-3']], 0.9))
    if 'hope-3' in found and args.protocol == 'domains':
        out.append(claim('hope-3 loses at most 0.02 bits per byte of the base text',
                         [-r['lost'] for r in found['hope-3']], -0.02))
    if {'hope-3', 'finetune'} <= {*found} and args.protocol != 'facts':
        out.append(claim('hope-3 gains more than 90 % of what fine-tuning gains',
                         [gained(a) - 0.9 * gained(b) for a, b in zip(found['hope-3'], found['finetune'])]))
    if {'least-squares', 'ridge'} <= {*found}:
        out.append(claim('the memory of least squares answers as ridge regression on all requests does, to 0.5 points',
                         [-abs(x) for x in pairs('least-squares', 'ridge', final)], -0.5))
    if {'hope-3', 'finetune'} <= {*found} and args.protocol == 'facts':
        for j, n in enumerate(args.n_facts):            # in points above what was answered before
            def left(r): return main_score(r['R'][2][j]) - main_score(r['R'][0][j])
            out.append(claim(f'of {n} facts hope-3 keeps twice what fine-tuning keeps',
                             [left(a) - 2 * left(b) for a, b in zip(found['hope-3'], found['finetune'])]))
    return out


def print_tables(found, names):
    unit = UNITS[args.protocol]
    width = 2 + max(8, *map(len, names))
    for name, runs in found.items():
        print(f'\n{name}: R, {unit}, mean over seeds; a row is what was read last, a column what is scored')
        print(f"{'':<{width}}" + ''.join(f'{column:>{width}}' for column in names))
        for i, first in enumerate(runs[0]['R']):
            cells = [mean_and_error([abs(main_score(r['R'][i][j])) for r in runs])[0] if first[j] else None
                     for j in range(len(names))]
            row = 'before' if not i else names[i - len(runs[0]['R'])] if args.protocol != 'facts' else PASSAGE[i]
            print(f'{row:<{width}}' + ''.join(f"{'-':>{width}}" if x is None else f'{x:>{width}.3f}' for x in cells))

    def cell(pair, scale=1.0):
        mean, error = pair
        return f'{scale * mean:.3f}' + (f' +- {2 * scale * error:.3f}' if error is not None else '')
    print(f'\n{len(next(iter(found.values())))} seeds, +- two standard errors; gained and lost in {unit}, kept in %')
    print(f"{'':<14}{'gained':>18}{'lost of the base':>18}{'kept, first ones':>20}{'kept, all':>18}{'in the end':>18}"
          f"{'bytes':>12}{'passes':>8}{'seconds':>9}")
    for name, runs in found.items():
        s = summary(runs)
        print(f"{name:<14}{cell(s['gained']):>18}{cell(s['lost']):>18}{cell(s['kept_first'], 100):>20}"
              f"{cell(s['kept'], 100):>18}{cell(s['final']):>18}{runs[0]['state_bytes']:>12,}{runs[0]['passes']:>8}"
              f"{sum(r['seconds'] for r in runs) / len(runs):>9.0f}")


def main():
    found, curves, names = {name: [] for name in args.learners.split(',')}, {}, []
    for seed in range(1, args.seeds + 1):
        checkpoint, enc = base_model(seed)
        base, tasks, other = texts(args, enc, seed)
        todo = [base, *tasks]
        names = [text.name for text in todo if text.scored or text.passages]
        if seed == 1:                                   # step sizes, once
            chosen = {}
            needed = {kind for name in found for kind in steps_for(name, dict.fromkeys(STEPS))}
            for kind in (kind for kind in STEPS if kind in needed):
                curves[kind] = choose(kind, checkpoint, enc, todo[0], other, chosen)
                of = (lambda row: row[1] - row[2]) if kind == 'ewc' else (lambda row: row[1])
                chosen[kind] = max(curves[kind], key=of)[0]
                print(f'{clear(sys.stdout)}{kind}: step, gained on a text not scored, lost of the base: '
                      + '; '.join(f'{a:g} {b:.3f} {c:.3f}' for a, b, c in curves[kind])
                      + f'; chosen {chosen[kind]:g}', flush=True)
        for name in found:
            found[name].append(run(name, seed, checkpoint, enc, todo, chosen))
            result = summary(found[name][-1:])
            print(f"{clear(sys.stdout)}seed {seed} | {name:<9} | gained {result['gained'][0]:.3f} | lost "
                  f"{result['lost'][0]:.3f} | kept {100 * result['kept'][0]:.0f} %", flush=True)
    print_tables(found, names)
    verdict = verdicts(found)
    print('\nholds beyond two standard errors, does not, or cannot be told (?)')
    for line in verdict:
        numbers = line['numbers']
        print(f"{ {True: 'yes', False: 'no ', None: '?  '}[line['holds']]} {line['claim']}: {numbers['mean']:.3f}"
              + (f" +- {2 * numbers['standard_error']:.3f}" if numbers['standard_error'] is not None else '')
              + f" (asked: {numbers['asked']:g})")
    path = args.json or os.path.join(args.out_dir, f'{args.protocol}.json')
    with atomic_write(path) as file:
        file.write(json.dumps({'about': {'commit': COMMIT, 'torch': torch.__version__, 'machine': describe('cpu'),
                                         'args': dataclasses.asdict(args), 'steps': curves, 'scored': names},
                               'learners': {name: {'seeds': runs, **summary(runs)} for name, runs in found.items()},
                               'verdict': verdict}, indent=1).encode())
    print(f'\nwritten to {path}')


if __name__ == '__main__':
    main()
