"""Blocks to integers and back: the same bytes for every pattern, and errors for what a block cannot hold."""

import dataclasses

import numpy as np
import pytest
from block_patterns import SPECIAL_F16, assert_same_bits, random_blocks, with_scales

from gguf_run.formats.blocks.codes import _FIELDS, pack, unpack
from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.blocks.unpack import INTEGER_FORMS
from gguf_run.formats.errors import FormatError
from gguf_run.formats.quantizers.quantizer import QUANTIZERS

by_type = pytest.mark.parametrize("type", [type_by_name(name) for name in _FIELDS], ids=lambda type: type.name)


def patterns(type):
    """Rows of one block: random bytes, bytes that are all equal, every special half in every field of that type."""
    uniform = np.repeat(np.arange(256, dtype=np.uint8), type.type_size).reshape(256, -1)
    rows = [random_blocks(1, (500, 1), type), uniform]
    for field in type.dtype.names:
        if type.dtype[field].base == np.dtype("<f2"):
            rows.append(with_scales(random_blocks(2, (1,), type), type, field, SPECIAL_F16.view(np.float16)))
        elif field in ("e", "d"):
            rows.append(with_scales(random_blocks(2, (1,), type), type, field, np.arange(256, dtype=np.uint8)))
    return as_written(np.concatenate(rows), type)


def as_written(blocks, type):
    """Blocks of the same meaning as `pack` writes it, by loops over digits and scales."""
    fields = blocks.copy().view(type.dtype)[:, 0]
    if type.name == "TQ1_0":
        for field, n_digits in (("qs", 5), ("qh", 4)):
            for byte in np.nditer(fields[field], op_flags=["readwrite"]):
                digits = [(int(byte) * 3**i % 256 * 3) >> 8 for i in range(n_digits)] + [0] * (5 - n_digits)
                number = sum(digit * 3 ** (4 - i) for i, digit in enumerate(digits))
                byte[...] = -(-256 * number // 243)
    if type.name == "NVFP4":
        d = fields["d"]
        fields["d"] = np.where(d == 0x7F, 0, np.where(d == 0xFF, 0xFF, d & 0x7F))
    return fields.view(np.uint8).reshape(blocks.shape)


@by_type
def test_pack_is_the_inverse_of_unpack(type):
    blocks = patterns(type)
    np.testing.assert_array_equal(pack(unpack(blocks, type)), blocks)
    some = np.concatenate([blocks[i : i + 5] for i in range(3)], axis=1)  # rows of three blocks
    np.testing.assert_array_equal(pack(unpack(some, type)), some)


@pytest.mark.parametrize("name", ["TQ1_0", "NVFP4"])
def test_forms_that_nobody_writes(name):
    """They are packed to another form that means the same."""
    type = type_by_name(name)
    blocks = random_blocks(3, (500, 2), type)
    again = pack(unpack(blocks, type))
    assert (again != blocks).any()
    assert_same_bits(dequantize(again, type), dequantize(blocks, type))


@pytest.mark.parametrize(("name", "field"), [("Q8_0", "d"), ("Q5_1", "m"), ("Q4_K", "dmin"), ("IQ4_XS", "d")])
def test_every_half(name, field):
    type = type_by_name(name)
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    blocks = with_scales(random_blocks(4, (1,), type), type, field, halves)
    np.testing.assert_array_equal(pack(unpack(blocks, type)), blocks)


@by_type
def test_steps_are_the_reference(type):
    blocks = random_blocks(5, (100, 2), type)
    codes = unpack(blocks, type)
    d, m = (np.repeat(step, INTEGER_FORMS[type.name].group, axis=1) for step in codes.steps())
    with np.errstate(all="ignore"):
        assert_same_bits(d * codes.value().astype(np.float32) + m, dequantize(blocks, type))


@by_type
def test_integers_that_do_not_fit(type):
    codes = unpack(np.zeros((2, type.type_size), np.uint8), type)
    form = INTEGER_FORMS[type.name]
    if (form.q_min, form.q_max) != (-128, 127):
        with pytest.raises(FormatError, match=f"codes go from .*{'15' if form.codebook else form.q_max}$"):
            pack(dataclasses.replace(codes, code=codes.code + np.int8(100)))
    if form.shared:
        with pytest.raises(FormatError, match="scales go from"):
            pack(dataclasses.replace(codes, scale=codes.scale + np.float32(200)))


def test_all_that_can_be_written():
    assert set(_FIELDS) == {name for name in QUANTIZERS if type_by_name(name).is_quantized} | {"NVFP4"}
    with pytest.raises(FormatError, match="IQ2_S has no codes that can be written: allowed are Q4_0 "):
        unpack(np.zeros((1, 82), np.uint8), type_by_name("IQ2_S"))
    with pytest.raises(FormatError, match=r"\(1, 19\): rows of 18 bytes each"):
        unpack(np.zeros((1, 19), np.uint8), type_by_name("Q4_0"))


@by_type
def test_empty(type):
    assert pack(unpack(np.zeros((3, 0), np.uint8), type)).shape == (3, 0)
    assert pack(unpack(np.zeros((0, type.type_size), np.uint8), type)).shape == (0, type.type_size)
