"""The largest logits of a row, and the ends of sums, against a sort."""

from typing import Any

import numpy as np
import pytest

from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.sampling import narrow
from gguf_run.kernels_cpu.sampling.narrow import ids_in_order


@njit
def surveyed(x, n, maxima):  # type: ignore[no-untyped-def]
    return float(narrow.survey(x, n, maxima))


@njit
def listed(x, n, maxima, k, keys, work, weights):  # type: ignore[no-untyped-def]
    narrow.survey(x, n, maxima)
    return narrow.greatest(x, n, maxima, k, keys, work, weights)


def address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def greatest(logits: np.ndarray, k: int) -> np.ndarray:
    n = len(logits)
    maxima, keys, work = np.zeros(n // 64 + 1, np.float32), np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)
    count = listed(address(logits), n, address(maxima), k, keys, work, np.zeros(n + 1))
    return keys[:count]


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 40_000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 1e30])
def test_the_largest_logits(n: int, spread: float) -> None:
    """Equal ones too, of which the lower ids come first; 0.0 and -0.0 are equal."""
    logits = np.round(np.random.default_rng(n).standard_normal(n) * 8).astype(np.float32) * np.float32(spread / 8)
    order = np.argsort(-logits, kind="stable")
    for k in {1, 7, n // 64, n // 2, n - 1, n, n + 5} - {0}:
        keys = greatest(logits, k)
        assert ids_in_order(keys) == order[:k].tolist()
        assert ids_in_order(keys) == ids_in_order(keys[::-1].copy())


def test_tokens_that_cannot_come_are_not_among_the_largest() -> None:
    logits = np.full(1000, -np.inf, np.float32)
    logits[[3, 900]] = -5, -4
    assert ids_in_order(greatest(logits, 40)) == [900, 3]


@pytest.mark.parametrize("at", [0, 64, 127, 129])
@pytest.mark.parametrize(("value", "expected"), [(np.nan, np.nan), (-np.nan, np.nan), (np.inf, np.inf), (-np.inf, 1)])
def test_a_survey_finds_what_is_no_number(at: int, value: float, expected: float) -> None:
    logits = np.ones(130, np.float32)
    logits[at] = np.copysign(np.float32(value), np.float32(value))
    found: Any = surveyed(address(logits), len(logits), address(np.zeros(3, np.float32)))
    np.testing.assert_equal(found, expected)


def test_a_sum_is_reached() -> None:
    rng = np.random.default_rng(4)
    for n in (1, 2, 50, 3000):
        keys = rng.integers(-(2**63), 2**63, n)
        weights = rng.random(n)
        order = np.argsort(-keys)
        sums = weights[order].cumsum()
        for wanted in (0.0, 0.3 * sums[-1], sums[-1] * (1 - 1e-9), 2 * sums[-1]):
            expected = order[min(int(sums.searchsorted(wanted)), n - 1)]
            assert narrow.reach(keys.copy(), weights.copy(), n, wanted) == keys[expected]
