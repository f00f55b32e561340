"""The ops of models with several streams of hidden states, against float64."""

import numpy as np
import pytest
from cpu_ops import Step, cpu, error
from numpy_backend import NumpyBackend
from stream_ops import streams


@pytest.mark.parametrize("width", [40, 301])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_streams(width: int, n_threads: int) -> None:
    expected = streams(Step(NumpyBackend(np.float64), 5), width).run(5)
    assert error(streams(Step(cpu(n_threads), 5), width).run(5), expected) < 2e-6
