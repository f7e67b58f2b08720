"""Shared by all tests: the repository root on the path, one thread, a comparison that says by how much it failed."""
import os
import sys

os.environ.setdefault('OMP_NUM_THREADS', '1')
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch  # noqa: E402

torch.set_num_threads(1)


def assert_near(name, got, want, tolerance):
    """Largest difference relative to the largest value; shapes must agree, NaN fails."""
    assert got.shape == want.shape, f'{name}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}'
    error = ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-3)).item()
    assert error <= tolerance, f'{name}: relative difference {error:.2e}, allowed {tolerance:.0e}'
