"""The matrix products of attention: query rows times vectors of 16 positions (q.k) or of 16 columns (p.v).

A tile is TILE query rows, or FEW if there are no more; K and V are read from the cache as they are stored.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from gguf_run.formats.jit import cgutils, intrinsic, types
from gguf_run.kernels_cpu import isa
from gguf_run.kernels_cpu.attention_softmax import SPAN
from gguf_run.kernels_cpu.panels import PANELS, ROWS, FloatPanel
from gguf_run.kernels_cpu.simd import F32, I16, I32, Simd, Val, kernel

# Rows and vectors of a tile: as many sums as the registers hold, by the lanes that the instruction set likes best. With
# fewer than _SUMS sums they are kept several times over, so that they do not wait for each other.
FEW = 4
TILE, VECTORS, FEW_VECTORS, _SUMS = {16: (8, 2, 2, 16), 8: (6, 1, 1, 6), 4: (4, 1, 1, 4)}[isa.current().lanes]
_LINE = 64


def _load(s: Simd, panel: FloatPanel, at: Val) -> Val:
    """16 elements of a float panel as f32."""
    stored = s.load(at, panel.element, ROWS)
    if panel.element == I16:  # bfloat16 is the upper half of an f32
        return (stored.to(I32, signed=False) << 16).as_type(F32)
    return stored.to(F32)


def _prefetch(s: Simd, at: Val) -> None:
    pointer = s.b.inttoptr(at.ir, ir.IntType(8).as_pointer())
    signature = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    function = cgutils.get_or_insert_function(s.b.module, signature, "llvm.prefetch.p0")
    s.b.call(function, [pointer, *(ir.Constant(I32, n) for n in (0, 3, 1))])  # to read, into all caches, data


def _sums(
    s: Simd, init: list[Val], n_steps: Val, products: Callable[[Val], list[tuple[Val, Val]]], ahead: Val
) -> list[Val]:
    """init + the sums of products over n_steps steps, in each of which a line of memory at `ahead` is fetched."""
    n = len(init)
    unroll = max(1, _SUMS // n)

    def step(i: Val, acc: list[Val]) -> list[Val]:
        _prefetch(s, ahead + i * _LINE)
        return [s.fma(a, b, total) for (a, b), total in zip(products(i), acc, strict=True)]

    def steps(i: Val, acc: list[Val]) -> list[Val]:
        return [value for u in range(unroll) for value in step(i * unroll + u, acc[u * n : u * n + n])]

    whole = n_steps >> (unroll.bit_length() - 1)
    acc = s.loop(whole, init + [s.const(F32, 0.0, ROWS)] * (n * (unroll - 1)), steps)
    totals = acc[:n]
    for u in range(1, unroll):
        totals = [a + b for a, b in zip(totals, acc[u * n : u * n + n], strict=True)]
    if unroll == 1:
        return totals
    return s.loop(n_steps - whole * unroll, totals, lambda i, acc: step(whole * unroll + i, acc))


def _by_rows(name: str, panel: FloatPanel, emit: Callable[..., None]) -> Callable[..., None]:
    """A call of emit(s, panel, n_rows, n_vectors, *arguments) for FEW or TILE rows, as the first argument says.

    Both are functions of their own that are not inlined: a loop then has all registers to itself.
    """

    def function(s: Simd, n_rows: int, n_vectors: int, arguments: tuple[Val, ...]) -> ir.Value:
        full_name = f"attention_{name}_{panel.name}_{n_rows}x{n_vectors}"
        if full_name in s.b.module.globals:
            return s.b.module.globals[full_name]
        signature = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        new = ir.Function(s.b.module, signature, full_name)
        new.linkage = "internal"
        new.attributes.add("noinline")
        inner = Simd(ir.IRBuilder(new.append_basic_block()), s.isa)
        emit(inner, panel, n_rows, n_vectors, *[Val(inner, argument) for argument in new.args])
        inner.b.ret_void()
        return new

    def emit_call(s: Simd, few: Val, *arguments: Val) -> None:
        shapes = (FEW, FEW_VECTORS), (TILE, VECTORS)
        chosen = s.b.select(few.ir, *(function(s, *shape, arguments) for shape in shapes))
        s.b.call(chosen, [argument.ir for argument in arguments])

    return emit_call


def _scores(
    s: Simd, panel: FloatPanel, n_rows: int, n_vectors: int, q: Val, k: Val, k_vector: Val, n: Val, ahead: Val, out: Val
) -> None:
    qs = [q + n * (4 * r) for r in range(n_rows)]
    ks = [k + k_vector * j for j in range(n_vectors)]

    def products(i: Val) -> list[tuple[Val, Val]]:
        columns = [_load(s, panel, at + i * (ROWS * panel.element_bytes)) for at in ks]
        return [(value, column) for value in [s.load(at + i * 4, F32, splat=ROWS) for at in qs] for column in columns]

    for i, value in enumerate(_sums(s, [s.const(F32, 0.0, ROWS)] * (n_rows * n_vectors), n, products, ahead)):
        s.store(value, out + (i // n_vectors * SPAN + i % n_vectors * ROWS) * 4)


def _values(
    s: Simd, panel: FloatPanel, n_rows: int, n_vectors: int, p: Val, v: Val, v_step: Val, n_seen: Val, ahead: Val,
    out: Val, out_row: Val,
) -> None:  # fmt: skip
    places = [out + out_row * r + 64 * j for r in range(n_rows) for j in range(n_vectors)]

    def products(i: Val) -> list[tuple[Val, Val]]:
        columns = [_load(s, panel, v + i * v_step + ROWS * panel.element_bytes * j) for j in range(n_vectors)]
        ps = [s.load(p + i * 4 + 4 * SPAN * r, F32, splat=ROWS) for r in range(n_rows)]
        return [(value, column) for value in ps for column in columns]

    totals = _sums(s, [s.load(at, F32, ROWS) for at in places], n_seen, products, ahead)
    for value, at in zip(totals, places, strict=True):
        s.store(value, at)


@intrinsic(prefer_literal=True)
def score_tile(
    typing_context: Any, panel: Any, few: Any, q: Any, k: Any, k_vector: Any, n: Any, ahead: Any, scores: Any
) -> Any:
    """scores[r, j] = q[r] . k[j], f32[rows][SPAN], for the tile's rows r and 16 * vectors j.

    panel: literal, of K's elements. q: f32[rows, n]; k: [vectors][n][16], k_vector bytes from vector to vector. ahead:
    n cache lines that will be needed soon.
    """
    emit = _by_rows("scores", PANELS[panel.literal_value], _scores)
    return kernel(types.void(panel, types.boolean, *[types.intp] * 6), emit)


@intrinsic(prefer_literal=True)
def value_tile(
    typing_context: Any, panel: Any, few: Any, p: Any, v: Any, v_step: Any, n_seen: Any, ahead: Any, sums: Any,
    sums_row: Any,
) -> Any:  # fmt: skip
    """sums[r, j] += sum over n_seen positions i of p[r, i] * v[i, j] for the tile's rows r and 16 * vectors j.

    p: f32[rows][SPAN]; v_step, sums_row: bytes from position to position of v, from row to row of sums (f32). The rest
    is as in score_tile; ahead: n_seen cache lines.
    """
    emit = _by_rows("values", PANELS[panel.literal_value], _values)
    return kernel(types.void(panel, types.boolean, *[types.intp] * 7), emit)
