"""
A run's log, OUT_DIR/log.jsonl: a line of JSON with what the run was started by, again for every time that it was
resumed, then one for each step and each evaluation. Here it is read, gone on with, and drawn.

Does NOT include: what a line says (train.py decides).
"""
import contextlib
import json

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
