"""INT8, FP8 and NF4: the codes that their definitions give."""

import numpy as np
import pytest

from gguf_run.formats import dequantize, quantize
from gguf_run.formats.blocks.coded import CODED_FORMS
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import FormatError


def weights() -> np.ndarray:
    """Rows of several sizes, from far below 1 to far above it, and a row of zeros."""
    x = np.random.default_rng(0).standard_normal((9, 192)) * np.geomspace(1e-6, 1e4, 9)[:, None]
    x[4] = 0
    x[5, :64] = 0
    return x.astype(np.float32)


def fields(type_name: str) -> np.ndarray:
    return quantize(weights(), type_name).view(type_by_name(type_name).dtype)


def test_int8() -> None:
    found, x = fields("INT8"), weights()
    d = np.abs(x).max(1) / np.float32(127)
    np.testing.assert_array_equal(found["d"], np.repeat(d[:, None], 6, 1))
    with np.errstate(invalid="ignore"):
        codes = np.nan_to_num(np.rint(x / d[:, None]))
    np.testing.assert_array_equal(found["qs"].reshape(x.shape), codes)
    assert np.abs(codes).max() == 127


def test_fp8_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    found, x = fields("FP8_E4M3"), weights()
    d = np.abs(x).max(1) / np.float32(448)
    np.testing.assert_array_equal(found["d"], np.repeat(d[:, None], 6, 1))
    with np.errstate(invalid="ignore"):
        scaled = np.where(d[:, None] > 0, x / d[:, None], 0)
    codes = torch.tensor(scaled).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(found["qs"].reshape(x.shape), codes)


def test_every_number_between_two_floats_of_8_bits() -> None:
    """Halves go to even, all others to the nearest."""
    table = CODED_FORMS["FP8_E4M3"].table[:127]
    middle = (table[1:] + table[:-1]) / 2
    x = np.concatenate([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))])
    x = np.concatenate([x, np.zeros(-len(x) % 32 + 31, np.float32), [np.float32(448)]]).astype(np.float32)
    found = quantize(x[None], "FP8_E4M3").view(type_by_name("FP8_E4M3").dtype)["qs"].reshape(-1)
    codes = np.arange(126)
    np.testing.assert_array_equal(found[:126], codes + codes % 2)
    np.testing.assert_array_equal(found[126:252], codes)
    np.testing.assert_array_equal(found[252:378], codes + 1)


def test_nf4() -> None:
    found, x = fields("NF4"), weights()
    blocks = x.reshape(9, 3, 64)
    np.testing.assert_array_equal(found["d"], np.abs(blocks).max(2))
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = np.abs(np.nan_to_num(blocks / found["d"][..., None])[..., None] - CODED_FORMS["NF4"].table)
    values = dequantize(quantize(x, "NF4"), "NF4").reshape(blocks.shape)
    error = np.abs(values - blocks) - distance.min(-1) * found["d"][..., None]
    assert (np.abs(error) <= 1e-6 * found["d"][..., None]).all()
    assert (values[:, :, 0] == CODED_FORMS["NF4"].table[found["qs"][..., 0] >> 4] * found["d"]).all()


def test_bad_weights_are_one_line() -> None:
    with pytest.raises(FormatError, match="rows of 100 weights are no whole INT8 blocks: a multiple of 32"):
        quantize(np.zeros((1, 100), np.float32), "INT8")
    with pytest.raises(FormatError, match="1 of 64 weights are NaN or infinite"):
        quantize(np.append(np.zeros(63), np.nan).astype(np.float32)[None], "NF4")
