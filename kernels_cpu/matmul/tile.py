"""The innermost kernel: 16 rows of a panel times 1 to 8 tokens, for each panel and instruction set.

Each of the 16 f32 lanes is one row: nothing is summed across lanes. A vector of weights is loaded and unpacked once,
and multiplied with all tokens of the tile. An activation is repeated in all lanes. Integer panels are in int_tile.py.
"""

import functools
import itertools
import operator
from collections.abc import Callable

from llvmlite import ir

from gguf_run.kernels_cpu.matmul.int_tile import int_tile, prefetch_step
from gguf_run.kernels_cpu.panels.panels import PANELS, ROWS, TOKENS, CodedPanel, FloatPanel, IntPanel, Panel
from gguf_run.kernels_cpu.vector import isa
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.simd import F16, F32, I8, I16, I32, I64, Simd, Val

TILES = tuple(n for n in (1, 2, 4, 8) if n <= isa.current().tokens)  # tokens of a tile
_FLOAT_SUMS = 16  # sums of the largest float tile that run side by side


@simd_kernel
def tile(
    s: Simd,
    panel: int,
    n_panels: int,
    n_tokens: Val,
    w: Val,
    w_panel: Val,
    n_steps: Val,
    x: Val,
    x_stride: Val,
    out: Val,
    out_stride: Val,
    init: Val,
    init_stride: Val,
    ahead: Val,
) -> None:
    """out[t, r] = init[t, r] + sum over columns of w[r, column] * x[t, column], t < n_tokens, r < 16 * panels.

    panel: place in PANELS.
    n_panels: panels of a tile of 4 tokens; other tiles take one.
    n_tokens: one of TILES.
    w: address of the first panel.
    w_panel: bytes from one panel to the next. 0: there is one panel, which is computed n_panels times.
    n_steps: steps of panel.columns columns.
    x, x_stride: rows of activation blocks for integer panels, of f32 for float panels.
    init, init_stride: rows of f32. init may be out; init_stride 0 repeats one row.
    ahead: as in int_tile.
    """
    step = s.select(w_panel.compare("==", 0), s.const(I64, 0), s.const(I64, 64))
    for n in TILES:
        with s.b.if_then(n_tokens.compare("==", n).ir):
            here = range(n_panels if n == 4 else 1)
            # Else the compiler would compute each address of an activation anew from a few of these.
            xs = [_opaque(s, x + x_stride * t) for t in range(n)]
            ws = [w + w_panel * p for p in here]
            moves = [(t, step * p) for t in range(n) for p in here]
            places = [(init + init_stride * t + move, out + out_stride * t + move) for t, move in moves]
            _tile(s, PANELS[panel], ws, n_steps, xs, places, ahead)


@simd_kernel
def tile_at(s: Simd, panel: int, n_tokens: Val, w: Val, n_steps: Val, at: Val, move: Val, ahead: Val) -> None:
    """As `tile`, for rows at any addresses: out[t, r] += sum over columns of w[r, column] * x[t, column].

    at: address of int64[2, TOKENS]: addresses of x[t], then addresses of out[t] less `move` bytes.
    """
    for n in TILES:
        with s.b.if_then(n_tokens.compare("==", n).ir):
            xs = [s.load(at + 8 * t, I64) for t in range(n)]
            outs = [s.load(at + 8 * (TOKENS + t), I64) + move for t in range(n)]
            _tile(s, PANELS[panel], [w], n_steps, xs, [(out, out) for out in outs], ahead)


def _opaque(s: Simd, value: Val) -> Val:
    """Return an i64 of which the compiler knows nothing."""
    same = ir.InlineAsm(ir.FunctionType(I64, [I64]), "", "=r,0")
    return Val(s, s.b.call(same, [value.ir]))


def _tile(
    s: Simd, panel: Panel, ws: list[Val], n_steps: Val, xs: list[Val], places: list[tuple[Val, Val]], ahead: Val
) -> None:
    """A tile of an integer or a float panel. The arguments are as in int_tile."""
    if isinstance(panel, IntPanel):
        int_tile(s, panel, ws, n_steps, xs, places, ahead)
        return
    if isinstance(panel, CodedPanel):
        _coded_tile(s, panel, ws, n_steps, xs, places, ahead)
        return

    def products(k: Val) -> list[tuple[Val, Val]]:
        at = k * panel.step_bytes
        prefetch_step(s, [w + at for w in ws], panel.step_bytes, ahead)
        rows = [load_floats(s, panel, w + at) for w in ws]
        values = [s.load(x + k * 4, F32, splat=ROWS) for x in xs]
        return [(row, value) for value in values for row in rows]

    start = [s.load(at, F32, ROWS) for at, _ in places]
    # All tiles add in the same order, so that a token's result is the same in each.
    unroll = _FLOAT_SUMS // isa.current().tokens
    sums = sums_of_products(s, start, n_steps, products, unroll * len(start))
    for (_, to), value in zip(places, sums, strict=True):
        s.store(value, to)


def _coded_tile(
    s: Simd, panel: CodedPanel, ws: list[Val], n_steps: Val, xs: list[Val], places: list[tuple[Val, Val]], ahead: Val
) -> None:
    """A tile of a coded panel. The columns of a scale are summed, and the sum is multiplied with the scale."""
    n, unroll = len(places), _FLOAT_SUMS // isa.current().tokens
    n_spans, per = s.const(I64, 1), n_steps
    if panel.span:
        per = s.const(I64, panel.span // panel.columns)
        n_spans = n_steps >> (panel.span // panel.columns).bit_length() - 1
    stored = 4 if panel.shared else 4 * ROWS
    codes = ((n_spans * stored + 63) >> 6) << 6  # bytes before the codes

    def step(k: Val, acc: list[Val]) -> list[Val]:
        at, new = codes + k * panel.step_bytes, list(acc)
        prefetch_step(s, [w + at for w in ws], panel.step_bytes, ahead)
        rows = [load_codes(s, panel, w + at) for w in ws]
        for c in range(panel.columns):
            values = [s.load(x + k * (4 * panel.columns) + 4 * c, F32, splat=ROWS) for x in xs]
            for i, (value, row) in enumerate(itertools.product(values, rows)):
                to = c % unroll * n + i
                new[to] = s.fma(row[c], value, new[to])
        return new

    def span(j: Val, acc: list[Val]) -> list[Val]:
        sums = s.loop(per, [s.const(F32, 0.0, ROWS)] * (n * unroll), lambda i, part: step(j * per + i, part))
        totals = [functools.reduce(operator.add, sums[i::n]) for i in range(n)]
        ats = [w + j * stored for w in ws]
        scales = [s.load(at, F32, splat=ROWS) if panel.shared else s.load(at, F32, ROWS) for at in ats]
        return [s.fma(total, scales[i % len(ws)], acc[i]) for i, total in enumerate(totals)]

    sums = s.loop(n_spans, [s.load(at, F32, ROWS) for at, _ in places], span)
    for (_, to), value in zip(places, sums, strict=True):
        s.store(value, to)


def load_codes(s: Simd, panel: CodedPanel, at: Val) -> list[Val]:
    """Load a step of a coded panel: f32[16] for each column. FP8 is divided by FLOAT8_FACTOR."""
    if panel.table:
        bytes_ = [s.load(at + ROWS * i, I8, ROWS).to(I32, signed=False) for i in range(panel.columns // 2)]
        return [s.look_up_floats(panel.table, codes) for v in bytes_ for codes in (v, v >> 4)]
    words = [s.load(at + 2 * ROWS * i, I16, ROWS) for i in range(panel.columns // 2)]
    match panel.name:
        case "INT8_F32":
            return [v.to(I32).to(F32) for word in words for v in ((word << 8).sar(8), word.sar(8))]
        case "E5M2":
            pairs = [(word << 8, word & 0xFF00) for word in words]
        case _:
            pairs = [(s.low_bytes(word) & 0xBFFF, word.sar(1) & 0xBF80) for word in words]
    return [half.as_type(F16).to(F32) for pair in pairs for half in pair]


def load_floats(s: Simd, panel: FloatPanel | CodedPanel, at: Val) -> Val:
    """Load 16 elements of a float panel as f32. Those of 8 bits are divided by FLOAT8_FACTOR."""
    stored = s.load(at, panel.element, ROWS)
    match panel.name:
        case "BF16":  # the upper half of an f32
            return (stored.to(I32, signed=False) << 16).as_type(F32)
        case "E5M2":  # the upper half of an f16. No number is NaN or infinite
            return (stored.to(I16, signed=False) << 8).as_type(F16).to(F32)
        case "E4M3":
            return ((stored.to(I16) << 7) & 0xBFFF).as_type(F16).to(F32)
    return stored.to(F32)


def sums_of_products(
    s: Simd, start: list[Val], n_steps: Val, products: Callable[[Val], list[tuple[Val, Val]]], n_sums: int
) -> list[Val]:
    """Return start + the sums of products(i) over n_steps steps.

    Fewer than n_sums sums are split into several each, so that no addition waits for another.
    """
    n = len(start)
    unroll = max(1, n_sums // n)  # steps of an iteration, each with sums of its own

    def step(i: Val, acc: list[Val]) -> list[Val]:
        return [s.fma(a, b, total) for (a, b), total in zip(products(i), acc, strict=True)]

    def steps(i: Val, acc: list[Val]) -> list[Val]:
        return [value for u in range(unroll) for value in step(i * unroll + u, acc[u * n : u * n + n])]

    whole = n_steps >> (unroll.bit_length() - 1)
    acc = s.loop(whole, start + [s.const(F32, 0.0, ROWS)] * (n * (unroll - 1)), steps)
    totals = acc[:n]
    for u in range(1, unroll):
        totals = [a + b for a, b in zip(totals, acc[u * n : u * n + n], strict=True)]
    if unroll == 1:
        return totals
    return s.loop(n_steps - whole * unroll, totals, lambda i, acc: step(whole * unroll + i, acc))


@simd_kernel
def prefetch(s: Simd, address: Val, n_bytes: Val) -> None:
    """Prefetch n_bytes of memory, nothing if it is below 0.

    Within a piece of work, `tile` prefetches. At its start the first answer of the memory would take as long as 30 kB
    of a stream. Kernels therefore prefetch the first bytes of panels.
    """
    s.each(n_bytes.sar(6), lambda i: s.prefetch(address + i * 64))
