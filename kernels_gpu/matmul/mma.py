"""matmul for more tokens than decode.py takes: weights become f16 in registers, and tensor cores multiply them.

Weights are read once for up to 64 tokens. A warp has tiles of 16 rows of the weights. A thread holds what `mma` wants
from it (panels/halves.py): thread 4 g + q of a warp has rows g and g + 8 of a tile, token g of each eight tokens of x,
and the sums of both rows for tokens 2 q and 2 q + 1. The four threads of a row share 256 columns: thread q has the 64
from 64 q on, which are whole units. x is stored in the same order (half_at in rows/quantize.py), so a warp loads 512
bytes of it at once.

Element i of a tensor [THREADS] must be in thread i. Triton promises no such thing; tests/kernels_gpu/test_compile.py
checks it.
"""

import triton
import triton.language as tl

from gguf_run.kernels_gpu.matmul.decode import is_last
from gguf_run.kernels_gpu.panels.halves import field_halves, load_run, mma, prefetch_run, run_width
from gguf_run.kernels_gpu.panels.units import added, words4, zeros
from gguf_run.kernels_gpu.rows.activation import gate_by


@triton.jit
def _step(sums, rows, x, f: tl.constexpr, i: tl.constexpr, M: tl.constexpr, PANEL: tl.constexpr):
    """Return sums + the products of the weights 4 i to 4 i + 7 of field f of all threads.

    rows: two for each tile. x: where the columns of the first 8 tokens are. sums: four for each 8 tokens and each tile.
    """
    TILES: tl.constexpr = len(rows) // 2
    a = ()
    for k in tl.static_range(2 * TILES):
        a0, a2 = field_halves(rows[k // 2 * 2][f], i + k % 2, PANEL)
        a1, a3 = field_halves(rows[k // 2 * 2 + 1][f], i + k % 2, PANEL)
        a = a + ((a0, a1, a2, a3),)
    total = ()
    for t in tl.static_range(M // 8):
        b = words4(x + t * 1024)
        for k in tl.static_range(TILES):
            c = mma(a[2 * k], b[0:2], sums[4 * (t * TILES + k) : 4 * (t * TILES + k) + 4])
            total = total + mma(a[2 * k + 1], b[2:4], c)
    return total


@triton.jit
def _sum_blocks(
    w, rows, x, first, end, n_unit,
    PANEL: tl.constexpr, M: tl.constexpr, EIGHTS: tl.constexpr, THREADS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Return the sums over columns 256 * first to 256 * end of w times x, as _step does.

    rows: of each thread, two for each tile. x: of the first token.
    """
    lane = tl.arange(0, THREADS) % 32
    x = x.to(tl.pointer_type(tl.int32)) + lane * 4
    sums = zeros(2 * len(rows) * (M // 8), THREADS)
    N: tl.constexpr = 64 // run_width(PANEL)  # runs of a thread in a block
    for i in range(first * N, end * N):
        block, part = i // N, i % N
        if part == 0 or PANEL.bits == 16:  # a sector of the cache has both runs of other panels
            ahead = (tl.minimum(block + 1, end - 1) * 4 + lane % 4) * N + part
            for r in tl.static_range(len(rows)):
                prefetch_run(w, rows[r], ahead, n_unit, PANEL, EVEN)
        weights = ()
        for r in tl.static_range(len(rows)):
            weights = weights + (load_run(w, rows[r], (block * 4 + lane % 4) * N + part, n_unit, PANEL, EVEN),)
        x_run = x + block * (EIGHTS * 1024) + part * 512
        for piece in tl.static_range(8 // N):  # 8 columns
            sums = _step(sums, weights, x_run + piece * 128, piece // 2, piece % 2 * 2, M, PANEL)
    return sums


@triton.jit
def _store(sums, o, m, xm, out, out_stride, bias, residual, residual_stride, n_out, ACTIVATION: tl.constexpr):
    """Store what the sums of token m and rows o and o + 8, or of the gate and the `up` of o, add up to."""
    factor = tl.load(xm + m)
    values = (sums[0] * factor, sums[1] * factor)
    if ACTIVATION is not None:
        if bias is not None:
            mask = o < n_out
            values = added(values, (tl.load(bias + o, mask=mask), tl.load(bias + n_out + o, mask=mask)))
        values = (gate_by(values[0], values[1], ACTIVATION),)
    for i in tl.static_range(len(values)):
        column = o + 8 * i
        mask = column < n_out
        value = values[i]
        if bias is not None and ACTIVATION is None:
            value += tl.load(bias + column, mask=mask)
        if residual is not None:
            value += tl.load(residual + m * residual_stride + column, mask=mask)
        tl.store(out + m * out_stride + column, value, mask=mask)


@triton.jit
def matmul_mma(
    w, x, out, out_stride, bias, residual, residual_stride, n_out, n_unit, n_block, parts, counts,
    PANEL: tl.constexpr, M: tl.constexpr, EIGHTS: tl.constexpr, TILES: tl.constexpr, THREADS: tl.constexpr,
    EVEN: tl.constexpr, SPLIT: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """out[m, o] = sum of w[o] * x[m] (+ bias[o]) (+ residual[m, o]); grid (n / M, n_out / columns, parts of a row).

    x: (xh, xm), fragments (EIGHTS: see half_at). n_block: of 256 columns of w. A warp has TILES tiles of 16 rows of w:
    16 columns of out, or 8 and their gates. For the other arguments see matmul_decode.
    SPLIT: whether a row has several parts. Then their sums go to `parts`, and the last program to finish adds them in
    one order; `counts`, all 0 before and after a launch, tells which one that is.
    """
    COLUMNS: tl.constexpr = 16 if ACTIVATION is None else 8  # of out, for each tile
    xh, xm = x
    thread = tl.arange(0, THREADS)
    token = tl.program_id(0) * M
    o = (tl.program_id(1) * (THREADS // 32) + thread // 32) * (TILES * COLUMNS) + thread % 32 // 4
    rows = ()
    for i in tl.static_range(TILES):
        lower = tl.minimum(o + i * COLUMNS, n_out - 1).to(tl.int64)
        if ACTIVATION is None:
            rows = rows + (lower, tl.minimum(o + i * COLUMNS + 8, n_out - 1).to(tl.int64))
        else:
            rows = rows + (lower, lower + n_out)
    n_part, part = tl.num_programs(2), tl.program_id(2)
    first = part * n_block // n_part
    end = (part + 1) * n_block // n_part
    sums = _sum_blocks(w, rows, xh + token * 256, first, end, n_unit, PANEL, M, EIGHTS, THREADS, EVEN)
    if SPLIT:
        N: tl.constexpr = TILES * M // 2
        place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        parts += place * (n_part * N * THREADS) + thread
        for i in tl.static_range(N):
            tl.store(parts + (part * N + i) * THREADS, sums[i])
        if not is_last(counts + place, n_part):
            return
        sums = zeros(N, THREADS)
        for k in range(n_part):
            values = ()
            for i in tl.static_range(N):
                values = values + (tl.load(parts + (k * N + i) * THREADS, cache_modifier=".cg"),)
            sums = added(sums, values)
    for i in tl.static_range(TILES):
        for t in tl.static_range(M // 8):
            for c in tl.static_range(2):
                pair = (sums[(t * TILES + i) * 4 + c], sums[(t * TILES + i) * 4 + 2 + c])
                m = token + 8 * t + thread % 4 * 2 + c
                _store(
                    pair, o + i * COLUMNS, m, xm, out, out_stride, bias, residual, residual_stride, n_out, ACTIVATION
                )
