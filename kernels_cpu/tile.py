"""The innermost kernel: 16 rows of a panel times 1 or 4 tokens, for every panel and instruction set.

Each of the 16 f32 lanes is one row, so nothing is summed across lanes. A vector of weights is loaded and unpacked once
and used for all tokens of the tile; a token's activations are broadcast. Integer panels read activations in blocks:

    offset  0: 32 int8 values           (see quantize.py; weight blocks and activation blocks are both 32 wide)
           32: f32 d                    value = d * int8
           36: i32 sums of values 0..31, 0..15, 16..31
           48: f32 d * those three sums
           60: unused, so that a block is one cache line
"""

import functools
import operator
from dataclasses import dataclass
from typing import Any

from numba import types
from numba.extending import intrinsic

from gguf_run.kernels_cpu.panels import BLOCK, PANELS, PARTS, ROWS, FloatPanel, IntPanel
from gguf_run.kernels_cpu.simd import F16, F32, I8, I16, I32, I64, Simd, Val, kernel

X_BLOCK_BYTES = 64
X_D, X_SUMS, X_D_SUMS = 32, 36, 48
# One token: bytes between what is used and what is asked for. Left to itself, the processor reads panels whose scales
# stand apart from their quants at half the speed of memory.
_AHEAD = 4096
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
    at a time). Addresses and strides in bytes. n_steps: of panel.columns columns each. Integer panels: x in activation
    blocks. Float panels: x in f32; w_panel, w_step: bytes from one panel, one step to the next. init may be out; stride
    0 repeats one row.
    """
    shape, panels, tokens = PANELS[panel.literal_value], n_panels.literal_value, n_tokens.literal_value

    def emit(s: Simd, w: Val, w_panel: Val, w_step: Val, n_steps: Val, *rest: Val) -> None:
        x, x_stride, out, out_stride, init, init_stride = rest
        places = [(t, p) for t in range(tokens) for p in range(panels)]
        start = [s.load(init + init_stride * t + 64 * p, F32, ROWS) for t, p in places]
        xs = [x + x_stride * t for t in range(tokens)]
        if isinstance(shape, IntPanel):
            acc = _int_panel(s, shape, w, n_steps, xs, start)
        else:
            acc = _float_panel(s, shape, [w + w_panel * p for p in range(panels)], w_step, n_steps, xs, start)
        for (t, p), value in zip(places, acc, strict=True):
            s.store(value, out + out_stride * t + 64 * p)

    return kernel(types.void(panel, n_panels, n_tokens, *[types.intp] * 10), emit)


@dataclass(frozen=True)
class _Block:
    """32 columns of a step: for each group a scale and, or not, a minimum, f32[16]; quants: 8 vectors of 64 bytes."""

    scales: list[Val]
    minimums: list[Val]
    stored: list[Val]


def _step(s: Simd, panel: IntPanel, w: Val, k: Val) -> list[_Block]:
    """Step k of the panel at w: its scales decoded, its planes loaded."""
    span, i = (k, s.const(I64, 0)) if panel.n_steps == 1 else (k >> _log2(panel.n_steps), k & (panel.n_steps - 1))
    at = w + span * panel.span_bytes
    factors = [s.load(at + 2 * ROWS * n, F16, ROWS).to(F32) for n in range(panel.n_factors)]
    scales, minimums = _heads(s, panel, at + i * panel.head_bytes + 2 * ROWS * panel.n_factors)
    if factors:
        scales = [scale * factors[0] for scale in scales]
        minimums = [minimum * factors[1] for minimum in minimums]
    quants = at + i * panel.step_bytes + panel.quants_at
    n_blocks, per = panel.columns // BLOCK, BLOCK // panel.group
    return [
        _Block(
            scales[per * n : per * n + per],
            minimums[per * n : per * n + per],
            [s.load(quants + 64 * (panel.bits * n + plane), I8, 64) for plane in range(panel.bits)],
        )
        for n in range(n_blocks)
    ]


def _log2(power: int) -> int:
    return power.bit_length() - 1


def _heads(s: Simd, panel: IntPanel, at: Val) -> tuple[list[Val], list[Val]]:
    """The scales and minimums of a step (see panels.py), without the factors of their span."""
    n = panel.columns // panel.group

    def field(i: int) -> Val:
        return s.load(at + ROWS * i, I8, ROWS).to(I32, signed=panel.scales.name == "k8")

    match panel.scales.name:
        case "k4":
            both = [field(i) for i in range(n)]
            return [(v & 15).to(F32) for v in both], [(v >> 4).to(F32) for v in both]
        case "k6":
            low = [field(i) for i in range(3)]
            six = [v & 63 for v in low] + [low[0] >> 6 | (low[1] >> 6) << 2 | (low[2] >> 6) << 4]
            if panel.has_minimum:
                return [v.to(F32) for v in six[:n]], [v.to(F32) for v in six[n:]]
            return [(v - 32).to(F32) for v in six], []
        case "k8":
            return [field(i).to(F32) for i in range(n)], []
        case "e8m0":
            e = field(0)
            power = s.select(e.compare("<", 2), s.const(I32, 0x00200000, ROWS) << e, (e - 1) << 23)
            return [power.as_type(F32)], []
        case name:
            width, element = (2, F16) if name == "f16" else (4, F32)
            count = n * (1 + panel.has_minimum)
            numbers = [s.load(at + ROWS * width * i, element, ROWS).to(F32) for i in range(count)]
            return numbers[:n], numbers[n:]


def _quant(s: Simd, panel: IntPanel, stored: list[Val], i: int) -> Val:
    """u of vector i, 64 bytes: columns 4i .. 4i+3 of the block's 16 rows."""
    if panel.bits == 8:
        return stored[i]
    parts, plane, bit = [], 0, 0
    for width in PARTS[panel.bits]:
        mask = ((1 << width) - 1) << bit
        parts.append(_moved(stored[plane + i % width], bit - width * (i // width)) & mask)
        plane, bit = plane + width, bit + width
    u = functools.reduce(operator.or_, parts)
    return s.look_up([value + panel.offset for value in panel.codebook], u) if panel.codebook else u


def _moved(v: Val, left: int) -> Val:
    """All bytes shifted left (right if negative); bits that come from a neighbour are the caller's to mask."""
    if left == 0:
        return v
    words = v.as_type(I16)
    return (words << left if left > 0 else words >> -left).as_type(I8)


def _int_panel(s: Simd, panel: IntPanel, w: Val, n_steps: Val, xs: list[Val], start: list[Val]) -> list[Val]:
    n_groups = BLOCK // panel.group
    first_sum = 0 if n_groups == 1 else 4  # the sum of all 32, or of each half

    def block(block: _Block, x_at: Val, acc: list[Val]) -> list[Val]:
        blocks = [x + x_at for x in xs]
        ds = [s.load(x + X_D, F32, splat=ROWS) for x in blocks]
        for g, scale in enumerate(block.scales):
            dots = [s.const(I32, 0, ROWS)] * len(xs)
            if panel.offset:  # sum (u - offset) * x = sum u * x - offset * sum x
                sums = [s.load(x + (X_SUMS + first_sum + 4 * g), I32, splat=ROWS) for x in blocks]
                dots = [dot - (sum_ << _log2(panel.offset)) for dot, sum_ in zip(dots, sums, strict=True)]
            for i in range(8 // n_groups * g, 8 // n_groups * (g + 1)):
                quants = _quant(s, panel, block.stored, i)
                x4s = [s.load(x + 4 * i, I32, splat=ROWS).as_type(I8) for x in blocks]
                dots = [s.dot(dot, quants, x4, panel.dot_bits) for dot, x4 in zip(dots, x4s, strict=True)]
            acc = [s.fma(dot.to(F32), scale * d, a) for dot, d, a in zip(dots, ds, acc, strict=True)]
        for g, minimum in enumerate(block.minimums):
            d_sums = [s.load(x + (X_D_SUMS + first_sum + 4 * g), F32, splat=ROWS) for x in blocks]
            acc = [s.fma(minimum, d_sum, a) for d_sum, a in zip(d_sums, acc, strict=True)]
        return acc

    n_lines = -(-panel.span_bytes // (64 * panel.n_steps))

    def body(k: Val, acc: list[Val]) -> list[Val]:
        if len(xs) == 1:
            for i in range(n_lines):
                s.prefetch(w + k * (panel.span_bytes // panel.n_steps) + (_AHEAD + 64 * i))
        blocks = _step(s, panel, w, k)
        for n, one in enumerate(blocks):
            acc = block(one, (k * len(blocks) + n) * X_BLOCK_BYTES, acc)
        return acc

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
