"""Unpackers of the codebook types IQ1, IQ2 and IQ3: an index selects 8 weights (IQ3: 4) of a grid.

The grids of IQ2 and IQ3 hold magnitudes. Their signs are 8 bits, lowest bit first; a set bit means negative. Some types
store only 7 bits: the eighth makes the number of negative weights even.
"""

from typing import Any

import numpy as np

from gguf_run.formats.blocks.scalars import f16, half_to_f32, u16, u32
from gguf_run.formats.compiler.jit import njit


@njit(forceinline=True)
def _even_signs(bits: Any) -> Any:
    """Seven sign bits, and their parity as the eighth."""
    parity = bits ^ (bits >> 4)
    parity ^= parity >> 2
    return bits | ((parity ^ (parity >> 1)) & 1) << 7


@njit(forceinline=True)
def _copy_signed(q: Any, to: int, grid: Any, index: Any, size: int, signs: Any) -> None:
    """q[to : to + size] = entry `index` of the grid, of `size` magnitudes, negative where a bit of signs is set."""
    for j in range(size):
        negative = (signs >> j) & 1
        q[to + j] = (grid[size * index + j] ^ -negative) + negative


@njit(forceinline=True)
def unpack_iq2_xxs(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f16 | 8 groups of 32 weights: 4 grid indices u8[4], then u32

    31 30 29 28 | 27 .. 21 | 20 .. 14 | 13 .. 7 | 6 .. 0
       scale s  | signs 3  | signs 2  | signs 1 | signs 0        weight = d * (s + 1/2) / 4 * +-grid
    """
    d = f16(src, at)
    for g in range(8):
        indices = src[at + 2 + 8 * g : at + 6 + 8 * g]
        signs = u32(src, at + 6 + 8 * g)
        scale[g] = d * (np.float32(0.5) + np.float32(signs >> 28)) * np.float32(0.25)
        for k in range(4):
            _copy_signed(q, 32 * g + 8 * k, grid, np.int64(indices[k]), 8, _even_signs((signs >> 7 * k) & 127))


@njit(forceinline=True)
def unpack_iq2_xs(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f16 | qs u16[32]: 7 signs (15-9), 9 bits of grid index (8-0) | scales u8[8]: two s per byte, low nibble first.

    weight = d * (s + 1/2) / 4 * +-grid; one s for 16 weights.
    """
    d = f16(src, at)
    for g in range(16):
        s = (src[at + 66 + g // 2] >> 4 * (g % 2)) & 15
        scale[g] = d * (np.float32(0.5) + np.float32(s)) * np.float32(0.25)
        for k in range(2):
            word = u16(src, at + 2 + 4 * g + 2 * k)
            _copy_signed(q, 16 * g + 8 * k, grid, word & 511, 8, _even_signs(word >> 9))


@njit(forceinline=True)
def unpack_iq2_s(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f16 | qs u8[32] | signs u8[32] | qh u8[8] | scales u8[8].

    Index k of the grid: qs[k] and, above it, two bits of qh[k // 4], lowest first. Scales as in IQ2_XS.
    """
    d = f16(src, at)
    for g in range(16):
        s = (src[at + 74 + g // 2] >> 4 * (g % 2)) & 15
        scale[g] = d * (np.float32(0.5) + np.float32(s)) * np.float32(0.25)
        for k in range(2 * g, 2 * g + 2):
            top = (src[at + 66 + k // 4] >> 2 * (k % 4)) & 3
            _copy_signed(q, 8 * k, grid, src[at + 2 + k] | top << 8, 8, np.int64(src[at + 34 + k]))


@njit(forceinline=True)
def unpack_iq3_xxs(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f16 | qs u8[64], indices of 4 weights | u32[8], scale and signs of 32 weights as in IQ2_XXS.

    weight = d * (s + 1/2) / 2 * +-grid.
    """
    d = f16(src, at)
    for g in range(8):
        word = u32(src, at + 66 + 4 * g)
        scale[g] = d * (np.float32(0.5) + np.float32(word >> 28)) * np.float32(0.5)
        for k in range(4):
            signs = _even_signs((word >> 7 * k) & 127)
            to = 32 * g + 8 * k
            _copy_signed(q, to, grid, np.int64(src[at + 2 + to // 4]), 4, signs)
            _copy_signed(q, to + 4, grid, np.int64(src[at + 3 + to // 4]), 4, signs >> 4)


@njit(forceinline=True)
def unpack_iq3_s(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f16 | qs u8[64] | qh u8[8] | signs u8[32] | scales u8[4]: two s per byte, low nibble first.

    Index k of the grid: qs[k] and, above it, bit k % 8 of qh[k // 8]. weight = d * (2 s + 1) * +-grid.
    """
    d = f16(src, at)
    for g in range(8):
        s = (src[at + 106 + g // 2] >> 4 * (g % 2)) & 15
        scale[g] = d * np.float32(2 * s + 1)
        qh = src[at + 66 + g]
        for k in range(8):
            signs = src[at + 74 + 4 * g + k // 2] >> 4 * (k % 2)
            index = src[at + 2 + 8 * g + k] | ((qh >> k) & 1) << 8
            _copy_signed(q, 32 * g + 4 * k, grid, index, 4, signs)


@njit(forceinline=True)
def unpack_iq1_s(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f16 | qs u8[32] | qh u16[8], one for 32 weights:

        15    | 14 13 12 | 11 .. 9 | 8 .. 6 | 5 .. 3 | 2 .. 0
    delta < 0 | scale s  | top bits of grid indices 3, 2, 1, 0

    weight = d * (2 s + 1) * (grid +- 1/8); grid values are -1, 0 and 1, and q is 8 * grid +- 1.
    """
    d = f16(src, at)
    for g in range(8):
        qh = u16(src, at + 34 + 2 * g)
        scale[g] = d * np.float32(2 * ((qh >> 12) & 7) + 1) * np.float32(0.125)
        delta = 1 - (qh >> 15) * 2
        for k in range(4):
            index = src[at + 2 + 4 * g + k] | ((qh >> 3 * k) & 7) << 8
            for j in range(8):
                q[32 * g + 8 * k + j] = 8 * grid[8 * index + j] + delta


@njit(forceinline=True)
def unpack_iq1_m(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """qs u8[32] | qh u8[16] | scales u16[4]; weights as in IQ1_S, with one s for 16 and one delta for 8.

    qh, two nibbles per byte, low first:    3         | 2 1 0
                                            delta < 0 | top bits of the grid index
    scales[k]:   15 .. 12         | 11 .. 9 | 8 .. 6 | 5 .. 3 | 2 .. 0
                 nibble k of d    | s of groups 4k + 3, 4k + 2, 4k + 1, 4k
    """
    bits = 0
    for k in range(4):
        bits |= (u16(src, at + 48 + 2 * k) >> 12) << 4 * k
    d = half_to_f32(bits)
    for g in range(16):
        s = (u16(src, at + 48 + g // 4 * 2) >> 3 * (g % 4)) & 7
        scale[g] = d * np.float32(2 * s + 1) * np.float32(0.125)
        for k in range(2):
            qh = src[at + 32 + g] >> 4 * k
            index = src[at + 2 * g + k] | (qh & 7) << 8
            delta = 1 - ((qh >> 3) & 1) * 2
            for j in range(8):
                q[16 * g + 8 * k + j] = 8 * grid[8 * index + j] + delta
