"""
A run's log, OUT_DIR/log.jsonl: a line of JSON with what the run was started by, again for every time that it was
resumed, then one for each step and each evaluation. Here it is read, gone on with, drawn, and made a curve of.

Does NOT include: when a line is written, and what it says (train.py decides).
"""
import contextlib
import json
import math
import re
from types import SimpleNamespace

from cli import UserError, atomic_write, read_file


def read_log(path, step):
    """The lines of a log up to that step, as dicts, without what a crash may leave: later steps, half a line."""
    lines = []
    for text in read_file(path).splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(text))
    return [line for line in lines if fits(line) and line.get('step', 0) <= step]


def fits(line):
    """Whether what a resumed run takes from a line is of its kind; anything else is not from train.py."""
    def number(x):
        return isinstance(x, (int, float)) and abs(x) < 1e39            # also not NaN
    return isinstance(line, dict) and isinstance(line.get('step', 0), int) and number(line.get('loss', 0)) and (
        isinstance(line.get('moves', []), list) and all(map(number, line.get('moves', []))))


def open_log(path, lines):
    """Write these lines, whole or not at all, in the place of what the log held -> log(**entry), which adds one."""
    with atomic_write(path) as file:
        file.write(''.join(json.dumps(line) + '\n' for line in lines).encode())
    file = open(path, 'a')

    def log(**entry):
        try:
            print(json.dumps(entry), file=file, flush=True)
        except OSError as error:
            raise UserError(f'could not write {path}: {error.strerror}; --resume goes on from the checkpoint') from None
    return log


# -----------------------------------------------------------------------------
# for people


def hms(seconds):
    """3750 -> '1:02:30'"""
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}'


def draw_curve(values, width=72, height=12):
    """A list of numbers as a curve of text lines, y axis labelled; neighbours are averaged to fit the width."""
    n = min(width, len(values))
    edges = [i * len(values) // n for i in range(n + 1)]
    means = [sum(values[i:j]) / (j - i) for i, j in zip(edges, edges[1:])]
    low, high = min(means), max(means)
    rows = [round((high - mean) / ((high - low) or 1) * (height - 1)) for mean in means]
    lines = [''.join('*' if row == line else ' ' for row in rows) for line in range(height)]
    labels = [f'{high - (high - low) * line / (height - 1):7.3f} |' for line in range(height)]
    return '\n'.join(label + line for label, line in zip(labels, lines)) + '\n' + ' ' * 8 + '+' + '-' * n


# -----------------------------------------------------------------------------
# a run as a curve, for plot.py


def number(text):
    """'32,768' -> 32768.0"""
    return float(text.replace(',', ''))


def read_run(path):
    """
    A log.jsonl, or what a run printed -> its path, settings, unit, and curve and marks: what training and validation
    lost, a dict each with step, tokens, seconds (of training, without first steps, which compile) and value. What it
    lost is in bits per byte where it read text, else in nats per token.
    """
    run = SimpleNamespace(path=path, settings={}, curve=[], marks=[])
    lines = read_log(path, math.inf)
    at, seconds, began, speed, tokens_per_step = 0, 0.0, False, None, None
    try:
        for line in lines if any('loss' in line for line in lines) else printed_log(path, lines):
            if 'config' in line:                            # a run's first line, or that of one that was resumed
                run.settings, began = line['run'] | line['config'], True
                tokens_per_step = run.settings['batch_size'] * run.settings['block_size']
                bytes_per_token = line['data'].get('bytes_per_token')
                nats = math.log(2) * bytes_per_token if bytes_per_token else 1.0
                run.unit = 'bits per byte' if bytes_per_token else 'nats per token'
            elif 'loss' in line or 'val_loss' in line:
                speed = line.get('tokens_per_second') or speed
                compiles, began = began and line['step'] == at + 1, False
                seconds += (line['step'] - at) * tokens_per_step / speed * (not compiles)
                at = line['step']
                where, loss = (run.curve, line['loss']) if 'loss' in line else (run.marks, line['val_loss'])
                where.append({'step': at, 'tokens': at * tokens_per_step, 'seconds': seconds, 'value': loss / nats})
    except (KeyError, TypeError, ValueError):
        run.curve = []                                      # it has lines, but not train.py's
    if not run.curve:
        raise UserError(f'{path} is no log of a run, which has settings, steps and losses: give the log.jsonl of one')
    return run


def printed_log(path, lines):
    """What a run printed, as the lines of a log.jsonl; lines: those that are so already, its first in most logs."""
    text = read_file(path).decode(errors='replace')
    mixer, batch_size, block_size = (re.search(pattern, text, re.M)[1] for pattern in (
        r'^model: (\S+), [\d,]+ parameters', r'^run: .* steps of (\d+) x', r'^run: .* steps of \d+ x ([\d,]+) tokens'))
    known = re.search(r'^tokens .* \| ([\d.]+) bytes per token', text, re.M)
    first = {'config': {'mixer': mixer}, 'data': {'bytes_per_token': float(known[1])} if known else {},
             'run': {'batch_size': int(batch_size), 'block_size': int(number(block_size))}}
    steps = re.findall(r'^(step|eval) +([\d,]+)/\S+ \| (?:val )?loss +([\d.]+) (?:.* ([\d,]+) tok/s)?', text, re.M)
    return [first, *lines, *({'step': int(number(step)), 'loss' if kind == 'step' else 'val_loss': float(loss),
                              'tokens_per_second': speed and number(speed)} for kind, step, loss, speed in steps)]


def names_of(runs):
    """What runs are called: by their mixers, or else by the settings in which they differ, or by their files."""
    def differ(names): return len({*names}) == len(names)
    mixers = [run.settings.get('mixer', '') for run in runs]
    keys = [key for key in runs[0].settings if key not in ('out_dir', 'resume', 'overwrite', 'init_from')
            and len({str(run.settings.get(key)) for run in runs}) > 1]
    settings = [', '.join(f'{key}={run.settings.get(key)}' for key in keys) for run in runs]
    return mixers if differ(mixers) else settings if differ(settings) else [run.path for run in runs]
