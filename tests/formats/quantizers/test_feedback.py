"""Rounding with second moments: against the algorithm in its plainest form, in float64, and the loss in every type."""

import numpy as np
import pytest
from numpy.typing import NDArray

from gguf_run.formats.blocks.codes import Codes, pack, unpack
from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import TensorType, type_by_name
from gguf_run.formats.blocks.unpack import INTEGER_FORMS
from gguf_run.formats.errors import FormatError
from gguf_run.formats.quantizers.feedback import round_rows
from gguf_run.formats.quantizers.metric import Metric, make_metric
from gguf_run.formats.quantizers.quantizer import SEARCHES, quantize

NAMES = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4 NVFP4 TQ1_0 TQ2_0"
by_type = pytest.mark.parametrize("type", [type_by_name(name) for name in NAMES.split()], ids=lambda type: type.name)


def moments(n: int) -> NDArray[np.float32]:
    """Return E[x xT] of inputs that share a few directions, and whose sizes are over decades."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((4 * n, n)) + 2 * rng.standard_normal((4 * n, 8)) @ rng.standard_normal((8, n))
    x *= 10 ** rng.uniform(-0.7, 0.7, n)
    return (x.T @ x / len(x)).astype(np.float32)


def weights(n_rows: int, n: int) -> NDArray[np.float32]:
    return np.random.default_rng(8).standard_t(5, (n_rows, n)).astype(np.float32)


def width(type: TensorType) -> int:
    return max(128, 2 * type.block_size)


def loss(x: NDArray[np.float32], blocks: NDArray[np.uint8], type: TensorType, h: NDArray[np.float32]) -> float:
    error = dequantize(blocks, type).astype(np.float64) - x
    return float(np.einsum("ri,ij,rj->", error, h, error, optimize=True))


def ggmls(x: NDArray[np.float32], type: TensorType, metric: Metric) -> NDArray[np.uint8]:
    """Return the blocks of ggml's rounding, or of the search of a type that has one. Each block is a row of its own:

    ggml makes some scales with the mean square of a row, which error feedback does not know when it needs it.
    """
    columns = np.arange(x.shape[1]).reshape(-1, type.block_size)
    parts = [quantize(x[:, here], type, metric.importance[here], search=type.name in SEARCHES) for here in columns]
    return np.concatenate(parts, axis=1)


def plain(x: NDArray[np.float32], type: TensorType, metric: Metric) -> Codes:
    """Round column after column. After each, set all later columns to where the loss is least (Optimal Brain Surgeon).

    `inverse` is of the moments of the columns that are left: without the first, it loses a product of rank 1.
    """
    form, inverse = INTEGER_FORMS[type.name], np.linalg.inv(metric.moments.astype(np.float64))
    levels = form.grid()[:16] if form.codebook else np.arange(form.q_min, form.q_max + 1)
    w = x.astype(np.float64).reshape(len(x), -1, type.block_size)[:, metric.order].reshape(x.shape)
    parts = np.empty((len(x), len(metric.order), type.type_size), np.uint8)
    for i, to in enumerate(metric.order):
        here = slice(i * type.block_size, (i + 1) * type.block_size)
        importance = metric.importance[here]
        codes = unpack(quantize(w[:, here].astype("f4"), type, importance, search=type.name in SEARCHES), type)
        d, m = (np.repeat(v.astype(np.float64), form.group, axis=1) for v in codes.steps())
        for j in range(type.block_size):
            at = here.start + j
            weights_of_codes = d[:, j, None] * levels + m[:, j, None]
            best = np.abs(weights_of_codes - w[:, at, None]).argmin(axis=1)
            codes.code[:, j] = best if form.codebook else levels[best]
            error = w[:, at] - weights_of_codes[np.arange(len(w)), best]
            first = inverse[0, 1:]
            w[:, at + 1 :] -= np.outer(error / inverse[0, 0], first)
            inverse = inverse[1:, 1:] - np.outer(first, first) / inverse[0, 0]
        parts[:, to] = pack(codes)
    return unpack(parts.reshape(len(x), -1), type)


@pytest.mark.parametrize("by_mass", [False, True])
@by_type
def test_it_is_the_plain_algorithm(type: TensorType, by_mass: bool) -> None:
    """A number that is half-way between two codes may go either way, and all that follows it in its row."""
    x = weights(16, width(type))
    metric = make_metric(moments(x.shape[1]), type.block_size, 0.3, by_mass)
    found, expected = unpack(round_rows(x, type, metric), type), plain(x, type, metric)
    same = (found.code == expected.code).mean()
    near = unpack(ggmls(x, type, metric), type).code
    assert same > 0.97, same
    assert (near == expected.code).mean() < 0.95  # what rounding alone gives


@by_type
def test_loss(type: TensorType) -> None:
    """It is below that of ggml's rounding with the same importance, and no sweep raises it."""
    x = weights(24, width(type))
    metric = make_metric(moments(x.shape[1]), type.block_size, 0.0, False)
    losses = [loss(x, round_rows(x, type, metric, sweeps, refit), type, metric.moments) for refit in (False, True)
              for sweeps in range(4)]  # fmt: skip
    assert losses[0] < 0.8 * loss(x, ggmls(x, type, metric), type, metric.moments)
    for first in (0, 4):
        assert all(b <= a * (1 + 1e-5) for a, b in zip(losses[first:], losses[first + 1 : first + 4], strict=False))
    assert losses[3] < losses[0]
    assert (losses[5] == losses[1]) == (type.name in SEARCHES)  # the scales of all others change, too


@by_type
def test_inputs_that_do_not_depend_on_each_other(type: TensorType) -> None:
    """Scales are ggml's. Codes are those nearest to the weights, which ggml's are not always: it rounds scales last."""
    x = weights(24, width(type))
    metric = make_metric(moments(x.shape[1]), type.block_size, 1.0, False)
    blocks, known = round_rows(x, type, metric), ggmls(x, type, metric)
    found, expected = unpack(blocks, type), unpack(known, type)
    np.testing.assert_array_equal(found.scale, expected.scale)
    np.testing.assert_array_equal(found.minimum, expected.minimum)
    ours, theirs = (np.abs(dequantize(b, type) - x) for b in (blocks, known))
    assert (ours <= theirs * (1 + 1e-6) + 1e-6).all()


@by_type
def test_rows_do_not_depend_on_each_other(type: TensorType) -> None:
    x = weights(9, width(type))
    metric = make_metric(moments(x.shape[1]), type.block_size, 0.5, True)
    parts = [round_rows(x[part], type, metric, 1) for part in (slice(4), slice(4, 9))]
    np.testing.assert_array_equal(np.concatenate(parts), round_rows(x, type, metric, 1))


@by_type
def test_zeros(type: TensorType) -> None:
    """Inputs that are always 0, and weights that are: nothing becomes infinite, and zeros stay."""
    x, h = weights(4, width(type)), moments(width(type))
    x[1], x[2, : type.block_size] = 0, 0
    h[:40], h[:, :40] = 0, 0
    for dead in (h, np.zeros_like(h)):
        found = dequantize(round_rows(x, type, make_metric(dead, type.block_size, 0.5, False), 2), type)
        assert np.isfinite(found).all()
        assert not found[1].any()
    assert np.abs(found - x).max() < np.abs(x).max()


def test_weights_that_are_not_finite() -> None:
    x, type = weights(4, 64), type_by_name("Q4_0")
    x[2, 40] = np.nan
    with pytest.raises(FormatError, match="NaN or infinite"):
        round_rows(x, type, make_metric(moments(64), 32, 0.5, False))
