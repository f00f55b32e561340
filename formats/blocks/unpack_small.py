"""Unpackers of types whose q is a digit or a table entry: TQ1_0 TQ2_0, IQ4_NL IQ4_XS, MXFP4 NVFP4."""

from typing import Any

import numpy as np

from gguf_run.formats.blocks.scalars import e8m0_half, f16, f32, take_bits, u16, ue4m3_half
from gguf_run.formats.compiler.jit import njit


@njit(forceinline=True)
def _trits(qs: Any, q: Any, n_digits: int) -> None:
    """q[n * i + j] = ternary digit i of byte j of qs u8[n], less 1.

    A byte b is the fraction b / 256 in base three. Multiplying by 3**i modulo 256 shifts i digits out. The next digit
    is the integer part of three times the rest.
    """
    n = len(qs)
    power = 1
    for i in range(n_digits):
        for j in range(n):
            q[n * i + j] = ((((qs[j] * power) & 255) * 3) >> 8) - 1
        power *= 3


@njit(forceinline=True)
def unpack_tq1_0(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """qs u8[48]: 32 bytes of 5 digits, 16 bytes of 5 digits | qh u8[4] of 4 digits | d f16."""
    scale[:] = f16(src, at + 52)
    _trits(src[at : at + 32], q[:160], 5)
    _trits(src[at + 32 : at + 48], q[160:240], 5)
    _trits(src[at + 48 : at + 52], q[240:], 4)


@njit(forceinline=True)
def unpack_tq2_0(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """qs u8[64] | d f16; 32 bytes hold four times 32 weights, lowest two bits first; weight = d * (q - 1)."""
    scale[:] = f16(src, at + 64)
    for g in range(8):
        take_bits(q, 32 * g, 32, src, at + 32 * (g // 4), 2 * (g % 4), 3, 1)


@njit(forceinline=True)
def _look_up(qs: Any, q: Any, grid: Any) -> None:
    """q[i] = grid[low nibble of qs[i]], q[n + i] = grid[high nibble] for qs u8[n]."""
    n = len(qs)
    for i in range(n):
        q[i] = grid[qs[i] & 15]
        q[n + i] = grid[qs[i] >> 4]


@njit(forceinline=True)
def unpack_iq4_nl(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f16 | qs u8[16], nibbles; weight = d * grid[q]."""
    scale[0] = f16(src, at)
    _look_up(src[at + 2 : at + 18], q, grid)


@njit(forceinline=True)
def unpack_iq4_xs(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f16 | scales_h u16 | scales_l u8[4] | qs u8[128], nibbles in eight groups of 16 bytes.

    The scale of group g has its low four bits in scales_l (low nibble first) and its top two bits in scales_h (lowest
    bits first). 32 is subtracted from it.
    """
    factor[0] = f16(src, at)
    scales_h = u16(src, at + 2)
    for g in range(8):
        s = ((src[at + 4 + g // 2] >> 4 * (g % 2)) & 15) | ((scales_h >> 2 * g) & 3) << 4
        scale[g] = np.float32(s - 32)
        _look_up(src[at + 8 + 16 * g : at + 24 + 16 * g], q[32 * g : 32 * g + 32], grid)


@njit(forceinline=True)
def unpack_mxfp4(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """e u8 | qs u8[16], nibbles. grid holds the e2m1 values times 2: the scale is half of 2**(e - 127)."""
    scale[0] = e8m0_half(src[at])
    _look_up(src[at + 1 : at + 17], q, grid)


@njit(forceinline=True)
def unpack_nvfp4(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d u8[4], e4m3 scales of 16 weights | qs u8[32], nibbles in four groups of 8 bytes; d is halved as in MXFP4."""
    for g in range(4):
        scale[g] = ue4m3_half(np.int64(src[at + g]))
        _look_up(src[at + 4 + 8 * g : at + 12 + 8 * g], q[16 * g : 16 * g + 16], grid)


@njit(forceinline=True)
def unpack_4(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f32 | qs u8[32], two weights in a byte, the first one in the high nibble. q becomes the codes."""
    scale[:] = f32(src, at)
    for i in range(32):
        q[2 * i] = src[at + 4 + i] >> 4
        q[2 * i + 1] = src[at + 4 + i] & 15
