"""Rows that are read in several steps, and the state between two of them (carry.py); test_scripts.py trains with it."""
import numpy as np
import torch

from carry import Rows, constants, join_rows, take_rows
from data import Text
from tasks import Recall

TEXT = Text(np.arange(5000, dtype=np.uint16))
RECALL = Recall(4, torch.arange(26), torch.arange(26, 52), 52)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_parts_of_a_row_are_the_row():
    for task in (TEXT, RECALL):
        rows, generator = Rows(task, 3, 16, 4, rng()), rng()
        for whole in range(2):
            parts = [rows.at(4 * whole + i, 1.0) for i in range(4)]
            want = [x for x in task.batch(3, 64, generator) if x is not None]
            assert list(parts[0]) == ['idx', 'targets', 'weights'][:len(want)]
            for name, x in zip(parts[0], want):
                assert torch.equal(torch.cat([part[name] for part in parts], dim=1), x)
                assert parts[1][name].is_contiguous()


def test_a_task_hears_how_far_training_is():
    class Listening(Text):
        def batch(self, n, T, generator, progress=1.0):
            heard.append(progress)
            return super().batch(n, T, generator)
    heard = []
    rows = Rows(Listening(TEXT.tokens), 2, 16, 2, rng())
    for step in range(6):
        rows.at(step, (step - step % 2) / 6)
    assert heard == [0, 2 / 6, 4 / 6], 'once for every row'


def test_rows_are_gone_on_with_where_a_run_stopped():
    for stop in range(1, 9):
        whole, again = Rows(RECALL, 2, 16, 3, rng()), Rows(RECALL, 2, 16, 3, rng(5))
        for step in range(stop):
            whole.at(step, 1.0)
        again.generator.set_state(whole.generator_state(stop))
        for step in range(stop, stop + 7):
            assert torch.equal(whole.at(step, 1.0)['idx'], again.at(step, 1.0)['idx'])


def test_a_state_in_parts():
    x = torch.randn(4, 3, requires_grad=True) * 2
    state = [{'S': x, 'same': x, 'count': torch.arange(4), 'place': 5}, {'S': torch.zeros(4, 1), 'place': 7}]
    parts = [take_rows(state, part, 'cpu') for part in (slice(0, 3), slice(3, 4))]
    assert parts[0][0]['S'] is parts[0][0]['same'] and torch.equal(parts[1][0]['S'], x[3:]), 'one tensor stays one'
    assert parts[0][0]['S'].requires_grad and not parts[0][0]['count'].requires_grad
    joined = join_rows(parts)
    assert torch.equal(joined[0]['S'], x) and joined[0]['S'].grad_fn is None and joined[0]['S'] is joined[0]['same']
    assert constants(state) == constants(joined) == (5, 7)
