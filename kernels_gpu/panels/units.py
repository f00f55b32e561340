"""Reads units of integer panels (layouts: panels.py) in the form that dp4a takes.

A thread has whole units: all values are tensors [n] with a number for each unit. Words are tuples of such tensors.
"""

import triton
import triton.language as tl

from gguf_run.kernels_gpu.panels.dots import look_up


@triton.jit
def words4(at):
    """Return the four words at pointers [n] to int32: one 16-byte load a thread."""
    n: tl.constexpr = at.shape[0]
    even, odd = tl.split(tl.reshape(tl.load(at[:, None] + tl.arange(0, 4)[None, :]), (n, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def zeros(n: tl.constexpr, UNITS: tl.constexpr):
    """Return n sums f32[UNITS] of 0: one number a thread."""
    sums = ()
    for _ in tl.static_range(n):
        sums = sums + (tl.zeros((UNITS,), tl.float32),)
    return sums


@triton.jit
def added(sums, values):
    """Return two tuples of tensors, added one by one."""
    total = ()
    for i in tl.static_range(len(sums)):
        total = total + (sums[i] + values[i],)
    return total


@triton.jit
def half_pair(word):
    """Return the two f16 in an int32, as f32."""
    low = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    high = ((word >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def load_floats(qs, at, TYPE: tl.constexpr):
    """Return the numbers `at` of a float panel's plane as f32. TYPE: of the panel."""
    if TYPE == "F32":
        return tl.load(qs.to(tl.pointer_type(tl.float32)) + at)
    elif TYPE == "F16":
        return tl.load(qs.to(tl.pointer_type(tl.float16)) + at).to(tl.float32)
    else:
        word = tl.load(qs.to(tl.pointer_type(tl.uint16)) + at)
        return (word.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high_words(high, at, HIGH: tl.constexpr, BITS: tl.constexpr):
    """Return two words of high bits of units at [n]: the same word twice if a unit has only one."""
    if HIGH == 0:
        none = tl.zeros(at.shape, tl.int32)
        return none, none
    elif BITS == 4 and HIGH == 1:
        one = tl.load(high.to(tl.pointer_type(tl.int32)) + at)
        return one, one
    else:
        both = tl.load(high.to(tl.pointer_type(tl.int64)) + at)
        return both.to(tl.int32), (both >> 32).to(tl.int32)


@triton.jit
def unit_words(w, row, u, n_unit, PANEL: tl.constexpr):
    """Return the codes of units u [n] of a row, a byte each: a tuple of fields of four words, 16 weights a field."""
    BITS: tl.constexpr = PANEL.bits
    HIGH: tl.constexpr = PANEL.high
    BOOK: tl.constexpr = PANEL.book_words
    qs, high, _scale, _d = w
    qs = qs.to(tl.pointer_type(tl.int32))
    fields = ()
    if BITS == 8:
        plane = qs + row * n_unit * 8
        return words4(plane + u * 4), words4(plane + (n_unit + u) * 4)
    else:
        word = words4(qs + (row * n_unit + u) * 4)
        h = _high_words(high, row * n_unit + u, HIGH, BITS)
        if BOOK is not None:
            low = ()
            top = ()
            for i in tl.static_range(4):
                a, b = look_up(word[i], BOOK)
                low = low + (a,)
                top = top + (b,)
            return low, top
        else:
            for f in tl.static_range(8 // BITS):
                field = ()
                for i in tl.static_range(4):
                    w = (word[i] >> (BITS * f)) & (0x01010101 * ((1 << BITS) - 1))
                    if HIGH == 2:  # field f has a word of its own
                        w = w | (_shift(h[f], 4 - 2 * i) & 0x30303030)
                    elif HIGH == 1 and BITS == 4:
                        w = w | (_shift(h[0], 4 - 4 * f - i) & 0x10101010)
                    elif HIGH == 1:
                        w = w | (_shift(h[f // 2], 2 - 4 * (f % 2) - i) & 0x04040404)
                    field = field + (w,)
                fields = fields + (field,)
            return fields


@triton.jit
def _shift(word, left: tl.constexpr):
    return word << left if left >= 0 else word >> -left


@triton.jit
def exponent_half(e):
    """Return 2**(e - 128) for an int32 e: half of what e8m0 means. The books of e2m1 hold doubled values in return."""
    bits = tl.where(e < 2, 0x200000 << e, (e - 1) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def unit_factors(w, row, u, n_unit, PANEL: tl.constexpr):
    """Return the factors of the dot products of units u [n] of a row.

    One scale a unit (group 32): (scale f32, minimum f32); a type without minimums has 0, which is not used.
    Several (group 16): (packed int8 scales, packed minimums, d, -dmin).
    """
    _qs, _high, scale, d = w
    BITS: tl.constexpr = PANEL.bits
    SCALES: tl.constexpr = PANEL.scales
    at = row * n_unit + u
    none = tl.zeros(u.shape, tl.float32)
    zero = tl.zeros(u.shape, tl.int32)
    per: tl.constexpr = 4 if BITS == 2 else 8  # units that share d
    at_d = row * (n_unit // per) + u // per
    if SCALES == "f16":
        return tl.load(scale.to(tl.pointer_type(tl.float16)) + at).to(tl.float32), none
    elif SCALES == "f16m":
        return half_pair(tl.load(scale.to(tl.pointer_type(tl.int32)) + at))
    elif SCALES == "e8m0":
        return exponent_half(tl.load(scale + at).to(tl.int32)), none
    elif SCALES == "k6m":
        pair = tl.load(scale.to(tl.pointer_type(tl.uint16)) + at).to(tl.int32)
        factor, minimum = half_pair(tl.load(d.to(tl.pointer_type(tl.int32)) + at_d))
        return factor * (pair & 255).to(tl.float32), -minimum * (pair >> 8).to(tl.float32)
    elif SCALES == "k4":
        pairs = tl.load(scale.to(tl.pointer_type(tl.int32)) + at)
        factor, minimum = half_pair(tl.load(d.to(tl.pointer_type(tl.int32)) + at_d))
        return pairs & 0x0F0F0F0F, (pairs >> 4) & 0x0F0F0F0F, factor, -minimum
    else:
        factor = tl.load(d.to(tl.pointer_type(tl.float16)) + at_d).to(tl.float32)
        if PANEL.group == 32:
            return factor * tl.load(scale.to(tl.pointer_type(tl.int8)) + at).to(tl.float32), none
        elif BITS == 2:
            return tl.load(scale.to(tl.pointer_type(tl.int32)) + at), zero, factor, none
        else:
            return tl.load(scale.to(tl.pointer_type(tl.int16)) + at).to(tl.int32), zero, factor, none
