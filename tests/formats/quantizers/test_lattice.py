"""Codes of grids that weights were trained for, against the codes that made the weights."""

import numpy as np
import pytest
from block_patterns import assert_same_bits

from gguf_run.formats.blocks.codes import Codes, pack, unpack
from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.blocks.unpack import INTEGER_FORMS
from gguf_run.formats.quantizers.lattice import LATTICES, recover
from gguf_run.formats.quantizers.quantizer import quantize

by_type = pytest.mark.parametrize("name", LATTICES)


def stored(x, kind):
    """The weights as a checkpoint of that kind holds them."""
    return dequantize(quantize(x, kind), kind)


def trained(name, seed=0, lowest=None, bits=10, n_rows=40, n=256):
    """Blocks whose codes and scales are not what ggml makes of them. Half floats of so many bits of a mantissa."""
    type, form = type_by_name(name), INTEGER_FORMS[name]
    rng = np.random.default_rng(seed)
    lowest = max(form.q_min, -127) if lowest is None else lowest
    code = rng.integers(lowest, form.q_max + 1, (n_rows, n)).astype(np.int8)
    if form.has_minimum:
        code[:, ::32] = 0  # the least weight is the minimum
    else:
        code[:, ::32] = lowest  # else all codes may be even, which is the same with half of the step
    shape = (n_rows, n // 32)
    scale, minimum = (
        np.round(rng.uniform(2**bits, 2 ** (bits + 1), shape)) * 2.0 ** rng.integers(-bits - 9, -bits - 5, shape)
        for _ in range(2)
    )
    minimum = -minimum if form.has_minimum else np.zeros((n_rows, 0))
    codes = Codes(type, code, *(v.astype(np.float32) for v in (scale, minimum)), np.ones((*shape, 2), np.float32))
    return pack(codes)


def as_rows(blocks):
    return blocks.reshape(len(blocks), -1)


@by_type
def test_what_ggml_writes_comes_back_from_f16(name):
    x = np.random.default_rng(1).standard_normal((40, 256), np.float32) * np.float32(0.03)
    x[3, 32:64] = 0
    blocks = quantize(x, name)
    again, fits = recover(stored(dequantize(blocks, name), "F16"), type_by_name(name))
    assert fits.all()
    assert as_rows(again).tobytes() == blocks.tobytes()


@by_type
@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_trained_codes_come_back(name, kind):
    """ggml's own rounding moves them if no code is the least one."""
    form = INTEGER_FORMS[name]
    lowest = max(form.q_min, -form.q_max)
    blocks = trained(name, lowest=lowest)
    x = stored(dequantize(blocks, name), kind)
    again, fits = recover(x, type_by_name(name))
    assert fits.all()
    assert_same_bits(stored(dequantize(as_rows(again), name), kind), x + np.float32(0))
    found, true = unpack(as_rows(again), type_by_name(name)), unpack(blocks, type_by_name(name))
    same = found.scale == true.scale  # else a finer step and greater codes mean the same
    assert same.mean() > 0.9
    assert (found.code == true.code)[np.repeat(same, 32, axis=1)].all()
    if name in ("Q4_0", "Q5_0"):
        assert (quantize(x, name) != blocks).reshape(*fits.shape, -1).any(axis=2).mean() > 0.9


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0"])
def test_from_bf16(name):
    """A step of eight bits, as training in BF16 has it, comes back; of one of eleven, only what BF16 still tells."""
    type = type_by_name(name)
    blocks = trained(name, bits=7)
    again, fits = recover(stored(dequantize(blocks, name), "BF16"), type)
    assert fits.all()
    assert as_rows(again).tobytes() == blocks.tobytes()

    blocks = trained(name, bits=10, n_rows=1000)  # some weights are powers of two
    x = stored(dequantize(blocks, name), "BF16")
    again, fits = recover(x, type)
    assert fits.all()
    assert_same_bits(stored(dequantize(as_rows(again), name), "BF16"), x + np.float32(0))
    assert (unpack(as_rows(again), type).code == unpack(blocks, type).code).all()


def test_a_lattice_of_another_type_is_none():
    """Only what the type can hold exactly fits: Q4_0 is a part of Q5_0 and Q8_0, and not the other way round."""
    weights = {name: stored(dequantize(trained(name), name), "F16") for name in LATTICES}
    part = {(a, b): recover(weights[a], type_by_name(b))[1].mean() for a in LATTICES for b in LATTICES}
    inside = {("Q4_0", "Q5_0"), ("Q4_0", "Q8_0"), ("Q5_0", "Q8_0")}
    for (a, b), fits in part.items():
        if a == b or (a, b) in inside:
            assert fits > 0.99, (a, b)
        elif not (a in ("Q4_0", "Q5_0", "Q4_1") and b in ("Q4_1", "Q5_1")):  # some steps and minimums suit both
            assert fits < 0.01, (a, b)


@by_type
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_no_lattice(name, kind):
    x = stored(np.random.default_rng(2).standard_normal((20, 256), np.float32), kind)
    x[0, 5], x[1, 40], x[2, 70] = np.nan, np.inf, 1e38
    x[4, 32:64] = 0  # all zeros are on every lattice
    blocks, fits = recover(x, type_by_name(name))
    assert fits.sum() == 1
    assert fits[4, 1]
    assert (blocks[~fits].view(np.uint8) == pack_zeros(name)).all()


def pack_zeros(name):
    type = type_by_name(name)
    form = INTEGER_FORMS[name]
    zeros = np.zeros((1, 1 if form.has_minimum else 0), np.float32)
    return pack(
        Codes(type, np.zeros((1, 32), np.int8), np.zeros((1, 1), np.float32), zeros, np.ones((1, 1, 2), np.float32))
    )
