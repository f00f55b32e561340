"""The table of tensor types, against the gguf package's table and ggml's block layouts."""

import gguf
import numpy as np
import pytest
from ggufbuild import TYPES

from gguf_run.formats.blocks.types import TENSOR_TYPES, TensorType, type_by_id, type_by_name
from gguf_run.formats.errors import UnsupportedError


def test_table_equals_the_gguf_package() -> None:
    for id, (block_size, type_size) in gguf.GGML_QUANT_SIZES.items():
        if id.name == "Q8_1":
            type_size = 36  # the package kept the size of an old layout with f32 fields; ggml's is 2 + 2 + 32
        row = type_by_id(int(id))
        assert (row.name, row.block_size, row.type_size) == (id.name, block_size, type_size)


def test_table_is_complete_and_unique() -> None:
    removed = {4, 5, 31, 32, 33, 36, 37, 38}
    assert [row.id for row in TENSOR_TYPES] == [id for id in range(43) if id not in removed]
    assert {row.name: (row.id, row.block_size, row.type_size) for row in TENSOR_TYPES} == TYPES


@pytest.mark.parametrize("row", TENSOR_TYPES, ids=lambda row: row.name)
def test_layout(row: TensorType) -> None:
    assert row.dtype.itemsize == row.type_size
    assert row.row_bytes(3 * row.block_size) == 3 * row.type_size
    assert row.is_quantized == (row.block_size > 1)
    # Fields follow each other without gaps and are little-endian.
    end = 0
    for name in row.dtype.names or ():
        field, offset = row.dtype.fields[name][:2]  # type: ignore[index]
        assert offset == end
        end = offset + field.itemsize
        assert field.base.newbyteorder("<") == field.base
    assert end in (0, row.type_size)


def test_fields_lie_where_gguf_reads_them() -> None:
    """The scale of a quantized 1.0-only row: where the gguf package puts it, the dtype finds it."""
    ones = np.ones((1, 256), np.float32)
    for name, expected in (("Q4_0", -0.125), ("Q5_0", -0.0625), ("Q8_0", 1 / 127), ("TQ1_0", 1.0), ("TQ2_0", 1.0)):
        blocks = gguf.quants.quantize(ones, gguf.GGMLQuantizationType[name])
        d = blocks.reshape(-1).view(type_by_name(name).dtype)["d"]
        np.testing.assert_allclose(d.astype(np.float64), expected, rtol=1e-3)


def test_lookup_by_name_takes_any_case() -> None:
    assert type_by_name("q4_k") is type_by_name("Q4_K") is type_by_id(12)


@pytest.mark.parametrize("id", [4, 5, 31, 36, 38])
def test_removed_type(id: int) -> None:
    with pytest.raises(UnsupportedError, match=r"removed from ggml: quantize the model again"):
        type_by_id(id)


@pytest.mark.parametrize("id", [-1, 43, 1 << 31])
def test_unknown_id(id: int) -> None:
    with pytest.raises(UnsupportedError, match=f"unknown tensor type {id}"):
        type_by_id(id)


def test_unknown_name() -> None:
    with pytest.raises(UnsupportedError, match=r'unknown tensor type "Q9_9": known are F32 F16 Q4_0'):
        type_by_name("Q9_9")
