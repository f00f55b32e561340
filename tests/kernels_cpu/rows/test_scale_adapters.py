"""The scales of adapters, against float64. Each sequence has its own."""

import numpy as np
import pytest
from adapter_ops import WANTED, WIDTH, compare
from cpu_ops import Step, cpu
from numpy_backend import NumpyBackend


@pytest.mark.parametrize("n_threads", [1, 3])
def test_each_sequence_has_its_scales(n_threads: int) -> None:
    expected, actual = compare(Step(NumpyBackend(np.float64), 8), Step(cpu(n_threads), 8))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    # a sequence without adapters: all columns are 0, but those that no adapter has
    row = len(WANTED) + WANTED.index(0)
    assert (actual[row, :WIDTH] == 0).all()
    assert (actual[row, WIDTH + 5 :] != 0).all()
