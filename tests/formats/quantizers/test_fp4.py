"""Searched scales of MXFP4 and NVFP4 against all scales there are, in float64. test_quantizer.py has ggml's bytes."""

import numpy as np
import pytest

from gguf_run.formats.blocks.codes import unpack
from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import CODEBOOKS, type_by_name
from gguf_run.formats.blocks.unpack import INTEGER_FORMS
from gguf_run.formats.errors import FormatError
from gguf_run.formats.quantizers.quantizer import SEARCHES, quantize

by_type = pytest.mark.parametrize("name", SEARCHES)


def errors(x, blocks, name, w):
    """The weighted squared error of each group."""
    e = w * (dequantize(blocks, name).astype(np.float64) - x) ** 2
    return e.reshape(len(x), -1, INTEGER_FORMS[name].group).sum(axis=2)


def scales(name):
    """All scales of a type, as float64."""
    type, field = type_by_name(name), {"MXFP4": "e", "NVFP4": "d"}[name]
    blocks = np.zeros(255, type.dtype)
    blocks[field] = np.arange(255).reshape(-1, *[1] * (blocks[field].ndim - 1))
    return np.unique(unpack(blocks.view(np.uint8).reshape(255, -1), type).scale.astype(np.float64))


@by_type
@pytest.mark.parametrize("size", [0.02, 1.0, 30.0])
def test_the_best_of_all_scales(name, size):
    rng = np.random.default_rng(0)
    x = (size * rng.standard_normal((9, 192))).astype(np.float32)  # 27 and 54 blocks: the last set of lanes has gaps
    for importance in (None, (rng.random(192) ** 2).astype(np.float32)):
        w = np.ones(192) if importance is None else importance.astype(np.float64)
        found = errors(x, quantize(x, name, importance, search=True), name, w)
        groups = np.abs(x).reshape(9, -1, INTEGER_FORMS[name].group).astype(np.float64)
        values = np.array(CODEBOOKS["e2m1"][:8], np.float64)
        best = np.full(found.shape, np.inf)
        for d in scales(name):
            e = np.abs(groups[..., None] - d * values).min(axis=3) ** 2
            best = np.minimum(best, (e * w.reshape(-1, groups.shape[2])).sum(axis=2))
        assert found.sum() <= 1.002 * best.sum()
        assert (found >= best * (1 - 1e-5)).all()
        assert found.sum() < errors(x, quantize(x, name), name, w).sum()


@by_type
def test_extremes(name):
    """Zeros, the least and the greatest numbers, importance of 0: never worse than ggml's bytes."""
    x = np.zeros((6, 64), np.float32)
    x[1], x[2], x[3, :3], x[4] = 1e-40, 1e30, (1, -0.0, 1e-8), -np.finfo(np.float32).max
    x[5] = np.arange(64)
    for importance in (None, np.zeros(64, np.float32), np.repeat(np.float32([0, 1]), 32)):
        w = np.ones(64) if importance is None else importance.astype(np.float64)
        searched = errors(x, quantize(x, name, importance, search=True), name, w)
        assert (searched <= errors(x, quantize(x, name), name, w)).all()


def test_error_of_nvfp4():
    x = np.random.default_rng(1).standard_normal((64, 1024), np.float32) * np.float32(0.05)
    one = np.ones(1024)
    ratio = errors(x, quantize(x, "NVFP4", search=True), "NVFP4", one).sum()
    assert ratio <= 0.80 * errors(x, quantize(x, "NVFP4"), "NVFP4", one).sum()


def test_no_search_for_other_types():
    with pytest.raises(FormatError, match="no search for Q4_K: allowed are MXFP4 NVFP4"):
        quantize(np.zeros((1, 256), np.float32), "Q4_K", search=True)
