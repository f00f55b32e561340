"""Unpackers of the K-quants: 256 weights in 16 groups of 16 or 8 groups of 32. Small scales share one or two f16.

Two patterns of 32 bytes recur, for i in 0..31:

               7   6     5   4     3   2     1   0
    nibbles:      w[32 + i]     |       w[i]            64 weights w of four bits
    crumbs:    w[96+i] | w[64+i] | w[32+i] | w[i]      128 weights w of two bits
"""

from typing import Any

import numpy as np

from gguf_run.formats.blocks.scalars import add_bits, f16, f32, take_bits
from gguf_run.formats.compiler.jit import njit


@njit(forceinline=True)
def _scales_and_minimums(block: Any, scale: Any, minimum: Any, factor: Any) -> None:
    """The head of Q4_K and Q5_K: d f16 | dmin f16 | 12 bytes of eight 6-bit scales s and eight 6-bit minimums m.

                  7   6      5   4   3   2   1   0
    byte i        s[4+i] top |        s[i]              for i in 0..3
    byte 4 + i    m[4+i] top |        m[i]
    byte 8 + i      m[4+i] low   |    s[4+i] low
    """
    factor[0] = f16(block, 0)
    factor[1] = -f16(block, 2)
    for i in range(4):
        s, m, low = block[4 + i], block[8 + i], block[12 + i]
        scale[i] = np.float32(s & 63)
        scale[4 + i] = np.float32((low & 15) | (s >> 6) << 4)
        minimum[i] = np.float32(m & 63)
        minimum[4 + i] = np.float32((low >> 4) | (m >> 6) << 4)


@njit(forceinline=True)
def unpack_q2_k(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """scales u8[16] | qs u8[64], crumbs | d f16 | dmin f16.

    scales[g]: scale of group g in the low nibble, minimum in the high; weight = d * scale * q - dmin * minimum.
    """
    factor[0] = f16(src, at + 80)
    factor[1] = -f16(src, at + 82)
    scales = src[at : at + 16]
    for g in range(16):
        scale[g] = np.float32(scales[g] & 15)
        minimum[g] = np.float32(scales[g] >> 4)
    for g in range(8):
        take_bits(q, 32 * g, 32, src, at + 16 + 32 * (g // 4), 2 * (g % 4), 3, 0)


@njit(forceinline=True)
def unpack_q3_k(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """hmask u8[32] | qs u8[64], crumbs | scales u8[12] | d f16; weight = d * (scale - 32) * q.

    Weight 32 g + i has two bits in qs. q is these two bits, less 4 if bit g of hmask[i] is clear. The 6-bit scales s:

                  7   6   5   4   3   2   1   0
    byte i          s[8+i] low  |    s[i] low           for i in 0..7
    byte 8 + i    s[12+i]| s[8+i]| s[4+i]| s[i]         for i in 0..3, two top bits each
    """
    factor[0] = f16(src, at + 108)
    scales = src[at + 96 : at + 108]
    for g in range(4):
        top = scales[8 + g]
        scale[g] = np.float32(((scales[g] & 15) | (top & 3) << 4) - 32)
        scale[4 + g] = np.float32(((scales[4 + g] & 15) | ((top >> 2) & 3) << 4) - 32)
        scale[8 + g] = np.float32(((scales[g] >> 4) | ((top >> 4) & 3) << 4) - 32)
        scale[12 + g] = np.float32(((scales[4 + g] >> 4) | (top >> 6) << 4) - 32)
    for g in range(8):
        take_bits(q, 32 * g, 32, src, at + 32 + 32 * (g // 4), 2 * (g % 4), 3, 0)
        add_bits(q, 32 * g, 32, src, at, g, 1, 2, 4)


@njit(forceinline=True)
def unpack_q4_k(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d, dmin, scales (above) | qs u8[128], nibbles; weight = d * s * q - dmin * m."""
    _scales_and_minimums(src[at : at + 16], scale, minimum, factor)
    for g in range(8):
        take_bits(q, 32 * g, 32, src, at + 16 + 32 * (g // 2), 4 * (g % 2), 15, 0)


@njit(forceinline=True)
def unpack_q5_k(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d, dmin, scales (above) | qh u8[32] | qs u8[128], nibbles; bit g of qh[i] is the fifth bit of weight 32 g + i."""
    _scales_and_minimums(src[at : at + 16], scale, minimum, factor)
    for g in range(8):
        take_bits(q, 32 * g, 32, src, at + 48 + 32 * (g // 2), 4 * (g % 2), 15, 0)
        add_bits(q, 32 * g, 32, src, at + 16, g, 1, 4, 0)


@njit(forceinline=True)
def unpack_q6_k(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """ql u8[128] | qh u8[64], crumbs | scales i8[16] | d f16; weight = d * scales[g] * (q - 32).

    Each half of 128 weights w has 32 bytes of qh (their top two bits) and 64 bytes of ql (their low four bits):

               7   6   5   4   3   2   1   0
    ql[i]        w[64+i] low |    w[i] low              for i in 0..63
    """
    factor[0] = f16(src, at + 208)
    scales = src[at + 192 : at + 208]
    for g in range(16):
        scale[g] = np.float32(np.int8(scales[g]))
    for g in range(8):
        c, j = g // 4, g % 4
        take_bits(q, 32 * g, 32, src, at + 64 * c + 32 * (j % 2), 4 * (j // 2), 15, 0)
        add_bits(q, 32 * g, 32, src, at + 128 + 32 * c, 2 * j, 3, 4, 32)


@njit(forceinline=True)
def unpack_q8_k(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f32 | qs i8[256] | bsums i16[16]; weight = d * q. bsums (sums of 16 q) are for dot products only."""
    scale[:] = f32(src, at)
    for g in range(8):
        take_bits(q, 32 * g, 32, src, at + 4 + 32 * g, 0, 255, 0)
