"""matmul for a few tokens: weights are read once, units of quants times int8 activations with dp4a.

A thread has one unit of R rows at a time and keeps a sum for each row and token: no shared memory, no barrier and no
conversion of layouts in the loop. Activations are blocks of 32 int8 values (quantize.py): xq, their factor xd, and xs,
the sums of each block's halves as two int16.
"""

import triton
import triton.language as tl

from gguf_run.kernels_gpu.panels.dots import dp2a, dp4a
from gguf_run.kernels_gpu.panels.units import unit_factors, unit_words, words4
from gguf_run.kernels_gpu.rows.activation import gate_by
from gguf_run.kernels_gpu.rows.quantize import store_int8
from gguf_run.kernels_gpu.rows.rms_norm import normed


@triton.jit
def _dot16(w, x, c):  # type: ignore[no-untyped-def]
    for i in tl.static_range(4):
        c = dp4a(w[i], x[i], c)
    return c


@triton.jit
def _dot32(w, x, factors, OFFSET: tl.constexpr, GROUP: tl.constexpr, MINIMUM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A unit of 32 weights times x = (halves' words, d, halves' sums)."""
    a, b, xd, low, high = x
    if GROUP == 32:
        dot = _dot16(w[0], a, _dot16(w[1], b, (low + high) * -OFFSET))
        value = factors[0] * dot.to(tl.float32)
        if MINIMUM:
            value += factors[1] * (low + high).to(tl.float32)
        return xd * value
    else:
        scales, _minimums, d, _dmin = factors
        dot = _dot16(w[0], a, low * -OFFSET) * ((scales << 24) >> 24)
        dot += _dot16(w[1], b, high * -OFFSET) * (scales >> 8)
        return xd * (d * dot.to(tl.float32))


@triton.jit
def _dot64(w, x, factors, OFFSET: tl.constexpr, MINIMUM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A unit of 64 weights with four scales. Dot products of 16 weights of up to 3 bits fit into int16."""
    scales, minimums, d, dmin = factors
    value = tl.zeros(d.shape, tl.float32)
    for half in tl.static_range(2):
        a, b, xd, low, high = x[half]
        one = _dot16(w[2 * half], a, low * -OFFSET)
        other = _dot16(w[2 * half + 1], b, high * -OFFSET)
        part = d * dp2a((one & 0xFFFF) | (other << 16), scales, half).to(tl.float32)
        if MINIMUM:
            part += dmin * dp2a((low & 0xFFFF) | (high << 16), minimums, half).to(tl.float32)
        value += xd * part
    return value


@triton.jit
def _block(xq, xd, xs, at, live, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Blocks of activations at [n]; those that are not live count for nothing."""
    d = tl.load(xd + at)
    sums = tl.load(xs + at)
    if not EVEN:
        d = tl.where(live, d, 0.0)
    return words4(xq + at * 8), words4(xq + at * 8 + 4), d, (sums << 16) >> 16, sums >> 16


@triton.jit
def dot_units(  # type: ignore[no-untyped-def]
    rows,
    xq,
    xd,
    xs,
    at,
    live,
    R: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Units of R rows, pairs of what unit_words and unit_factors return, times the activations of units number `at`."""
    MINIMUM: tl.constexpr = SCALES == "f16m" or SCALES == "k6m" or SCALES == "k4"
    values = ()
    if BITS == 2:
        x = (_block(xq, xd, xs, at * 2, live, EVEN), _block(xq, xd, xs, at * 2 + 1, live, EVEN))
        for r in tl.static_range(R):
            values = values + (_dot64(rows[r][0], x, rows[r][1], OFFSET, MINIMUM),)
    else:
        x = _block(xq, xd, xs, at, live, EVEN)
        for r in tl.static_range(R):
            values = values + (_dot32(rows[r][0], x, rows[r][1], OFFSET, GROUP, MINIMUM),)
    return values


@triton.jit
def is_last(count, n):  # type: ignore[no-untyped-def]
    """Whether all of n programs that call it but this one have done so; then their stores can be read (past L1)."""
    tl.debug_barrier()  # all of this program's stores come before its count
    last = tl.atomic_add(count, 1, sem="acq_rel") == n - 1
    if last:
        tl.store(count, 0)
    return last


@triton.jit
def matmul_decode(  # type: ignore[no-untyped-def]
    qs,
    high,
    scale,
    d,
    xq,
    xd,
    xs,
    out,
    bias,
    residual,
    n_out,
    n_unit,
    out_stride,
    residual_stride,
    oq,
    od,
    os,
    counts,
    norm,
    norm_out,
    norm_stride,
    eps,
    more,
    more_stride,
    norm2,
    norm2_out,
    norm2_stride,
    eps2,
    BITS: tl.constexpr,
    HIGH: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    OFFSET: tl.constexpr,
    BOOK: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    UNITS: tl.constexpr,
    EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out[m, o] = sum of w[o] * x[m] (+ bias[o]) (+ residual[m, o]) for M tokens, R rows a program.

    UNITS: units of a row at once, one a thread. EVEN: it divides n_unit. ACTIVATION, if any: half of the R rows come
    from the second half of the matrix, and out = activation(first) * second; n_out counts the pairs.

    What needs more of out than a program has is done by the program that is the last to be ready, which counts, zeros
    when a launch begins and ends, tell. oq, not None (with od, os): gets blocks of an ACTIVATION's out as int8. norm,
    not None: weights of an RMS norm of out's rows, WIDTH >= n_out, into norm_out, with the rows of more added, if any;
    norm2, not None: of a norm of that; oq, not None: gets what comes last.
    """
    PAIRS: tl.constexpr = R if ACTIVATION is None else R // 2
    first = tl.program_id(0) * PAIRS
    lane = tl.arange(0, UNITS)
    sums = ()
    for _ in tl.static_range(M * R):
        sums = sums + (tl.zeros((UNITS,), tl.float32),)
    for start in range(0, n_unit, UNITS):
        u = start + lane
        live = u < n_unit
        if not EVEN:
            u = tl.minimum(u, n_unit - 1)
        rows = ()
        for r in tl.static_range(R):
            row = (tl.minimum(first + r % PAIRS, n_out - 1) + (r // PAIRS) * n_out).to(tl.int64)
            w = unit_words(qs, high, row, u, n_unit, BITS, HIGH, BOOK)
            rows = rows + ((w, unit_factors(scale, d, row, u, n_unit, BITS, GROUP, SCALES)),)
        added = ()
        for m in tl.static_range(M):
            values = dot_units(rows, xq, xd, xs, m * n_unit + u, live, R, BITS, GROUP, SCALES, OFFSET, EVEN)
            for r in tl.static_range(R):
                added = added + (sums[m * R + r] + values[r],)
        sums = added
    for m in tl.static_range(M):
        for r in tl.static_range(PAIRS):
            o = first + r
            mask = o < n_out
            value = tl.sum(sums[m * R + r], 0)
            if bias is not None:
                value += tl.load(bias + o, mask=mask, other=0.0)
            if ACTIVATION is not None:
                other = tl.sum(sums[m * R + PAIRS + r], 0)
                if bias is not None:
                    other += tl.load(bias + n_out + o, mask=mask, other=0.0)
                value = gate_by(value, other, ACTIVATION)
            if residual is not None:
                value += tl.load(residual + m * residual_stride + o, mask=mask, other=0.0)
            tl.store(out + m * out_stride + o, value, mask=mask)
    if ACTIVATION is not None:
        if oq is not None:
            block = first // 32
            if is_last(counts + block, 32 // PAIRS):
                column = block * 32 + tl.arange(0, 32)
                for row in range(M):
                    made = tl.load(out + row * out_stride + column, cache_modifier=".cg")
                    store_int8(made, block * 32, oq, od, os, row, n_out, 32)
    elif norm is not None:
        column = tl.arange(0, WIDTH)
        if is_last(counts, tl.num_programs(0)):
            for row in range(M):
                made = tl.load(out + row * out_stride + column, mask=column < n_out, other=0.0, cache_modifier=".cg")
                made = normed(made, norm, column, n_out, eps)
                if more is not None:
                    tl.debug_barrier()  # else it is loaded before registers are free
                    made += tl.load(more + row * more_stride + column, mask=column < n_out, other=0.0)
                tl.store(norm_out + row * norm_stride + column, made, mask=column < n_out)
                if norm2 is not None:
                    made = normed(made, norm2, column, n_out, eps2)
                    tl.store(norm2_out + row * norm2_stride + column, made, mask=column < n_out)
                if oq is not None:
                    store_int8(made, 0, oq, od, os, row, n_out, WIDTH)
