"""Quantizing against ggml itself (libgguf), byte for byte."""

import libgguf
import numpy as np
import pytest

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.quantize import QUANTIZERS, count_bad, quantize
from gguf_run.formats.types import type_by_name


def by_ggml(x, type, importance=None):
    """The blocks of x f32[n_rows, n]. By number: libgguf's enumeration lacks MXFP4."""
    out = np.empty((len(x), type.row_bytes(x.shape[1])), np.uint8)
    libgguf.quantize_rows_into_raw(type.id, x, out, len(x), x.shape[1], importance)
    return out


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_bytes_are_ggmls(name, weighted):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((36, 512)).astype(np.float32)
    importance = rng.random(512).astype(np.float32) if weighted else None
    np.testing.assert_array_equal(quantize(x, name, importance), by_ggml(x, type_by_name(name), importance))


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
