"""Products of experts for many tokens: tiles of weights become f16 in registers. `finish` ends products of torch."""

import triton
import triton.language as tl

from gguf_run.kernels_gpu.panels.fields import field_width, tile_field
from gguf_run.kernels_gpu.rows.activation import gate_by, place
from gguf_run.kernels_gpu.rows.quantize import half_at


@triton.jit
def tile_product(w, rows, x_rows, n_in, n_unit, PANEL: tl.constexpr, UNITS: tl.constexpr, EIGHTS: tl.constexpr):
    """Return f32[N, M]: `rows` int64[N] of the weights times the f16 rows at pointers x_rows [M].

    UNITS: units of a row at a time. The weights are the left operand of tl.dot: so each warp has rows of its own, and
    no weight is converted twice. EIGHTS: see half_at.
    """
    E: tl.constexpr = field_width(PANEL)
    UNIT: tl.constexpr = PANEL.unit
    N: tl.constexpr = rows.shape[0]
    acc = tl.zeros((N, x_rows.shape[0]), tl.float32)
    for start in range(0, n_unit, UNITS):
        u = start + tl.arange(0, UNITS)
        units = tl.minimum(u, n_unit - 1)
        for f in tl.static_range(UNIT // E):
            field = tile_field(w, rows, units, n_unit, f, PANEL)
            column = tl.reshape(u[:, None] * UNIT + f * E + tl.arange(0, E)[None, :], (UNITS * E,))
            at = half_at(0, column, n_in, EIGHTS)
            x = tl.load(x_rows[:, None] + at[None, :], mask=column[None, :] < n_in, other=0.0)
            acc = tl.dot(tl.reshape(field, (N, UNITS * E)).to(tl.float16), tl.trans(x), acc)
    return acc


@triton.jit
def finish(
    raw, raw_stride, xm, out, out_stride, bias, residual, residual_stride, n_out,
    ACTIVATION: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = raw * xm (+ bias) (+ residual); grid (rows, n_out / WIDTH).

    xm: factors of the rows. ACTIVATION: None, or out = activation(first half of raw * xm) * second half.
    """
    row, o, mask = place(n_out, WIDTH)
    factor = 1.0
    if xm is not None:
        factor = tl.load(xm + row)
    value = tl.load(raw + row * raw_stride + o, mask=mask) * factor
    if bias is not None:
        value += tl.load(bias + o, mask=mask)
    if ACTIVATION is not None:
        other = tl.load(raw + row * raw_stride + n_out + o, mask=mask) * factor
        if bias is not None:
            other += tl.load(bias + n_out + o, mask=mask)
        value = gate_by(value, other, ACTIVATION)
    if residual is not None:
        value += tl.load(residual + row * residual_stride + o, mask=mask)
    tl.store(out + row * out_stride + o, value, mask=mask)
