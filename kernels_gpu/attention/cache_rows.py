"""How rows of a KV cache are stored and read; cache_types.py has the table of types.

A row is one position of one KV head. It may have gone through the Hadamard transform. Its elements are in the plane qs.
Its scales (f16), if it has any, are in the plane d: one for each block of 32 columns in ggml's types, one for the row
in int8 and fp8. Byte j of a block of q4_0 has columns j and 16 + j. So a tile of rows is two operands of half the
width: columns j and columns 16 + j.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from gguf_run.kernels_gpu.attention.cache_types import CACHE_FORMATS
from gguf_run.models import pages

PAGE = tl.constexpr(pages.PAGE)


@triton.constexpr_function
def n_operand(name):
    """Return how many operands of tl.dot a tile of rows is: 2 for q4_0."""
    return 2 if name == "q4_0" else 1


@triton.constexpr_function
def has_row_factor(name):
    """Return whether each row has a single scale. load_rows does not apply this scale; row_factors returns it."""
    return CACHE_FORMATS[name].block is None


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
    return head_dim * CACHE_FORMATS[name].bits // 8, CACHE_FORMATS[name].n_scale(head_dim)


@triton.jit
def column_of(c, part: tl.constexpr, TYPE: tl.constexpr):
    """Return the column that is column c of operand `part`."""
    return c // 16 * 32 + 16 * part + c % 16 if TYPE == "q4_0" else c


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


@triton.jit
def _half(code, OFFSET: tl.constexpr):
    """Return code - OFFSET as f16, exactly, for code in uint8.

    The bits 0x6400 + code are the f16 number 1024 + code. A subtraction is cheaper than a conversion.
    """
    return (code.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + OFFSET)


@triton.jit
def load_rows(planes, rows, live, TYPE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Return rows [n] as operands of tl.dot: one [n, WIDTH], or two of half the width (n_operand). 0 where not live.

    f16, or f32 if is_wide. The factors of row_factors are not applied.
    """
    qs, d = planes
    if TYPE == "q8_0" or TYPE == "q4_0":
        BYTES: tl.constexpr = 32 if TYPE == "q8_0" else 16
        block = tl.arange(0, WIDTH // 32)[None, :]
        mask = live[:, None] & (block < HEAD_DIM // 32)
        at = rows[:, None] * (HEAD_DIM // 32) + block
        scale = tl.load(d + at, mask=mask, other=0.0)[:, :, None]
        byte = tl.load(qs + at[:, :, None] * BYTES + tl.arange(0, BYTES)[None, None, :], mask=mask[:, :, None], other=0)
        size: tl.constexpr = (rows.shape[0], WIDTH // 32 * BYTES)
        if TYPE == "q8_0":
            return (tl.reshape(byte.to(tl.int8, bitcast=True).to(tl.float16) * scale, size),)
        else:
            low, high = _half(byte & 15, 8) * scale, _half(byte >> 4, 8) * scale
            return tl.reshape(low, size), tl.reshape(high, size)
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
            return (tl.load(qs.to(tl.pointer_type(tl.int8)) + at, mask=mask, other=0).to(tl.float16),)
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
def _fp8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """Return the nearest fp8 codes of x, ties to even, at most LARGEST. Only sm_89 and later have an instruction."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(x), LARGEST)
    drop: tl.constexpr = 23 - MANTISSA
    exact = size.to(tl.int32, bitcast=True)
    normal = ((exact + ((1 << (drop - 1)) - 1) + ((exact >> drop) & 1)) >> drop) - ((127 - BIAS) << MANTISSA)
    small = ((size * 2.0 ** (BIAS - 1 + MANTISSA) + 12582912.0) - 12582912.0).to(tl.int32)
    code = tl.where(size < 2.0 ** (1 - BIAS), small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def store_row(x, planes, row, scales, head, TYPE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store x f32[WIDTH], 0 beyond HEAD_DIM, as a row, with the roundings of the reference.

    scales: None, or f32[n_head_kv]: static scales.
    """
    qs, d = planes
    WIDTH: tl.constexpr = x.shape[0]
    column = tl.arange(0, WIDTH)
    mask = column < HEAD_DIM
    at = row * HEAD_DIM + column
    if TYPE == "f32":
        tl.store(qs.to(tl.pointer_type(tl.float32)) + at, x, mask=mask)
    elif TYPE == "f16":
        tl.store(qs.to(tl.pointer_type(tl.float16)) + at, x.to(tl.float16), mask=mask)
    elif TYPE == "bf16":
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(qs.to(tl.pointer_type(tl.int16)) + at, bits.to(tl.int16), mask=mask)
    elif TYPE == "q8_0" or TYPE == "q4_0":
        blocks = tl.reshape(x, (WIDTH // 32, 32))
        block = tl.arange(0, WIDTH // 32)
        size = tl.max(tl.abs(blocks), axis=1)
        if TYPE == "q8_0":
            scale = tl.div_rn(size, 127.0)
        else:  # the first of the largest values becomes -8
            i = tl.arange(0, 32)[None, :]
            first = tl.min(tl.where(tl.abs(blocks) == size[:, None], i, 32), axis=1)
            scale = tl.sum(tl.where(i == first[:, None], blocks, 0.0), axis=1) * -0.125
        inverse = tl.where(scale == 0, 0.0, tl.div_rn(1.0, scale))
        tl.store(d + row * (HEAD_DIM // 32) + block, scale.to(tl.float16), mask=block < HEAD_DIM // 32)
        value = tl.fma(blocks, inverse[:, None], 0.0)  # a plain product would be fused with the addition below
        if TYPE == "q8_0":
            whole = tl.floor(tl.abs(value) + 0.5)
            code = tl.reshape(tl.where(value < 0, -whole, whole), (WIDTH,)).to(tl.int8)
            tl.store(qs.to(tl.pointer_type(tl.int8)) + at, code, mask=mask)
        else:
            code = tl.minimum((value + 8.5).to(tl.int32), 15)
            low, high = tl.split(tl.permute(tl.reshape(code, (WIDTH // 32, 2, 16)), (0, 2, 1)))
            to = block[:, None] * 16 + tl.arange(0, 16)[None, :]
            byte = (low | high << 4).to(tl.uint8)
            tl.store(qs + row * (HEAD_DIM // 2) + to, byte, mask=to < HEAD_DIM // 2)
    else:
        LARGEST: tl.constexpr = 127.0 if TYPE == "int8" else (448.0 if TYPE == "fp8_e4m3" else 57344.0)
        if scales is None:
            scale = tl.div_rn(tl.max(tl.abs(x), axis=0), LARGEST).to(tl.float16)
        else:
            scale = tl.load(scales + head).to(tl.float16)
        tl.store(d + row, scale)
        factor = scale.to(tl.float32)
        value = x * tl.where(factor == 0, 0.0, tl.div_rn(1.0, factor))
        if TYPE == "int8":
            value = tl.minimum(tl.maximum(value, -127.0), 127.0)
            tl.store(qs + at, ((value + 12582912.0) - 12582912.0).to(tl.int8).to(tl.uint8, bitcast=True), mask=mask)
        elif TYPE == "fp8_e4m3":
            tl.store(qs + at, _fp8(value, 3, 7, LARGEST), mask=mask)
        else:
            tl.store(qs + at, _fp8(value, 2, 15, LARGEST), mask=mask)


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
