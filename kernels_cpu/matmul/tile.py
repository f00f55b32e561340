"""The innermost kernel: 16 rows of a panel times 1 to 8 tokens, for each panel and instruction set.

Each of the 16 f32 lanes is one row: nothing is summed across lanes. A vector of weights is loaded and unpacked once,
and multiplied with all tokens of the tile. An activation is repeated in all lanes. Integer panels are in int_tile.py.
"""

from collections.abc import Callable

from gguf_run.kernels_cpu.matmul.int_tile import int_tile, prefetch_step
from gguf_run.kernels_cpu.panels.panels import PANELS, ROWS, TOKENS, FloatPanel, IntPanel, Panel
from gguf_run.kernels_cpu.vector import isa
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.simd import F16, F32, I16, I32, I64, Simd, Val

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
            xs = [x + x_stride * t for t in range(n)]
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


def _tile(
    s: Simd, panel: Panel, ws: list[Val], n_steps: Val, xs: list[Val], places: list[tuple[Val, Val]], ahead: Val
) -> None:
    """A tile of an integer or a float panel. The arguments are as in int_tile."""
    if isinstance(panel, IntPanel):
        int_tile(s, panel, ws, n_steps, xs, places, ahead)
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


# What load_floats leaves out: f16 has e5m2's exponent, but one more bit than e4m3's, with another bias.
FLOAT8_FACTOR = {"E4M3": 256.0, "E5M2": 1.0}


def load_floats(s: Simd, panel: FloatPanel, at: Val) -> Val:
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
