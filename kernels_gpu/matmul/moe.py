"""The products of a mixture of experts. A token reads only the matrices of its experts.

The rows of an expert are neighbours: in gate_up first its gates, then its `up`s, [n_expert][2][n_ff], or its `up`s
alone, [n_expert][1][n_ff]; in down [n_expert][n_embd]. A pair p is a token and one of its experts; for chosen, weights
and order see moe_route.py.
"""

import triton
import triton.language as tl

from gguf_run.kernels_gpu.matmul.decode import dot_units, store_blocks, store_sums, sum_units
from gguf_run.kernels_gpu.matmul.tiles import tile_product
from gguf_run.kernels_gpu.panels.units import added, unit_factors, unit_words, zeros
from gguf_run.kernels_gpu.rows.activation import activate, gate_by, place
from gguf_run.kernels_gpu.rows.quantize import half_at, store_halves


@triton.jit
def expert_gate_up(
    w, x, chosen, weights, bias, out, made, counts, n_ff,
    PANEL: tl.constexpr, N_UNIT: tl.constexpr, N_USED: tl.constexpr, PAIRS: tl.constexpr, UNITS: tl.constexpr,
    N_PART: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """out f32[p, n_ff] = activation(gate[e] * x) * (up[e] * x) for few tokens, of pair p's expert e and token.

    Grid (pairs, n_ff / PAIRS). N_PART: 1: out = activation(up[e] * x). weights: None, or factors of the pairs' sums.
    bias: None, or f32[n_expert, N_PART, n_ff]. made: (xq, xd, xs), gets out as int8.
    counts: zeros, one for each block of made. For the others see matmul_decode.
    """
    EVEN: tl.constexpr = N_UNIT % UNITS == 0
    p = tl.program_id(0)
    e = tl.load(chosen + p)
    if e < 0:
        return
    before = p // N_USED * N_UNIT
    base = e.to(tl.int64) * (N_PART * n_ff)
    first = tl.program_id(1) * PAIRS
    sums = sum_units(w, base, first, n_ff, x, before, N_UNIT, PANEL, 1, N_PART * PAIRS, PAIRS, UNITS, EVEN)
    if bias is not None:
        bias += base
    factor = 1.0 if weights is None else tl.load(weights + p)
    store_sums(sums, first, out + p * n_ff, n_ff, bias, None, 0, n_ff, 1, N_PART * PAIRS, ACTIVATION, N_PART, factor)
    store_blocks(out, n_ff, first, p, made, counts + p * (n_ff // 32), n_ff, 1, PAIRS)


@triton.jit
def expert_down(
    w, x, chosen, weights, bias, out, out_stride, n_out,
    PANEL: tl.constexpr, N_UNIT: tl.constexpr, N_USED: tl.constexpr, R: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """out[t, o] += sum over token t's pairs p of weights[p] * (down[e, o] * x[p] (+ bias[e, o])), for few tokens.

    Grid (n_out / R, tokens). weights: None: 1. A row is the rows of all experts of the token, one after the other: so
    the sum has one order, and few threads are idle.
    """
    N_ALL: tl.constexpr = N_USED * N_UNIT
    EVEN: tl.constexpr = N_ALL % UNITS == 0
    t = tl.program_id(1)
    if tl.load(chosen + t * N_USED) < 0:
        return
    first = tl.program_id(0) * R
    sums = zeros(R, UNITS)
    for start in range(0, N_ALL, UNITS):
        i = start + tl.arange(0, UNITS)
        live = i < N_ALL
        if not EVEN:
            i = tl.minimum(i, N_ALL - 1)
        p, u = t * N_USED + i // N_UNIT, i % N_UNIT
        base = tl.load(chosen + p).to(tl.int64) * (n_out * N_UNIT)  # the units before those of the expert
        words, factors = base * (2 if PANEL.bits == 8 else 1) + u, base + u
        rows = ()
        for r in tl.static_range(R):
            row = tl.minimum(first + r, n_out - 1).to(tl.int64)
            rows = rows + ((unit_words(w, row, words, N_UNIT, PANEL), unit_factors(w, row, factors, N_UNIT, PANEL)),)
        weight = 1.0 if weights is None else tl.load(weights + p)
        dots = dot_units(rows, x, t * N_ALL + i, live, R, PANEL, EVEN)
        values = ()
        for r in tl.static_range(R):
            values = values + (weight * dots[r],)
        sums = added(sums, values)
    for r in tl.static_range(R):
        o = first + r
        value = tl.load(out + t * out_stride + o, mask=o < n_out, other=0.0) + tl.sum(sums[r], 0)
        if bias is not None:
            for k in range(N_USED):
                e = tl.load(chosen + t * N_USED + k).to(tl.int64)
                weight = 1.0 if weights is None else tl.load(weights + t * N_USED + k)
                value += weight * tl.load(bias + e * n_out + o, mask=o < n_out, other=0.0)
        tl.store(out + t * out_stride + o, value, mask=o < n_out)


@triton.jit
def expert_tile(
    w, xh, counts, order, raw, raw_stride, n_expert, n_out, n_in, n_unit,
    PANEL: tl.constexpr, PER_ROW: tl.constexpr, EXPERTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    UNITS: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """raw f32[p, o] = w[e, o] * xh[p / PER_ROW] for many tokens, of pair p's expert e. EIGHTS: see half_at.

    Grid (n_out / N, the most tiles of M pairs of one expert that there can be). EXPERTS >= n_expert.
    """
    tile = tl.program_id(1)
    each = tl.arange(0, EXPERTS)
    n_pairs = tl.load(counts + each, mask=each < n_expert, other=0)
    n_tiles = (n_pairs + M - 1) // M
    e = tl.sum((tl.cumsum(n_tiles, axis=0) <= tile).to(tl.int32), axis=0)
    if e >= n_expert:
        return
    at = (tile - tl.sum(tl.where(each < e, n_tiles, 0), axis=0)) * M
    m = at + tl.arange(0, M)
    live = m < tl.load(counts + e)
    first = tl.sum(tl.where(each < e, n_pairs, 0), axis=0)
    p = tl.load(order + first + m, mask=live, other=0).to(tl.int64)
    o = tl.program_id(0) * N + tl.arange(0, N)
    rows = e.to(tl.int64) * n_out + tl.minimum(o, n_out - 1)
    x_rows = xh + half_at(p // PER_ROW, 0, n_in, EIGHTS)
    acc = tile_product(w, rows, x_rows, n_in, n_unit, PANEL, UNITS, EIGHTS)
    tl.store(raw + p[None, :] * raw_stride + o[:, None], acc, mask=live[None, :] & (o[:, None] < n_out))


@triton.jit
def gate_pairs(
    raw, raw_stride, xm, chosen, weights, bias, n_ff, out, halves,
    N_USED: tl.constexpr, N_PART: tl.constexpr, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """halves[p] = activation(gate) * up of the gates and `up`s in raw; grid (pairs,), WIDTH >= n_ff.

    xm: the tokens' factors. For weights, bias and N_PART see expert_gate_up. halves: (xh, xm).
    out: None, or f32[pairs, n_ff], gets the same.
    """
    p = tl.program_id(0).to(tl.int64)
    e = tl.load(chosen + p)
    if e < 0:
        return
    column = tl.arange(0, WIDTH)
    mask = column < n_ff
    factor = tl.load(xm + p // N_USED)
    if weights is not None:
        factor *= tl.load(weights + p)
    value = tl.load(raw + p * raw_stride + column, mask=mask, other=0.0) * factor
    if bias is not None:
        bias += e.to(tl.int64) * (N_PART * n_ff) + column
        value += tl.load(bias, mask=mask, other=0.0)
    if N_PART == 2:
        up = tl.load(raw + p * raw_stride + n_ff + column, mask=mask, other=0.0) * factor
        if bias is not None:
            up += tl.load(bias + n_ff, mask=mask, other=0.0)
        value = gate_by(value, up, ACTIVATION)
    else:
        value = activate(value, ACTIVATION)
    if out is not None:
        tl.store(out + p * n_ff + column, value, mask=mask)
    store_halves(value, column, halves, p, n_ff, 0)


@triton.jit
def add_pairs(
    raw, raw_stride, xm, chosen, weights, bias, out, out_stride, n_out, N_USED: tl.constexpr, WIDTH: tl.constexpr
):
    """out[t] += weights[p] * (xm[p] * raw[p] (+ bias[e])) for each of t's pairs p; grid (tokens, n_out / WIDTH).

    weights: None: 1.
    """
    t, o, mask = place(n_out, WIDTH)
    if tl.load(chosen + t * N_USED) < 0:
        return
    total = tl.load(out + t * out_stride + o, mask=mask)
    for k in range(N_USED):
        p = t * N_USED + k
        value = tl.load(raw + p * raw_stride + o, mask=mask) * tl.load(xm + p)
        if bias is not None:
            value += tl.load(bias + tl.load(chosen + p).to(tl.int64) * n_out + o, mask=mask)
        total += value if weights is None else tl.load(weights + p) * value
    tl.store(out + t * out_stride + o, total, mask=mask)
