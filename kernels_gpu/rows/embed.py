"""Ops on rows: embeddings, the choice of result rows, gating, sums of squares."""

import triton
import triton.language as tl

from gguf_run.kernels_gpu.panels.fields import tile_field
from gguf_run.kernels_gpu.rows.activation import activate


@triton.jit
def embed(  # type: ignore[no-untyped-def]
    qs,
    high,
    scale,
    d,
    ids,
    out,
    out_stride,
    n_in,
    n_unit,
    factor,
    BITS: tl.constexpr,
    HIGH: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    OFFSET: tl.constexpr,
    BOOK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """out[t] = factor * table[ids[t]]; grid (tokens, n_unit / UNITS)."""
    E: tl.constexpr = 128 // BITS if BITS >= 16 else 16
    UNIT: tl.constexpr = E if BITS >= 16 else (64 if BITS == 2 else 32)
    t = tl.program_id(0).to(tl.int64)
    rows = tl.load(ids + t + tl.arange(0, 1)).to(tl.int64)
    u = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    units = tl.minimum(u, n_unit - 1)
    for f in tl.static_range(UNIT // E):
        w = tile_field(qs, high, scale, d, rows, units, n_unit, f, BITS, HIGH, GROUP, SCALES, OFFSET, BOOK)
        column = u[None, :, None] * UNIT + f * E + tl.arange(0, E)[None, None, :]
        tl.store(out + t * out_stride + column, w * factor, mask=column < n_in)


@triton.jit
def copy_rows(x, x_stride, rows, out, out_stride, n, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[i] = x[rows[i]]; grid (rows, n / WIDTH)."""
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    row = tl.load(rows + i).to(tl.int64)
    value = tl.load(x + row * x_stride + column, mask=column < n)
    tl.store(out + i * out_stride + column, value, mask=column < n)


@triton.jit
def gated(gate, gate_stride, up, up_stride, out, out_stride, n, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """out = activation(gate) (* up); grid (rows, n / WIDTH)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = column < n
    value = activate(tl.load(gate + row * gate_stride + column, mask=mask), ACTIVATION)
    if up is not None:
        value *= tl.load(up + row * up_stride + column, mask=mask)
    tl.store(out + row * out_stride + column, value, mask=mask)


@triton.jit
def gate_rows(x, x_stride, gate, gate_stride, n, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """x[t] *= sigmoid(gate[t, 0]); grid (rows, n / WIDTH)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    at = x + row * x_stride + column
    factor = tl.sigmoid(tl.load(gate + row * gate_stride))
    tl.store(at, tl.load(at, mask=column < n) * factor, mask=column < n)


@triton.jit
def softcap(x, x_stride, n, scale, CAP: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """x = CAP * tanh(scale * x / CAP), or scale * x without CAP; grid (rows, n / WIDTH)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    at = x + row * x_stride + column
    value = tl.load(at, mask=column < n) * scale
    if CAP is not None:
        value = CAP * (2 * tl.sigmoid(value * (2 / CAP)) - 1)
    tl.store(at, value, mask=column < n)


@triton.jit
def observe(x, x_stride, sums, n_row, n, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """sums f64[n] += the squares of all rows; grid (n / WIDTH,)."""
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    mask = column < n
    total = tl.load(sums + column, mask=mask)
    at = x + column
    for _ in range(0, n_row):
        value = tl.load(at, mask=mask).to(tl.float64)
        total += value * value
        at += x_stride
    tl.store(sums + column, total, mask=mask)
