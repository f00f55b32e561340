"""Weights as f16 for tensor cores: words of two f16, as mma.m16n8k16 takes them.

All values are tensors [n] with one number for each thread. Words are int32; the lower half is the first f16.
"""

import triton
import triton.language as tl
from triton.language import target_info

from gguf_run.kernels_gpu.panels.units import half_pair, unit_factors, unit_words, words4


@triton.jit
def half_word(low, high):
    """Return two f32 as a word of two f16."""
    if target_info.is_cuda():
        asm: tl.constexpr = "cvt.rn.f16x2.f32 $0, $1, $2;"
        return tl.inline_asm_elementwise(asm, "=r,r,r", [high, low], dtype=tl.int32, is_pure=True, pack=1)
    else:
        low = low.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
        return low | high.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32) << 16


@triton.jit
def scaled_bytes(word, scale, minimum, OFFSET: tl.constexpr):
    """Return (byte - OFFSET) * scale + minimum of the four unsigned bytes of a word: two words.

    scale, minimum: words of the same f16 twice. A byte with 0x64 above it is the f16 1024 + byte: no conversion.
    """
    if target_info.is_cuda():
        asm: tl.constexpr = """{
            .reg .b32 a, b;
            prmt.b32 a, $2, 0x64646464, 0x4140;
            prmt.b32 b, $2, 0x64646464, 0x4342;
            sub.rn.f16x2 a, a, $5;
            sub.rn.f16x2 b, b, $5;
            fma.rn.f16x2 $0, a, $3, $4;
            fma.rn.f16x2 $1, b, $3, $4;
        }"""
        offset = tl.full(word.shape, (0x6400 + OFFSET) * 0x10001, tl.int32)
        operands = [word, scale, minimum, offset]
        types: tl.constexpr = (tl.int32, tl.int32)
        return tl.inline_asm_elementwise(asm, "=r,=r,r,r,r,r", operands, dtype=types, is_pure=True, pack=1)
    else:
        scale, _ = half_pair(scale)
        minimum, _ = half_pair(minimum)
        values = ()
        for i in tl.static_range(4):
            values = values + ((((word >> (8 * i)) & 255) - OFFSET).to(tl.float32) * scale + minimum,)
        return half_word(values[0], values[1]), half_word(values[2], values[3])


@triton.jit
def mma(a, b, c):
    """Return c + a b for each warp: f32[16, 8] + f16[16, 16] f16[16, 8], as PTX spreads them over 32 threads.

    Thread 4 g + q has of a (4 words) rows g, g + 8, g, g + 8, of b (2 words) column g, of c (4 numbers) columns 2 q and
    2 q + 1 of rows g and g + 8. Its words stand for the columns of a, the rows of b, number 2 q and 2 q + 1 (the last
    two words of a and the last one of b: 2 q + 8 and 2 q + 9). Any order of these is right if a and b have the same.
    """
    if target_info.is_cuda():
        asm: tl.constexpr = (
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
            "{$10, $11, $12, $13};"
        )
        operands = [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]]
        types: tl.constexpr = (tl.float32, tl.float32, tl.float32, tl.float32)
        places: tl.constexpr = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"
        return tl.inline_asm_elementwise(asm, places, operands, dtype=types, is_pure=True, pack=1)
    else:
        columns = _matrix(b[0], b[1])[:, None]
        c0, c1 = _sums(_matrix(a[0], a[2])[:, :, None] * columns)
        c2, c3 = _sums(_matrix(a[1], a[3])[:, :, None] * columns)
        return c[0] + c0, c[1] + c1, c[2] + c2, c[3] + c3


@triton.jit
def _matrix(low, high):
    """Return f32[warps, 8, 16]: the f16 in two words of each thread; 8 rows of 4 threads."""
    low0, low1 = half_pair(low)
    high0, high1 = half_pair(high)
    return tl.reshape(tl.join(tl.join(low0, low1), tl.join(high0, high1)), (low.shape[0] // 32, 8, 16))


@triton.jit
def _sums(products):
    """Return the sums of products[warps, row, column, 16] for columns 2 q and 2 q + 1, one number a thread each."""
    n: tl.constexpr = products.shape[0]
    return tl.split(tl.reshape(tl.sum(products, 3), (n * 32, 2)))


@triton.jit
def _factor_words(factors, f: tl.constexpr, PANEL: tl.constexpr):
    """Return scale and minimum of field f of units, as words. factors: see unit_factors."""
    if PANEL.group == 32:
        scale, minimum = factors
    elif PANEL.scales == "k4":
        scales, minimums, d, dmin = factors
        scale = d * ((scales >> (8 * f)) & 255).to(tl.float32)
        minimum = dmin * ((minimums >> (8 * f)) & 255).to(tl.float32)
    else:
        scales, _minimums, d, minimum = factors
        scale = d * ((scales << (24 - 8 * f)) >> 24).to(tl.float32)
    return half_word(scale, scale), half_word(minimum, minimum)


@triton.constexpr_function
def run_width(panel):
    """Weights that a thread takes from a row at a time: those of a unit, 32 of a float panel."""
    return max(panel.unit, 32)


@triton.jit
def load_run(w, row, run, n_unit, PANEL: tl.constexpr, EVEN: tl.constexpr):
    """Return run number `run` of a row, as fields of 16 weights for field_halves.

    EVEN: the row has a multiple of 256 weights. Else weights beyond it are any others.
    """
    fields = ()
    if PANEL.bits < 16:
        u = run if EVEN else tl.minimum(run, n_unit - 1)
        words = unit_words(w, row, u, n_unit, PANEL)
        factors = unit_factors(w, row, u, n_unit, PANEL)
        for f in tl.static_range(PANEL.unit // 16):
            fields = fields + (words[f] + _factor_words(factors, f, PANEL),)
    else:
        at = w[0].to(tl.pointer_type(tl.int32)) + row * (n_unit * 4)
        for f in tl.static_range(2):
            words = ()
            for i in tl.static_range(2):
                u = run * 4 + 2 * f + i
                words = words + words4(at + (u if EVEN else tl.minimum(u, n_unit - 1)) * 4)
            fields = fields + (words,)
    return fields


@triton.jit
def prefetch_run(w, row, run, n_unit, PANEL: tl.constexpr, EVEN: tl.constexpr):
    """Bring the 32 bytes in which a run begins into the second level's cache; of planes but d, which is small."""
    qs, high, scale, _d = w
    u = run * (run_width(PANEL) // PANEL.unit)
    if not EVEN:
        u = tl.minimum(u, n_unit - 1)
    at = row * n_unit + u
    if PANEL.bits == 8:
        _prefetch(qs + (row * n_unit + at) * 16)
        _prefetch(qs + (row * n_unit + at + n_unit) * 16)
    else:
        _prefetch(qs + at * 16)
    if PANEL.bits == 16:
        _prefetch(qs + at * 16 + 32)
    if PANEL.high > 0:
        _prefetch(high + at * PANEL.high_bytes)
    if scale is not None:
        _prefetch(scale + at * PANEL.scale_bytes)


@triton.jit
def _prefetch(at):
    if target_info.is_cuda():
        asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def field_halves(field, i: tl.constexpr, PANEL: tl.constexpr):
    """Return the weights 4 i to 4 i + 3 of a field as two words of two f16."""
    BITS: tl.constexpr = PANEL.bits
    if BITS == 16:
        one = field[2 * i]
        two = field[2 * i + 1]
        if PANEL.scales == "BF16":
            one = half_word((one << 16).to(tl.float32, bitcast=True), (one & -65536).to(tl.float32, bitcast=True))
            two = half_word((two << 16).to(tl.float32, bitcast=True), (two & -65536).to(tl.float32, bitcast=True))
        return one, two
    elif BITS == 8 or PANEL.book_words is not None:  # signed bytes: their top bits are turned over, which adds 128
        return scaled_bytes(field[i] ^ -0x7F7F7F80, field[4], field[5], PANEL.offset + 128)
    else:
        return scaled_bytes(field[i], field[4], field[5], PANEL.offset)
