"""Half floats and bit fields of K-quant blocks, for LANES blocks at once. formats/blocks/unpack_k.py draws the layouts.

block is CPointer(U8): vector i holds byte i of each block. q is CPointer(F32): quants, which are whole numbers.
"""

from typing import Any

import numpy as np

from gguf_run.formats.compiler.jit import njit
from gguf_run.formats.quantizers.lanes import bits, fabs, from_bits, to_byte, to_int, where


@njit(forceinline=True)
def half(v: Any) -> Any:
    """The bits of v rounded to f16, ties to even, as I32."""
    magnitude = fabs(v)
    m = bits(magnitude)
    # Normal: change the bias of the exponent from 127 to 15 and round 13 bits off. The carry may reach the exponent.
    h = (m - (112 << 23) + 0x0FFF + ((m >> 13) & 1)) >> 13
    h = where(h > 0x7C00, 0x7C00, h)  # too large: infinite
    # Subnormal: the last bit of 0.5 as f32 is 2**-24, and there the addition rounds.
    h = where(magnitude < np.float32(2.0**-14), bits(magnitude + np.float32(0.5)) - 0x3F000000, h)
    return where(m > 0x7F800000, 0x7E00, h) | ((bits(v) >> 16) & 0x8000)


@njit(forceinline=True)
def half_to_f32(h: Any) -> Any:
    """The f16 whose bits are h (I32), as f32."""
    m = (h & 0x7FFF) << 13
    value = from_bits(m) * np.float32(2.0**112)
    value = where(m >= 0x0F800000, from_bits(m | 0x7F800000), value)  # infinite, NaN
    return from_bits(bits(value) | ((h & 0x8000) << 16))


@njit(forceinline=True)
def put(block: Any, at: Any, value: Any) -> None:
    """Byte `at` of the block = the low byte of value (I32)."""
    block[at] = to_byte(value)


@njit(forceinline=True)
def put_half(block: Any, at: Any, h: Any) -> None:
    put(block, at, h)
    put(block, at + 1, h >> 8)


@njit(forceinline=True)
def put_nibbles(block: Any, at: Any, n: Any, q: Any, first: Any) -> None:
    """n bytes from `at` on = the quants q[first : first + 2 n] modulo 16. The second half is the high nibbles."""
    for i in range(n):
        put(block, at + i, (to_int(q[first + i]) & 15) | to_int(q[first + n + i]) << 4)


@njit(forceinline=True)
def put_crumbs(block: Any, at: Any, n: Any, q: Any, first: Any, shift: Any) -> None:
    """n bytes from `at` on = bits shift and shift + 1 of the quants q[first : first + 4 n]."""
    for i in range(n):
        byte = (to_int(q[first + i]) >> shift) & 3
        for j in range(1, 4):
            byte = byte | ((to_int(q[first + n * j + i]) >> shift) & 3) << 2 * j
        put(block, at + i, byte)


@njit(forceinline=True)
def put_bits(block: Any, at: Any, q: Any, shift: Any) -> None:
    """32 bytes from `at` on = bit `shift` of the 256 quants. The bit of q[32 g + i] is bit g of byte i."""
    for i in range(32):
        byte = (to_int(q[i]) >> shift) & 1
        for g in range(1, 8):
            byte = byte | ((to_int(q[32 * g + i]) >> shift) & 1) << g
        put(block, at + i, byte)


@njit(forceinline=True)
def put_scales_and_minimums(block: Any, at: Any, scale: Any, minimum: Any) -> None:
    """12 bytes from `at` on = scales and minimums of 0..63, as Q4_K and Q5_K store them."""
    for i in range(4):
        s, s4, m, m4 = to_int(scale[i]), to_int(scale[4 + i]), to_int(minimum[i]), to_int(minimum[4 + i])
        put(block, at + i, s | (s4 >> 4) << 6)
        put(block, at + 4 + i, m | (m4 >> 4) << 6)
        put(block, at + 8 + i, (s4 & 15) | m4 << 4)


@njit(forceinline=True)
def put_scales(block: Any, at: Any, scale: Any) -> None:
    """12 bytes from `at` on = sixteen scales of 0..63, as Q3_K stores them."""
    put_nibbles(block, at, 8, scale, 0)
    put_crumbs(block, at + 8, 4, scale, 0, 4)
