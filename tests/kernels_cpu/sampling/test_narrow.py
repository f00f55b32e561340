"""Where the largest logits of a row end, and how their weights add up, against a sort."""

import numpy as np
import pytest

from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.sampling import narrow

LOWEST = float(narrow.LOWEST)


@njit
def surveyed(x, maxima, best):  # type: ignore[no-untyped-def]
    return float(narrow.survey(x, maxima, best))


@njit
def cut_row(x, maxima, values, best, temperature, low, wanted, sums, keys, weights):  # type: ignore[no-untyped-def]
    most, low = narrow.survey(x, maxima, best), np.float32(low)
    return float(narrow.cut(x, values, best, most, temperature, low, wanted, sums, keys, weights))


@njit
def summed(x, maxima, values, best, temperature, low, sums):  # type: ignore[no-untyped-def]
    most = narrow.survey(x, maxima, best)
    return narrow.sum_blocks(x, values, best, most, temperature, np.float32(low), sums)


def filled(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row with -inf up to the end of a block, and room for the maxima of blocks."""
    row = np.append(logits, np.full(-len(logits) % 64, -np.inf, np.float32))
    return row, np.zeros(len(row) // 64, np.float32)


def survey(logits: np.ndarray) -> float:
    row, best = filled(logits)
    return float(surveyed(row.ctypes.data, best.ctypes.data, best))


def kept(logits: np.ndarray, temperature: float, wanted: float, low: float = LOWEST) -> list[int]:
    """The ids of the logits that a cut leaves."""
    row, best = filled(logits)
    rooms = np.zeros(len(best)), np.zeros(len(row), np.int64), np.zeros(len(row))
    low = cut_row(row.ctypes.data, best.ctypes.data, row, best, temperature, low, wanted, *rooms)
    return np.flatnonzero(row >= low).tolist()


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 40_000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 1e30])
def test_the_k_largest_logits(n: int, spread: float) -> None:
    """Of equal ones the lower ids; 0.0 and -0.0 are equal."""
    logits = np.round(np.random.default_rng(n).standard_normal(n) * 8).astype(np.float32) * np.float32(spread / 8)
    order = np.argsort(-logits, kind="stable")
    for k in {1, 7, n // 64, n // 2, n - 1, n, n + 5} - {0}:
        assert kept(logits, np.inf, k) == sorted(order[:k].tolist())


@pytest.mark.parametrize("n", [1, 64, 700, 40_000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("temperature", [1.0, 0.2, 3.0])
def test_the_fewest_logits_that_reach_a_sum(n: int, spread: float, temperature: float) -> None:
    """Also where the maxima of blocks do not reach it together. A sum of thousands is float32's."""
    logits = (np.random.default_rng(n).standard_normal(n) * spread).astype(np.float32)
    order = np.argsort(-logits, kind="stable")
    sums = np.exp((logits[order].astype(np.float64) - logits.max()) / temperature).cumsum()
    lowest = float(logits.min())
    for share in (0.0, 0.3, 0.95, 0.9999):
        expected = int(sums.searchsorted(share * sums[-1])) + 1
        found = kept(logits, temperature, share * sums[-1], lowest)
        assert set(found) <= set(order[: expected + 1].tolist())
        assert set(found) >= set(order[: expected - 1].tolist())
        assert len(found) == expected or n > 4096
    assert kept(logits, temperature, 2 * sums[-1], lowest) == list(range(n))


@pytest.mark.parametrize("n", [64, 700, 40_000])
@pytest.mark.parametrize("low", [LOWEST, -1.0, 2.0])
def test_weights_of_blocks(n: int, low: float) -> None:
    logits = np.random.default_rng(n).standard_normal(n, np.float32) * 3
    row, best = filled(logits)
    sums = np.zeros(len(best))
    weights = np.exp((row.astype(np.float64) - logits.max()) / 0.7) * (row >= low)
    total = summed(row.ctypes.data, best.ctypes.data, row, best, 0.7, low, sums)
    rtol = 1e-6 if n > 4096 and low == LOWEST else 1e-13
    np.testing.assert_allclose(sums, weights.reshape(-1, 64).sum(axis=1), rtol=rtol)
    assert total == pytest.approx(weights.sum(), rel=rtol)


def test_tokens_that_cannot_come_are_not_among_the_largest() -> None:
    logits = np.full(1000, -np.inf, np.float32)
    logits[[3, 900]] = -5, -4
    assert kept(logits, np.inf, 40) == [3, 900]


@pytest.mark.parametrize("at", [0, 64, 127, 129])
@pytest.mark.parametrize(("value", "expected"), [(np.nan, np.nan), (-np.nan, np.nan), (np.inf, np.inf), (-np.inf, 1)])
def test_a_survey_finds_what_is_no_number(at: int, value: float, expected: float) -> None:
    logits = np.ones(130, np.float32)
    logits[at] = np.copysign(np.float32(value), np.float32(value))
    np.testing.assert_equal(survey(logits), expected)
