"""A row of K or V as f32, and as what a cache type stores: codes, and the f16 numbers of its blocks.

A code is one byte for integers (unsigned, as in panels/panels.py) and 8-bit floats, 2 or 4 bytes for other floats.
Rows of ggml's types equal the result of quantize_row_*_ref byte for byte: the operations and their order are ggml's.
"""

import itertools
from collections.abc import Callable

from llvmlite import ir

from gguf_run.kernels_cpu.attention.cache_types import FORMATS, CacheFormat
from gguf_run.kernels_cpu.matmul.tile import load_floats
from gguf_run.kernels_cpu.panels.panels import FLOAT8_FACTOR, ROWS, FloatPanel, IntPanel
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.simd import F16, F32, I8, I16, I32, I64, Simd, Val
from gguf_run.models.kv_cache import GROUP

_HALVES = (0, 1)  # a block of 32 columns is two vectors
_FLOAT8 = {"E4M3": (3, 7), "E5M2": (2, 15)}  # bits of the mantissa, the exponent's bias


def narrow_float8(s: Simd, name: str, x: Val, largest: float) -> Val:
    """Convert f32 to bytes of an fp8 type, to nearest, halves to even. Larger numbers become `largest`."""
    mantissa, bias = _FLOAT8[name]
    bits = x.as_type(I32)
    sign = (bits >> 24) & 0x80
    size = s.minimum(s.absolute(x), s.const(F32, largest, x.lanes))
    rest, drop = size.as_type(I32), 23 - mantissa
    # Below the smallest normal number: after adding 2^drop steps, the mantissa is a multiple of the step, rounded.
    magic = s.const(F32, 2.0 ** (drop + 1 - bias), x.lanes)
    small = (size + magic).as_type(I32) - magic.as_type(I32)
    normal = (rest - ((127 - bias) << 23) + ((1 << (drop - 1)) - 1) + ((rest >> drop) & 1)) >> drop
    smallest = s.const(F32, 2.0 ** (1 - bias), x.lanes)
    return (s.select(size.compare("<", smallest), small, normal) | sign).to(I8)


def _by_inverse(s: Simd, d: Val) -> Val:
    """1 / d, or 0 where d is 0."""
    zero = s.const(F32, 0.0)
    return s.splat(s.select(d.compare("==", 0.0), zero, s.const(F32, 1.0) / d), ROWS)


def _fold(s: Simd, halves: list[Val], combine: Callable[[Val, Val], Val]) -> Val:
    """Combine all numbers of a block."""
    return s.fold(combine(*halves), combine)


def _farthest(s: Simd, x: list[Val]) -> Val:
    """The number of largest magnitude (the first of several), with its sign."""
    sizes = [s.absolute(half) for half in x]
    largest = _fold(s, sizes, s.maximum)
    keys = []
    for h in _HALVES:
        key = s.constants(I32, [2 * (16 * h + i) for i in range(ROWS)]) | (x[h].as_type(I32) >> 31)
        is_largest = sizes[h].compare("==", s.splat(largest, ROWS))
        keys.append(s.select(is_largest, s.const(I32, 0, ROWS) - key, s.const(I32, -1000, ROWS)))
    is_negative = (s.const(I32, 0) - _fold(s, keys, s.maximum)) & 1
    return s.select(is_negative.compare("==", 1), largest * -1.0, largest)


_Encoded = tuple[list[Val], list[Val]]  # numbers of a block, f32; codes, i32


def _with_scale(s: Simd, panel: IntPanel, x: list[Val]) -> _Encoded:
    nmax = panel.offset
    d = _farthest(s, x) / -float(nmax)
    inverse = _by_inverse(s, d)
    top = s.const(I32, 2 * nmax - 1, ROWS)
    return [d], [s.minimum((half * inverse + (nmax + 0.5)).to(I32), top) for half in x]


def _with_minimum(s: Simd, panel: IntPanel, x: list[Val]) -> _Encoded:
    nmax = (1 << panel.bits) - 1
    low, high = _fold(s, x, s.minimum), _fold(s, x, s.maximum)
    d = (high - low) / float(nmax)
    inverse = _by_inverse(s, d)
    lows, top = s.splat(low, ROWS), s.const(I32, nmax, ROWS)
    return [d, low], [s.minimum(((half - lows) * inverse + 0.5).to(I32), top) for half in x]


def _signed_bytes(s: Simd, panel: IntPanel, x: list[Val]) -> _Encoded:
    d = _fold(s, [s.absolute(half) for half in x], s.maximum) / 127.0
    levels = []
    for level in [half * _by_inverse(s, d) for half in x]:  # halves go away from zero; 0.49999997 + 0.5 is 1
        half = s.const(F32, 0.49999997, ROWS)
        levels.append((level + s.select(level.compare(">=", 0.0), half, half * -1.0)).to(I32) + 128)
    return [d], levels


def _with_codebook(s: Simd, panel: IntPanel, x: list[Val]) -> _Encoded:
    book = panel.codebook
    d = _farthest(s, x) / float(book[0])
    inverse = _by_inverse(s, d)
    codes, products, squares = [], [], []
    for half in x:
        level = half * inverse
        code, value = s.const(I32, 0, ROWS), s.const(F32, book[0], ROWS)
        for low, high in itertools.pairwise(book):
            above = (level - low).compare(">=", s.const(F32, high, ROWS) - level)
            code = code + Val(s, s.b.zext(above.ir, code.type))
            value = s.select(above, s.const(F32, high, ROWS), value)
        weighted = half * half * value
        codes.append(code)
        products.append(weighted * half)
        squares.append(weighted * value)
    total, weight = (_in_order(s, halves) for halves in (products, squares))
    return [s.select(weight.compare(">", 0.0), total / weight, s.const(F32, 0.0))], codes


def _in_order(s: Simd, halves: list[Val]) -> Val:
    """The sum of all numbers from left to right, as C computes it."""
    total = s.const(F32, 0.0)
    for half in halves:
        for i in range(ROWS):
            total = total + Val(s, s.b.extract_element(half.ir, ir.Constant(I32, i)))
    return total


_TRIES = (1.0, 0.92, 0.85, 0.78)  # int4: scales to try; 1 is the scale that fits the largest number


def _least_squares(s: Simd, panel: IntPanel, x: list[Val]) -> _Encoded:
    """Try some scales. The codes that fit best stay, with the scale that fits them best."""
    nmax, largest = panel.offset, _farthest(s, x)
    zero, top = s.const(F32, 0.0, ROWS), s.const(I32, 2 * nmax - 1, ROWS)
    best: list[Val] = []
    for part in _TRIES:
        inverse = _by_inverse(s, largest * (-part / nmax))
        scaled = [half * inverse + (nmax + 0.5) for half in x]
        codes = [s.minimum(s.maximum(v, zero).to(I32), top) for v in scaled]
        qs = [(code - nmax).to(F32) for code in codes]
        # the error is x.x - product^2 / square
        product, square = (s.sum(a[0] * b[0] + a[1] * b[1]) for a, b in ((x, qs), (qs, qs)))
        square = s.maximum(square, s.const(F32, 1.0))
        new = [product * product / square, product / square, *codes]
        if best:
            better = new[0].compare(">", best[0])
            new = [s.select(better, a, b) for a, b in zip(new, best, strict=True)]
        best = new
    return [best[1]], best[2:]


_ENCODERS = {
    "q8_0": _signed_bytes,
    "q5_1": _with_minimum,
    "q5_0": _with_scale,
    "q4_1": _with_minimum,
    "q4_0": _with_scale,
    "iq4_nl": _with_codebook,
    "int4": _least_squares,
}


def _encode_blocks(s: Simd, form: CacheFormat, x: Val, n: Val, codes: Val, numbers: Val) -> None:
    def body(b: Val) -> None:
        halves = [s.load(x + b * 128 + 64 * h, F32, ROWS) for h in _HALVES]
        assert isinstance(form.panel, IntPanel)
        found, us = _ENCODERS[form.name](s, form.panel, halves)
        for i, number in enumerate(found):
            s.store(number.to(F16), numbers + b * (2 * len(found)) + 2 * i)
        for h in _HALVES:
            s.store(us[h].to(I8), codes + b * GROUP + 16 * h)

    s.each(n >> 5, body)


def _encode_row(s: Simd, form: CacheFormat, x: Val, n: Val, codes: Val, numbers: Val, static: Val) -> None:
    """Encode a row with one scale, f16: `static` if it is not 0, else the scale that fits the largest number."""
    zeros = s.const(F32, 0.0, ROWS)
    sizes = s.loop(n >> 4, [zeros], lambda i, acc: [s.maximum(acc[0], s.absolute(s.load(x + i * 64, F32, ROWS)))])
    most = s.fold(sizes[0], s.maximum)
    scale = s.select(static.compare("==", 0.0), most / form.largest, static).to(F16)
    s.store(scale, numbers)
    inverse = _by_inverse(s, scale.to(F32))

    def body(i: Val) -> None:
        level = s.load(x + i * 64, F32, ROWS) * inverse
        if isinstance(form.panel, FloatPanel):
            s.store(narrow_float8(s, form.panel.name, level, form.largest), codes + i * ROWS)
        else:
            top = s.const(F32, form.largest, ROWS)
            level = s.maximum(s.minimum(level, top), top * -1.0)
            s.store((s.rint(level) + 128).to(I8), codes + i * ROWS)

    s.each(n >> 4, body)


def _encode_floats(s: Simd, panel: FloatPanel, x: Val, n: Val, codes: Val) -> None:
    def body(i: Val) -> None:
        value = s.load(x + i * 64, F32, ROWS)
        if panel.element == I16:  # bfloat16: to nearest, halves to even
            bits = value.as_type(I32)
            value = ((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16).to(I16)
        else:
            value = value.to(panel.element)
        s.store(value, codes + i * panel.step_bytes)

    s.each(n >> 4, body)


@simd_kernel(floats="static")
def encode(s: Simd, form: int, x: Val, n: Val, codes: Val, numbers: Val, static: Val) -> None:
    """Quantize a row.

    form: place in FORMATS.
    x, n: f32[n], n a multiple of 32.
    codes: n codes.
    numbers: f16, the numbers of one block after those of another.
    static: scale of the row, or 0 to compute it.
    """
    type = FORMATS[form]
    if type.block:
        _encode_blocks(s, type, x, n, codes, numbers)
    elif type.n_numbers:
        _encode_row(s, type, x, n, codes, numbers, static)
    elif isinstance(type.panel, FloatPanel):
        _encode_floats(s, type.panel, x, n, codes)


@simd_kernel
def decode(s: Simd, form: int, codes: Val, numbers: Val, n: Val, x: Val) -> None:
    """Write the row that `encode` made as f32[n] at x."""
    type = FORMATS[form]
    panel, count = type.panel, type.n_numbers

    def body(i: Val) -> None:
        block = i >> 1 if type.block else s.const(I64, 0)
        found = [s.load(numbers + block * (2 * count) + 2 * j, F16).to(F32) for j in range(count)]
        if isinstance(panel, FloatPanel):
            value = load_floats(s, panel, codes + i * panel.step_bytes) * FLOAT8_FACTOR.get(panel.name, 1.0)
        else:
            u = s.load(codes + i * ROWS, I8, ROWS)
            if panel.codebook:
                u = s.look_up(panel.codebook, s.concat(s.concat(u, u), s.concat(u, u))).part(0, ROWS)
            value = u.to(I32, signed=bool(panel.codebook)).to(F32) - float(0 if panel.codebook else panel.offset)
        if found:
            value = value * s.splat(found[0], ROWS)
        if count == 2:
            value = value + s.splat(found[1], ROWS)
        s.store(value, x + i * 64)

    s.each(n >> 4, body)
