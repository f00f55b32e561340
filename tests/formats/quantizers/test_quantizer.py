"""Quantizing against ggml itself (libgguf), byte for byte, and what quantize() refuses."""

from collections.abc import Callable

import gguf
import libgguf
import numpy as np
import pytest
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.quantizers.quantizer import QUANTIZERS, count_bad, quantize

Array = NDArray[np.float32]
N_ROWS, N = 6, 1792  # 42 blocks of 256: two full sets of lanes and a part of one; rows begin in the midst of a set

# The scale of a normal distribution, or what is done to it.
DATA: dict[str, float | Callable[[Array, np.random.Generator], Array]] = {
    "normal": 0.02,
    "heavy": lambda x, rng: x / rng.random(x.shape) ** 2,
    "sparse": lambda x, rng: x * (rng.random(x.shape) < 0.05),  # zeros of both signs
    "constant groups": lambda x, rng: np.repeat(x[:, ::16], 16, axis=1),
    "constant rows": lambda x, rng: x[:, :1] + 0 * x,
    "zero": 0.0,
    "positive": lambda x, rng: abs(x),
    "negative": lambda x, rng: -1 - abs(x),
    "ties": lambda x, rng: np.round(4 * x),
    "mixed sizes": lambda x, rng: x * np.exp2(rng.integers(-30, 30, x.shape)),
    "mixed tiny": lambda x, rng: x * 10.0 ** rng.integers(-44, -1, x.shape),
    "rows of all sizes": lambda x, rng: x * np.exp2(rng.integers(-149, 124, (len(x), 1))),
    "below a power of two": lambda x, rng: np.clip(100 * x, -1, 1) * (256 - rng.integers(0, 9, (len(x), 1)) * 2.0**-17),
    "nearly zero": 1e-15,
    "squares vanish": 1e-25,
    "denormal": 1e-40,
    "squares large": 1e18,
    "squares overflow": 1e30,
    "sums overflow": 3e37,
    "the greatest numbers": lambda x, rng: np.clip(3e38 * x, -np.finfo(np.float32).max, np.finfo(np.float32).max),
}


def by_ggml(x, type, importance=None):
    """The blocks of x f32[n_rows, n]. By number: libgguf's enumeration lacks MXFP4."""
    out = np.empty((len(x), type.row_bytes(x.shape[1])), np.uint8)
    libgguf.quantize_rows_into_raw(type.id, x, out, len(x), x.shape[1], importance)
    return out


@pytest.mark.parametrize("name", QUANTIZERS)
def test_bytes_equal_the_reference(name):
    rng = np.random.default_rng(4)
    type = type_by_name(name)
    positive = (rng.random(N) ** 4).astype(np.float32)
    importances = (None, positive, positive * (rng.random(N) < 0.5), np.zeros(N, np.float32))
    for kind, make in DATA.items():
        x = rng.standard_normal((N_ROWS, N))
        x = (make(x, rng) if callable(make) else x * make).astype(np.float32)
        for i, importance in enumerate(importances):
            differ = quantize(x, name, importance, 1) != by_ggml(x, type, importance)
            wrong = differ.reshape(-1, type.type_size).any(axis=1)
            assert not wrong.any(), f"{kind}, importance {i}: block {wrong.argmax()} and {wrong.sum() - 1} others"


@pytest.mark.parametrize("n_rows", [1, 15, 16, 17])
def test_nothing_is_written_beyond_the_last_block(n_rows):
    x = np.random.default_rng(n_rows).standard_normal((n_rows, 256), np.float32)
    out = np.full(n_rows * 144 + 64, 0xAA, np.uint8)
    QUANTIZERS["Q4_K"](x.reshape(-1), 256, np.zeros(0, np.float32), out)
    assert (out[: n_rows * 144].reshape(n_rows, -1) == by_ggml(x, type_by_name("Q4_K"))).all()
    assert (out[n_rows * 144 :] == 0xAA).all()


@pytest.mark.parametrize(("name", "seed"), [("Q2_K", 30301), ("Q4_K", 8512), ("Q5_K", 2065)])
def test_scale_codes_that_outgrow_their_field(name, seed):
    """One of 10**4 super-blocks of wildly mixed sizes ends so, if weighted; the seeds were found by trying."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((1, 256)) * 10.0 ** rng.integers(-44, -1, (1, 256))).astype(np.float32)
    importance = (rng.random(256) ** 4 * (rng.random(256) < 0.5)).astype(np.float32)
    assert (quantize(x, name, importance) == by_ggml(x, type_by_name(name), importance)).all()


def test_rows_are_cut_over_threads_and_axes_stay():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 300, 1024), np.float32)  # several chunks, the last one short
    importance = rng.random(1024, np.float32)
    expected = by_ggml(x.reshape(900, 1024), type_by_name("Q4_0"), importance).reshape(3, 300, -1)
    for n_threads in (1, 3, None):
        np.testing.assert_array_equal(quantize(x, "q4_0", importance, n_threads), expected)
    np.testing.assert_array_equal(quantize(x.transpose(1, 0, 2), "Q4_0", importance), expected.transpose(1, 0, 2))
    assert quantize(np.empty((2, 0, 64), np.float32), "Q4_0").shape == (2, 0, 36)
    assert quantize(np.empty((2, 0), np.float32), "Q4_0").shape == (2, 0)


def test_half_floats_are_taken_as_their_values():
    x = np.random.default_rng(3).standard_normal((2, 512), np.float32).astype(np.float16)
    np.testing.assert_array_equal(quantize(x, "Q8_0"), quantize(x.astype(np.float32), "Q8_0"))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q6_K"])
def test_what_was_written_is_read_back(name):
    """The error of each weight is at most half a step of the largest in its block; the gguf package reads the same."""
    x = np.random.default_rng(5).standard_normal((4, 512), np.float32)
    type = type_by_name(name)
    blocks = quantize(x, type)
    read = dequantize(blocks, type)
    step = {"F32": 0, "F16": 2**-10, "BF16": 2**-7, "Q8_0": 1 / 127, "Q6_K": 1 / 31}[name]
    assert np.abs(read - x).max() <= 0.51 * step * np.abs(x).max()
    np.testing.assert_array_equal(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name]), read)


def test_bad_weights_are_counted_and_the_first_is_named():
    x = np.zeros((3, 32), np.float32)
    x[1, 5], x[2, 7] = np.nan, -np.inf
    assert count_bad(x) == (2, 37)
    with pytest.raises(
        FormatError, match=r"2 of 96 weights are NaN or infinite.*the first at index 37 \(row 1, column 5"
    ):
        quantize(x, "Q8_0")
    with pytest.raises(FormatError, match="2 of 96"):
        quantize(x.astype(np.float16), "Q8_0")


def test_what_cannot_be_quantized():
    x = np.zeros((2, 48), np.float32)
    with pytest.raises(FormatError, match="rows of 48 weights are no whole Q8_0 blocks: a multiple of 32"):
        quantize(x, "Q8_0")
    with pytest.raises(FormatError, match="float64"):
        quantize(x.astype(np.float64), "F16")
    with pytest.raises(FormatError, match="no quantizer for IQ2_XXS"):
        quantize(x, "IQ2_XXS")
    with pytest.raises(UnsupportedError, match="unknown tensor type"):
        quantize(x, "Q4_L")


def test_importance_must_fit():
    x = np.zeros((2, 32), np.float32)
    good = np.ones(32, np.float32)
    quantize(x, "Q8_0", good)
    with pytest.raises(FormatError, match=r"shape \(64,\).*need \(32,\)"):
        quantize(x, "Q8_0", np.ones(64, np.float32))
    for bad in (-1.0, np.nan, np.inf):
        importance = good.copy()
        importance[3] = bad
        with pytest.raises(FormatError, match=r"1 of 32 importance weights .* at column 3"):
            quantize(x, "Q8_0", importance)


def test_api_in_the_package() -> None:
    """As the README has it; a type is a name or a TensorType."""
    import gguf_run.formats

    weights = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
    blocks = gguf_run.formats.quantize(weights, "Q8_0")
    assert (blocks == gguf_run.formats.quantize(weights, type_by_name("Q8_0"))).all()
    assert np.abs(gguf_run.formats.dequantize(blocks, "Q8_0") - weights).max() < 1 / 127
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gguf_run.formats.nothing  # noqa: B018
