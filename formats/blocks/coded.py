"""Types whose codes stand for floats: FP8, and the 4-bit types NF4 and FP4 of bitsandbytes. Weight = d * table[code].

A block is d, f32, and then its codes (types.py). Codes of 4 bits: two in a byte, the first one in the high nibble.
References: OCP FP8 1.0, bitsandbytes 0.50.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.types import TensorType, type_by_name
from gguf_run.formats.blocks.unpack import IntegerForm
from gguf_run.formats.compiler.deferred import COMPILING, imported
from gguf_run.formats.compiler.jit import njit
from gguf_run.formats.frozen import frozen

if COMPILING:
    from gguf_run.formats.blocks.scalars import f32

CODES_AT = 4  # bytes of a block before its codes


@frozen
class CodedForm:
    """A type, and the weights that its codes stand for where d is 1."""

    type: TensorType
    table: NDArray[np.float32]  # [16 or 256], read-only


def float8(dtype: str) -> NDArray[np.float32]:
    """Return the value of each of the 256 codes of F8_E4M3 (no infinities; 0x7f and 0xff are NaN) or F8_E5M2."""
    codes = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":
        with np.errstate(invalid="ignore"):  # ARM signals that some codes are NaN
            return (codes << 8).view(np.float16).astype(np.float32)  # the upper half of an F16
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    size = np.where(exponent > 0, np.ldexp(8 + mantissa, exponent - 10), np.ldexp(mantissa, -9))
    size[codes & 127 == 127] = np.nan
    return np.where(codes & 128, -size, size).astype(np.float32)


# Quantiles of the normal distribution, and a float of 1 sign bit, 2 bits of exponent and 1 of mantissa, over 12.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = np.array((0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3), np.float32) / np.float32(12)
_TABLES = {
    "FP8_E4M3": float8("F8_E4M3"),
    "FP8_E5M2": float8("F8_E5M2"),
    "NF4": np.array(_NF4, np.float32),
    "FP4": _FP4,
    "INT8_F32": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
}
_TABLES |= {"FP8_E4M3_128": _TABLES["FP8_E4M3"], "NF4_F32": _TABLES["NF4"], "FP4_F32": _TABLES["FP4"]}


def _form(name: str, table: NDArray[np.float32]) -> CodedForm:
    table.flags.writeable = False
    return CodedForm(type_by_name(name), table)


# How the codes of types of 4 bits become panels of integers.
CODES_OF_4_BITS: Mapping[str, IntegerForm] = MappingProxyType(
    {
        name: IntegerForm(
            type_by_name(name), 32, 0, 15, False, False, imported(f"{__package__}.unpack_small", "unpack_4")
        )
        for name in ("NF4", "FP4")
    }
)
CODED_FORMS: Mapping[str, CodedForm] = MappingProxyType({name: _form(name, table) for name, table in _TABLES.items()})


@njit
def decode(src: Any, type_size: int, table: Any, out: Any) -> None:
    """out f32[:] = the weights of blocks src u8[:] of type_size bytes."""
    is_wide, at = len(table) == 256, 0
    for start in range(0, len(src), type_size):
        d = f32(src, start)
        for byte in src[start + CODES_AT : start + type_size]:
            if is_wide:
                out[at] = d * table[byte]
                at += 1
            else:
                out[at], out[at + 1] = d * table[byte >> 4], d * table[byte & 15]
                at += 2
