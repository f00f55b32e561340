"""How rows of a KV cache look, and how they are read; cache_types.py has the table of types.

A row is one position of one KV head. It may have gone through the Hadamard transform. Its elements are in the plane qs.
Its scales (f16), if it has any, are in the plane d: one for each block of 32 columns, followed by a minimum if the type
has minimums; one for the row in int8 and fp8. Byte j of a block has columns j and 16 + j, 4 bits each, unless codes
have 8 bits. So a tile of rows is two operands of half the width: columns j and columns 16 + j. The fifth bits stand
behind all the nibbles of a row, 4 bytes for each block, as in the plane `high` of panels/panels.py.
"""

import triton
import triton.language as tl
from triton.language import target_info
from triton.language.target_info import cuda_capability_geq

from gguf_run.kernels_gpu.attention.cache_types import CACHE_FORMATS
from gguf_run.kernels_gpu.panels.dots import look_up
from gguf_run.models import pages

PAGE = tl.constexpr(pages.PAGE)


@triton.constexpr_function
def n_operand(name):
    """Return how many operands of tl.dot a tile of rows is: 2 for codes of 4 and 5 bits."""
    return 2 if CACHE_FORMATS[name].bits < 8 else 1


@triton.constexpr_function
def panel_of(name):
    """Return the panel whose units are the blocks of a row, if it has blocks."""
    return CACHE_FORMATS[name].panel


@triton.constexpr_function
def has_row_factor(name):
    """Return whether each row has a single scale. load_rows does not apply this scale; row_factors returns it."""
    return CACHE_FORMATS[name].has_row_factor


@triton.constexpr_function
def is_wide(name):
    """Return whether the operands are f32, else f16."""
    return name in ("bf16", "f32")


@triton.constexpr_function
def precision(name):
    """Return the precision of tl.dot: exact for f32. Tensor cores take more bits of an f32 than a bf16 has."""
    return "ieee" if name == "f32" else None


@triton.constexpr_function
def row_sizes(name, head_dim):
    """Return the bytes of a row's elements and the number of its scales."""
    return head_dim * CACHE_FORMATS[name].bits // 8, CACHE_FORMATS[name].n_numbers(head_dim)


@triton.jit
def column_of(c, part: tl.constexpr, TYPE: tl.constexpr):
    """Return the column that is column c of operand `part`."""
    return c // 16 * 32 + 16 * part + c % 16 if n_operand(TYPE) == 2 else c


@triton.jit
def row_of(pages, n_pages, head, position):
    """Return the row that has a position, i64. pages: a sequence's row of the page table. n_pages: those of a head."""
    i = position // PAGE
    return (head.to(tl.int64) * n_pages + tl.load(pages + i)) * PAGE + (position - i * PAGE)


@triton.jit
def planes_at(planes, row, TYPE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return the planes (qs, d) from a row on: from there int32 is enough to count rows."""
    qs, d = planes
    SIZES: tl.constexpr = row_sizes(TYPE, HEAD_DIM)
    qs += row * SIZES[0]
    if d is None:
        return qs, qs
    else:
        return qs, d + row * SIZES[1]


# Assembler of NVIDIA GPUs for four bytes in a register. The functions that use it have the same for other targets.
NIBBLES = tl.constexpr("{ .reg .b32 x; shr.u32 x, $2, 4; and.b32 $0, $2, 0x0f0f0f0f; and.b32 $1, x, 0x0f0f0f0f; }")
HIGH_BIT = tl.constexpr(
    "{ .reg .b32 x; and.b32 x, $1, $2; add.u32 x, x, 0x7f7f7f7f; shr.u32 x, x, 3; and.b32 x, x, 0x10101010;"
    " or.b32 $0, $3, x; }"
)


@triton.constexpr_function
def half_code(signed, offset):
    """Return that of _half. Signed bytes become unsigned ones, from which 128 is subtracted."""
    flip, start = 0x80808080 if signed else 0, (0x6400 + offset) * 0x10001
    return (
        f"{{ .reg .b32 x, y; xor.b32 x, $2, {flip}; mov.b32 y, {start};"
        " prmt.b32 $0, x, 0x64646464, 0x4140; sub.f16x2 $0, $0, y;"
        " prmt.b32 $1, x, 0x64646464, 0x4342; sub.f16x2 $1, $1, y; }"
    )


@triton.jit
def _half(code, OFFSET: tl.constexpr = 0):
    """Return code - OFFSET as f16, exactly, for code in uint8; or code in int8 (without OFFSET).

    The bits 0x6400 + code are the f16 number 1024 + code. A subtraction is cheaper than a conversion.
    """
    SIGNED: tl.constexpr = code.dtype == tl.int8
    if target_info.is_cuda():
        asm: tl.constexpr = half_code(SIGNED, 128 if SIGNED else OFFSET)
        return tl.inline_asm_elementwise(asm, "=r,=r,r", [code], dtype=tl.float16, is_pure=True, pack=4)
    else:
        return code.to(tl.float16) - OFFSET


@triton.jit
def _nibbles(byte):
    """Return the low and the high nibbles of bytes, uint8."""
    if target_info.is_cuda():
        types: tl.constexpr = (tl.uint8, tl.uint8)
        return tl.inline_asm_elementwise(NIBBLES, "=r,=r,r", [byte], dtype=types, is_pure=True, pack=4)
    else:
        return byte & 15, byte >> 4


@triton.jit
def _with_high_bit(code, high, mask):
    """Return code, plus 16 where a byte of high has the bit of mask; all uint8."""
    if target_info.is_cuda():
        args = [high, mask, code]
        return tl.inline_asm_elementwise(HIGH_BIT, "=r,r,r,r", args, dtype=tl.uint8, is_pure=True, pack=4)
    else:
        return code | tl.where((high & mask) != 0, 16, 0).to(tl.uint8)


@triton.jit
def _load_blocks(planes, rows, live, TYPE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Do what load_rows does, for types with blocks."""
    qs, d = planes
    PANEL: tl.constexpr = panel_of(TYPE)
    BOOK: tl.constexpr = PANEL.book_words
    BYTES: tl.constexpr = 4 * PANEL.bits
    block = tl.arange(0, WIDTH // 32)[None, :]
    mask = live[:, None] & (block < HEAD_DIM // 32)
    number = rows[:, None] * (HEAD_DIM // 32) + block
    if PANEL.scales == "f16m":
        pair = tl.load(d.to(tl.pointer_type(tl.uint32)) + number, mask=mask, other=0)[:, :, None]
        scale = pair.to(tl.uint16).to(tl.float16, bitcast=True)
        minimum = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        scale = tl.load(d + number, mask=mask, other=0.0)[:, :, None]
    mask, block = mask[:, :, None], block[:, :, None]
    qs += (rows * row_sizes(TYPE, HEAD_DIM)[0])[:, None, None]
    byte = tl.load(qs + block * BYTES + tl.arange(0, BYTES)[None, None, :], mask=mask, other=0)
    size: tl.constexpr = (rows.shape[0], WIDTH // 32 * BYTES)
    if PANEL.bits == 8:
        return (tl.reshape(_half(byte.to(tl.int8, bitcast=True)) * scale, size),)
    else:
        if BOOK is not None:
            low, high = look_up(byte, BOOK)
            low, high = low.to(tl.int8, bitcast=True), high.to(tl.int8, bitcast=True)
        else:
            low, high = _nibbles(byte)
        if PANEL.high:
            j = tl.arange(0, 16)[None, None, :]
            bits = tl.load(qs + HEAD_DIM // 2 + block * 4 + j % 4, mask=mask, other=0)
            low = _with_high_bit(low, bits, (1 << j // 4).to(tl.uint8))
            high = _with_high_bit(high, bits, (16 << j // 4).to(tl.uint8))
        low, high = _half(low, PANEL.offset), _half(high, PANEL.offset)
        if PANEL.scales == "f16m":
            low, high = tl.fma(low, scale, minimum), tl.fma(high, scale, minimum)
        else:
            low, high = low * scale, high * scale
        return tl.reshape(low, size), tl.reshape(high, size)


@triton.jit
def load_rows(planes, rows, live, TYPE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Return rows [n] as operands of tl.dot: one [n, WIDTH], or two of half the width (n_operand). 0 where not live.

    f16, or f32 if is_wide. The factors of row_factors are not applied.
    """
    qs, _d = planes
    if panel_of(TYPE) is not None:
        return _load_blocks(planes, rows, live, TYPE, HEAD_DIM, WIDTH)
    else:
        column = tl.arange(0, WIDTH)[None, :]
        mask = live[:, None] & (column < HEAD_DIM)
        at = rows[:, None] * HEAD_DIM + column
        if TYPE == "f32":
            return (tl.load(qs.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0),)
        elif TYPE == "f16":
            return (tl.load(qs.to(tl.pointer_type(tl.float16)) + at, mask=mask, other=0.0),)
        elif TYPE == "bf16":
            bits = tl.load(qs.to(tl.pointer_type(tl.uint16)) + at, mask=mask, other=0).to(tl.uint32)
            return ((bits << 16).to(tl.float32, bitcast=True),)
        elif TYPE == "int8":
            return (_half(tl.load(qs.to(tl.pointer_type(tl.int8)) + at, mask=mask, other=0)),)
        else:
            code = tl.load(qs + at, mask=mask, other=0)
            if TYPE == "fp8_e4m3" and cuda_capability_geq(8, 9):  # which has an instruction for two
                return (code.to(tl.float8e4nv, bitcast=True).to(tl.float16),)
            bits = code.to(tl.uint16)
            # e5m2 is the upper half of an f16; e4m3 moved to an f16's exponent is 2^8 too small (row_factors)
            bits = bits << 8 if TYPE == "fp8_e5m2" else (bits & 0x80) << 8 | (bits & 0x7F) << 7
            return (bits.to(tl.float16, bitcast=True),)


@triton.jit
def row_factors(planes, rows, live, TYPE: tl.constexpr):
    """Return the factors of rows f32[n], for types with has_row_factor; 0 where not live."""
    _qs, d = planes
    factor = tl.load(d + rows, mask=live, other=0.0).to(tl.float32)
    return factor * 256.0 if TYPE == "fp8_e4m3" and not cuda_capability_geq(8, 9) else factor


@triton.jit
def _mix(x, N: tl.constexpr):
    """Transform the rows of x f32[rows, blocks, N]: out[i] = sum over j of x[j] * (-1)^(number of bits in i & j)."""
    i = tl.arange(0, N)
    bits = i[:, None] & i[None, :]
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return tl.sum(x[:, :, None] * (1 - 2 * (bits & 1)).to(tl.float32)[None, :, :], axis=1)


@triton.jit
def hadamard(x, N: tl.constexpr):
    """Return the orthonormal transform of x f32[WIDTH], in blocks of the largest power of two that divides N (>= 32).

    A block is a matrix of 8 columns: first its rows are transformed, then its columns.
    """
    BLOCK: tl.constexpr = N & -N
    A: tl.constexpr = BLOCK // 8
    WIDTH: tl.constexpr = x.shape[0]
    y = _mix(tl.reshape(x, (WIDTH // 8, 8)), 8)
    y = tl.permute(tl.reshape(y, (WIDTH // BLOCK, A, 8)), (0, 2, 1))
    y = _mix(tl.reshape(y, (WIDTH // A, A)), A)
    y = tl.permute(tl.reshape(y, (WIDTH // BLOCK, 8, A)), (0, 2, 1))
    return tl.reshape(y, (WIDTH,)) * (BLOCK**-0.5)
