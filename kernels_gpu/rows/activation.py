"""Activation functions, and small ops on rows: gating, softcap, the wanted rows, temperature, sums of squares."""

import triton
import triton.language as tl


@triton.jit
def activate(x, NAME: tl.constexpr):
    """Return activation(x), see models.ops.ACTIVATIONS. In gelu, tanh(y) = 2 sigmoid(2 y) - 1."""
    if NAME == "silu":
        return x * tl.sigmoid(x)
    elif NAME == "relu2":
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif NAME == "sigmoid":
        return tl.sigmoid(x)
    elif NAME == "identity":
        return x
    elif NAME == "gelu_erf":
        return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def gate_by(gate, up, NAME: tl.constexpr):
    """Return activation(gate) * up. NAME: of `activate`, or "swiglu_oai" (models.rare_ops.Moe)."""
    if NAME == "swiglu_oai":
        gate = tl.minimum(gate, 7.0)
        return gate * tl.sigmoid(1.702 * gate) * (tl.clamp(up, -7.0, 7.0) + 1.0)
    else:
        return activate(gate, NAME) * up


@triton.jit
def place(n, WIDTH: tl.constexpr):
    """Return the row and the columns of a program of the grid (rows, n / WIDTH), and which of the columns exist."""
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    return tl.program_id(0).to(tl.int64), column, column < n


@triton.jit
def copy_rows(x, x_stride, rows, out, out_stride, n, WIDTH: tl.constexpr):
    """out[i] = x[rows[i]]; grid (rows, n / WIDTH)."""
    i, column, mask = place(n, WIDTH)
    row = tl.load(rows + i).to(tl.int64)
    tl.store(out + i * out_stride + column, tl.load(x + row * x_stride + column, mask=mask), mask=mask)


@triton.jit
def gated(gate, gate_stride, up, up_stride, out, out_stride, n, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr):
    """out = activation(gate) (* up); grid (rows, n / WIDTH)."""
    row, column, mask = place(n, WIDTH)
    value = activate(tl.load(gate + row * gate_stride + column, mask=mask), ACTIVATION)
    if up is not None:
        value *= tl.load(up + row * up_stride + column, mask=mask)
    tl.store(out + row * out_stride + column, value, mask=mask)


@triton.jit
def xielu(x, x_stride, out, out_stride, n, alpha_p, alpha_n, beta, eps, WIDTH: tl.constexpr):
    """See models.rare_ops.Xielu; grid (rows, n / WIDTH). Above -0.5, e^m - 1 - m is a sum of powers of m."""
    row, column, mask = place(n, WIDTH)
    value = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
    m = tl.minimum(value, eps)
    rest = tl.full((WIDTH,), 1.0, tl.float32)
    for i in tl.static_range(7):
        rest = rest * m / (9 - i) + 1.0
    rest = tl.where(m > -0.5, rest * m * m * 0.5, tl.exp(m) - 1.0 - m)
    made = tl.where(value > 0, alpha_p * value * value, alpha_n * (rest + (m - value))) + beta * value
    tl.store(out + row * out_stride + column, made, mask=mask)


@triton.jit
def gate_rows(x, x_stride, gate, gate_stride, n, WIDTH: tl.constexpr):
    """x[t] *= sigmoid(gate[t, 0]); grid (rows, n / WIDTH)."""
    row, column, mask = place(n, WIDTH)
    at = x + row * x_stride + column
    factor = tl.sigmoid(tl.load(gate + row * gate_stride))
    tl.store(at, tl.load(at, mask=mask) * factor, mask=mask)


@triton.jit
def temper(x, x_stride, positions, n, scale, length, offset, WIDTH: tl.constexpr):
    """x[t] *= 1 + scale * ln(1 + floor((positions[t] + offset) / length)); grid (rows, n / WIDTH)."""
    row, column, mask = place(n, WIDTH)
    at = x + row * x_stride + column
    n_whole = tl.maximum(tl.load(positions + row) + offset, 0) // length  # rows that only fill up have the position -1
    factor = 1 + scale * tl.log(1 + n_whole.to(tl.float32))
    tl.store(at, tl.load(at, mask=mask) * factor, mask=mask)


@triton.jit
def add_positions(x, x_stride, positions, table, n, n_row, WIDTH: tl.constexpr):
    """x[t] += table[min(positions[t], n_row - 1)]; grid (rows, n / WIDTH)."""
    row, column, mask = place(n, WIDTH)
    position = tl.maximum(tl.minimum(tl.load(positions + row), n_row - 1), 0)  # -1: a row that only fills up
    at = x + row * x_stride + column
    added = tl.load(table + position.to(tl.int64) * n + column, mask=mask)
    tl.store(at, tl.load(at, mask=mask) + added, mask=mask)


@triton.jit
def scale_adapters(x, x_stride, seqs, values, n_adapter, adapters, factors, n, WIDTH: tl.constexpr):
    """See models.rare_ops.ScaleAdapters; grid (rows, n / WIDTH). adapters, factors: of each column."""
    row, column, mask = place(n, WIDTH)
    adapter = tl.load(adapters + column, mask=mask, other=0)
    scale = tl.load(values + tl.load(seqs + row) * n_adapter + adapter)
    at = x + row * x_stride + column
    value = tl.load(at, mask=mask, other=0.0) * (scale * tl.load(factors + column, mask=mask, other=0.0))
    tl.store(at, tl.where(scale == 0, 0.0, value), mask=mask)


@triton.jit
def softcap(x, x_stride, n, scale, CAP: tl.constexpr, WIDTH: tl.constexpr):
    """x = CAP * tanh(scale * x / CAP), or scale * x without CAP; grid (rows, n / WIDTH)."""
    row, column, mask = place(n, WIDTH)
    at = x + row * x_stride + column
    value = tl.load(at, mask=mask) * scale
    if CAP is not None:
        value = CAP * (2 * tl.sigmoid(value * (2 / CAP)) - 1)
    tl.store(at, value, mask=mask)


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
