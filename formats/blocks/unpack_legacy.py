"""Unpackers of the types with one scale per block of 32 to 128 weights: Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q8_1 Q1_0 Q2_0 INT8.

unpack.py says what an unpacker does. In the 4- and 5-bit types byte i of `qs` holds weights i and i + 16, and bit i of
the 32-bit `qh` is the fifth bit of weight i:

      qs[i]   7  6  5  4 | 3  2  1  0
             weight i+16 | weight i
"""

from typing import Any

from gguf_run.formats.blocks.scalars import add_bit_of_each, f16, f32, take_bits, u32
from gguf_run.formats.compiler.jit import njit


@njit(forceinline=True)
def _halves(src: Any, at: int, q: Any, offset: int) -> None:
    """q = the 32 weights in the nibbles of the bytes from `at` on, less the offset."""
    take_bits(q, 0, 16, src, at, 0, 15, offset)
    take_bits(q, 16, 16, src, at, 4, 15, offset)


@njit(forceinline=True)
def unpack_q4_0(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f16 | qs u8[16]; weight = d * (q - 8)."""
    scale[0] = f16(src, at)
    _halves(src, at + 2, q, 8)


@njit(forceinline=True)
def unpack_q4_1(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f16 | m f16 | qs u8[16]; weight = d * q + m."""
    scale[0] = f16(src, at)
    minimum[0] = f16(src, at + 2)
    _halves(src, at + 4, q, 0)


@njit(forceinline=True)
def unpack_q5_0(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f16 | qh u32 | qs u8[16]; weight = d * (q - 16)."""
    scale[0] = f16(src, at)
    _halves(src, at + 6, q, 0)
    add_bit_of_each(q, u32(src, at + 2), 4, 16)


@njit(forceinline=True)
def unpack_q5_1(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f16 | m f16 | qh u32 | qs u8[16]; weight = d * q + m."""
    scale[0] = f16(src, at)
    minimum[0] = f16(src, at + 2)
    _halves(src, at + 8, q, 0)
    add_bit_of_each(q, u32(src, at + 4), 4, 0)


@njit(forceinline=True)
def unpack_q8_0(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f16 | qs i8[32]; weight = d * q."""
    scale[0] = f16(src, at)
    take_bits(q, 0, 32, src, at + 2, 0, 255, 0)


@njit(forceinline=True)
def unpack_q8_1(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f16 | s f16 | qs i8[32]; weight = d * q. s = d * sum(qs) is for dot products only."""
    scale[0] = f16(src, at)
    take_bits(q, 0, 32, src, at + 4, 0, 255, 0)


@njit(forceinline=True)
def unpack_int8(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f32 | qs i8[32]; weight = d * q. All blocks of a row have the same d."""
    scale[0] = f32(src, at)
    take_bits(q, 0, 32, src, at + 4, 0, 255, 0)


@njit(forceinline=True)
def unpack_q1_0(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f16 | qs u8[16]; weight = d * (1 if its bit is set, else -1). The lowest bit comes first."""
    scale[:] = f16(src, at)
    qs = src[at + 2 : at + 18]
    for i in range(16):
        for j in range(8):
            q[8 * i + j] = ((qs[i] >> j) & 1) * 2 - 1


@njit(forceinline=True)
def unpack_q2_0(src: Any, at: int, q: Any, scale: Any, minimum: Any, factor: Any, grid: Any) -> None:
    """d f16 | qs u8[16]; weight = d * (q - 1). The lowest two bits come first."""
    scale[:] = f16(src, at)
    qs = src[at + 2 : at + 18]
    for i in range(16):
        for j in range(4):
            q[4 * i + j] = ((qs[i] >> 2 * j) & 3) - 1
