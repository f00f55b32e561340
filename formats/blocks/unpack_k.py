"""Unpackers of the K-quants: 256 weights in 16 groups of 16 or 8 groups of 32. Small scales share one or two f16.

Two patterns of 32 bytes recur, for i in 0..31:

               7   6     5   4     3   2     1   0
    nibbles:      w[32 + i]     |       w[i]            64 weights w of four bits
    crumbs:    w[96+i] | w[64+i] | w[32+i] | w[i]      128 weights w of two bits
"""

from typing import Any

import numpy as np

from gguf_run.formats.blocks.scalars import f16, f32
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
    for c in range(2):
        qs = src[at + 16 + 32 * c : at + 48 + 32 * c]
        for j in range(4):
            out = q[128 * c + 32 * j : 128 * c + 32 * j + 32]
            for i in range(32):
                out[i] = (qs[i] >> 2 * j) & 3


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
    hmask = src[at : at + 32]
    for c in range(2):
        qs = src[at + 32 + 32 * c : at + 64 + 32 * c]
        for j in range(4):
            out = q[128 * c + 32 * j : 128 * c + 32 * j + 32]
            for i in range(32):
                out[i] = (((qs[i] >> 2 * j) & 3) | ((hmask[i] >> (4 * c + j)) & 1) << 2) - 4


@njit(forceinline=True)
def unpack_q4_k(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d, dmin, scales (above) | qs u8[128], nibbles; weight = d * s * q - dmin * m."""
    _scales_and_minimums(src[at : at + 16], scale, minimum, factor)
    for c in range(4):
        qs = src[at + 16 + 32 * c : at + 48 + 32 * c]
        for j in range(2):
            out = q[64 * c + 32 * j : 64 * c + 32 * j + 32]
            for i in range(32):
                out[i] = (qs[i] >> 4 * j) & 15


@njit(forceinline=True)
def unpack_q5_k(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d, dmin, scales (above) | qh u8[32] | qs u8[128], nibbles; bit g of qh[i] is the fifth bit of weight 32 g + i."""
    _scales_and_minimums(src[at : at + 16], scale, minimum, factor)
    qh = src[at + 16 : at + 48]
    for c in range(4):
        qs = src[at + 48 + 32 * c : at + 80 + 32 * c]
        for j in range(2):
            out = q[64 * c + 32 * j : 64 * c + 32 * j + 32]
            for i in range(32):
                out[i] = ((qs[i] >> 4 * j) & 15) | ((qh[i] >> (2 * c + j)) & 1) << 4


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
    for c in range(2):
        qh = src[at + 128 + 32 * c : at + 160 + 32 * c]
        for j in range(4):
            ql = src[at + 64 * c + 32 * (j % 2) : at + 64 * c + 32 * (j % 2) + 32]
            out = q[128 * c + 32 * j : 128 * c + 32 * j + 32]
            for i in range(32):
                out[i] = (((ql[i] >> 4 * (j // 2)) & 15) | ((qh[i] >> 2 * j) & 3) << 4) - 32


@njit(forceinline=True)
def unpack_q8_k(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f32 | qs i8[256] | bsums i16[16]; weight = d * q. bsums (sums of 16 q) are for dot products only."""
    scale[:] = f32(src, at)
    qs = src[at + 4 : at + 260]
    for i in range(256):
        q[i] = qs[i]
