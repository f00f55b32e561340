"""The innermost kernel: 16 rows of a panel times 1 or 4 tokens, for each panel and instruction set.

Each of the 16 f32 lanes is one row: nothing is summed across lanes. A vector of weights is loaded and unpacked once,
and multiplied with all tokens of the tile. An activation is repeated in all lanes. Integer panels are in int_tile.py.
"""

from collections.abc import Callable

from gguf_run.kernels_cpu.matmul.int_tile import AHEAD, int_tile
from gguf_run.kernels_cpu.panels.panels import PANELS, ROWS, FloatPanel, IntPanel, Panel
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.simd import F32, I16, I32, I64, Simd, Val

_FLOAT_SUMS = 16  # sums of a float tile that run side by side


@simd_kernel
def tile(
    s: Simd,
    panel: int,
    n_panels: int,
    n_tokens: int,
    w: Val,
    w_panel: Val,
    w_step: Val,
    n_steps: Val,
    x: Val,
    x_stride: Val,
    out: Val,
    out_stride: Val,
    init: Val,
    init_stride: Val,
    ahead: Val,
) -> None:
    """out[t, r] = init[t, r] + sum over columns of w[r, column] * x[t, column], t < n_tokens, r < 16 * n_panels.

    panel: place in PANELS.
    n_panels, n_tokens: the size of the tile.
    w: address of the first panel.
    w_panel: bytes from one panel to the next. 0: there is one panel, which is computed n_panels times.
    w_step: bytes from one step to the next, for float panels.
    n_steps: steps of panel.columns columns.
    x, x_stride: rows of activation blocks for integer panels, of f32 for float panels.
    init, init_stride: rows of f32. init may be out; init_stride 0 repeats one row.
    ahead: as in int_tile.
    """
    xs = [x + x_stride * t for t in range(n_tokens)]
    ws = [w + w_panel * p for p in range(n_panels)]
    step = s.select(w_panel.compare("==", 0), s.const(I64, 0), s.const(I64, 64))
    moves = [(t, step * p) for t in range(n_tokens) for p in range(n_panels)]
    places = [(init + init_stride * t + move, out + out_stride * t + move) for t, move in moves]
    _tile(s, PANELS[panel], ws, w_step, n_steps, xs, places, ahead)


@simd_kernel
def tile_at(
    s: Simd,
    panel: int,
    n_panels: int,
    n_tokens: int,
    w: Val,
    w_panel: Val,
    w_step: Val,
    n_steps: Val,
    at: Val,
    move: Val,
) -> None:
    """As `tile`, for rows at any addresses: out[t, r] += sum over columns of w[r, column] * x[t, column].

    at: address of int64[2, n_tokens]: addresses of x[t], then addresses of out[t] less `move` bytes.
    """
    xs = [s.load(at + 8 * t, I64) for t in range(n_tokens)]
    ws = [w + w_panel * p for p in range(n_panels)]
    outs = [s.load(at + 8 * (n_tokens + t), I64) + move + 64 * p for t in range(n_tokens) for p in range(n_panels)]
    ahead = s.const(I64, AHEAD if n_tokens == 1 else 0)
    _tile(s, PANELS[panel], ws, w_step, n_steps, xs, [(out, out) for out in outs], ahead)


def _tile(
    s: Simd, panel: Panel, ws: list[Val], w_step: Val, n_steps: Val, xs: list[Val], places: list[tuple[Val, Val]],
    ahead: Val,
) -> None:  # fmt: skip
    """A tile of an integer or a float panel. The arguments are as in int_tile."""
    if isinstance(panel, IntPanel):
        int_tile(s, panel, ws, n_steps, xs, places, ahead)
        return
    start = [s.load(at, F32, ROWS) for at, _ in places]
    acc = _float_panel(s, panel, ws, w_step, n_steps, xs, start)
    for (_, to), value in zip(places, acc, strict=True):
        s.store(value, to)


def _float_panel(
    s: Simd, panel: FloatPanel, ws: list[Val], w_step: Val, n_steps: Val, xs: list[Val], start: list[Val]
) -> list[Val]:
    """Return start + the products over all steps."""

    def weights(w: Val, k: Val) -> Val:
        return widen(s.load(w + w_step * k, panel.element, ROWS))

    def products(k: Val) -> list[tuple[Val, Val]]:
        rows = [weights(w, k) for w in ws]
        values = [s.load(x + k * 4, F32, splat=ROWS) for x in xs]
        return [(row, value) for value in values for row in rows]

    return sums_of_products(s, start, n_steps, products, _FLOAT_SUMS)


def widen(stored: Val) -> Val:
    """Elements of a float panel of 16 or 32 bits as f32."""
    if stored.element == I16:  # bfloat16 is the upper half of an f32
        return (stored.to(I32, signed=False) << 16).as_type(F32)
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
def prefetch(s: Simd, address: Val) -> None:
    """Prefetch the first panels of a piece of work.

    Within a piece, `tile` prefetches. At the start of a piece the first answer of the memory would take as long as
    30 kB of a stream.
    """

    def line(i: Val) -> None:
        s.prefetch(address + i * 64)

    s.each(AHEAD // 64, line)
