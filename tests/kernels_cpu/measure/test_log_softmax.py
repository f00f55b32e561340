"""The kernels under gguf-eval against float64: log(sum(exp)) and Kullback-Leibler divergence of rows."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from gguf_run.kernels_cpu.measure.log_softmax import LogSoftmax

WIDTHS = (1, 2, 63, 64, 65, 4095, 4096, 4161, 49_152)  # around the vector's and the f32 sums' lengths


@pytest.fixture(scope="module", params=[1, 3])
def reduce(request: pytest.FixtureRequest) -> Iterator[LogSoftmax]:
    kernels = LogSoftmax(request.param)
    yield kernels
    kernels.close()


def rows(n_vocab: int, scale: float, seed: int = 0, n_rows: int = 5) -> NDArray[np.float32]:
    """Rows that are parts of longer ones, as in a backend's buffer; what stands between them must not count."""
    rng = np.random.default_rng(seed)
    padded = np.full((n_rows, n_vocab + 7), 1e9, np.float32)
    padded[:, :n_vocab] = rng.standard_normal((n_rows, n_vocab)) * scale
    return padded[:, :n_vocab]


def log_probabilities(x: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = x.astype(np.float64)
    shifted = exact - exact.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def divergence(p: NDArray[np.float32], q: NDArray[np.float32]) -> NDArray[np.float64]:
    a, b = log_probabilities(p), log_probabilities(q)
    t = a - b
    return (np.exp(a) * (np.expm1(-t) + t)).sum(axis=1)


@pytest.mark.parametrize("n_vocab", WIDTHS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("offset", [0.0, -1000.0])
def test_log_sum_exp(reduce: LogSoftmax, n_vocab: int, scale: float, offset: float) -> None:
    x = rows(n_vocab, scale)
    x += np.float32(offset)
    expected = x[:, 0] - log_probabilities(x)[:, 0]
    assert np.abs(reduce.log_sum_exp(x) - expected).max() < 3e-7


def test_log_sum_exp_of_extremes(reduce: LogSoftmax) -> None:
    """Large values do not overflow, and what vanishes beside the largest is 0."""
    x = np.full((3, 100), -1e30, np.float32)
    x[0, 99], x[1, :2], x[2] = 1e4, 1e4, 1e4
    assert reduce.log_sum_exp(x) == pytest.approx([1e4, 1e4 + np.log(2), 1e4 + np.log(100)], abs=1e-9)


@pytest.mark.parametrize("at", [0, 4100, 8999])
def test_log_sum_exp_of_tokens_that_cannot_be(reduce: LogSoftmax, at: int) -> None:
    x = np.full((2, 9000), -np.inf, np.float32)
    x[:, at] = 3.0
    assert (reduce.log_sum_exp(x) == 3.0).all()


@pytest.mark.parametrize("n_vocab", WIDTHS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("noise", [1e-5, 1e-3, 0.1, 5.0])
def test_divergence(reduce: LogSoftmax, n_vocab: int, scale: float, noise: float) -> None:
    """An error of t, here 5e-8, changes the sum of p t^2 / 2 by as much times the mean |t| <= sqrt(2 KL); an error of
    exp changes it in proportion."""
    p = rows(n_vocab, scale)
    q = (p + rows(n_vocab, noise, seed=1)).astype(np.float32)
    expected = divergence(p, q)
    found = reduce.divergence(p, q)
    assert (np.abs(found - expected) <= 5e-8 * np.sqrt(2 * expected) + 3e-6 * expected).all()
    assert (found >= 0).all()


@pytest.mark.parametrize("n_vocab", WIDTHS)
def test_divergence_of_equal_rows_is_zero(reduce: LogSoftmax, n_vocab: int) -> None:
    p = rows(n_vocab, 10.0)
    assert (reduce.divergence(p, p.copy()) == 0).all()


def test_divergence_has_a_direction_and_knows_no_offset(reduce: LogSoftmax) -> None:
    p, q = rows(1000, 1.0), rows(1000, 1.0, seed=1)
    there, back = reduce.divergence(p, q), reduce.divergence(q, p)
    assert np.abs(there - back).min() > 1e-3
    assert reduce.divergence(p, q + np.float32(8)) == pytest.approx(there, rel=1e-5)


def test_divergence_of_far_apart_rows(reduce: LogSoftmax) -> None:
    """What q holds for impossible is finite: 80 nats away."""
    p, q = np.zeros((2, 1, 200), np.float32)
    p[0, 3] = q[0, 130] = 80
    assert reduce.divergence(p, q) == pytest.approx([80.0], rel=1e-6)


def test_nothing_finite_comes_of_nan(reduce: LogSoftmax) -> None:
    x = np.full((2, 130), np.nan, np.float32)
    assert not np.isfinite(reduce.log_sum_exp(x)).any()


def test_rows_must_fit(reduce: LogSoftmax) -> None:
    x = rows(64, 1.0)
    for wrong in (x[:, :32], x[:2], x.astype(np.float64), x[:, ::2].repeat(1, 0)[:, ::-1]):
        with pytest.raises(ValueError, match="must be float32, of one shape"):
            reduce.divergence(x, wrong)
