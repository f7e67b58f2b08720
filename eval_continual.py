"""
Does a model learn one thing after another without losing what it knew?

    python eval_continual.py                            three new kinds of text, one after the other (domains)
    python eval_continual.py --protocol=languages       two invented languages (languages.py)
    python eval_continual.py --quick                    the same in under two minutes, with tiny models: that it runs
    python eval_continual.py --learners=finetune,hope-3 --seeds=1

domains     a model of Python source reads C++, YAML and CMake, none of which it has seen; bits per byte
languages   a model that can gloss a language by its first lines reads lines of A, then of B; % of meanings right

nothing     the model as it is                          joint       fine-tuned on all of it at once: the ceiling
icl         its state goes on, its weights stay         clock       its MLPs learn as it reads: one level (cms.py)
finetune    AdamW, all weights                          hope-N      ... and N slow levels that keep, read out by
ewc         ... held by the Fisher information                      evidence, with an empty recurrent state
replay-P    ... beside P % of all that was read before, the base model's corpus among it

All read the same tokens once. finetune and clock have the best of five step sizes by what they gain on a text that is not
scored, replay and joint finetune's, hope clock's, ewc the best of five strengths by gain less loss. R[i, j] is the score on j after reading i, 0 the base text; gained R[j, j] - b_j; lost, of
the base; kept, the share of what j alone gains that is left in the end. What is scored is never read. The base models
are trained once, into OUT_DIR; each result is kept there, and an interrupted evaluation goes on. OUT_DIR/PROTOCOL.json
has everything.

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
import torch.nn.functional as F

from cli import (UserError, atomic_write, build, check, clear, git_commit, one_line_errors, read_args, read_file,
                 show_status, words)
from cms import Learner, empty_state
from corpora import load_documents
from languages import Language, chrf, tokens_of
from machine import describe, load_checkpoint, load_learner, load_model, load_tokenizer
from model import state_bytes
from tokenizer import encode

one_line_errors()
HERE = os.path.dirname(os.path.abspath(__file__))
LEARNERS = ('nothing', 'icl', 'finetune', 'ewc', 'replay-1', 'replay-5', 'joint', 'clock', 'hope-1', 'hope-2', 'hope-3')
STEPS = {'finetune': (1e-4, 3e-4, 1e-3, 2e-3, 4e-3), 'ewc': (1, 10, 100, 1e3, 1e4), 'clock': (0.1, 0.3, 1, 2, 4)}
DOMAINS, CHOOSE_BY = 'pip:torch:.h,pip:torch:.yaml,pip:torch:.cmake', 'pip:numpy:.f90,.f'      # Fortran
WINDOW = 256                    # tokens of a step of fine-tuning
BASE = 8                        # times n_bytes of the base text are at hand, 5 % of its corpus, for those who keep some


@dataclass
class Continual:
    """The evaluation"""
    protocol: str = 'domains'           # domains | languages
    learners: str = ','.join(LEARNERS)  # which of them
    seeds: int = 3                      # base models, each with texts of its own
    domains: str = DOMAINS              # texts: what --data of train.py takes, of a package with its suffix
    n_bytes: int = 50_000               # domains: of each text that is read; a fifth as much is scored
    n_lines: int = 300                  # languages: that are read; a sixth as many are scored
    out_dir: str = 'out-continual'      # where base models and results are kept
    json: str = ''                      # the file of results ('' = OUT_DIR/PROTOCOL.json)
    quick: bool = False                 # tiny models, little text, one seed: whether it works, not how well

    def __post_init__(self):
        check(self.protocol in ('domains', 'languages'), f"--protocol is domains or languages, not '{self.protocol}'")
        words('learners', self.learners, LEARNERS)
        for name in ('seeds', 'n_bytes', 'n_lines'):
            check(getattr(self, name) >= 1, f'--{name} must be at least 1, not {getattr(self, name)}')
        check(not os.path.isdir(self.json), f'--json={self.json} is a folder; a file is needed')
        if self.quick:
            self.seeds, self.n_bytes, self.n_lines = 1, min(self.n_bytes, 6_000), min(self.n_lines, 30)


given = read_args([Continual], sys.argv[1:])
args, = build([Continual], given)
torch.set_flush_denormal(True)                          # as in training


# -----------------------------------------------------------------------------
# base models and texts


@dataclass
class Text:
    """Something to be read: tokens (1-D), and what is scored, [(token ids, which of them count, bytes)]."""
    name: str
    tokens: torch.Tensor
    scored: list


def train(folder, *options):
    """A base model in OUT_DIR/folder, trained by train.py unless it is there -> the path of its checkpoint."""
    out = os.path.join(args.out_dir, folder)
    path = os.path.join(out, 'ckpt.pt')
    if not os.path.exists(path):
        tiny = ['--n_embd=32', '--n_layer=1', '--max_steps=30', '--batch_size=2', '--block_size=128', '--compile=false']
        command = ['train.py', *options, '--sample_tokens=0', f'--out_dir={out}', *(tiny if args.quick else [])]
        print(f"python {' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, os.path.join(HERE, command[0]), *command[1:]],
                              stdout=None if sys.stdout.isatty() else subprocess.DEVNULL)
        if done.returncode:
            raise UserError(f'the base model could not be trained into {out}')
    return path


def base_model(seed):
    """The checkpoint that the learners of a seed begin with, and its tokenizer."""
    folder = f"{args.protocol}-{seed}{'-quick' * args.quick}"
    if args.protocol == 'domains':
        path = train(folder, f'--seed={seed}')
    else:               # that there is something to recall is found in short rows
        short = train(f'{folder}-short', '--data=languages', '--block_size=128', '--batch_size=32', '--max_steps=800',
                      '--eval_every=800', '--start_lr=0.1', f'--seed={seed}')
        path = train(folder, '--data=languages', f'--init_from={short}', '--block_size=512', '--batch_size=8',
                     '--max_steps=500', '--eval_every=500', '--start_lr=0.1', '--learning_rate=2e-3', f'--seed={seed}')
    checkpoint = load_checkpoint(path)
    return checkpoint, load_tokenizer(checkpoint, path)


def domain(name, enc, seed):
    """n_bytes of a corpus to read, and a fifth as many of its held-out documents."""
    data, _, suffix = name.rpartition(':') if name.count(':') > 1 else (name, '', '')
    documents = list(zip(*load_documents(data, suffix)))
    random.Random(seed).shuffle(documents)              # at most 20 kB of each, so that no large one is all there is

    def piece(side, n):
        text = b'\n'.join(text[:20_000] for (_, text), which in documents if which == side)[:n]
        return torch.from_numpy(encode(enc, text).astype(int)), len(text)
    test, n_bytes = piece('val', args.n_bytes // 5)
    tokens, _ = piece('train', args.n_bytes * (BASE if name == 'python' else 1))
    return Text(name, tokens, [(test, torch.ones(len(test), dtype=bool), n_bytes)])


def language(name, enc, seed):
    """n_lines of a language to read, and others of it."""
    language = Language(f'{name} {seed}')
    lines = language.lines(args.n_lines, 'read')
    asked = [tokens_of(enc, [line]) for line in language.lines(max(2, args.n_lines // 6), 'scored', but=lines)]
    return Text(name, torch.tensor(tokens_of(enc, lines)[0]),
                [(torch.tensor([enc.encode_ordinary('\n')[-1]] + ids), torch.tensor([False] + marks), 0)
                 for ids, marks in asked])


def texts(enc, seed):
    """The base text, those that are read one after the other, and the one that step sizes are chosen by."""
    if args.protocol == 'domains':
        return [domain(name, enc, seed) for name in ('python', *args.domains.split(','))], domain(CHOOSE_BY, enc, seed)
    none = Text('none', torch.empty(0, dtype=torch.long), [])
    return [none] + [language(name, enc, seed) for name in 'AB'], language('steps', enc, seed)


# -----------------------------------------------------------------------------
# scores


@torch.no_grad()
def read(reader, tokens, state=None, what=None):
    """A text through a reader, from a state -> losses of its tokens but the first, what it said for them, its state."""
    losses, said = [], []
    for i in range(0, len(tokens) - 1, 512):
        idx, targets = tokens[i:i + 512], tokens[i + 1:i + 513]
        logits, _, state = reader(idx[:len(targets)][None], None, state)
        losses.append(F.cross_entropy(logits[0], targets, reduction='none'))
        said.append(logits[0].argmax(-1))
        if what:
            show_status(f'{what} {i + len(targets):,} of {len(tokens):,} tokens')
    return torch.cat(losses), torch.cat(said), state


def score(text, reader, state, enc):
    """
    domains: bits per byte of what is scored; languages: % of the meanings right, each with the right ones before it,
    and chrF of what is said. Every piece is read from the state.
    """
    nats, right, said_all = 0.0, [], []
    for tokens, counts, n_bytes in text.scored:
        losses, said, _ = read(reader, tokens, state)
        nats += losses.sum().item() / math.log(2) / n_bytes if n_bytes else 0.0
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
# learners: each reads texts in turn, and is a reader and the state that scoring begins with


class Stream:
    """nothing, icl, clock, hope-N: one stream that goes on, of a reader that may learn from it."""
    def __init__(self, name, checkpoint, step):
        self.name, self.state = name, None
        chunks = {'clock': '128', 'hope': '128' + ',change' * int(name[-1])} if name[0] == 'h' else {'clock': '128'}
        learns = name.partition('-')[0] in chunks
        if learns:
            share = 0.0 if name == 'clock' else -1.0
            self.reader = load_learner(checkpoint, chunks=chunks[name.partition('-')[0]], step=step, share=share).eval()
            self.scorer = Learner(self.reader.model, moves=False).eval()
        else:
            self.reader = self.scorer = load_model(checkpoint).eval()

    def learn(self, text):
        if self.name != 'nothing':
            self.state = read(self.reader, text.tokens, self.state, f'{self.name} reads {text.name}:')[2]

    def to_score(self):
        """icl remembers in its state alone; what a learner knows is in its levels: its state is emptied."""
        if self.name in ('nothing', 'icl') or self.state is None:
            return self.scorer, self.state
        kept = {name: self.state[name] for name in ('delta', 'book') if name in self.state}
        return self.scorer, empty_state(self.reader.model, 1) | kept

    def bytes(self):
        return state_bytes({name: x for name, x in (self.state or {}).items() if name != 'trace'}
                           if isinstance(self.state, dict) else self.state)


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
        n = max(1, (len(tokens) - 1) // WINDOW)
        return [tokens[i * WINDOW:(i + 1) * WINDOW + 1] for i in range(n)] if len(tokens) > 1 else []

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
        for i, window in enumerate(windows):
            lr = self.step * min(1, (i + 1) / 10) * max(0.05, 1 - i / len(windows))
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
        """Beyond the weights themselves, which are the model's."""
        return state_bytes([*(self.fisher or []), *(self.anchor or [])]) + 2 * sum(map(len, self.kept))


def steps_for(name, chosen):
    """Of the steps that were chosen, {'finetune', 'ewc', 'clock'}, those that a learner uses."""
    uses = {'clock': ['clock'], 'hope': ['clock'], 'ewc': ['finetune', 'ewc'], 'nothing': [], 'icl': []}
    return {kind: chosen[kind] for kind in uses.get(name.partition('-')[0], ['finetune']) if kind in chosen}


def make(name, checkpoint, steps, base):
    """A learner with the steps that it uses."""
    if name.partition('-')[0] in ('nothing', 'icl', 'clock', 'hope'):
        return Stream(name, checkpoint, steps.get('clock', 0.0))
    return FineTuned(name, checkpoint, steps['finetune'], base, steps.get('ewc', 0.0))


# -----------------------------------------------------------------------------
# a cell: one learner, one seed


def kept_result(key, make_result):
    """A result from OUT_DIR, or made and kept there. key: all that it depends on."""
    about = json.dumps({**key, 'args': [args.protocol, args.domains, args.n_bytes, args.n_lines, args.quick]})
    path = os.path.join(args.out_dir, 'results', hashlib.sha256(about.encode()).hexdigest()[:20] + '.json')
    if os.path.exists(path):
        return json.loads(read_file(path))
    result = make_result()
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
    return kept_result({'steps of': kind, 'with': steps, 'by': text.name}, measure)


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
    found = kept_result({'run': name, 'seed': seed, 'steps': steps}, measure)
    first = int(bool(base.scored))                      # the place of the first task among what is scored
    values, alone = [[main_score(x) for x in row] for row in found['R']], [main_score(x) for x in found['alone']]
    n, before, last = len(tasks), values[0], values[-1]
    if name == 'joint':                                 # there is no before and after
        gained = [last[j + first] - before[j + first] for j in range(n)]
        return found | {'gained': gained, 'kept': [1.0] * n, 'lost': before[0] - last[0] if first else 0.0}
    gains = [alone[j] - before[j + first] for j in range(n)]
    return found | {'gained': [values[j + 1][j + first] - before[j + first] for j in range(n)],
                    'kept': [(last[j + first] - before[j + first]) / gain if gain > 0 else 0.0
                             for j, gain in enumerate(gains)],
                    'lost': before[0] - last[0] if first else 0.0}


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
            'kept_first': [mean(r['kept'][:-1]) for r in runs], 'lost': [r['lost'] for r in runs]}
    return {name: mean_and_error(values) for name, values in rows.items()}


def claim(text, numbers, low):
    """A claim that one number is at least low: holds beyond two standard errors, does not, or cannot be told."""
    mean, error = mean_and_error(numbers)
    margin = 2 * error if error is not None else math.inf
    holds = True if mean - margin >= low else False if mean + margin < low else None
    return {'claim': text, 'holds': holds, 'numbers': {'mean': mean, 'standard_error': error, 'asked': low}}


def verdicts(found):
    """What the paper claims, and what was asked of the levels here, where the learners for it were run."""
    def pairs(a, b, value): return [value(x) - value(y) for x, y in zip(found[a], found[b])]
    def last(r): return sum(r['kept'][:-1]) / len(r['kept'][:-1])
    def final(r): return sum(main_score(x) for x in r['R'][-1]) / len(r['R'][-1])
    def gained(r): return sum(r['gained']) / len(r['gained'])
    out = []
    chain = [name for name in ('icl', 'hope-1', 'hope-2', 'hope-3') if name in found]
    for a, b in zip(chain, chain[1:]):
        out.append(claim(f'{b} ends better than {a}, mean over all that is scored', pairs(b, a, final), 0))
    for rival in ('finetune', 'ewc', 'replay-1', 'replay-5', 'clock'):
        if rival in found and 'hope-3' in found:
            out.append(claim(f'hope-3 ends better than {rival}', pairs('hope-3', rival, final), 0))
    if 'hope-3' in found:
        out.append(claim('hope-3 keeps 90 % of its gain on all but the last', [last(r) for r in found['hope-3']], 0.9))
        if args.protocol == 'domains':
            out.append(claim('hope-3 loses at most 0.02 bits per byte of the base text',
                             [-r['lost'] for r in found['hope-3']], -0.02))
        if 'finetune' in found:
            out.append(claim('hope-3 gains 90 % of what fine-tuning gains',
                             [gained(a) / gained(b) for a, b in zip(found['hope-3'], found['finetune'])], 0.9))
    return out


def print_tables(found, names):
    unit = 'bits per byte' if args.protocol == 'domains' else '% of meanings right'
    for name, runs in found.items():
        print(f'\n{name}: R, {unit}, mean over seeds; a row is what was read last, a column what is scored')
        print(f"{'':<18}" + ''.join(f'{column:>18}' for column in names))
        for i in range(len(runs[0]['R'])):
            cells = [mean_and_error([abs(main_score(r['R'][i][j])) for r in runs])[0] for j in range(len(names))]
            row = 'before' if not i else names[i - len(runs[0]['R'])]
            print(f'{row:<18}' + ''.join(f'{x:>18.3f}' for x in cells))

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
        file.write(json.dumps({'about': {'commit': git_commit(), 'torch': torch.__version__, 'machine': describe('cpu'),
                                         'args': dataclasses.asdict(args), 'steps': curves, 'scored': names},
                               'learners': {name: {'seeds': runs, **summary(runs)} for name, runs in found.items()},
                               'verdict': verdict}, indent=1).encode())
    print(f'\nwritten to {path}')


if __name__ == '__main__':
    main()
