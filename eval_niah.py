"""
Test a model's recall: needles in haystacks of any length (niah.py), answered by writing, scored by exact match.

    python train.py --data=niah --out_dir=out-niah          a model that is asked for them; results/needles.md has the
                                                            options of one that finds them
    python eval_niah.py --out_dir=out-niah                  the six tasks at 1, 4 and 16 times its training length
    python eval_niah.py --out_dir=out-niah --tasks=s1 --lengths=1024,65536 --n=110
    python eval_niah.py --out_dir=out-niah --gate_floor=0.2         what its gates nearly close is closed (memory.py)
    python eval_niah.py --out_dir=out-niah --learn          its MLPs learn from the haystack as it is read (cms.py)
    python eval_niah.py --oracle                            a program that can copy: 100 %, or this file is wrong
    python eval_niah.py --guess                             random values of the right form: what chance is

A length is the tokens of the prompt (end of text, haystack with its needles, question) and of room for the answer.
The model writes greedily until it ends its text; the score is the share of the values asked for that stand in what it
wrote as whole words, a mean over examples. Haystacks are cut from held-out text, and no seed is one of training. A
recurrent memory reads them in constant memory; attention sees the last block_size tokens. OUT_DIR/niah.json has it all.

Does NOT include: scores by probability among given choices, which a model that recalls nothing can win.
"""
import collections
import dataclasses
import json
import math
import os
import random
import shlex
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from cli import atomic_write, build, check, git_commit, interval, numbers, one_line_errors, read_args, words
from data import prepare
from machine import load_checkpoint, load_learner, load_model, load_tokenizer, pick_checkpoint, pick_device
from model import check_ids, state_bytes, stream
from niah import FORMS, TASKS, Needles, found, oracle

one_line_errors()

# -----------------------------------------------------------------------------
# knobs


@dataclass
class Eval:
    """The evaluation"""
    out_dir: str = 'out'                # the folder of the checkpoint
    best: bool = False                  # the checkpoint of the lowest validation loss, not the last
    tasks: str = 's1,s2,s3,mk,mv,mq'    # which of them
    lengths: str = ''                   # tokens, as in 512,2048 ('' = 1, 4 and 16 times the block size)
    n: int = 33                         # examples of each task and length, as many for each depth
    depths: int = 11                    # places of the needle, evenly from the haystack's start to its end
    form: str = ''                      # short | full, how long keys and values are ('' = as trained, or short)
    haystack: str = 'english'           # a corpus (corpora.py); its held-out part is read
    seed: int = 0                       # of the examples
    batch_size: int = 11                # prompts that are read at once
    json: str = ''                      # where the results go ('' = OUT_DIR/niah.json)
    # who answers
    oracle: bool = False                # a regular expression, in the place of a model
    guess: bool = False                 # random values, in the place of a model
    learn: bool = False                 # the model, while its MLPs learn from what it reads
    cms_chunks: str = ''                # tokens between two moves of each level ('' = as trained, or 128,change,..)
    cms_step: float = -1.0              # inner step size of all levels (below 0 = as trained)
    cms_share: float = -1.0             # of all levels' weight, dealt out at every token (below 0 = the default)
    gate_floor: float = -1.0            # the model's write gates below it are closed (below 0 = as trained)
    device: str = 'auto'                # cpu | cuda | mps; auto is cuda where there is one

    def __post_init__(self):
        check(not os.path.isdir(self.json), f'--json={self.json} is a folder; a file is needed')
        for name in ('n', 'batch_size'):
            check(getattr(self, name) >= 1, f'--{name} must be at least 1, not {getattr(self, name)}')
        check(self.depths >= 2, f'--depths must be at least 2, not {self.depths}')
        check(self.n % self.depths == 0, f'--n={self.n} must be a multiple of --depths={self.depths}')
        words('tasks', self.tasks, TASKS)
        numbers('lengths', self.lengths or '1')
        check(self.form in ('', *FORMS), f"--form must be one of {', '.join(FORMS)}, not '{self.form}'")
        check(self.oracle + self.guess + self.learn <= 1, 'give one of --oracle, --guess and --learn')
        check(self.learn or not self.cms_chunks and self.cms_step < 0 and self.cms_share < 0,
              'the --cms options are for --learn')
        check(self.gate_floor < 0.5, f'--gate_floor must be below 0.5, not {self.gate_floor}')
        check(self.cms_step < math.inf, f'--cms_step must be a number, not {self.cms_step}')


given = read_args([Eval], sys.argv[1:])
args, = build([Eval], given)

# -----------------------------------------------------------------------------
# who answers

torch.set_flush_denormal(True)                              # as in training
device, model, trained, enc, block_size = pick_device(args.device), None, {}, None, 512
if not args.oracle and not args.guess:
    ckpt_path = pick_checkpoint(args.out_dir, args.best)
    checkpoint = load_checkpoint(ckpt_path)
    trained, enc = checkpoint['run'], load_tokenizer(checkpoint, ckpt_path)
    if args.gate_floor >= 0:
        checkpoint['config']['gate_floor'] = args.gate_floor
    if args.learn:
        reader = load_learner(checkpoint, device, args.cms_chunks, args.cms_step, args.cms_share).eval()
        model = reader.model
    else:
        reader = model = load_model(checkpoint, device).eval()
    block_size = model.config.block_size
_, text, enc, info = prepare(args.haystack, enc.name if enc else 'bytes', args.out_dir if model else None, quiet=True,
                             enc=enc)
kind, _, trained_form = trained.get('data', '').partition(':')          # niah, or niah:full (tasks.py)
form = args.form or (trained_form if kind == 'niah' else '') or 'short'
needles = Needles(enc, text, form)
tasks = args.tasks.split(',')
lengths = numbers('lengths', args.lengths) if args.lengths else [block_size * times for times in (1, 4, 16)]


def examples(task, length):
    """The n examples of a task and length: the same ones for every model with that tokenizer."""
    return [needles.example(task, length, f'eval {args.seed} {task} {length} {i}', i % args.depths / (args.depths - 1))
            for i in range(args.n)]


def replies(task, part):
    """What is written after each prompt of some examples of one length -> list of str, bytes of state per prompt."""
    if args.oracle:
        return [oracle(enc.decode(example.prompt.tolist(), errors='replace')) for example in part], 0
    if args.guess:
        rng = random.Random(str([example.golds for example in part]))
        return [', '.join(needles.values(TASKS[task].kind, len(example.golds), rng)) for example in part], 0
    prompts = torch.from_numpy(np.stack([example.prompt for example in part])).to(device)       # (B, T)
    written, state = [], None
    check_ids(prompts, model.config.vocab_size)
    for token, state in stream(reader, prompts, needles.answer_room(task) + 1, temperature=0, stop_token=enc.eot_token):
        written.append(token)
    rows = torch.stack(written, dim=1).tolist()
    texts = [enc.decode([i for i in row if i != enc.eot_token], errors='replace') for row in rows]
    return texts, state_bytes(state) // len(part)


# -----------------------------------------------------------------------------
# scores


def measure(task, length):
    """One cell of the table."""
    start, scores, by_depth, kept = time.perf_counter(), [], collections.defaultdict(list), []
    todo, state = examples(task, length), 0
    for i in range(0, args.n, args.batch_size):
        part = todo[i:i + args.batch_size]
        texts, state = replies(task, part)
        for example, text in zip(part, texts):
            hits = found(text, example.golds)
            scores.append(sum(hits) / len(hits))
            for depth, hit in zip(example.depths, hits):
                by_depth[round(depth * (args.depths - 1))].append(hit)
            kept.append({'golds': example.golds, 'answer': text})
        if sys.stderr.isatty():
            print(f'\r{task} at {length:,}: {len(scores)}/{args.n} ', end='', file=sys.stderr, flush=True)
    score = sum(scores) / args.n
    low, high = interval(score, args.n)
    seconds = time.perf_counter() - start
    if sys.stderr.isatty():
        print('\r', end='', file=sys.stderr)
    print(f'{task:<4}{length:>9,} tokens | {args.n} examples | {100 * score:5.1f} % '
          f'[{100 * low:.0f}-{100 * high:.0f}] | state {state / 1024:,.0f} KiB | {seconds:.1f} s', flush=True)
    return {'task': task, 'length': length, 'n': args.n, 'score': score, 'low': low, 'high': high,
            'chance': needles.chance(task), 'state_bytes': state, 'seconds': seconds,
            'by_depth': [[sum(by_depth[d]), len(by_depth[d])] for d in range(args.depths)],
            'answers': kept[:args.depths]}


def print_table(cells):
    """Tasks down, lengths across."""
    print(f'\nexact match in %, 95 % interval, {args.n} examples each')
    print(f"{'task':<6}" + ''.join(f'{length:>17,}' for length in lengths) + f"{'chance':>10}{'any shown':>12}")
    for task in tasks:
        row = [cells[task, length] for length in lengths]
        text = [f"{100 * c['score']:.1f} [{100 * c['low']:.0f}-{100 * c['high']:.0f}]" for c in row]
        t = TASKS[task]                                     # 'any shown': naming as many of the values that are shown
        print(f'{task:<6}' + ''.join(f'{cell:>17}' for cell in text)
              + f"{100 * row[0]['chance']:>10.2g}{100 * t.n_asked / t.n_keys:>12.0f}")


def print_map(cells):
    """A row is a depth; for each task a column is a length, in the order of the table."""
    colours = sys.stdout.isatty() and 'NO_COLOR' not in os.environ
    width = max(4, len(lengths) + 2)
    print('\nrows: where the needle lies, in % of the haystack; columns: lengths; a digit: tenths found, * is all')
    print(' ' * 6 + ''.join(f'{task:<{width}}' for task in tasks))
    for depth in range(args.depths):
        line = f'{100 * depth / (args.depths - 1):4.0f}  '
        for task in tasks:
            for length in lengths:
                hits, of = cells[task, length]['by_depth'][depth]
                mark = '.' if not of else '*' if hits == of else str(10 * hits // of)
                shade = (196, 202, 208, 220, 154, 46)[5 * hits // max(of, 1)]       # red to green
                line += f'\033[30;48;5;{shade}m{mark}\033[0m' if colours and of else mark
            line += ' ' * (width - len(lengths))
        print(line.rstrip())


# -----------------------------------------------------------------------------
# go

for task in tasks:                                          # what is too short is said before a haystack is read
    examples(task, min(lengths))
who = 'oracle' if args.oracle else 'guess' if args.guess else model.config.mixer
print(f'{who}{" that learns while it reads" if args.learn else ""}'
      + (f' | {model.num_params():,} parameters | {checkpoint["step"]:,} steps of '
         f'{trained["batch_size"]} x {block_size:,} tokens' if model else ''))
print(f'haystack {args.haystack}, held-out part: {len(text):,} tokens, sha256 {info["sha256"][:16]}')
print(f'form {form}: numbers of {FORMS[form]["number"]} digits, codes of {FORMS[form]["code"]}, '
      f'keys of {"two words" if FORMS[form]["adjectives"] else "one word"}')
if model and kind != 'niah':
    print('this model was not trained on needles (train.py --data=niah): it does not know what is asked')
if len(text) < max(lengths):
    print(f'the longest haystacks go through that text {max(lengths) / len(text):.1f} times')
path = args.json or (os.path.join(args.out_dir, 'niah.json') if model else '')
about = {'command': shlex.join(sys.argv), 'commit': git_commit(), 'torch': torch.__version__, 'who': who,
         'parameters': model.num_params() if model else 0, 'run': trained,
         'config': dataclasses.asdict(model.config) if model else {}, 'eval': dataclasses.asdict(args),
         'form': FORMS[form], 'haystack': info}
cells = {}
for length in sorted(lengths):
    for task in tasks:
        cells[task, length] = measure(task, length)
        if path:                                            # whole after every cell: the long ones come last
            with atomic_write(path) as file:
                file.write(json.dumps(about | {'cells': list(cells.values())}, indent=1).encode())
print_table(cells)
print_map(cells)
if path:
    print(f'\nwritten to {path}; again with: python {shlex.join(sys.argv)}')
