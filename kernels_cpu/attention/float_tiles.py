"""The matrix products of attention over floats: query rows times 16 positions (q.k) or 16 columns (p.v).

A tile is TILE query rows, or FEW if there are no more. K and V are read from the cache as they are stored. The kernels
do nothing if the type of K or V is not a float.
"""

import functools
from collections.abc import Callable

from gguf_run.kernels_cpu.attention.cache_types import FORMATS
from gguf_run.kernels_cpu.attention.sizes import FEW, SPAN, TILE
from gguf_run.kernels_cpu.matmul.tile import load_floats, sums_of_products
from gguf_run.kernels_cpu.panels.panels import ROWS, FloatPanel
from gguf_run.kernels_cpu.vector import isa
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.simd import F32, Simd, Val

# Vectors and sums of a tile, by Isa.lanes: as many sums as the registers hold. A tile with fewer than _SUMS sums splits
# each into several, so that no addition waits for another.
VECTORS, FEW_VECTORS, _SUMS = {16: (2, 2, 16), 8: (1, 1, 6), 4: (1, 1, 4)}[isa.current().lanes]
_LINE = 64


def _by_rows(s: Simd, form: int, emit: Callable[..., None], few: Val, *arguments: Val) -> None:
    """Call emit(s, *arguments, panel, n_rows, n_vectors) for FEW rows if few is not 0, else for TILE rows."""
    panel = FORMATS[form].panel
    if isinstance(panel, FloatPanel):
        functions = []
        for n_rows, n_vectors in ((FEW, FEW_VECTORS), (TILE, VECTORS)):
            emit_size = functools.partial(emit, panel=panel, n_rows=n_rows, n_vectors=n_vectors)
            functions.append(s.function(f"{emit.__name__}_{form}_{n_rows}", emit_size, arguments))
        s.b.call(s.b.select(few.compare("!=", 0).ir, *functions), [argument.ir for argument in arguments])


def _scores(
    s: Simd, q: Val, k: Val, k_vector: Val, n: Val, ahead: Val, out: Val, panel: FloatPanel, n_rows: int, n_vectors: int
) -> None:
    qs = [q + n * (4 * r) for r in range(n_rows)]
    ks = [k + k_vector * j for j in range(n_vectors)]

    def products(i: Val) -> list[tuple[Val, Val]]:
        s.prefetch(ahead + i * _LINE)
        columns = [load_floats(s, panel, at + i * (ROWS * panel.element_bytes)) for at in ks]
        return [(value, column) for value in [s.load(at + i * 4, F32, splat=ROWS) for at in qs] for column in columns]

    zeros = [s.const(F32, 0.0, ROWS)] * (n_rows * n_vectors)
    for i, value in enumerate(sums_of_products(s, zeros, n, products, _SUMS)):
        s.store(value, out + (i // n_vectors * SPAN + i % n_vectors * ROWS) * 4)


def _values(
    s: Simd, p: Val, v: Val, v_step: Val, n_seen: Val, ahead: Val, out: Val, out_row: Val, *, panel: FloatPanel,
    n_rows: int, n_vectors: int,
) -> None:  # fmt: skip
    places = [out + out_row * r + 64 * j for r in range(n_rows) for j in range(n_vectors)]

    def products(i: Val) -> list[tuple[Val, Val]]:
        s.prefetch(ahead + i * _LINE)
        columns = [load_floats(s, panel, v + i * v_step + ROWS * panel.element_bytes * j) for j in range(n_vectors)]
        ps = [s.load(p + i * 4 + 4 * SPAN * r, F32, splat=ROWS) for r in range(n_rows)]
        return [(value, column) for value in ps for column in columns]

    totals = sums_of_products(s, [s.load(at, F32, ROWS) for at in places], n_seen, products, _SUMS)
    for value, at in zip(totals, places, strict=True):
        s.store(value, at)


@simd_kernel
def score_tile(s: Simd, form: int, few: Val, q: Val, k: Val, k_vector: Val, n: Val, ahead: Val, scores: Val) -> None:
    """scores[r, j] = q[r] . k[j] for the rows r and the 16 * vectors positions j of a tile, without scales of rows.

    form: place of K's type in FORMATS. few: whether the tile has FEW rows.
    q: f32[rows, n].
    k, k_vector: [vectors][n][16], and the bytes from vector to vector.
    ahead: address of n cache lines to prefetch.
    scores: f32[rows][SPAN].
    """
    _by_rows(s, form, _scores, few, q, k, k_vector, n, ahead, scores)


@simd_kernel
def value_tile(
    s: Simd, form: int, few: Val, p: Val, v: Val, v_step: Val, n_seen: Val, ahead: Val, sums: Val, sums_row: Val
) -> None:
    """sums[r, j] += sum over n_seen positions i of p[r, i] * v[i, j] for rows r and 16 * vectors columns j of a tile.

    form: place of V's type in FORMATS. few: whether the tile has FEW rows.
    p: f32[rows][SPAN].
    v, v_step: elements, and the bytes from position to position.
    ahead: address of n_seen cache lines to prefetch.
    sums, sums_row: f32, and the bytes from row to row.
    """
    _by_rows(s, form, _values, few, p, v, v_step, n_seen, ahead, sums, sums_row)
