"""Little-endian numbers, small floats and fields of bits in the bytes of a block, for use inside kernels.

Floats are decoded by integer arithmetic on their bits. The result is the same on every processor, for subnormal
numbers, signed zeros, infinities and NaN too.
"""

from typing import Any

import numpy as np
from llvmlite import ir

from gguf_run.formats.compiler.jit import intrinsic, njit, types


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
    magnitude = (h & 0x7FFF) << 13
    scaled = np.float32(_f32_of(magnitude) * np.float32(2.0**112))  # adds 112 to the exponent, of subnormal numbers too
    bits = np.int64(scaled.view(np.uint32))
    if magnitude >= 0x7C00 << 13:  # inf, NaN: the exponent stays all ones
        bits = magnitude | 0x7F800000
    return _f32_of(bits | (h & 0x8000) << 16)


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


@intrinsic(prefer_literal=True)
def take_bits(typing_context, q, first, n, src, at, shift, mask, offset):  # type: ignore[no-untyped-def]
    """q[first + i] = ((src[at + i] >> shift) & mask) - offset for i < n, of q i8[:] and src u8[:]. n is a literal."""
    signature = types.void(q, types.intp, n, src, *[types.intp] * 4)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        to, field = _field(context, builder, sig, args[:7])
        builder.store(builder.sub(field, _splat(builder, args[7], field.type)), to).align = 1
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def add_bits(typing_context, q, first, n, src, at, shift, mask, left, offset):  # type: ignore[no-untyped-def]
    """q[first + i] = (q[first + i] | ((src[at + i] >> shift) & mask) << left) - offset for i < n; see take_bits."""
    signature = types.void(q, types.intp, n, src, *[types.intp] * 5)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        to, field = _field(context, builder, sig, args[:7])
        before = builder.load(to)
        before.align = 1
        field = builder.or_(before, builder.shl(field, _splat(builder, args[7], field.type)))
        builder.store(builder.sub(field, _splat(builder, args[8], field.type)), to).align = 1
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def add_bit_of_each(typing_context, q, word, left, offset):  # type: ignore[no-untyped-def]
    """q[i] = (q[i] | ((word >> i) & 1) << left) - offset for i < 32, of q i8[:]."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words, vector = ir.VectorType(ir.IntType(32), 32), ir.VectorType(ir.IntType(8), 32)
        q = context.make_array(sig.args[0])(context, builder, args[0])
        to = builder.bitcast(q.data, vector.as_pointer())
        before = builder.load(to)
        before.align = 1
        shifted = builder.lshr(_splat(builder, args[1], words), ir.Constant(words, list(range(32))))
        bit = builder.trunc(builder.and_(shifted, ir.Constant(words, [1] * 32)), vector)
        value = builder.or_(before, builder.shl(bit, _splat(builder, args[2], vector)))
        builder.store(builder.sub(value, _splat(builder, args[3], vector)), to).align = 1
        return context.get_dummy_value()

    return types.void(q, *[types.intp] * 3), codegen


def _field(context: Any, builder: Any, sig: Any, args: Any) -> tuple[Any, Any]:
    """Return the address of q[first], and (src[at + i] >> shift) & mask, as vectors of n bytes.

    Written as loops, these fields become single bytes: the compiler cannot know that q and src are different memory.
    """
    q, first, _, src, at, shift, mask = args
    vector = ir.VectorType(ir.IntType(8), sig.args[2].literal_value)
    to, source = (
        builder.bitcast(builder.gep(context.make_array(kind)(context, builder, array).data, [i]), vector.as_pointer())
        for kind, array, i in ((sig.args[0], q, first), (sig.args[3], src, at))
    )
    value = builder.load(source)
    value.align = 1
    shifted = builder.lshr(value, _splat(builder, shift, vector))
    return to, builder.and_(shifted, _splat(builder, mask, vector))


def _splat(builder: Any, number: Any, vector: Any) -> Any:
    """Return a vector whose lanes are all a number, cut off to their width."""
    one = builder.insert_element(
        ir.Constant(vector, ir.Undefined), builder.trunc(number, vector.element), ir.IntType(32)(0)
    )
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)
