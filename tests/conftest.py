"""Shared by all tests: the root on the path, one thread, a text, a comparison that says by how much it failed."""
import os
import sys

os.environ.setdefault('OMP_NUM_THREADS', '1')
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def difference(got, want):
    """The largest difference relative to the largest value."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-3)).item()


def assert_near(name, got, want, tolerance):
    """Largest difference relative to the largest value; shapes must agree, NaN fails."""
    assert got.shape == want.shape, f'{name}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}'
    error = difference(got, want)
    assert error <= tolerance, f'{name}: relative difference {error:.2e}, allowed {tolerance:.0e}'


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp('text') / 'text.txt'
    path.write_text(''.join(f'line {i}: the answer to {i % 7} is {i % 7 * 6}.\n' for i in range(1000)))
    return str(path)
