"""Blocks as the integers and scales that they store, and back: `unpack` reads blocks, `pack` is its inverse.

Methods that choose integers and scales themselves (error feedback, lattices, training) write blocks by `pack`. The
unpackers (unpack_*.py) draw the bits that both sides mean.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.types import TensorType
from gguf_run.formats.blocks.unpack import INTEGER_FORMS, IntegerForm
from gguf_run.formats.compiler.jit import specialize
from gguf_run.formats.errors import FormatError

_Octets = NDArray[np.uint8]
_MINUS_0 = np.float32(-0.0)  # to add it changes no float, not even -0.0


@dataclass(frozen=True)
class Codes:
    """Rows of weights as the integers that their blocks store. unpack.py says what each type's scales are."""

    type: TensorType
    code: NDArray[np.int8]  # [n_rows, n]: the q of unpack.py; the index into a codebook of 16 values, if there is one
    scale: NDArray[np.float32]  # [n_rows, n / group]: as stored
    minimum: NDArray[np.float32]  # [n_rows, n / group], or [n_rows, 0] if the type has none
    factor: NDArray[np.float32]  # [n_rows, n / block_size, 2]: 1 if the type has no shared factors

    def steps(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return d and m, float32[n_rows, n / group]: d * value + m, rounded twice, is the weight bit for bit.

        m is -0.0 for a type without minimums.
        """
        repeated = np.repeat(self.factor, self.scale.shape[1] // max(1, self.factor.shape[1]), axis=1)
        with np.errstate(all="ignore"):
            d = repeated[..., 0] * self.scale
            return d, repeated[..., 1] * self.minimum if self.minimum.size else np.full_like(d, _MINUS_0)

    def value(self) -> NDArray[np.int8]:
        """Return int8[n_rows, n]: what each code means, in units of d."""
        form = INTEGER_FORMS[self.type.name]
        return form.grid()[self.code] if form.codebook else self.code


# Placeholders: specialize() replaces them by the values of a type.
unpack_block: Any = None
TYPE_SIZE = 0


def _unpack_blocks(src: Any, code: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """Take blocks src u8[:] apart. The others are arrays [n_blocks, ...]."""
    for b in range(len(code)):
        unpack_block(src, b * TYPE_SIZE, code[b], scale[b], minimum[b], factor[b], grid)


@functools.cache
def _unpacker(name: str) -> Callable[..., None]:
    type = INTEGER_FORMS[name].type
    return specialize(_unpack_blocks, name, unpack_block=INTEGER_FORMS[name].unpack, TYPE_SIZE=type.type_size)


def unpack(blocks: _Octets, type: TensorType) -> Codes:
    """Return the integers of rows of blocks, uint8[n_rows, row_bytes].

    FormatError for a type that `pack` cannot write and for rows that are not whole blocks.
    """
    form = _written(type)
    if blocks.ndim != 2 or blocks.shape[1] % type.type_size:
        raise FormatError(f"{type.name} blocks of shape {blocks.shape}: rows of {type.type_size} bytes each are needed")
    n_rows, n_blocks = len(blocks), blocks.shape[1] // type.type_size
    n_groups = type.block_size // form.group
    code = np.empty((n_rows * n_blocks, type.block_size), np.int8)
    scale = np.empty((len(code), n_groups), np.float32)
    minimum = np.empty((len(code), n_groups if form.has_minimum else 0), np.float32)
    factor = np.ones((len(code), 2), np.float32)
    grid = np.arange(16, dtype=np.int8)  # an unpacker that looks its values up here returns codes
    _unpacker(type.name)(np.ascontiguousarray(blocks).reshape(-1), code, scale, minimum, factor, grid)
    return Codes(
        type,
        code.reshape(n_rows, n_blocks * type.block_size),
        scale.reshape(n_rows, n_blocks * n_groups),
        minimum.reshape(n_rows, n_blocks * minimum.shape[1]),
        factor.reshape(n_rows, n_blocks, 2),
    )


def _halves(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bits of floats as f16. A NaN keeps its payload, which no conversion of the processor does."""
    bits = x.view(np.uint32)
    with np.errstate(all="ignore"):
        halves = x.astype(np.float16).view(np.uint16)
    payload = np.maximum(bits >> 13 & 0x3FF, 1)  # never 0, which is infinity
    return np.where(np.isnan(x), bits >> 16 & 0x8000 | 0x7C00 | payload, halves).astype(np.uint16)


def _unsigned(v: NDArray[Any], low: int, high: int, what: str) -> _Octets:
    """Return integers as their block holds them: less `low`, or all eight bits of signed bytes."""
    if v.size and not (low <= v.min() and v.max() <= high):
        raise FormatError(f"{what} go from {v.min()} to {v.max()}: a block can hold {low} to {high}")
    return v.astype(np.int8).view(np.uint8) if low == -128 else (v - v.dtype.type(low)).astype(np.uint8)


def _merge(q: _Octets, n: int, bits: int, shift: int = 0) -> _Octets:
    """Return bytes that hold `bits` bits, from bit `shift` on, of each q. q[i], q[n + i], ... share a byte i < n."""
    parts = ((q >> shift) & ((1 << bits) - 1)).reshape(len(q), -1, 8 // bits, n)
    shifts = bits * np.arange(8 // bits, dtype=np.uint8)
    return np.bitwise_or.reduce(parts << shifts[:, None], axis=2).reshape(len(q), -1)


def _digits(q: _Octets) -> _Octets:
    """Return the bytes of ternary digits q[n, n_digits, n_bytes]: a fraction of 256 with up to five digits."""
    number: NDArray[Any] = np.zeros((len(q), q.shape[2]), np.uint16)
    for i in range(5):
        number = number * 3 + (q[:, i] if i < q.shape[1] else 0)
    return ((number * 256 + 242) // 243).astype(np.uint8)


def _q4_k_scales(s: _Octets, m: _Octets) -> _Octets:
    low, high = [(v[:, :4] | v[:, 4:] >> 4 << 6) for v in (s, m)]
    return np.concatenate([low, high, s[:, 4:] & 15 | m[:, 4:] << 4], axis=1)


def _e8m0(scale: NDArray[np.float32]) -> _Octets:
    bits = scale.view(np.uint32)
    return np.where(bits < 1 << 23, bits >> 22, (bits >> 23) + 1).astype(np.uint8)


def _ue4m3(scale: NDArray[np.float32]) -> _Octets:
    """0x7F means 0, so the greatest value has the sign bit, which is ignored."""
    subnormal = (scale * np.float32(2.0**10)).astype(np.uint32)
    code = np.where(scale < 2.0**-7, subnormal, (scale.view(np.uint32) >> 20) - (119 << 3))
    return np.where(code == 0x7F, 0xFF, code).astype(np.uint8)


# Type -> (unsigned codes, scales, minimums) -> the fields of its blocks except d, dmin and m.
_FIELDS: Mapping[str, Callable[[_Octets, Any, Any], dict[str, NDArray[Any]]]] = {
    "Q4_0": lambda q, s, m: {"qs": _merge(q, 16, 4)},
    "Q4_1": lambda q, s, m: {"qs": _merge(q, 16, 4)},
    "Q5_0": lambda q, s, m: {"qs": _merge(q, 16, 4), "qh": _merge(q, 1, 1, 4)},
    "Q5_1": lambda q, s, m: {"qs": _merge(q, 16, 4), "qh": _merge(q, 1, 1, 4)},
    "Q8_0": lambda q, s, m: {"qs": q},
    "Q2_K": lambda q, s, m: {"qs": _merge(q, 32, 2), "scales": s | m << 4},
    "Q3_K": lambda q, s, m: {
        "qs": _merge(q, 32, 2),
        "hmask": _merge(q, 32, 1, 2),
        "scales": np.concatenate([_merge(s, 8, 4), _merge(s, 4, 2, 4)], axis=1),
    },
    "Q4_K": lambda q, s, m: {"qs": _merge(q, 32, 4), "scales": _q4_k_scales(s, m)},
    "Q5_K": lambda q, s, m: {"qs": _merge(q, 32, 4), "qh": _merge(q, 32, 1, 4), "scales": _q4_k_scales(s, m)},
    "Q6_K": lambda q, s, m: {"ql": _merge(q, 64, 4), "qh": _merge(q, 32, 2, 4), "scales": s},
    "IQ4_NL": lambda q, s, m: {"qs": _merge(q, 16, 4)},
    "IQ4_XS": lambda q, s, m: {"qs": _merge(q, 16, 4), "scales_l": _merge(s, 1, 4), "scales_h": _merge(s, 1, 2, 4)},
    "TQ1_0": lambda q, s, m: {
        "qs": np.concatenate([_digits(q[:, :160].reshape(-1, 5, 32)), _digits(q[:, 160:240].reshape(-1, 5, 16))], 1),
        "qh": _digits(q[:, 240:].reshape(-1, 4, 4)),
    },
    "TQ2_0": lambda q, s, m: {"qs": _merge(q, 32, 2)},
    "MXFP4": lambda q, s, m: {"qs": _merge(q, 16, 4), "e": _e8m0(s)},
    "NVFP4": lambda q, s, m: {"qs": _merge(q, 8, 4), "d": _ue4m3(s)},
}
# Type with shared factors -> the least and the greatest scale.
_SCALES: Mapping[str, tuple[int, int]] = {
    "Q2_K": (0, 15), "Q3_K": (-32, 31), "Q4_K": (0, 63), "Q5_K": (0, 63), "Q6_K": (-128, 127), "IQ4_XS": (-32, 31),
}  # fmt: skip


def _written(type: TensorType) -> IntegerForm:
    if type.name not in _FIELDS:
        raise FormatError(f"{type.name} has no codes that can be written: allowed are {' '.join(_FIELDS)}")
    return INTEGER_FORMS[type.name]


def pack(codes: Codes) -> _Octets:
    """Return the blocks, uint8[n_rows, row_bytes]: the inverse of `unpack`, NaN payloads of half floats included.

    Where bytes differ in nothing that `unpack` reads, they are as ggml's quantizers write them: a byte of ternary
    digits is the one of its digits, and those past the last are 0; the scale of NVFP4 has no sign, and 0 is 0x00.
    Scales must be what the type can store (half floats are rounded).
    FormatError for a type that cannot be written and for integers that it cannot hold.
    """
    form = _written(codes.type)
    n_blocks = codes.code.size // codes.type.block_size
    if not n_blocks:
        return np.empty((len(codes.code), codes.type.row_bytes(codes.code.shape[1])), np.uint8)
    low, high = (0, 15) if form.codebook else (form.q_min, form.q_max)
    q = _unsigned(codes.code.reshape(n_blocks, -1), low, high, "codes")
    s: NDArray[Any] = codes.scale.reshape(n_blocks, -1)
    m: NDArray[Any] = codes.minimum.reshape(n_blocks, -1)
    out = np.empty(n_blocks, codes.type.dtype)
    if form.shared:
        f = codes.factor.reshape(n_blocks, 2)
        fields = {"d": _halves(f[:, 0])} | ({"dmin": _halves(-f[:, 1])} if form.has_minimum else {})
        low, high = _SCALES[codes.type.name]
        s, m = (_unsigned(v, low, high, what) for v, what in ((s, "scales"), (m, "minimums")))
    else:
        fields = {"d": _halves(s[:, 0])} | ({"m": _halves(m[:, 0])} if form.has_minimum else {})
    fields |= _FIELDS[codes.type.name](q, s, m)
    for name in codes.type.dtype.names or ():
        to = out[name]
        to[...] = fields[name].view(to.dtype).reshape(to.shape)
    return out.view(np.uint8).reshape(len(codes.code), -1)
