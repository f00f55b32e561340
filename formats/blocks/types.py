"""The tables of tensor types: the size of a block of each type, and the fields of its bytes.

A row of a tensor is a sequence of blocks. A block holds `block_size` weights in `type_size` bytes. The structured dtype
has ggml's names for the fields of a block, in little-endian order. A big-endian file swaps the bytes of each field.
Reference: ggml-common.h and ggml.h of llama.cpp. The unpackers (unpack_*.py) draw the bits of the fields.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.frozen import frozen


@frozen
class TensorType:
    """One tensor type."""

    id: int | None  # ggml's number; None: the type is in no GGUF file
    name: str
    block_size: int  # weights of a block
    type_size: int  # bytes of a block
    dtype: np.dtype[Any]  # fields of a block, type_size bytes

    def __post_init__(self) -> None:
        assert self.dtype.itemsize == self.type_size, f"{self.name}: layout of {self.dtype.itemsize} bytes"

    def row_bytes(self, n: int) -> int:
        """Return the bytes of a row of n weights. n must be a multiple of block_size."""
        return n // self.block_size * self.type_size

    @property
    def is_quantized(self) -> bool:
        """Whether a block holds more than one weight."""
        return self.block_size > 1


_F16, _F32, _I8, _U8, _I16, _U16, _U32 = "<f2", "<f4", "i1", "u1", "<i2", "<u2", "<u4"


def _row(id: int | None, name: str, block_size: int, type_size: int, *fields: tuple[Any, ...] | str) -> TensorType:
    """A row of the table. fields: one scalar type, or (name, scalar type[, count]) for each field of a block."""
    layout = fields[0] if isinstance(fields[0], str) else list(fields)
    return TensorType(id, name, block_size, type_size, np.dtype(layout))


# fmt: off
TENSOR_TYPES: tuple[TensorType, ...] = (
    _row( 0, "F32",       1,   4, _F32),
    _row( 1, "F16",       1,   2, _F16),
    _row( 2, "Q4_0",     32,  18, ("d", _F16), ("qs", _U8, 16)),
    _row( 3, "Q4_1",     32,  20, ("d", _F16), ("m", _F16), ("qs", _U8, 16)),
    _row( 6, "Q5_0",     32,  22, ("d", _F16), ("qh", _U32), ("qs", _U8, 16)),
    _row( 7, "Q5_1",     32,  24, ("d", _F16), ("m", _F16), ("qh", _U32), ("qs", _U8, 16)),
    _row( 8, "Q8_0",     32,  34, ("d", _F16), ("qs", _I8, 32)),
    # For activations, never in a file; s = d * sum(qs). (The gguf package counts 40 bytes, with f32 d and s.)
    _row( 9, "Q8_1",     32,  36, ("d", _F16), ("s", _F16), ("qs", _I8, 32)),
    _row(10, "Q2_K",    256,  84, ("scales", _U8, 16), ("qs", _U8, 64), ("d", _F16), ("dmin", _F16)),
    _row(11, "Q3_K",    256, 110, ("hmask", _U8, 32), ("qs", _U8, 64), ("scales", _U8, 12), ("d", _F16)),
    _row(12, "Q4_K",    256, 144, ("d", _F16), ("dmin", _F16), ("scales", _U8, 12), ("qs", _U8, 128)),
    _row(13, "Q5_K",    256, 176, ("d", _F16), ("dmin", _F16), ("scales", _U8, 12), ("qh", _U8, 32), ("qs", _U8, 128)),
    _row(14, "Q6_K",    256, 210, ("ql", _U8, 128), ("qh", _U8, 64), ("scales", _I8, 16), ("d", _F16)),
    # For activations; bsums[j] = sum of the 16 quants of group j.
    _row(15, "Q8_K",    256, 292, ("d", _F32), ("qs", _I8, 256), ("bsums", _I16, 16)),
    _row(16, "IQ2_XXS", 256,  66, ("d", _F16), ("qs", _U16, 32)),
    _row(17, "IQ2_XS",  256,  74, ("d", _F16), ("qs", _U16, 32), ("scales", _U8, 8)),
    # gas: scales and signs. ggml counts them as the last third of qs.
    _row(18, "IQ3_XXS", 256,  98, ("d", _F16), ("qs", _U8, 64), ("gas", _U32, 8)),
    _row(19, "IQ1_S",   256,  50, ("d", _F16), ("qs", _U8, 32), ("qh", _U16, 8)),
    _row(20, "IQ4_NL",   32,  18, ("d", _F16), ("qs", _U8, 16)),
    _row(21, "IQ3_S",   256, 110, ("d", _F16), ("qs", _U8, 64), ("qh", _U8, 8), ("signs", _U8, 32), ("scales", _U8, 4)),
    _row(22, "IQ2_S",   256,  82, ("d", _F16), ("qs", _U8, 32), ("signs", _U8, 32), ("qh", _U8, 8), ("scales", _U8, 8)),
    _row(23, "IQ4_XS",  256, 136, ("d", _F16), ("scales_h", _U16), ("scales_l", _U8, 4), ("qs", _U8, 128)),
    _row(24, "I8",        1,   1, _I8),
    _row(25, "I16",       1,   2, _I16),
    _row(26, "I32",       1,   4, "<i4"),
    _row(27, "I64",       1,   8, "<i8"),
    _row(28, "F64",       1,   8, "<f8"),
    # There is no field d: its 16 bits are the top nibbles of the four scales.
    _row(29, "IQ1_M",   256,  56, ("qs", _U8, 32), ("qh", _U8, 16), ("scales", _U16, 4)),
    _row(30, "BF16",      1,   2, _U16),  # the upper half of an f32: numpy has no bfloat16
    _row(34, "TQ1_0",   256,  54, ("qs", _U8, 48), ("qh", _U8, 4), ("d", _F16)),
    _row(35, "TQ2_0",   256,  66, ("qs", _U8, 64), ("d", _F16)),
    _row(39, "MXFP4",    32,  17, ("e", _U8), ("qs", _U8, 16)),
    _row(40, "NVFP4",    64,  36, ("d", _U8, 4), ("qs", _U8, 32)),
    _row(41, "Q1_0",    128,  18, ("d", _F16), ("qs", _U8, 16)),
    _row(42, "Q2_0",     64,  18, ("d", _F16), ("qs", _U8, 16)),
)
# Types of quantized checkpoints that ggml does not have. They live in memory only: GGUF has no number for them.
# All blocks of a row have the same d, but in NF4 and FP4. In types for 128 x 128 weights all rows of a panel have it.
CHECKPOINT_TYPES: tuple[TensorType, ...] = (
    _row(None, "FP8_E4M3",      32,  36, ("d", _F32), ("qs", _U8, 32)),
    _row(None, "FP8_E5M2",      32,  36, ("d", _F32), ("qs", _U8, 32)),
    _row(None, "FP8_E4M3_128", 128, 132, ("d", _F32), ("qs", _U8, 128)),
    _row(None, "INT8",          32,  36, ("d", _F32), ("qs", _I8, 32)),
    # bitsandbytes: a byte of qs has two weights, the first one in the high nibble.
    _row(None, "NF4",           64,  36, ("d", _F32), ("qs", _U8, 32)),
    _row(None, "FP4",           64,  36, ("d", _F32), ("qs", _U8, 32)),
    # The same blocks, of which products take activations as they are, not rounded to int8.
    _row(None, "INT8_F32",      32,  36, ("d", _F32), ("qs", _I8, 32)),
    _row(None, "NF4_F32",       64,  36, ("d", _F32), ("qs", _U8, 32)),
    _row(None, "FP4_F32",       64,  36, ("d", _F32), ("qs", _U8, 32)),
)
# fmt: on

# Types that ggml has removed. Files with them exist.
_REMOVED = MappingProxyType(
    {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
    | {36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
)
_BY_ID = MappingProxyType({row.id: row for row in TENSOR_TYPES if row.id is not None})
_BY_NAME = MappingProxyType({row.name: row for row in (*TENSOR_TYPES, *CHECKPOINT_TYPES)})


def type_by_id(id: int) -> TensorType:
    """Return the type with ggml's number `id`. UnsupportedError, which names no file, if there is none."""
    if id in _REMOVED:
        raise UnsupportedError(f"tensor type {id} ({_REMOVED[id]}) was removed from ggml: quantize the model again")
    if id not in _BY_ID:
        raise UnsupportedError(f"unknown tensor type {id}: types 0 to {max(_BY_ID)} are known")
    return _BY_ID[id]


def type_by_name(name: str) -> TensorType:
    """Return the type called `name`, in any case ("Q4_0", "q4_k"). UnsupportedError lists the names."""
    if name.upper() not in _BY_NAME:
        raise UnsupportedError(f'unknown tensor type "{name}": known are {" ".join(_BY_NAME)}')
    return _BY_NAME[name.upper()]


# The 16 values of IQ4_NL and IQ4_XS, which are closest to each other around zero, and those of the 4-bit float e2m1
# (OCP MX specification 1.0), times 2. grids.py has larger codebooks.
CODEBOOKS: Mapping[str, tuple[int, ...]] = {
    "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "e2m1": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
}
