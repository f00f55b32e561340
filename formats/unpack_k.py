"""Unpackers of the K-quants: 256 weights in 16 groups of 16 or 8 of 32, whose small scales share one or two f16."""

from typing import Any

import numpy as np

from gguf_run.formats.jit import njit
from gguf_run.formats.scalars import f16


@njit(forceinline=True)
def _scales_and_minimums(block: Any, scale: Any, minimum: Any) -> None:
    """The head of Q4_K and Q5_K: d f16 | dmin f16 | 12 bytes of eight 6-bit scales s and eight 6-bit minimums m.

              7 6   5 4 3 2 1 0
    byte 0-3  s4-7  s0-3              s4-7, m4-7: the two top bits here ..
    byte 4-7  m4-7  m0-3
    byte 8-11 m4-7 (4 bits) s4-7 (4 bits)        .. the four low bits here
    """
    d = f16(block, 0)
    dmin = f16(block, 2)
    for i in range(4):
        s, m, low = block[4 + i], block[8 + i], block[12 + i]
        scale[i] = d * np.float32((s & 63))
        scale[4 + i] = d * np.float32((low & 15 | s >> 6 << 4))
        minimum[i] = -(dmin * np.float32((m & 63)))
        minimum[4 + i] = -(dmin * np.float32((low >> 4 | m >> 6 << 4)))


@njit(forceinline=True)
def unpack_q4_k(src: Any, at: int, q: Any, scale: Any, minimum: Any, grid: Any) -> None:
    """d, dmin, scales (above) | qs u8[128]: 32 bytes hold 32 weights in their low nibbles, the next 32 in their high."""
    _scales_and_minimums(src[at : at + 16], scale, minimum)
    for c in range(4):
        qs = src[at + 16 + 32 * c : at + 48 + 32 * c]
        out = q[64 * c : 64 * c + 64]
        for i in range(32):
            out[i] = qs[i] & 15
        for i in range(32):
            out[32 + i] = qs[i] >> 4


@njit(forceinline=True)
def unpack_q6_k(src: Any, at: int, q: Any, scale: Any, minimum: Any, grid: Any) -> None:
    """ql u8[128] | qh u8[64] | scales i8[16] | d f16; weight = d * scales[g] * (q - 32).

    Each half of 128 weights has 64 bytes of ql and 32 of qh; for i in 0..31:

              7 6      5 4      3 2      1 0
      qh[i]   w[96+i]  w[64+i]  w[32+i]  w[i]        the two top bits
      ql[i], ql[32+i]: low nibbles w[i], w[32+i]; high nibbles w[64+i], w[96+i]
    """
    d = f16(src, at + 208)
    scales = src[at + 192 : at + 208]
    for g in range(16):
        scale[g] = d * np.float32(np.int8(scales[g]))
    for c in range(2):
        ql = src[at + 64 * c : at + 64 * c + 64]
        qh = src[at + 128 + 32 * c : at + 160 + 32 * c]
        out = q[128 * c : 128 * c + 128]
        for i in range(32):
            out[i] = (ql[i] & 15 | (qh[i] & 3) << 4) - 32
        for i in range(32):
            out[32 + i] = (ql[32 + i] & 15 | (qh[i] >> 2 & 3) << 4) - 32
        for i in range(32):
            out[64 + i] = (ql[i] >> 4 | (qh[i] >> 4 & 3) << 4) - 32
        for i in range(32):
            out[96 + i] = (ql[32 + i] >> 4 | (qh[i] >> 6) << 4) - 32
