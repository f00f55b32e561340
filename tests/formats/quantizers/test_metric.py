"""Second moments made ready: the factor, the order of blocks, and shrinking of what has no factor."""

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from gguf_run.formats.quantizers import metric as module
from gguf_run.formats.quantizers.metric import make_metric, memory_for


def moments(n: int, n_tokens: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n_tokens, n)) * 10 ** rng.uniform(-2, 2, n) + 3
    return (x.T @ x / n_tokens).astype(np.float32)


@pytest.mark.parametrize("double", [256, 0])
@pytest.mark.parametrize("n_tokens", [1, 50, 1000])
def test_factor(n_tokens: int, double: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """UT U is the inverse of moments, also with fewer tokens than columns and in float32."""
    monkeypatch.setattr(module, "_DOUBLE", double)
    metric = make_metric(moments(160, n_tokens), 32, 0.5, False)
    u, h = metric.factor.astype(np.float64), metric.moments.astype(np.float64)
    assert np.abs(np.tril(u, -1)).max() < 1e-12 * np.abs(u).max()
    assert np.abs(u @ h @ u.T - np.eye(160)).max() < (1e-3 if double else 1e-2)


def test_importance() -> None:
    """It is that of each column when the later ones are free: 1 / inverse[0, 0] of the moments from there on."""
    metric = make_metric(moments(64, 500), 32, 0.5, True)
    h = metric.moments.astype(np.float64)
    assert metric.importance == pytest.approx([1 / np.linalg.inv(h[j:, j:])[0, 0] for j in range(64)], rel=1e-4)
    diagonal = make_metric(moments(64, 500), 32, 1.0, True)
    assert diagonal.importance == pytest.approx(np.diag(diagonal.moments), rel=1e-5)


def test_shrunk_and_damped() -> None:
    h = moments(64, 500)
    expected = (0.75 * h).astype(np.float64)
    np.fill_diagonal(expected, np.diag(h) + 0.01 * np.diag(h).mean())
    assert make_metric(h, 32, 0.25, False).moments == pytest.approx(expected, rel=1e-6)


def test_blocks_in_order_of_mass() -> None:
    h = moments(96, 500)
    mass = np.diag(h).reshape(3, 32).sum(axis=1)
    metric = make_metric(h, 32, 0.5, True)
    assert metric.order.tolist() == np.argsort(-mass).tolist() != [0, 1, 2]
    columns = np.concatenate([np.arange(32 * i, 32 * i + 32) for i in metric.order])
    left_to_right = make_metric(h, 32, 0.5, False)
    assert left_to_right.order.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(metric.moments, left_to_right.moments[np.ix_(columns, columns)])


def test_what_has_no_factor_is_shrunk_more() -> None:
    """No x has such moments; a damaged file may."""
    h = np.full((64, 64), -0.5, np.float32)
    np.fill_diagonal(h, 1)
    metric = make_metric(h, 32, 0.0, False)
    off_diagonal = metric.moments[0, 1]
    assert -1 / 63 - 0.001 < off_diagonal < 0
    assert np.isfinite(metric.factor).all()
    assert np.isfinite(make_metric(np.zeros((64, 64), np.float32), 32, 0.0, False).factor).all()


@pytest.mark.parametrize("double", [1024, 0])
def test_memory(double: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DOUBLE", double)
    h = moments(1024, 64)
    tracemalloc.start()
    make_metric(h, 32, 0.5, True)
    needed = h.nbytes + tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.9 * needed < memory_for(1024) < 1.1 * needed
