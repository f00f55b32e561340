"""The innermost kernel: 16 rows of a panel times 1 or 4 tokens, for every panel and instruction set.

Each of the 16 f32 lanes is one row, so nothing is summed across lanes. A vector of weights is loaded and unpacked once
and used for all tokens of the tile; a token's activations are broadcast. Integer panels read activations in blocks:

    offset  0: 32 int8 values           (see quantize.py; weight blocks and activation blocks are both 32 wide)
           32: f32 d                    value = d * int8
           36: i32 sums of values 0..31, 0..15, 16..31
           48: f32 d * those three sums
           60: unused, so that a block is one cache line
"""

from typing import Any

from numba import types
from numba.extending import intrinsic

from gguf_run.kernels_cpu.panels import PANELS, ROWS, FloatPanel, IntPanel
from gguf_run.kernels_cpu.simd import F16, F32, I8, I16, I32, Simd, Val, kernel

X_BLOCK_BYTES = 64
X_D, X_SUMS, X_D_SUMS = 32, 36, 48
_FLOAT_SUMS = 16  # sums of a float tile that run side by side, so that they do not wait for each other


@intrinsic(prefer_literal=True)
def tile(
    typing_context: Any,
    panel: Any,
    n_panels: Any,
    n_tokens: Any,
    w: Any,
    w_panel: Any,
    w_step: Any,
    n_steps: Any,
    x: Any,
    x_stride: Any,
    out: Any,
    out_stride: Any,
    init: Any,
    init_stride: Any,
) -> Any:
    """out[t, r] = init[t, r] + sum over columns of w[r, column] * x[t, column], t < n_tokens, r < 16 * n_panels.

    panel, n_panels, n_tokens: literal integers (place in PANELS; panels and tokens of the tile; integer panels come one
    at a time). Addresses and strides in bytes. Integer panels: n_steps blocks of 32 columns, x in activation blocks.
    Float panels: n_steps columns, x in f32. w_panel, w_step: bytes from one panel, one step to the next. init may be
    out; stride 0 repeats one row.
    """
    shape, panels, tokens = PANELS[panel.literal_value], n_panels.literal_value, n_tokens.literal_value

    def emit(s: Simd, w: Val, w_panel: Val, w_step: Val, n_steps: Val, *rest: Val) -> None:
        x, x_stride, out, out_stride, init, init_stride = rest
        places = [(t, p) for t in range(tokens) for p in range(panels)]
        start = [s.load(init + init_stride * t + 64 * p, F32, ROWS) for t, p in places]
        xs = [x + x_stride * t for t in range(tokens)]
        if isinstance(shape, IntPanel):
            acc = _int_panel(s, shape, w, w_step, n_steps, xs, start)
        else:
            acc = _float_panel(s, shape, [w + w_panel * p for p in range(panels)], w_step, n_steps, xs, start)
        for (t, p), value in zip(places, acc, strict=True):
            s.store(value, out + out_stride * t + 64 * p)

    return kernel(types.void(panel, n_panels, n_tokens, *[types.intp] * 10), emit)


def _scales(s: Simd, panel: IntPanel, at: Val) -> list[Val]:
    element = F16 if panel.half_scales else F32
    return [s.load(at + panel.scale_bytes * g, element, ROWS).to(F32) for g in range(panel.n_groups)]


def _quants(s: Simd, panel: IntPanel, at: Val) -> list[Val]:
    """The block's u as 8 vectors of 64 bytes: vector i holds columns 4i .. 4i+3 of the 16 rows."""
    stored = [s.load(at + 64 * i, I8, 64) for i in range(panel.bits)]
    if panel.bits == 8:
        return stored
    quants = [v & 15 for v in stored[:4]] + [v >> 4 for v in stored[:4]]
    for i in range(8):
        if panel.bits == 5:
            quants[i] = quants[i] | (_moved(stored[4], 4 - i) & 16)
        elif panel.bits == 6:
            quants[i] = quants[i] | (_moved(stored[4 + i // 4], 4 - 2 * (i % 4)) & 48)
    return quants


def _moved(v: Val, left: int) -> Val:
    """All bytes shifted left (right if negative); bits that come from a neighbour are the caller's to mask."""
    words = v.as_type(I16)
    return (words << left if left >= 0 else words >> -left).as_type(I8)


def _int_panel(
    s: Simd, panel: IntPanel, w: Val, w_step: Val, n_steps: Val, xs: list[Val], start: list[Val]
) -> list[Val]:
    per_group = 8 // panel.n_groups
    first_sum = 0 if panel.n_groups == 1 else 4  # the sum of all 32, or of each half

    def body(k: Val, acc: list[Val]) -> list[Val]:
        at = w + w_step * k
        scales = _scales(s, panel, at)
        minimums = _scales(s, panel, at + panel.head_bytes // 2) if panel.has_minimum else []
        quants = _quants(s, panel, at + panel.head_bytes)
        new = []
        for x, total in zip(xs, acc, strict=True):
            xb = x + k * X_BLOCK_BYTES
            d = s.load(xb + X_D, F32, splat=ROWS)
            for g, scale in enumerate(scales):
                dots = s.const(I32, 0, ROWS)
                if panel.offset:  # sum (u - offset) * x = sum u * x - offset * sum x
                    sums = s.load(xb + (X_SUMS + first_sum + 4 * g), I32, splat=ROWS)
                    dots = dots - (sums << (panel.offset.bit_length() - 1))
                for i in range(per_group * g, per_group * (g + 1)):
                    x4 = s.load(xb + 4 * i, I32, splat=ROWS).as_type(I8)
                    dots = s.dot(dots, quants[i], x4, panel.dot_bits)
                total = s.fma(dots.to(F32), scale * d, total)
            for g, minimum in enumerate(minimums):
                d_sum = s.load(xb + (X_D_SUMS + first_sum + 4 * g), F32, splat=ROWS)
                total = s.fma(minimum, d_sum, total)
            new.append(total)
        return new

    return s.loop(n_steps, start, body)


def _float_panel(
    s: Simd, panel: FloatPanel, ws: list[Val], w_step: Val, n_steps: Val, xs: list[Val], start: list[Val]
) -> list[Val]:
    def weights(w: Val, k: Val) -> Val:
        stored = s.load(w + w_step * k, panel.element, ROWS)
        if panel.element == I16:  # bfloat16 is the upper half of an f32
            return (stored.to(I32, signed=False) << 16).as_type(F32)
        return stored.to(F32)

    def column(k: Val, acc: list[Val]) -> list[Val]:
        rows = [weights(w, k) for w in ws]
        values = [s.load(x + k * 4, F32, splat=ROWS) for x in xs]
        pairs = [(value, row) for value in values for row in rows]
        return [s.fma(row, value, a) for (value, row), a in zip(pairs, acc, strict=True)]

    n = len(start)
    zero = s.const(F32, 0.0, ROWS)

    unroll = max(1, _FLOAT_SUMS // n)  # columns per iteration; each has sums of its own

    def columns(i: Val, acc: list[Val]) -> list[Val]:
        return [value for u in range(unroll) for value in column(i * unroll + u, acc[u * n : u * n + n])]

    whole = n_steps >> (unroll.bit_length() - 1)
    acc = s.loop(whole, start + [zero] * (n * (unroll - 1)), columns)
    total = acc[:n]
    for u in range(1, unroll):
        total = [sum_ + part for sum_, part in zip(total, acc[u * n : u * n + n], strict=True)]
    done = whole * unroll
    return s.loop(n_steps - done, total, lambda i, acc: column(done + i, acc))
