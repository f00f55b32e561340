"""A row of a KV cache is encoded and stored (layout: cache_rows.py).

Rows hold the same codes and numbers as those of the CPU, bit for bit: the operations and their order are ggml's, and
those of kernels_cpu/attention/cache_codec.py for int4. Products that are added to something are made by tl.fma with 0:
the compiler would fuse a plain product with the addition.
"""

import triton
import triton.language as tl

from gguf_run.kernels_gpu.attention.cache_rows import panel_of, row_sizes
from gguf_run.kernels_gpu.panels.dots import book_value


@triton.jit
def _inverse(d):
    """Return 1 / d, or 0 where d is 0."""
    return tl.where(d == 0, 0.0, tl.div_rn(1.0, d))


@triton.jit
def _farthest(x):
    """Return the number of largest magnitude (the first of several) of each block f32[blocks, 32], with its sign."""
    at = tl.argmax(tl.abs(x), axis=1)[:, None]
    return tl.sum(tl.where(tl.arange(0, 32)[None, :] == at, x, 0.0), axis=1)


# Encoders take blocks x f32[blocks, 32]. They return codes i32[blocks, 32], the scale of each block and, if the type
# has minimums, its minimum.


@triton.jit
def _with_scale(x, LEVELS: tl.constexpr):
    d = _farthest(x) * (-2.0 / LEVELS)
    return tl.minimum((tl.fma(x, _inverse(d)[:, None], 0.0) + (LEVELS / 2 + 0.5)).to(tl.int32), LEVELS - 1), d


@triton.jit
def _with_minimum(x, LEVELS: tl.constexpr):
    low = tl.min(x, axis=1)
    d = tl.div_rn(tl.max(x, axis=1) - low, LEVELS - 1.0)
    level = tl.fma(x - low[:, None], _inverse(d)[:, None], 0.0) + 0.5
    return tl.minimum(level.to(tl.int32), LEVELS - 1), d, low


@triton.jit
def _signed_bytes(x):
    d = tl.div_rn(tl.max(tl.abs(x), axis=1), 127.0)
    level = tl.fma(x, _inverse(d)[:, None], 0.0)
    whole = tl.floor(tl.abs(level) + 0.5)
    return tl.where(level < 0, -whole, whole).to(tl.int32), d


@triton.jit
def _in_order(x):
    """Return the sums of the rows of x f32[blocks, 32], from left to right."""
    total, column = tl.zeros((x.shape[0], 1), tl.float32), tl.zeros((x.shape[0], 1), tl.int32)
    for _ in range(32):
        total += tl.gather(x, column, axis=1)
        column += 1
    return tl.reshape(total, (x.shape[0],))


@triton.jit
def _with_codebook(x, BOOK: tl.constexpr):
    i = tl.arange(0, 16)
    low, high = book_value(i, BOOK).to(tl.float32), book_value(i + 1, BOOK).to(tl.float32)
    d = tl.div_rn(_farthest(x), tl.sum(tl.where(i == 0, low, 0.0), axis=0))
    level = tl.fma(x, _inverse(d)[:, None], 0.0)[:, :, None]
    above = (level - low[None, None, :] >= high[None, None, :] - level) & (i < 15)[None, None, :]
    code = tl.sum(above.to(tl.int32), axis=2)
    value = book_value(code, BOOK).to(tl.float32)
    weighted = x * x * value
    total, weight = _in_order(weighted * x), _in_order(weighted * value)
    return code, tl.where(weight > 0, tl.div_rn(total, weight), 0.0)


@triton.jit
def _in_halves(x):
    """Return the sums of the rows of x f32[n, 32]: halves of a row are added up until one number is left."""
    n: tl.constexpr = x.shape[0]
    for half in tl.static_range(5):
        x = tl.sum(tl.reshape(x, (n, 2, 16 >> half)), axis=1)
    return tl.reshape(x, (n,))


@triton.jit
def _least_squares(x):
    """Try some scales: 1, 0.92, 0.85, 0.78 of the one that fits the largest number. The codes that fit best stay."""
    n: tl.constexpr = x.shape[0]
    i = tl.arange(0, 4)[None, :]
    part = tl.where(i < 2, tl.where(i == 0, -0.125, -0.115), tl.where(i == 2, -0.10625, -0.0975))
    d = _farthest(x)[:, None] * part
    scaled = tl.fma(x[:, None, :], _inverse(d)[:, :, None], 0.0) + 8.5
    code = tl.minimum(tl.maximum(scaled, 0.0).to(tl.int32), 15)
    q = tl.reshape((code - 8).to(tl.float32), (n * 4, 32))
    product = _in_halves(tl.fma(tl.reshape(tl.broadcast_to(x[:, None, :], (n, 4, 32)), (n * 4, 32)), q, 0.0))
    square = tl.maximum(tl.sum(q * q, axis=1), 1.0)
    best = tl.argmax(tl.reshape(tl.div_rn(product * product, square), (n, 4)), axis=1)[:, None] == i
    d = tl.reshape(tl.div_rn(product, square), (n, 4))
    return tl.sum(tl.where(best[:, :, None], code, 0), axis=1), tl.sum(tl.where(best, d, 0.0), axis=1)


@triton.jit
def _store_blocks(x, planes, row, TYPE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store blocks x f32[blocks, 32] as a row."""
    qs, d = planes
    PANEL: tl.constexpr = panel_of(TYPE)
    BOOK: tl.constexpr = PANEL.book_words
    LEVELS: tl.constexpr = 2 ** (PANEL.bits + PANEL.high)
    N: tl.constexpr = x.shape[0]
    block = tl.arange(0, N)
    there = block < HEAD_DIM // 32
    number = row * (HEAD_DIM // 32) + block
    if PANEL.bits == 8:
        code, scale = _signed_bytes(x)
    elif PANEL.scales == "f16m":
        code, scale, minimum = _with_minimum(x, LEVELS)
        number *= 2
        tl.store(d + number + 1, minimum.to(tl.float16), mask=there)
    elif BOOK is not None:
        code, scale = _with_codebook(x, BOOK)
    elif TYPE == "int4":
        code, scale = _least_squares(x)
    else:
        code, scale = _with_scale(x, LEVELS)
    tl.store(d + number, scale.to(tl.float16), mask=there)
    qs += row * row_sizes(TYPE, HEAD_DIM)[0]
    block, there = block[:, None], there[:, None]
    if PANEL.bits == 8:
        tl.store(qs + block * 32 + tl.arange(0, 32)[None, :], code.to(tl.uint8), mask=there)
    else:
        low, high = tl.split(tl.permute(tl.reshape(code & 15, (N, 2, 16)), (0, 2, 1)))
        tl.store(qs + block * 16 + tl.arange(0, 16)[None, :], (low | high << 4).to(tl.uint8), mask=there)
        if PANEL.high:
            bits = tl.sum(tl.reshape(code >> 4, (N, 8, 4)) << tl.arange(0, 8)[None, :, None], axis=1)
            tl.store(qs + HEAD_DIM // 2 + block * 4 + tl.arange(0, 4)[None, :], bits.to(tl.uint8), mask=there)


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
    elif panel_of(TYPE) is not None:
        _store_blocks(tl.reshape(x, (WIDTH // 32, 32)), planes, row, TYPE, HEAD_DIM)
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
