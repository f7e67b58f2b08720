"""
Choose how a text goes on: of several choices the one that a model finds likeliest, as common sense is tested.

    python eval_choices.py                              near and far, of the checkpoint's own held-out text
    python eval_choices.py --out_dir=out,out-tf         several models in one table, and how they differ
    python eval_choices.py --data=hellaswag.jsonl       a file: a line of JSON is {ctx, endings, label}, as HellaSwag's,
    python eval_choices.py --data=piqa.jsonl --labels=piqa.lst      {goal, sol1, sol2, label}, as PIQA's, or
    python eval_choices.py --data=mine.jsonl            {context, choices, answer}; labels count from 0
    python eval_choices.py --learn --context=4096       the MLPs learn from the context as it is read (cms.py)

near    how a held-out document goes on, or three pieces from elsewhere in it, outside the context
far     ... or three pieces of other held-out documents. All are of the same number of bytes and begin at a line's end

Small models have no common sense, and these two, which need no download, rank them all the same. Right is who prefers
the right choice to every other one, by bits over the bytes of a choice, whatever tokens these make, in two ways:

likelihood      it costs the fewest after the context, as the paper counts. But a plain line costs less than a rare one
                whatever stands before it, and small models see little more
gain            the context saves the most of what it costs without any

Context and choice are cut into tokens apart, so that the seam is the same for all choices; of HellaSwag and PIQA a
blank, which belongs to the choice, stands between them. Attention sees the last block_size tokens of a context,
recurrent memories all of it.

Does NOT include: questions with examples before them, choices that are letters (A, B, C, D).
"""
import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import tasks
from carry import map_state
from cli import (UserError, atomic_write, build, check, clear, git_commit, interval, one_line_errors, read_args,
                 read_file, show_status)
from data import Text
from machine import describe, load_checkpoint, load_learner, load_model, load_tokenizer, pick_checkpoint, pick_device
from model import check_finite, read
from tokenizer import encode

one_line_errors()
SCORES = ('likelihood', 'gain')
HELD_OUT = 4 << 20              # tokens, of a corpus that holds more: choices are drawn from the first of them

# -----------------------------------------------------------------------------
# knobs


@dataclass
class Eval:
    """The evaluation"""
    out_dir: str = 'out'                # folders of checkpoints, with commas between
    best: bool = False                  # the checkpoints of the lowest validation loss, not the last
    data: str = 'near,far'              # near, far, files of JSON lines, with commas between
    labels: str = ''                    # a file with a label a line, for a file of data without
    n: int = 200                        # items of each, drawn from all; as many as there are, if they are fewer
    context: int = 512                  # near, far: bytes of context
    length: int = 64                    # near, far: bytes of a choice
    seed: int = 0                       # of the items
    batch_size: int = 16                # items that are read at once
    learn: bool = False                 # the MLPs learn from what they read
    json: str = ''                      # a file for the results and every item ('' = none)
    device: str = 'auto'                # cpu | cuda | mps; auto is cuda where there is one

    def __post_init__(self):
        check(not os.path.isdir(self.json), f'--json={self.json} is a folder; a file is needed')
        for name in ('n', 'context', 'length', 'batch_size'):
            check(getattr(self, name) >= 1, f'--{name} must be at least 1, not {getattr(self, name)}')
        for name in ('out_dir', 'data'):
            words = getattr(self, name).split(',')
            check('' not in words and len({*words}) == len(words),
                  f'--{name} takes names with commas between, each once, not {getattr(self, name)}')
        check(not self.labels or len({*self.data.split(',')} - {'near', 'far'}) == 1,
              '--labels is for one file of --data')


given = read_args([Eval], sys.argv[1:])
args, = build([Eval], given)


@dataclass
class Item:
    """A context, what may follow it, all bytes, and which of these does. name: where it is from."""
    name: str
    context: bytes
    choices: list
    answer: int

    def digest(self):
        """What tells an item from others, whatever model answers it."""
        return hashlib.sha256(repr((self.context, self.choices, self.answer)).encode()).hexdigest()[:16]


# -----------------------------------------------------------------------------
# items from a file


def read_items(path, labels_path=''):
    """All items of a file of JSON lines. UserError with the number of the line for the first that is none."""
    lines = [(i, line) for i, line in enumerate(read_file(path).splitlines(), 1) if line.strip()]
    labels = read_file(labels_path).decode(errors='replace').split() if labels_path else [None] * len(lines)
    if len(labels) != len(lines):
        raise UserError(f'{labels_path} has {len(labels)} labels, {path} {len(lines)} items')
    if not lines:
        raise UserError(f'{path} holds no items')
    items = []
    for (i, line), label in zip(lines, labels):
        try:
            items.append(parse(json.loads(line), label, f'line {i}'))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {i}: {getattr(error, 'msg', error)}") from None
    return items


def parse(row, label, name):
    """An item from what a line of JSON holds and the label of the labels' file, if any. ValueError: why it is none."""
    row = row if isinstance(row, dict) else {}
    if {'ctx', 'endings'} <= row.keys():
        context, choices, given, between = row['ctx'], row['endings'], row.get('label'), ' '
    elif {'goal', 'sol1', 'sol2'} <= row.keys():
        context, choices, given, between = row['goal'], [row['sol1'], row['sol2']], row.get('label'), ' '
    elif {'context', 'choices'} <= row.keys():
        context, choices, given, between = row['context'], row['choices'], row.get('answer'), ''
    else:
        raise ValueError('it needs ctx, endings and label, or goal, sol1, sol2 and label, or context, choices and '
                         'answer')
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(x, str) for x in [context, *choices]):
        raise ValueError('context and choices must be text, and there must be at least two choices')
    if '' in choices:
        raise ValueError('a choice is empty')
    label = str(given if label is None else label)
    if label not in map(str, range(len(choices))):
        raise ValueError(f"the label must be one of 0 to {len(choices) - 1}, not '{label}'")
    return Item(name, context.encode(errors='replace'),
                [(between + choice).encode(errors='replace') for choice in choices], int(label))


# -----------------------------------------------------------------------------
# items from held-out text


def held_out_documents(checkpoint, enc, out_dir):
    """The documents, as bytes, that a checkpoint's training held out. UserError if its text is not here any more."""
    run, about = checkpoint['run'], checkpoint['data']
    data = about.get('path') or run['data']                 # a file or folder, whatever folder we are in
    _, task, _, info = tasks.load(data, enc.name, out_dir, run['suffix'], True, enc, about.get('left_out', ()))
    if not isinstance(task, Text):
        raise UserError(f"{out_dir} was trained on {data}, which is no text: near and far need some; give --data=FILE")
    if info['sha256'] != about['sha256']:
        raise UserError(f'the text of --data={data} is not the one that {out_dir} was trained on, so that nobody knows '
                        'what it held out; give --data=FILE')
    tokens = np.asarray(task.tokens[:HELD_OUT])
    parts = np.split(tokens, np.flatnonzero(tokens == enc.eot_token))
    documents = [enc.decode_bytes(part[part != enc.eot_token].tolist()) for part in parts]
    return [text for text in documents if text]


def draw_items(kind, documents, n, context, length, seed):
    """
    Up to n items, each the same whatever n is. Choice 0 is the true one. Every choice begins behind a line's last
    character, with the newline: there tokens end anyway, so cutting the seam costs nothing.
    """
    by_document = [[(d, line.end()) for line in re.finditer(rb'\S(?=\r?\n)', text) if line.end() + length <= len(text)]
                   for d, text in enumerate(documents)]
    places, items, used = [*itertools.chain(*by_document)], [], []

    def piece(place):
        return documents[place[0]][place[1]:place[1] + length]
    for d, p in random.Random(seed).sample(places, len(places)):
        if len(items) == n:
            break
        if p < context or any(d == e and abs(p - q) < length for e, q in used):     # what is asked is asked once
            continue
        choices, pool = [piece((d, p))], by_document[d] if kind == 'near' else places
        rng = random.Random(f'{seed} {d} {p}')
        for e, q in rng.sample(pool, min(100, len(pool))):
            elsewhere = q + length <= p - context or q >= p + length if kind == 'near' else e != d
            if elsewhere and len(choices) < 4 and piece((e, q)) not in choices:
                choices.append(piece((e, q)))
        if len(choices) == 4:
            used.append((d, p))
            items.append(Item(f'document {d}, byte {p}', documents[d][p - context:p], choices, 0))
    return items


def find_items(name, documents, out_dir):
    """n items of near, of far, or of a file; documents: what out_dir held out."""
    if name not in ('near', 'far'):
        items = read_items(name, args.labels)
        kept = sorted(random.Random(args.seed).sample(range(len(items)), min(args.n, len(items))))
        return [items[i] for i in kept]
    items = draw_items(name, documents, args.n, args.context, args.length, args.seed)
    if not items:
        raise UserError(f'{out_dir} held out {len(documents)} documents, too short for {name} choices of '
                        f'{args.length} bytes after {args.context}, or too few: far takes two; try a smaller --context '
                        'or --length, or --data=FILE')
    return items


# -----------------------------------------------------------------------------
# scores


def batches(enc, items, size):
    """Which items are read at once: up to `size`, whose contexts have as many tokens, so that none is filled up."""
    lengths = [len(encode(enc, item.context)) for item in items]
    for _, same in itertools.groupby(sorted(range(len(items)), key=lengths.__getitem__), key=lengths.__getitem__):
        same = [*same]
        yield from (same[i:i + size] for i in range(0, len(same), size))


@torch.no_grad()
def bits_per_byte(reader, enc, items, together=True):
    """
    What the choices of a batch of items cost after their contexts, [[float]]. Contexts are read once, and the choices
    read on from there, all as rows of one batch, which is exact, or, not together, one choice of one item at a time,
    as a learner's state cannot be cut into rows.
    """
    device = next(reader.parameters()).device
    contexts = torch.tensor([[enc.eot_token, *encode(enc, item.context).tolist()] for item in items], device=device)
    choices = [(i, encode(enc, choice).tolist()) for i, item in enumerate(items) for choice in item.choices]
    state, nats = None, []
    if contexts.shape[1] > 1:                               # the last token is read with the choice that it predicts
        _, state = read(reader, contexts[:, :-1])
    for group in [choices] if together else [[choice] for choice in choices]:
        whose, T = [i for i, _ in group], max(len(row) for _, row in group)
        idx = contexts[whose, -1:].repeat(1, T)             # (n, 1) -> (n, T); what is right of a choice, none sees
        targets = torch.full_like(idx, -1)
        for i, (_, row) in enumerate(group):
            row = torch.tensor(row, device=device)
            idx[i, 1:len(row)], targets[i, :len(row)] = row[:-1], row
        begin = map_state(lambda x: x[whose], state) if together and state else state
        logits, _, _ = reader(idx, state=begin)             # (n, T) -> (n, T, V)
        check_finite(logits)
        lost = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction='none')
        nats += lost.view(-1, T).double().sum(1).tolist()   # (n T,) -> (n, T) -> (n,)
    costs = iter(nats)
    return [[next(costs) / math.log(2) / len(choice) for choice in item.choices] for item in items]


def is_right(bits, answer):
    """Whether the right choice costs less than each of the others: a tie is not right."""
    return all(bits[answer] < x for i, x in enumerate(bits) if i != answer)


def measure(name, items, out_dir, reader, enc):
    """One line of the table, and all that is behind it."""
    start, kept = time.perf_counter(), {}
    for batch in batches(enc, items, 1 if args.learn else args.batch_size):
        show_status(f'{out_dir}, {name}: {len(kept)} of {len(items)}')
        asked = [items[i] for i in batch]
        bare = [dataclasses.replace(item, context=b'') for item in asked]
        costs = (bits_per_byte(reader, enc, some, together=not args.learn) for some in (asked, bare))
        for i, bits, alone in zip(batch, *costs):
            answer = items[i].answer
            kept[i] = {'name': items[i].name, 'item': items[i].digest(), 'answer': answer, 'bits_per_byte': bits,
                       'without_context': alone, 'likelihood': is_right(bits, answer),
                       'gain': is_right([x - y for x, y in zip(bits, alone)], answer)}
    kept = [kept[i] for i in range(len(items))]
    n, seconds, chance = len(kept), time.perf_counter() - start, sum(1 / len(item.choices) for item in items)
    line = {'out_dir': out_dir, 'data': name, 'n': n, 'chance': chance / n, 'seconds': seconds}
    shown = f'{clear(sys.stdout)}{out_dir:<{wide}}  {name:<{width}}{n:>6}{100 * chance / n:>8.1f}'
    for score in SCORES:
        share = sum(item[score] for item in kept) / n
        low, high = interval(share, n)
        line[score] = {'share': share, 'low': low, 'high': high}
        shown += f'{100 * share:>8.1f} [{100 * low:4.1f}-{100 * high:5.1f}]'
    print(f'{shown}{seconds:>9.1f}', flush=True)
    return line | {'items': kept}


def paired(a, b):
    """How much larger the share of True is in b than in a, of the same items, and its 95 % interval."""
    n, more, less = len(a), sum(y and not x for x, y in zip(a, b)), sum(x and not y for x, y in zip(a, b))
    difference = (more - less) / n
    half = 1.96 * math.sqrt(more + less - (more - less) ** 2 / n) / n
    return difference, difference - half, difference + half


def differences(results):
    """Every model beside the first one, where both answered the same items."""
    found = []
    for b, score in itertools.product(results, SCORES):
        a = next(a for a in results if a['data'] == b['data'])
        if a is not b and [item['item'] for item in a['items']] == [item['item'] for item in b['items']]:
            by, low, high = paired(*([item[score] for item in result['items']] for result in (a, b)))
            found.append({'data': b['data'], 'score': score, 'out_dir': b['out_dir'], 'than': a['out_dir'],
                          'difference': by, 'low': low, 'high': high})
    return found


# -----------------------------------------------------------------------------
# go

torch.set_flush_denormal(True)                              # as in training
device, names, models = pick_device(args.device), args.data.split(','), {}
for out_dir in args.out_dir.split(','):                     # all that can be wrong is said before anything is read
    path = pick_checkpoint(out_dir, args.best)
    checkpoint = load_checkpoint(path)
    enc = load_tokenizer(checkpoint, path)
    documents = held_out_documents(checkpoint, enc, out_dir) if {*names} & {'near', 'far'} else []
    items = [(name, find_items(name, documents, out_dir)) for name in names]
    reader = (load_learner if args.learn else load_model)(checkpoint, device).eval()
    model = reader.model if args.learn else reader
    models[out_dir] = {'mixer': model.config.mixer, 'parameters': model.num_params(), 'step': checkpoint['step'],
                       'run': checkpoint['run'], 'config': checkpoint['config']}, items, reader, enc
    print(f"{out_dir}: {model.config.mixer}{', learning as it reads' * args.learn}, {model.num_params():,} parameters, "
          f"{checkpoint['step']:,} steps")

wide, width = max(10, *map(len, models)), max(4, *map(len, names))
print(f"\n{'checkpoint':<{wide}}  {'data':<{width}}{'items':>6}{'chance':>8}"
      + ''.join(f'{score + ", % [95 %]":>21}' for score in SCORES) + f"{'seconds':>9}")
results = [measure(name, items, out_dir, reader, enc) for out_dir, (_, asked, reader, enc) in models.items()
           for name, items in asked]
compared = differences(results)
for pair in compared:
    by, low, high = (f"{100 * pair[key]:+.1f}" for key in ('difference', 'low', 'high'))
    print(f"{pair['data']}, {pair['score']}: {pair['out_dir']} {by} points [{low} to {high}] beside {pair['than']}, "
          'on the same items')
if args.json:
    about = {'command': shlex.join(sys.argv), 'commit': git_commit(), 'torch': torch.__version__,
             'machine': describe(device), 'eval': dataclasses.asdict(args),
             'models': {out_dir: about for out_dir, (about, *_) in models.items()}}
    with atomic_write(args.json) as file:
        file.write(json.dumps(about | {'results': results, 'differences': compared}, indent=1).encode())
    print(f'written to {args.json}')
