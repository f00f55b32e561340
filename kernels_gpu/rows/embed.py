"""Ops on rows: embeddings, the wanted rows, gating, softcap, sums of squares."""

import triton
import triton.language as tl

from gguf_run.kernels_gpu.panels.fields import field_width, tile_field
from gguf_run.kernels_gpu.rows.activation import activate


@triton.jit
def embed(
    w, ids, out, out_stride, n_in, n_unit, factor,
    PANEL: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """out[t] = factor * table[ids[t]]; grid (tokens, n_unit / UNITS)."""
    E: tl.constexpr = field_width(PANEL)
    UNIT: tl.constexpr = PANEL.unit
    t = tl.program_id(0).to(tl.int64)
    rows = tl.load(ids + t + tl.arange(0, 1)).to(tl.int64)
    u = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    units = tl.minimum(u, n_unit - 1)
    for f in tl.static_range(UNIT // E):
        field = tile_field(w, rows, units, n_unit, f, PANEL)
        column = u[None, :, None] * UNIT + f * E + tl.arange(0, E)[None, None, :]
        tl.store(out + t * out_stride + column, field * factor, mask=column < n_in)


@triton.jit
def copy_rows(x, x_stride, rows, out, out_stride, n, WIDTH: tl.constexpr):
    """out[i] = x[rows[i]]; grid (rows, n / WIDTH)."""
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    row = tl.load(rows + i).to(tl.int64)
    value = tl.load(x + row * x_stride + column, mask=column < n)
    tl.store(out + i * out_stride + column, value, mask=column < n)


@triton.jit
def gated(gate, gate_stride, up, up_stride, out, out_stride, n, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr):
    """out = activation(gate) (* up); grid (rows, n / WIDTH)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = column < n
    value = activate(tl.load(gate + row * gate_stride + column, mask=mask), ACTIVATION)
    if up is not None:
        value *= tl.load(up + row * up_stride + column, mask=mask)
    tl.store(out + row * out_stride + column, value, mask=mask)


@triton.jit
def gate_rows(x, x_stride, gate, gate_stride, n, WIDTH: tl.constexpr):
    """x[t] *= sigmoid(gate[t, 0]); grid (rows, n / WIDTH)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    at = x + row * x_stride + column
    factor = tl.sigmoid(tl.load(gate + row * gate_stride))
    tl.store(at, tl.load(at, mask=column < n) * factor, mask=column < n)


@triton.jit
def softcap(x, x_stride, n, scale, CAP: tl.constexpr, WIDTH: tl.constexpr):
    """x = CAP * tanh(scale * x / CAP), or scale * x without CAP; grid (rows, n / WIDTH)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    at = x + row * x_stride + column
    value = tl.load(at, mask=column < n) * scale
    if CAP is not None:
        value = CAP * (2 * tl.sigmoid(value * (2 / CAP)) - 1)
    tl.store(at, value, mask=column < n)


@triton.jit
def observe(x, x_stride, sums, seen, n_row, n, WIDTH: tl.constexpr):
    """sums f64[n] += the squares of n_row rows of x; seen int64[1] += n_row; grid (n / WIDTH,)."""
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    mask = column < n
    total = tl.load(sums + column, mask=mask)
    at = x + column
    for _ in range(0, n_row):
        value = tl.load(at, mask=mask).to(tl.float64)
        total += value * value
        at += x_stride
    tl.store(sums + column, total, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(seen, tl.load(seen) + n_row)
