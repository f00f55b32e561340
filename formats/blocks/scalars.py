"""Little-endian numbers and small floats in the bytes of a block, for use inside kernels.

Floats are decoded by integer arithmetic on their bits. The result is the same on every processor, for subnormal
numbers, signed zeros, infinities and NaN too.
"""

from typing import Any

import numpy as np

from gguf_run.formats.compiler.jit import njit


@njit(forceinline=True)
def u16(block: Any, at: int) -> Any:
    """Bytes at and at + 1 of block u8[:] as an int64."""
    return np.int64(block[at]) | np.int64(block[at + 1]) << 8


@njit(forceinline=True)
def u32(block: Any, at: int) -> Any:
    """Bytes at to at + 3 of block u8[:] as an int64."""
    return u16(block, at) | u16(block, at + 2) << 16


@njit(forceinline=True)
def _f32_of(bits: Any) -> Any:
    """The f32 with these bits."""
    return np.uint32(bits).view(np.float32)


@njit(forceinline=True)
def half_to_f32(h: Any) -> Any:
    """The f16 whose bits are the int64 h, as f32.

    15 14      10 9          0           31 30        23 22                    0
    s  e e e e e  m m ... m      ->      s  e + 112     m m ... m 0 0 ... 0
    """
    magnitude = h & 0x7FFF
    bits = (magnitude << 13) + (112 << 23)
    if magnitude >= 0x7C00:  # inf, NaN: the exponent stays all ones
        bits = (magnitude << 13) | 0x7F800000
    value = _f32_of(bits | (h & 0x8000) << 16)
    if magnitude < 0x0400:  # subnormal, zero: m * 2**-24
        value = np.float32(np.int32(magnitude)) * np.float32(-(2.0**-24) if h & 0x8000 else 2.0**-24)
    return value


@njit(forceinline=True)
def f16(block: Any, at: int) -> Any:
    """The f16 at bytes at and at + 1 of block u8[:] as f32."""
    return half_to_f32(u16(block, at))


@njit(forceinline=True)
def f32(block: Any, at: int) -> Any:
    """The f32 at bytes at to at + 3 of block u8[:]."""
    return _f32_of(u32(block, at))


@njit(forceinline=True)
def e8m0_half(e: Any) -> Any:
    """Half of the power of two that the OCP MX scale byte e means: 2**(e - 128). It is subnormal for e of 0 and 1."""
    e = np.int64(e)
    return _f32_of(0x00200000 << e if e < 2 else (e - 1) << 23)


@njit(forceinline=True)
def ue4m3_half(x: Any) -> Any:
    """Half of an NVFP4 scale byte (sign bit ignored, e4m3 with bias 7); the NaN code 0x7F means 0, as in ggml."""
    exponent = (x >> 3) & 15
    mantissa = x & 7
    if x == 0x7F:
        return np.float32(0)
    if exponent == 0:
        return np.float32(mantissa) * np.float32(2.0**-10)
    # the bits of (1 + mantissa / 8) * 2**(exponent - 7) / 2
    return _f32_of((exponent + 119) << 23 | (mantissa << 20))


@njit(forceinline=True)
def half_bits(value: Any) -> Any:
    """The bits of the f16 nearest to an f32, as uint16. Halves go to even, large numbers to infinity, NaN to 0x7E00."""
    bits = np.float32(value).view(np.int32)
    rest = np.int32(bits & 0x7FFFFFFF)
    # Add half of the last bit that stays, less one if that bit is even: it carries exactly where it must round up.
    half: Any = np.int32(rest - ((112 << 23) - 0xFFF) + (rest >> 13 & 1)) >> 13
    if rest < 113 << 23:  # subnormal: the last bit of 0.5 as f32 is 2**-24, and there the addition rounds
        half = np.int64(np.float32(rest.view(np.float32) + np.float32(0.5)).view(np.int32)) - 0x3F000000
    half = 0x7E00 if rest > 0x7F800000 else min(half, 0x7C00)
    return np.uint16(bits >> 16 & 0x8000 | half)
