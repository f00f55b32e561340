"""Dot products of packed bytes: one instruction each on NVIDIA GPUs, plain Triton elsewhere.

All functions take and return int32 tensors of one shape; look_up takes bytes, too.
"""

import triton
import triton.language as tl
from triton.language import target_info


@triton.jit
def _byte(word, j: tl.constexpr):
    """Return byte j of a word, signed."""
    return (word << (24 - 8 * j)) >> 24


@triton.jit
def dp4a(a, b, c):
    """Return c + the sum of the products of the four signed bytes of a and b."""
    if target_info.is_cuda():
        asm: tl.constexpr = "dp4a.s32.s32 $0, $1, $2, $3;"
        c = tl.inline_asm_elementwise(asm, "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1)
    else:
        for j in tl.static_range(4):
            c += _byte(a, j) * _byte(b, j)
    return c


@triton.jit
def dp2a(a, b, half: tl.constexpr):
    """Return the two signed 16-bit halves of a times the signed bytes 2 half and 2 half + 1 of b, added."""
    if target_info.is_cuda():
        asm: tl.constexpr = "dp2a.hi.s32.s32 $0, $1, $2, 0;" if half else "dp2a.lo.s32.s32 $0, $1, $2, 0;"
        return tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return ((a << 16) >> 16) * _byte(b, 2 * half) + (a >> 16) * _byte(b, 2 * half + 1)


@triton.constexpr_function
def look_up_code(book):
    """Return assembler of NVIDIA GPUs for four bytes in a register.

    prmt picks four of eight bytes by the low three bits of four nibbles. It does so in the lower and in the upper half
    of the book; then the top bits of the nibbles pick one of both results. The last two instructions separate low
    nibbles (even) from high nibbles (odd).
    """
    b0, b1, b2, b3 = book
    return f"""{{
        .reg .b32 low, top, a, b, b1, b3;
        mov.b32 b1, {b1}; mov.b32 b3, {b3};
        and.b32 low, $2, 0x77777777;
        shr.u32 top, $2, 1; and.b32 top, top, 0x44444444; or.b32 top, top, 0x32103210;
        prmt.b32 a, {b0}, b1, low; prmt.b32 b, {b2}, b3, low; prmt.b32 a, a, b, top;
        shr.u32 low, low, 16; shr.u32 top, top, 16;
        prmt.b32 b, {b0}, b1, low; prmt.b32 low, {b2}, b3, low; prmt.b32 b, b, low, top;
        prmt.b32 $0, a, b, 0x6420; prmt.b32 $1, a, b, 0x7531;
    }}"""


@triton.jit
def look_up(word, BOOK: tl.constexpr):
    """Return the bytes of BOOK for the low nibbles of a word's bytes, and those for the high nibbles.

    word: int32, or a byte, uint8. BOOK: 16 bytes in four int32.
    """
    BYTES: tl.constexpr = word.dtype.primitive_bitwidth // 8
    if target_info.is_cuda():
        types: tl.constexpr = (word.dtype, word.dtype)
        asm: tl.constexpr = look_up_code(BOOK)
        return tl.inline_asm_elementwise(asm, "=r,=r,r", [word], dtype=types, is_pure=True, pack=4 // BYTES)
    else:
        low = tl.zeros_like(word)
        high = tl.zeros_like(word)
        for j in tl.static_range(BYTES):
            low = low | ((book_value(word >> (8 * j), BOOK) & 255) << (8 * j)).to(word.dtype)
            high = high | ((book_value(word >> (8 * j + 4), BOOK) & 255) << (8 * j)).to(word.dtype)
        return low, high


@triton.jit
def book_value(code, BOOK: tl.constexpr):
    """Return the signed byte of BOOK that the low nibble of a code picks."""
    code = code & 15
    words = tl.where(code < 8, tl.where(code < 4, BOOK[0], BOOK[1]), tl.where(code < 12, BOOK[2], BOOK[3]))
    return (words << (24 - 8 * (code & 3))) >> 24
