"""
Does a model learn one thing after another without losing what it knew?

    python eval_continual.py                            three new kinds of text, one after the other (domains)
    python eval_continual.py --protocol=languages       two invented languages (languages.py)
    python eval_continual.py --protocol=intents         150 classes of requests, fifteen at a time (intents.py)
    python eval_continual.py --protocol=facts           facts told once, asked for after other text (facts.py)
    python eval_continual.py --protocol=days            ... and more of them every day
    python eval_continual.py --protocol=levels          do more levels help, and faster ones (the paper's figure 7)
    python eval_continual.py --quick                    the same in under two minutes, with tiny models: that it runs
    python eval_continual.py --learners=finetune,hope-3 --seeds=1

Each protocol has a base model of its own: of Python source, of languages, of requests by their words, of questions on a
passage. What is read and how it is scored stands in protocols.py.

Those who learn stand in learners.py; hope-N is --learn of sample.py with N slow levels (evidence.py), sleep-N sleeps as
well (sleep.py). All read the same tokens once. finetune and clock have the best of five step sizes by what they gain on
a text that is not scored (of facts, by what is left of it after other text); replay and joint have finetune's, hope and
sleep clock's, ewc the best of five strengths by gain less loss (where there is no base text, of two texts in turn).

R[i, j] is the score on j after reading i, 0 the base text; gained R[j, j] - b_j, b_j before any; lost, of the base in
the end; kept, the share of what j alone gains that is left in the end. Of intents it is the share of what was right
when j was read, among fewer names than in the end; of facts, after other text. What is scored is never read. Base
models are trained once, into OUT_DIR, where each result is kept: what was interrupted goes on. OUT_DIR/PROTOCOL.json
has it all.

Does NOT include: task labels or boundaries for hope and clock (finetune, ewc and replay are told them).
"""
import dataclasses
import glob
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass

import torch

from cli import (UserError, atomic_write, build, check, clear, git_commit, numbers, one_line_errors, read_args,
                 read_file, run_script, words)
from data import prepare
from learners import LEARNERS, ON_FEATURES, STEPS, make, read, steps_for
from machine import describe, load_checkpoint, load_learner, load_model, load_tokenizer, owner
from metrics import claim, main_score, mean_and_error, metrics, print_claims, print_tables, summary, verdicts
from protocols import BASES, CLOCKS, DOMAINS, digest, score, texts

one_line_errors()
HERE = os.path.dirname(os.path.abspath(__file__))
CODE = sorted(glob.glob(os.path.join(HERE, '*.py')))        # a result that was kept is of this code
QUICK = dict(seeds=1, n_bytes=6_000, n_lines=30, n_tasks=2, n_intents=3, n_requests=1, n_days=2, n_other=500)


@dataclass
class Continual:
    """The evaluation"""
    protocol: str = 'domains'           # domains | languages | intents | facts | levels
    learners: str = ''                  # which of them, as in icl,hope-3 ('' = all)
    seeds: int = 3                      # base models, each with texts of its own
    domains: str = DOMAINS              # texts: what --data of train.py takes, of a package with its suffix
    n_bytes: int = 50_000               # domains: of each text that is read; a fifth as much is scored
    n_languages: int = 2                # languages: how many are read, one after the other
    n_lines: int = 600                  # languages: of each that is read; a sixth as many are scored
    n_tasks: int = 10                   # intents: how many parts are read, one after the other
    n_intents: int = 15                 # intents: how many each part has, at most
    n_requests: int = 30                # intents: of each intent that are read; a tenth as many are scored
    facts: str = ''                     # facts, days: how many a passage has ('' = 1,20,200; of days 20)
    n_readings: int = 1                 # ... how often it is read, one time after the other
    n_other: int = 10_000               # ... tokens of other text behind it
    n_days: int = 8                     # days: how many
    out_dir: str = 'out-continual'      # where base models and results are kept
    json: str = ''                      # the file of results ('' = OUT_DIR/PROTOCOL.json)
    quick: bool = False                 # tiny models, little text, one seed: whether it works, not how well

    def __post_init__(self):
        check(self.protocol in BASES, f"--protocol is one of {', '.join(BASES)}, not '{self.protocol}'")
        check(self.protocol != 'levels' or not self.learners, '--protocol=levels has readers of its own, no --learners')
        theirs = LEARNERS + ON_FEATURES * (self.protocol == 'intents')
        self.learners = self.learners or ','.join(theirs)
        words('learners', self.learners, theirs)
        self.n_facts = numbers('facts', self.facts or ('20' if self.protocol == 'days' else '1,20' if self.quick
                                                          else '1,20,200'))
        check(self.protocol != 'days' or len(self.n_facts) == 1, f'--protocol=days takes one number, not {self.facts}')
        for name in ('seeds', 'n_bytes', 'n_languages', 'n_lines', 'n_tasks', 'n_intents', 'n_requests', 'n_readings',
                     'n_other', 'n_days'):
            check(getattr(self, name) >= 1, f'--{name} must be at least 1, not {getattr(self, name)}')
        check(self.n_languages <= 26, f'--n_languages must be at most 26, not {self.n_languages}')
        check(self.n_tasks <= 10, f'--n_tasks must be at most 10, not {self.n_tasks}')
        check(self.n_requests <= 50, f'--n_requests must be at most 50, not {self.n_requests}')
        check(max(self.n_facts) <= 1000, f'--facts must be at most 1000, not {max(self.n_facts)}')
        check(not os.path.isdir(self.json), f'--json={self.json} is a folder; a file is needed')


given = read_args([Continual], sys.argv[1:])
args, = build([Continual], (QUICK if given.get('quick') else {}) | given)
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
        asked = options.keys() - {'init_from', 'compile', 'eval_every'}     # these change nothing, or have moved
        if other := sorted(name for name in asked if str(its[name]) != str(options[name])):
            raise UserError(f"{out} holds a base model of another {', '.join(other)}; give another --out_dir")
        return checkpoint['step'] >= checkpoint['run']['max_steps']
    options |= {'sample_tokens': 0} | (TINY if args.quick else {})
    if args.quick and args.protocol == 'levels':        # needles need room
        options['block_size'] = 512
    if not whole():
        run_script('train.py', ({'resume': 'true'} if os.path.exists(path) else options) | {'out_dir': out})
        if not whole():
            raise UserError(f'the base model could not be trained into {out}')
    return path


def base_model(seed):
    """The path of the checkpoint that the learners of a seed begin with, the checkpoint, and its tokenizer."""
    kind = 'facts' if args.protocol == 'days' else args.protocol
    folder = f"{kind}-{seed}{'-quick' * args.quick}"
    path = None
    for stage, options in BASES[args.protocol]:
        path = train(folder + stage, seed=seed, **options, **({'init_from': path} if path else {'mixer': 'hope'}))
    checkpoint = load_checkpoint(path)
    return path, checkpoint, load_tokenizer(checkpoint, path)


# -----------------------------------------------------------------------------
# a cell: one learner, one seed


def kept_result(key, make_result):
    """A result from OUT_DIR, or made and kept there. key: all that it depends on."""
    about = json.dumps({**key, 'args': dataclasses.asdict(args) | {'facts': args.n_facts} | dict.fromkeys(
        ('learners', 'seeds', 'out_dir', 'json'))})
    about += ''.join(hashlib.sha256(read_file(file)).hexdigest() for file in CODE)
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


def choose(kind, checkpoint, enc, base, others, chosen):
    """
    [(step, gain on what is not scored, loss of the base)] for each of five steps; of facts, what is left of it. ewc
    reads all others in turn, and its loss is of the first ones too: without a base text, one alone has nothing to hold.
    """
    steps, others = steps_for(kind, chosen), others if kind == 'ewc' else others[:1]
    names = [name for text in others for name in text.names]

    def measure():
        rows = []
        for step in STEPS[kind][:2 if args.quick else None]:
            def fresh(): return make(kind, checkpoint, steps | {kind: step}, base)
            if others[0].passages:
                before, _, left = (main_score(row[0]) for row in read_passages(fresh, enc, base, others, False)[0])
                rows.append([step, left - before, 0.0])
                continue
            learner = fresh()
            def scores(): return [main_score(score(x, *learner.to_score(), enc, names)) for x in (base, *others)]
            R = [scores()]
            for text in others:
                learner.learn(text)
                R.append(scores())
            gains = [R[i][i] - R[0][i] for i in range(1, len(R))]
            lost = [R[i][i] - R[-1][i] for i in range(len(R))]
            rows.append([step, sum(gains) / len(gains), lost[0] + sum(lost[1:]) / len(gains)])
        return rows
    return kept_result({'steps of': kind, 'with': steps, 'by': digest(others), 'model': owner(checkpoint)}, measure)


def run(name, seed, checkpoint, enc, todo, chosen):
    """R and what follows from it, of one learner."""
    (base, *tasks), steps = todo, steps_for(name, chosen)
    measure = read_passages if args.protocol == 'facts' else read_in_turn

    def measured():
        start = time.perf_counter()
        R, alone, learner = measure(lambda: make(name, checkpoint, steps, base), enc, base, tasks, name == 'joint')
        return {'R': R, 'alone': alone, 'seconds': time.perf_counter() - start, 'state_bytes': learner.bytes(),
                'passes': args.n_readings if args.protocol in ('facts', 'days') else 1}
    found = kept_result({'run': name, 'of': digest(todo), 'steps': steps, 'model': owner(checkpoint)}, measured)
    values, alone = [[x and main_score(x) for x in row] for row in found['R']], [main_score(x) for x in found['alone']]
    if args.protocol == 'facts':                        # each column has been read by itself: before, read, other text
        return found | metrics([values[0], *[values[1]] * len(alone), values[2]], alone, 0)
    return found | metrics(values, alone, int(bool(base.scored)), at_once=name == 'joint')


def read_in_turn(fresh, enc, base, tasks, at_once):
    """
    Scores R of all texts before any is read and after each (of intents and days of the last one and, in the end, of
    all; of days so far after 1, 2, 4, 8, .. as well), those of each when it alone was read (of intents and days, after
    it was), and the learner. fresh() makes one; at_once: all texts are read together, and as much of the base text as
    of one of them.
    """
    def scores(learner, i):
        names = [name for text in tasks[:i] for name in text.names]
        whole = i in (0, len(tasks)) or args.protocol == 'days' and i & (i - 1) == 0        # 1, 2, 4, 8, ..
        def told(j, text): return text.unit not in ('intents', 'whole') or j == i or whole and j <= (i or len(tasks))
        return [score(text, *learner.to_score(), enc, names) if told(j, text) else None
                for j, text in enumerate([base, *tasks]) if text.scored]
    learner = fresh()
    R = [scores(learner, 0)]
    for i, text in enumerate(tasks):
        if not at_once:
            learner.learn(text)
        elif i == 0:
            more = [window for other in tasks[1:] for window in learner.windows(other.tokens)]
            learner.learn(text, more + learner.windows(base.tokens)[:len(learner.windows(text.tokens))])
        R.append(scores(learner, i + 1))
    if args.protocol in ('intents', 'days'):
        return R, [R[j + 1][j - len(tasks)] for j in range(len(tasks))], learner
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
            learner.learn(passage, *([learner.windows(text.tokens)] if at_once else []))
            rows[-1].append(now())
            if not at_once:
                learner.learn(text)
            rows[-1].append(now())
        for row, values in zip(R, zip(*rows)):
            row.append({'right': sum(values) / len(values)})
    return R, R[1], learner


# -----------------------------------------------------------------------------
# levels: no text after another, but how many of them, and how slow


def read_with(chunks, seed, path, checkpoint, enc):
    """{'mk': % of needles found, 'mv', 'mq', 'bpb': of a long text} by a reader with these clocks ('': none)."""
    times, n, n_tokens = (2, 2, 1_000) if args.quick else (8, 22, 16_000)

    def measured():
        length = times * checkpoint['config']['block_size']
        out = os.path.join(args.out_dir, 'results', f'needles-{os.getpid()}.json')
        os.makedirs(os.path.dirname(out), exist_ok=True)
        options = dict(out_dir=os.path.dirname(path), tasks='mk,mv,mq', lengths=length, n=n,
                       depths=2 if args.quick else 11, json=out, seed=seed)
        run_script('eval_niah.py', options | (dict(learn='true', cms_chunks=chunks) if chunks else {}))
        found = {cell['task']: 100 * cell['score'] for cell in json.loads(read_file(out))['cells']}
        os.remove(out)
        reader = load_learner(checkpoint, chunks=chunks).eval() if chunks else load_model(checkpoint).eval()
        text = prepare('english', quiet=True, enc=enc)[1]
        text = text[text != enc.eot_token][:n_tokens].astype(int)
        losses = read(reader, torch.from_numpy(text), None, f'{chunks}:')[0]
        return found | {'bpb': losses.sum().item() / math.log(2) / len(enc.decode_bytes(text[1:].tolist()))}
    return kept_result({'levels': chunks, 'seed': seed, 'model': owner(checkpoint)}, measured)


def levels():
    """A row for each number of levels and each slowest clock; a verdict on both."""
    rows, counts = {'': 'no level moves', '64': '1, every 64'}, (4,) if args.quick else (1, 2, 3, 4)
    for slowest, clocks in CLOCKS.items():
        rows |= {','.join(map(str, clocks[-k:])): f'{k}, slowest {slowest:,}' for k in counts}
    found, columns = {chunks: [] for chunks in rows}, ('mk', 'mv', 'mq', 'bpb')
    for seed in range(1, args.seeds + 1):
        base = base_model(seed)
        for chunks in rows:
            found[chunks].append(read_with(chunks, seed, *base))
            print(f'{clear(sys.stdout)}seed {seed} | {rows[chunks]:<16} | '
                  + ' | '.join(f'{name} {found[chunks][-1][name]:.2f}' for name in columns), flush=True)
    print(f'\n{args.seeds} seeds, means: needles found, %, and bits per byte of a long text')
    print(f"{'levels':<18}{'clocks':<20}" + ''.join(f'{name:>9}' for name in columns))
    for chunks, runs in found.items():
        print(f'{rows[chunks]:<18}{chunks:<20}' + ''.join(
            f'{mean_and_error([run[name] for run in runs])[0]:>9.2f}' for name in columns))
    of = {slowest: found[','.join(map(str, clocks))] for slowest, clocks in CLOCKS.items()}
    def needles(run): return (run['mk'] + run['mv'] + run['mq']) / 3
    def pairs(a, b, value): return [value(x) - value(y) for x, y in zip(a, b)]
    verdict = []
    for what, value in (('finds more needles', needles), ('reads a long text better', lambda run: -run['bpb'])):
        verdict += [claim(f'four levels, the slowest every {slowest:,} tokens, for the fastest alone: it {what}',
                          pairs(four, found['64'], value)) for slowest, four in of.items()]
        verdict.append(claim(f'of four levels the slowest every 512 tokens, for 8,192: it {what}',
                             pairs(of[512], of[8192], value)))
    write(found, verdict)


# -----------------------------------------------------------------------------
# go


def write(learners, verdict, curves=(), names=()):
    """The verdict on the terminal, and all of it in a file."""
    print_claims(verdict)
    path = args.json or os.path.join(args.out_dir, f'{args.protocol}.json')
    with atomic_write(path) as file:
        file.write(json.dumps({'about': {'commit': COMMIT, 'torch': torch.__version__, 'machine': describe('cpu'),
                                         'args': dataclasses.asdict(args), 'steps': curves, 'scored': names},
                               'learners': learners, 'verdict': verdict}, indent=1).encode())
    print(f'\nwritten to {path}')


def main():
    if args.protocol == 'levels':
        return levels()
    found, curves, names = {name: [] for name in args.learners.split(',')}, {}, []
    for seed in range(1, args.seeds + 1):
        _, checkpoint, enc = base_model(seed)
        base, tasks, others = texts(args, enc, seed)
        todo = [base, *tasks]
        names = [text.name for text in todo if text.scored or text.passages]
        if seed == 1:                                   # step sizes, once
            chosen = {}
            needed = {kind for name in found for kind in steps_for(name, dict.fromkeys(STEPS))}
            for kind in (kind for kind in STEPS if kind in needed):
                curves[kind] = choose(kind, checkpoint, enc, base, others, chosen)
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
    print_tables(args.protocol, found, names)
    write({name: {'seeds': runs, **summary(runs)} for name, runs in found.items()},
          verdicts(args.protocol, found, args.n_facts), curves, names)


if __name__ == '__main__':
    main()
