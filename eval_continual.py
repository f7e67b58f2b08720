"""
Does a model learn one thing after another without losing what it knew?

    python eval_continual.py                            three new kinds of text, one after the other (domains)
    python eval_continual.py --protocol=languages       two invented languages (languages.py)
    python eval_continual.py --quick                    the same in under two minutes, with tiny models: that it runs
    python eval_continual.py --learners=finetune,hope-3 --seeds=1

domains     a model of Python source reads C++, YAML and CMake, none of which it has seen; bits per byte
languages   a model that can gloss a language by its first lines reads lines of A, then of B; % of meanings right

Those who learn stand in learners.py; hope-N is --learn of sample.py with N slow levels (evidence.py), sleep-N sleeps as
well (sleep.py). All read the same tokens once. finetune and clock have the best of five step sizes by what they gain on
a text that is not scored; replay and joint have finetune's, hope and sleep clock's, ewc the best of five strengths by
gain less loss.

R[i, j] is the score on j after reading i, 0 the base text; gained R[j, j] - b_j, b_j before any; lost, of the base in
the end; kept, the share of what j alone gains that is left in the end. What is scored is never read. Base models are
trained once, into OUT_DIR, where each result is kept: what was interrupted goes on. OUT_DIR/PROTOCOL.json has it all.

Does NOT include: task labels or boundaries for hope and clock (finetune, ewc and replay are told them).
"""
import dataclasses
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

from cli import (UserError, atomic_write, build, check, clear, git_commit, one_line_errors, read_args, read_file,
                 words)
from corpora import SAYS_GENERATED, load_documents
from languages import Language, chrf, tokens_of
from learners import LEARNERS, STEPS, make, read, steps_for
from machine import describe, load_checkpoint, load_tokenizer, owner
from tokenizer import encode

one_line_errors()
HERE = os.path.dirname(os.path.abspath(__file__))
DOMAINS, CHOOSE_BY = 'pip:torch:.h,pip:torch:.yaml,pip:torch:.cmake', 'pip:numpy:.f90,.f'      # Fortran
CODE = [f'{name}.py' for name in 'eval_continual learners cms evidence sleep languages corpora'.split()]
BASE = 8                        # times n_bytes of the base text are at hand, 5 % of its corpus, for those who keep some


@dataclass
class Continual:
    """The evaluation"""
    protocol: str = 'domains'           # domains | languages
    learners: str = ','.join(LEARNERS)  # which of them
    seeds: int = 3                      # base models, each with texts of its own
    domains: str = DOMAINS              # texts: what --data of train.py takes, of a package with its suffix
    n_bytes: int = 50_000               # domains: of each text that is read; a fifth as much is scored
    n_languages: int = 2                # languages: how many are read, one after the other
    n_lines: int = 600                  # languages: of each that is read; a sixth as many are scored
    out_dir: str = 'out-continual'      # where base models and results are kept
    json: str = ''                      # the file of results ('' = OUT_DIR/PROTOCOL.json)
    quick: bool = False                 # tiny models, little text, one seed: whether it works, not how well

    def __post_init__(self):
        check(self.protocol in ('domains', 'languages'), f"--protocol is domains or languages, not '{self.protocol}'")
        words('learners', self.learners, LEARNERS)
        for name in ('seeds', 'n_bytes', 'n_languages', 'n_lines'):
            check(getattr(self, name) >= 1, f'--{name} must be at least 1, not {getattr(self, name)}')
        check(self.n_languages <= 26, f'--n_languages must be at most 26, not {self.n_languages}')
        check(not os.path.isdir(self.json), f'--json={self.json} is a folder; a file is needed')
        if self.quick:
            self.seeds, self.n_bytes, self.n_lines = 1, min(self.n_bytes, 6_000), min(self.n_lines, 30)


given = read_args([Continual], sys.argv[1:])
args, = build([Continual], given)
torch.set_flush_denormal(True)                          # as in training
COMMIT = git_commit()                                   # of the code that runs, whatever comes after it is read


# -----------------------------------------------------------------------------
# base models and texts


@dataclass
class Text:
    """Something to be read: tokens (1-D), and what is scored, [(token ids, which of them count, bytes)]."""
    name: str
    tokens: torch.Tensor
    scored: list


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
    if args.protocol == 'domains':
        path = train(folder, seed=seed)
    else:               # that there is something to recall is found in short rows; long ones have all words
        options, path = dict(data='languages', start_lr=0.1, seed=seed), None
        for name, T, n, steps in (('-short', 128, 32, 800), ('-middle', 512, 8, 500), ('', 2048, 2, 1000)):
            more = dict(init_from=path, learning_rate=2e-3) if path else {}
            path = train(folder + name, **options, block_size=T, batch_size=n, max_steps=steps, eval_every=500, **more)
    checkpoint = load_checkpoint(path)
    return checkpoint, load_tokenizer(checkpoint, path)


def domain(name, enc, seed):
    """n_bytes of a corpus to read, and a fifth as many of its held-out documents. a+b: pieces of 500 bytes in turn."""
    if '+' in name:
        parts = [domain(part, enc, seed) for part in name.split('+')]
        pieces = [part.tokens.split(len(part.tokens) * 500 // args.n_bytes) for part in parts]
        mixed = torch.cat([piece for turn in zip(*pieces) for piece in turn])
        return Text(name, mixed, [scored for part in parts for scored in part.scored])
    data, _, suffix = name.rpartition(':') if name.count(':') > 1 else (name, '', '')
    documents = [pair for pair in zip(*load_documents(data, suffix)) if not SAYS_GENERATED.search(pair[0][1][:1000])]
    random.Random(seed).shuffle(documents)              # at most 20 kB of each, so that no large one is all there is

    def piece(side, n):
        text = b'\n'.join(text[:20_000] for (_, text), which in documents if which == side)[:n]
        return torch.from_numpy(encode(enc, text).astype(int)), len(text)
    test, n_bytes = piece('val', args.n_bytes // 5)
    tokens, _ = piece('train', args.n_bytes * (BASE if name == 'python' else 1))
    return Text(name, tokens, [(test, torch.ones(len(test), dtype=bool), n_bytes)])


def language(name, enc, seed):
    """n_lines of a language to read, and others of it, each after one that was read: some levels begin mid-line."""
    language, newline = Language(f'{name} {seed}'), enc.encode_ordinary('\n')[-1:]
    lines, asked = language.lines(args.n_lines, 'read'), []
    for before, line in zip(lines, language.lines(max(2, args.n_lines // 6), 'scored', but=lines)):
        first, (ids, marks) = newline + tokens_of(enc, [before])[0], tokens_of(enc, [line])
        asked.append((torch.tensor(first + ids), torch.tensor([False] * len(first) + marks), 0))
    return Text(name, torch.tensor(tokens_of(enc, lines)[0]), asked)


def texts(enc, seed):
    """The base text, those that are read one after the other, and the one that step sizes are chosen by."""
    if args.protocol == 'domains':
        return [domain(name, enc, seed) for name in ('python', *args.domains.split(','))], domain(CHOOSE_BY, enc, seed)
    none, names = Text('none', torch.empty(0, dtype=torch.long), []), [chr(65 + i) for i in range(args.n_languages)]
    return [none] + [language(name, enc, seed) for name in names], language('steps', enc, seed)


# -----------------------------------------------------------------------------
# scores


def score(text, reader, state, enc):
    """
    domains: bits per byte of what is scored; languages: % of the meanings right, each with the right ones before it,
    and chrF of what is said. Every piece is read from the state.
    """
    nats, right, said_all = 0.0, [], []
    for tokens, counts, n_bytes in text.scored:
        losses, said, _ = read(reader, tokens, state)
        nats += losses.sum().item() / math.log(2) / n_bytes / len(text.scored) if n_bytes else 0.0
        counts, meant = counts[1:], tokens[1:]
        if not n_bytes:
            right += (said == meant)[counts].tolist()
            said_all.append(chrf(*(enc.decode(x[counts].tolist(), errors='replace') for x in (said, meant))))
    if text.scored and text.scored[0][2]:
        return {'bpb': nats}
    if not text.scored:
        return {'right': 0.0, 'chrf': 0.0}
    return {'right': 100 * sum(right) / max(1, len(right)), 'chrf': 100 * sum(said_all) / max(1, len(said_all))}


# -----------------------------------------------------------------------------
# a cell: one learner, one seed


def kept_result(key, make_result):
    """A result from OUT_DIR, or made and kept there. key: all that it depends on."""
    about = json.dumps({**key, 'args': [args.protocol, args.domains, args.n_bytes, args.n_languages, args.n_lines,
                                        args.quick]})
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
            before = [main_score(score(x, *learner.to_score(), enc)) for x in (text, base)]
            learner.learn(text)
            now = [main_score(score(x, *learner.to_score(), enc)) for x in (text, base)]
            rows.append([step, now[0] - before[0], before[1] - now[1]])
        return rows
    return kept_result({'steps of': kind, 'with': steps, 'by': text.name, 'model': owner(checkpoint)}, measure)


def run(name, seed, checkpoint, enc, todo, chosen):
    """R and what follows from it, of one learner."""
    (base, *tasks), steps = todo, steps_for(name, chosen)

    def measure():
        start, learner = time.perf_counter(), make(name, checkpoint, steps, base)
        R = [[score(text, *learner.to_score(), enc) for text in todo if text.scored]]
        for i, text in enumerate(tasks):
            if name != 'joint':
                learner.learn(text)
            elif i == 0:                                # all at once, and as much of the base text as of one of them
                more = [window for other in tasks[1:] for window in learner.windows(other.tokens)]
                learner.learn(text, more + learner.windows(base.tokens)[:len(learner.windows(text.tokens))])
            R.append([score(text, *learner.to_score(), enc) for text in todo if text.scored])
        seconds, alone = time.perf_counter() - start, [R[1][-len(tasks)]]
        for text in tasks[1:]:
            other = make(name, checkpoint, steps, base)
            if name != 'joint':
                other.learn(text)
            alone.append(score(text, *other.to_score(), enc))
        return {'R': R, 'alone': alone, 'seconds': seconds, 'state_bytes': learner.bytes(), 'passes': 1}
    found = kept_result({'run': name, 'seed': seed, 'steps': steps, 'model': owner(checkpoint)}, measure)
    values, alone = [[main_score(x) for x in row] for row in found['R']], [main_score(x) for x in found['alone']]
    return found | metrics(values, alone, int(bool(base.scored)), at_once=name == 'joint')


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


def mean_and_error(values):
    """The mean of one number per seed, and its standard error (None of one seed)."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((x - mean) ** 2 for x in values) / max(1, len(values) - 1) / len(values))
    return mean, spread if len(values) > 1 else None


def summary(runs):
    """{'gained', 'kept', 'lost', 'kept_first': (mean, standard error)} over seeds; of several texts their mean."""
    def mean(values): return sum(values) / len(values)
    rows = {'gained': [mean(r['gained']) for r in runs], 'kept': [mean(r['kept']) for r in runs],
            'kept_first': [mean(r['kept'][:-1] or r['kept']) for r in runs], 'lost': [r['lost'] for r in runs]}
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
    def final(r): return sum(main_score(x) for x in r['R'][-1]) / len(r['R'][-1])
    def gained(r): return sum(r['gained']) / len(r['gained'])
    out = []
    chain = [name for name in ('icl', 'hope-1', 'hope-2', 'hope-3') if name in found]
    for a, b in zip(chain, chain[1:]):
        out.append(claim(f'{b} ends better than {a}, mean over all that is scored', pairs(b, a, final)))
    for rival in ('finetune', 'ewc', 'replay-1', 'replay-5', 'joint', 'clock', 'hope-0', 'clocks'):
        if rival in found and 'hope-3' in found:
            out.append(claim(f'hope-3 ends better than {rival}', pairs('hope-3', rival, final)))
    if 'hope-3' in found:
        out.append(claim('hope-3 keeps 90 % of its gain on all but the last',
                         [first_ones(r) for r in found['hope-3']], 0.9))
        if args.protocol == 'domains':
            out.append(claim('hope-3 loses at most 0.02 bits per byte of the base text',
                             [-r['lost'] for r in found['hope-3']], -0.02))
        if 'finetune' in found:
            out.append(claim('hope-3 gains more than 90 % of what fine-tuning gains',
                             [gained(a) - 0.9 * gained(b) for a, b in zip(found['hope-3'], found['finetune'])]))
    return out


def print_tables(found, names):
    unit = 'bits per byte' if args.protocol == 'domains' else '% of meanings right'
    width = 2 + max(8, *map(len, names))
    for name, runs in found.items():
        print(f'\n{name}: R, {unit}, mean over seeds; a row is what was read last, a column what is scored')
        print(f"{'':<{width}}" + ''.join(f'{column:>{width}}' for column in names))
        for i in range(len(runs[0]['R'])):
            cells = [mean_and_error([abs(main_score(r['R'][i][j])) for r in runs])[0] for j in range(len(names))]
            row = 'before' if not i else names[i - len(runs[0]['R'])]
            print(f'{row:<{width}}' + ''.join(f'{x:>{width}.3f}' for x in cells))

    def cell(pair, scale=1.0):
        mean, error = pair
        return f'{scale * mean:.3f}' + (f' +- {2 * scale * error:.3f}' if error is not None else '')
    print(f'\n{len(next(iter(found.values())))} seeds, +- two standard errors; gained and lost in {unit}, kept in %')
    print(f"{'':<10}{'gained':>18}{'lost of the base':>18}{'kept, first ones':>20}{'kept, all':>18}{'bytes':>12}"
          f"{'passes':>8}{'seconds':>9}")
    for name, runs in found.items():
        s = summary(runs)
        print(f"{name:<10}{cell(s['gained']):>18}{cell(s['lost']):>18}{cell(s['kept_first'], 100):>20}"
              f"{cell(s['kept'], 100):>18}{runs[0]['state_bytes']:>12,}{runs[0]['passes']:>8}"
              f"{sum(r['seconds'] for r in runs) / len(runs):>9.0f}")


def main():
    learners = args.learners.split(',')
    found, curves, names = {name: [] for name in learners}, {}, []
    for seed in range(1, args.seeds + 1):
        checkpoint, enc = base_model(seed)
        todo, other = texts(enc, seed)
        names = [text.name for text in todo if text.scored]
        if seed == 1:                                   # step sizes, once
            chosen = {}
            needed = {kind for name in learners for kind in steps_for(name, dict.fromkeys(STEPS))}
            for kind in (kind for kind in STEPS if kind in needed):
                curves[kind] = choose(kind, checkpoint, enc, todo[0], other, chosen)
                of = (lambda row: row[1] - row[2]) if kind == 'ewc' else (lambda row: row[1])
                chosen[kind] = max(curves[kind], key=of)[0]
                print(f'{clear(sys.stdout)}{kind}: step, gained on a text not scored, lost of the base: '
                      + '; '.join(f'{a:g} {b:.3f} {c:.3f}' for a, b, c in curves[kind])
                      + f'; chosen {chosen[kind]:g}', flush=True)
        for name in learners:
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
