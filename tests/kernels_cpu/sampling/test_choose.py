"""The random numbers of compiled draws."""

import numpy as np

from gguf_run.kernels_cpu.sampling.choose import uniform
from gguf_run.runtime.sampling import candidates


def test_numbers_are_those_of_pythons_function() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**64, (200, 3), np.uint64, endpoint=False)
    words[::7] = np.uint64(2**64 - 1)
    words[::11, 1:] = 0
    for arguments in words:
        assert uniform(*arguments.view(np.int64).tolist()) == candidates.uniform(*arguments.tolist())
