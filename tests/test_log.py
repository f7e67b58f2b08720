"""A run's log: what a crash leaves of it, what is added, how a curve looks (log.py)."""
import json

import pytest

from cli import UserError
from log import draw_curve, hms, open_log, read_log


def test_a_log_is_read_up_to_a_step_and_gone_on_with(tmp_path):
    path = tmp_path / 'out' / 'log.jsonl'
    log = open_log(path, [{'command': 'x'}, {'step': 1, 'loss': 3.0}])
    log(step=2, loss=2.5)
    log(step=2, val_loss=2.6)
    log(step=3, loss=float(2))
    with open(path, 'a') as file:
        file.write('5\n{"step": null}\n{"step": 4')             # what a crash may leave
    lines = read_log(path, 2)
    assert lines == [{'command': 'x'}, {'step': 1, 'loss': 3.0}, {'step': 2, 'loss': 2.5}, {'step': 2, 'val_loss': 2.6}]
    open_log(path, lines)(step=3, loss=1.0)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*lines, {'step': 3, 'loss': 1.0}]


def test_a_log_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='could not write'):
        open_log(tmp_path / 'file' / 'log.jsonl', [])


def test_curve():
    curve = draw_curve([4.0, 3.0, 2.0, 1.0], height=4).splitlines()
    assert [line.split('|')[1] for line in curve[:4]] == ['*   ', ' *  ', '  * ', '   *']
    assert draw_curve([1.0]) and draw_curve([2.0] * 500)


def test_hours():
    assert [hms(s) for s in (0, 59.9, 61, 3750, 360000)] == ['0:00:00', '0:00:59', '0:01:01', '1:02:30', '100:00:00']
