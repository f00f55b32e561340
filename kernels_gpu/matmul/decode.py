"""matmul for few tokens: dp4a multiplies units of quants with int8 activations; weights are read once.

A thread has one unit of R rows at a time, and a sum for each row and token. The loop has no shared memory, no barrier
and no conversion of layouts. For the blocks of int8 activations (xq, xd, xs) see rows/quantize.py.
"""

import triton
import triton.language as tl

from gguf_run.kernels_gpu.panels.dots import dp2a, dp4a
from gguf_run.kernels_gpu.panels.units import added, load_floats, unit_factors, unit_words, words4, zeros
from gguf_run.kernels_gpu.rows.activation import activate, gate_by
from gguf_run.kernels_gpu.rows.norms import normed
from gguf_run.kernels_gpu.rows.quantize import store_int8


@triton.jit
def _dot16(w, x, c):
    for i in tl.static_range(4):
        c = dp4a(w[i], x[i], c)
    return c


@triton.jit
def _dot32(w, x, factors, OFFSET: tl.constexpr, GROUP: tl.constexpr, MINIMUM: tl.constexpr):
    """Return units of 32 weights times blocks of activations (see _block)."""
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
def _dot64(w, x, factors, OFFSET: tl.constexpr, MINIMUM: tl.constexpr):
    """Return units of 64 weights, with four scales each, times pairs of blocks of activations.

    Dot products of 16 weights of up to 3 bits fit into int16.
    """
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
def _block(x, at, live, EVEN: tl.constexpr):
    """Return blocks of activations at [n]: words of both halves, factor, sums of both halves. Factor 0 if not live."""
    xq, xd, xs = x
    d = tl.load(xd + at)
    sums = tl.load(xs + at)
    if not EVEN:
        d = tl.where(live, d, 0.0)
    return words4(xq + at * 8), words4(xq + at * 8 + 4), d, (sums << 16) >> 16, sums >> 16


@triton.jit
def dot_units(rows, x, at, live, R: tl.constexpr, PANEL: tl.constexpr, EVEN: tl.constexpr):
    """Multiply the units of R rows with the activations of the units number `at` [n].

    rows: pairs of what unit_words and unit_factors return. x: int8 activations (xq, xd, xs).
    """
    OFFSET: tl.constexpr = PANEL.offset
    SCALES: tl.constexpr = PANEL.scales
    MINIMUM: tl.constexpr = SCALES == "f16m" or SCALES == "k6m" or SCALES == "k4"
    values = ()
    if PANEL.bits == 2:
        blocks = (_block(x, at * 2, live, EVEN), _block(x, at * 2 + 1, live, EVEN))
        for r in tl.static_range(R):
            values = values + (_dot64(rows[r][0], blocks, rows[r][1], OFFSET, MINIMUM),)
    else:
        block = _block(x, at, live, EVEN)
        for r in tl.static_range(R):
            values = values + (_dot32(rows[r][0], block, rows[r][1], OFFSET, PANEL.group, MINIMUM),)
    return values


@triton.jit
def sum_units(
    w, base, first, n_out, x, before, n_unit,
    PANEL: tl.constexpr, M: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, UNITS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Return the sums of each thread over the units of R rows of w for M tokens: M * R values f32[UNITS].

    The matrix has its rows from `base` on, n_out of them or twice n_out. The R rows are PAIRS rows from `first` on; if
    R is 2 PAIRS, also the rows n_out after these. before: units of x before those of the first token.
    """
    lane = tl.arange(0, UNITS)
    sums = zeros(M * R, UNITS)
    for start in range(0, n_unit, UNITS):
        u = start + lane
        live = u < n_unit
        if not EVEN:
            u = tl.minimum(u, n_unit - 1)
        rows = ()
        for r in tl.static_range(R):
            row = base + (tl.minimum(first + r % PAIRS, n_out - 1) + (r // PAIRS) * n_out).to(tl.int64)
            rows = rows + ((unit_words(w, row, u, n_unit, PANEL), unit_factors(w, row, u, n_unit, PANEL)),)
        values = ()
        for m in tl.static_range(M):
            values = values + dot_units(rows, x, before + m * n_unit + u, live, R, PANEL, EVEN)
        sums = added(sums, values)
    return sums


@triton.jit
def store_sums(
    sums, first, out, out_stride, bias, residual, residual_stride, n_out,
    M: tl.constexpr, R: tl.constexpr, ACTIVATION: tl.constexpr, N_PART: tl.constexpr = 2, factor=1.0,
):  # fmt: skip
    """Store what the threads' sums add up to, for M tokens and R rows of a matrix: see matmul_decode.

    N_PART: 1: out = ACTIVATION(w * x). factor: of the sums.
    """
    N: tl.constexpr = R if ACTIVATION is None else R // N_PART  # columns of out, from `first` on
    for m in tl.static_range(M):
        for r in tl.static_range(N):
            o = first + r
            mask = o < n_out
            value = tl.sum(sums[m * R + r], 0) * factor
            if bias is not None:
                value += tl.load(bias + o, mask=mask, other=0.0)
            if N < R:
                other = tl.sum(sums[m * R + N + r], 0) * factor
                if bias is not None:
                    other += tl.load(bias + n_out + o, mask=mask, other=0.0)
                value = gate_by(value, other, ACTIVATION)
            elif ACTIVATION is not None:
                value = activate(value, ACTIVATION)
            if residual is not None:
                value += tl.load(residual + m * residual_stride + o, mask=mask, other=0.0)
            tl.store(out + m * out_stride + o, value, mask=mask)


@triton.jit
def is_last(count, n):
    """Return whether this program is the last of n that call it. Its loads past L1 then see the stores of the others.

    count: 0 before the first call; 0 again after the last one.
    """
    tl.debug_barrier()  # all of this program's stores come before its count
    last = tl.atomic_add(count, 1, sem="acq_rel") == n - 1
    if last:
        tl.store(count, 0)
    return last


@triton.jit
def store_blocks(out, out_stride, first, row, made, counts, n_out, M: tl.constexpr, N: tl.constexpr):
    """Write M rows of out, from `row` on, as int8: `made`. The last of the programs that share a block of 32 does it.

    N: columns of a program, from `first` on. counts: zeros, one for each block of a row.
    """
    block = first // 32
    if is_last(counts + block, 32 // N):
        column = block * 32 + tl.arange(0, 32)
        for m in range(M):
            value = tl.load(out + (row + m) * out_stride + column, cache_modifier=".cg")
            store_int8(value, block * 32, made, row + m, n_out, 32)


@triton.jit
def _norm_rows(out, out_stride, norm, norm2, made, counts, n_out, M: tl.constexpr, WIDTH: tl.constexpr):
    """Norm the rows of out: the last program does it. WIDTH >= n_out. See matmul_decode."""
    weight, norm_out, norm_stride, eps, residual, residual_stride = norm
    column = tl.arange(0, WIDTH)
    mask = column < n_out
    if is_last(counts, tl.num_programs(0)):
        for row in range(M):
            value = tl.load(out + row * out_stride + column, mask=mask, other=0.0, cache_modifier=".cg")
            value = normed(value, weight, column, n_out, eps)
            if residual is not None:
                tl.debug_barrier()  # else it is loaded before registers are free
                value += tl.load(residual + row * residual_stride + column, mask=mask, other=0.0)
            tl.store(norm_out + row * norm_stride + column, value, mask=mask)
            if norm2 is not None:
                weight2, norm_out2, norm_stride2, eps2 = norm2
                value = normed(value, weight2, column, n_out, eps2)
                tl.store(norm_out2 + row * norm_stride2 + column, value, mask=mask)
            if made is not None:
                store_int8(value, 0, made, row, n_out, WIDTH)


@triton.jit
def matmul_decode(
    w, x, out, out_stride, bias, residual, residual_stride, n_out, n_unit, made, counts, norm, norm2,
    PANEL: tl.constexpr, M: tl.constexpr, R: tl.constexpr, UNITS: tl.constexpr, EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[m, o] = sum of w[o] * x[m] (+ bias[o]) (+ residual[m, o]) for M tokens, R rows of w a program.

    w: planes of the weights. x: int8 activations (xq, xd, xs).
    n_out: columns of out. n_unit: units of a row of w. UNITS: units at once, one a thread. EVEN: UNITS divides n_unit.
    ACTIVATION: None, or out = activation(first half of w * x) * second half; a program has R / 2 rows of each half.

    Epilogues need more of out than a program has. The last program to finish runs them: `counts`, all 0 before and
    after a launch, tells which one that is.
    norm: None, or (weight, norm_out, its stride, eps, residual, its stride): norm_out = normed(out) (+ residual).
    norm2: None, or (weight, norm_out, its stride, eps): an RMS norm of the first norm's result.
    made: None, or (xq, xd, xs): gets the last result as int8. Without a norm only that of an ACTIVATION.
    """
    PAIRS: tl.constexpr = R if ACTIVATION is None else R // 2
    first = tl.program_id(0) * PAIRS
    sums = sum_units(w, 0, first, n_out, x, 0, n_unit, PANEL, M, R, PAIRS, UNITS, EVEN)
    store_sums(sums, first, out, out_stride, bias, residual, residual_stride, n_out, M, R, ACTIVATION)
    if ACTIVATION is not None:
        if made is not None:
            store_blocks(out, out_stride, first, 0, made, counts, n_out, M, PAIRS)
    elif norm is not None:
        _norm_rows(out, out_stride, norm, norm2, made, counts, n_out, M, WIDTH)


@triton.jit
def matmul_float(
    qs, x, x_stride, out, out_stride, bias, residual, residual_stride, n_out, n_in, n_unit,
    TYPE: tl.constexpr, M: tl.constexpr, R: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """matmul_decode of float panels, in f32. A thread multiplies 16 bytes of each of R rows at a time.

    out[m, o] = w[o] * x[m] (+ bias[o]) (+ residual[m, o]) for M tokens. TYPE: of the panel.
    """
    E: tl.constexpr = 4 if TYPE == "F32" else 8
    first = tl.program_id(0) * R
    e = tl.arange(0, E)[None, :]
    sums = zeros(M * R, UNITS)
    for start in range(0, n_unit, UNITS):
        u = start + tl.arange(0, UNITS)
        units = tl.minimum(u, n_unit - 1)[:, None] * E + e
        column = u[:, None] * E + e
        rows = ()
        for r in tl.static_range(R):
            at = tl.minimum(first + r, n_out - 1).to(tl.int64) * (n_unit * E) + units
            rows = rows + (load_floats(qs, at, TYPE),)
        values = ()
        for m in tl.static_range(M):
            x_m = tl.load(x + m * x_stride + column, mask=column < n_in, other=0.0)
            for r in tl.static_range(R):
                values = values + (tl.sum(rows[r] * x_m, axis=1),)
        sums = added(sums, values)
    store_sums(sums, first, out, out_stride, bias, residual, residual_stride, n_out, M, R, None)
