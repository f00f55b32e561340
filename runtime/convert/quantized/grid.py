"""Weights on an integer grid, as GPTQ, AWQ and others store them, and the GGUF blocks that can hold their codes.

weight[o, i] = scale[o, g] * (code[o, i] - zero[o, g]) + bias[o, g], where g is the group of column i.

A block of Q4_0, Q4_1 or Q8_0 has a scale (and a minimum) for 32 weights of a row. If groups are runs of a multiple of
32 columns, the codes move into blocks unchanged; only scale and minimum are rounded to f16. Codes of 2 or 3 bits move
too: the file grows, but loses nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.types import type_by_name

Array = NDArray[Any]
_BLOCK = 32
# How far rounding scale and minimum to f16 may move a weight, in parts of the range of its codes.
_TOLERANCE = 1e-3
# The most bits of a code, whether the zero point is in the middle of the codes, the type whose blocks hold them.
_KEPT = ((4, True, "Q4_0"), (4, False, "Q4_1"), (8, True, "Q8_0"))


def unpack_codes(packed: Array, n_bits: int) -> NDArray[np.uint8]:
    """Return the codes uint8[..., n] of rows in which they follow each other, lowest bits first.

    packed: rows of any little-endian integer type. n: as many codes of n_bits (1 to 8) as fit. Eight codes are n_bits
    whole bytes, so a code may cross from one word into the next.
    """
    octets = np.ascontiguousarray(packed).view(np.uint8)
    n_groups = octets.shape[-1] // n_bits
    groups = octets[..., : n_groups * n_bits].reshape(*octets.shape[:-1], n_groups, n_bits)
    word = groups[..., 0].astype(np.uint64)
    for j in range(1, n_bits):
        word |= groups[..., j].astype(np.uint64) << np.uint64(8 * j)
    codes = np.empty((*word.shape, 8), np.uint8)
    for i in range(8):
        codes[..., i] = (word >> np.uint64(n_bits * i)) & np.uint64((1 << n_bits) - 1)
    return codes.reshape(*octets.shape[:-1], 8 * n_groups)


@dataclass(frozen=True)
class GridNumbers:
    """What the codes of some rows mean. Each array is [n_rows, n_group or 1]."""

    scale: Array  # float32
    zero: Array  # in units of a code
    bias: Array | None = None  # float32

    @property
    def minimum(self) -> NDArray[np.float64]:
        """The weight of code 0."""
        low = -self.scale.astype(np.float64) * self.zero
        return low if self.bias is None else low + self.bias


@dataclass(frozen=True)
class Grid:
    """A matrix float[n_out, n_in]. `codes` and `numbers` are functions of rows first .. end that read the file."""

    n_out: int
    n_bits: int  # codes are below 2**n_bits
    groups: NDArray[np.int64]  # [n_in]: the group of each column
    codes: Callable[[int, int], NDArray[np.uint8]]  # -> [end - first, n_in]
    numbers: Callable[[int, int], GridNumbers]
    exact: bool = False  # blocks must hold scale and minimum without rounding

    @cached_property
    def kept(self) -> str | None:
        """The tensor type whose blocks hold the codes unchanged; None: there is none."""
        runs = self.groups[: len(self.groups) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
        if len(self.groups) % _BLOCK or (runs != runs[:, :1]).any():
            return None
        numbers = self.numbers(0, self.n_out)
        symmetric = numbers.bias is None and bool((numbers.zero == 1 << self.n_bits - 1).all())
        name = next((name for bits, zero, name in _KEPT if self.n_bits <= bits and symmetric == zero), None)
        if name is None:
            return None
        # The scale's error moves the code furthest from the zero point most. The minimum's error moves all codes.
        scale, last = numbers.scale.astype(np.float64), (1 << self.n_bits) - 1
        with np.errstate(all="ignore"):
            error = np.abs(scale.astype(np.float16) - scale) * (1 << self.n_bits - 1 if symmetric else last)
            if not symmetric:
                error = error + np.abs(numbers.minimum.astype(np.float16) - numbers.minimum)
            return name if (error <= (0.0 if self.exact else _TOLERANCE) * last * np.abs(scale)).all() else None

    @np.errstate(all="ignore")  # of damaged files; infinities and NaN are named where weights are written
    def blocks(self, first: int, end: int) -> NDArray[np.uint8]:
        """Return the blocks uint8[end - first, row_bytes] of type `kept`."""
        assert self.kept
        out = np.empty((end - first, len(self.groups) // _BLOCK), type_by_name(self.kept).dtype)
        group, numbers = self.groups[::_BLOCK], self.numbers(first, end)
        out["d"] = _columns(numbers.scale, group)
        if self.kept == "Q4_1":
            out["m"] = _columns(numbers.minimum, group)
        codes, half = self.codes(first, end).reshape(*out.shape, _BLOCK), np.uint8(1 << self.n_bits - 1)
        if self.kept == "Q8_0":
            out["qs"] = (codes - half).view(np.int8)
        else:
            codes = codes + (np.uint8(8) - half) if self.kept == "Q4_0" else codes
            out["qs"] = codes[..., :16] | codes[..., 16:] << 4  # a byte holds weights i and i + 16
        return out.view(np.uint8)

    @np.errstate(all="ignore")
    def floats(self, first: int, end: int) -> NDArray[np.float32]:
        """Return the weights float32[end - first, n_in], each step of the formula rounded once."""
        numbers = self.numbers(first, end)
        out = self.codes(first, end).astype(np.float32)
        out -= _columns(numbers.zero, self.groups)
        out *= _columns(numbers.scale, self.groups)
        if numbers.bias is not None:
            out += _columns(numbers.bias, self.groups)
        return out


def _columns(numbers: Array, groups: NDArray[np.int64]) -> Array:
    """Return numbers[n_rows, n_group or 1] for each column: [n_rows, len(groups) or 1]."""
    return numbers if numbers.shape[1] == 1 else numbers[:, groups]
