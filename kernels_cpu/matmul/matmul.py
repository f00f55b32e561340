"""out = x @ w.T, by tiles of 1 or 4 tokens. A piece of work is some panels, for some tiles of tokens."""

import functools

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import carray, njit
from gguf_run.kernels_cpu.panels.panels import PANELS, ROWS, TOKENS, IntPanel
from gguf_run.kernels_cpu.replay.op import TapeOp, n_shrinking, op, shrinking
from gguf_run.kernels_cpu.vector import isa

if COMPILING:
    from gguf_run.kernels_cpu.matmul.int_tile import AHEAD
    from gguf_run.kernels_cpu.matmul.tile import prefetch, tile
    from gguf_run.kernels_cpu.vector.native import f32_at, i64_at

_PIECE_BYTES = 16384  # one token: bytes of weights that a thread takes at a time, or more
_GROUPS, _TILES = 8, 16  # a batch: panels and tiles of a piece. The panels stay in the second-level cache


@njit(inline="always")
def _add_bias(bias, out, out_stride, n_tokens, g, lanes):
    """Add the bias of panel g to `lanes` columns of n_tokens rows at out."""
    for t in range(n_tokens):
        row = f32_at(out + t * out_stride, lanes)
        for r in range(lanes):
            row[r] += f32_at(bias, (g + 1) * ROWS)[g * ROWS + r]


@njit(inline="always")
def cut(piece, n_tokens, n_tile, n_unit, unit_bytes, most, multiple, nth):
    """Return (number of pieces, first unit, end, first tile, end) for a piece of a matmul.

    A unit is some panels, of unit_bytes. A piece of a batch has at most `most` units, rounded up to a multiple of
    `multiple`.
    """
    if n_tokens == 1:
        n_piece = n_shrinking(n_unit, max(1, _PIECE_BYTES // unit_bytes), nth)
        first, end = shrinking(piece, n_unit, n_piece)
        return n_piece, first, end, 0, 1
    units = min(most, max(1, n_unit // (2 * nth)))
    units = (units + multiple - 1) // multiple * multiple
    across = (n_unit + units - 1) // units
    first, t0 = piece % across * units, piece // across * _TILES
    n_piece = across * ((n_tile + _TILES - 1) // _TILES)
    return n_piece, first, min(first + units, n_unit), t0, min(t0 + _TILES, n_tile)


def tile_panels(panel: int) -> int:
    """Return the panels of a tile of several tokens: one for scales with a shared factor, which need more registers."""
    shape = PANELS[panel]
    return 1 if isinstance(shape, IntPanel) and shape.scales.shared else isa.current().panels


@functools.cache
def matmul(panel: int) -> TapeOp:
    """Return the op for one kind of panel: its place in PANELS.

    rows: address of the number of tokens.
    n_out: rows of the matrix.
    n_steps: see tile.
    group_bytes: bytes of a panel.
    w: address of the panels.
    x, out: rows.
    residual: rows that are added, or 16 zeros with residual_stride = residual_group = 0.
    residual_group: bytes from the columns of one panel to those of the next.
    bias: f32[n_out], or 0.
    scratch: TOKENS * 16 floats for each thread.
    """
    panels = tile_panels(panel)

    @op(
        "rows n_out n_steps group_bytes w x x_stride out out_stride "
        "residual residual_stride residual_group bias scratch scratch_stride"
    )
    def matmul_panel(args, piece, ith, nth):
        a = carray(args, 1)[0]
        n_tokens = i64_at(a.rows, 1)[0]
        n_group = (a.n_out + ROWS - 1) // ROWS
        n_tile = (n_tokens + TOKENS - 1) // TOKENS
        tail = a.n_out % ROWS
        spare = a.scratch + ith * a.scratch_stride
        n_piece, g0, g1, t0, t1 = cut(piece, n_tokens, n_tile, n_group, a.group_bytes, _GROUPS, panels, nth)
        if piece < 0:
            return n_piece
        if n_tokens == 1:
            prefetch(a.w + g0 * a.group_bytes, AHEAD)
        count = 1 if n_tokens == 1 else TOKENS
        for t in range(t0, t1):
            first = t * TOKENS
            x = a.x + first * a.x_stride
            g = g0
            while g < g1:
                w = a.w + g * a.group_bytes
                out = a.out + first * a.out_stride + g * ROWS * 4
                init = a.residual + first * a.residual_stride + g * a.residual_group
                init_row, to, to_row, lanes = a.residual_stride, out, a.out_stride, ROWS
                n_here = 1
                if tail and g == n_group - 1:
                    # fewer than 16 rows are left: the tile reads and writes spare memory
                    lanes, to, to_row = tail, spare, ROWS * 4
                    for i in range(count):
                        row, source = f32_at(spare + i * ROWS * 4, ROWS), f32_at(init + i * init_row, ROWS)
                        for r in range(tail):
                            row[r] = source[r]
                    init, init_row = spare, ROWS * 4
                elif n_tokens > 1 and g + panels <= g1 - (tail > 0 and g1 == n_group):
                    n_here = panels
                if n_tokens == 1:
                    tile(panel, 1, 1, w, 0, a.n_steps, x, a.x_stride, to, to_row, init, init_row, AHEAD)
                else:
                    next_w = a.group_bytes if n_here > 1 else 0
                    ahead = n_here * a.group_bytes if t == t0 else 0  # later tiles find the panels in the cache
                    tile(panel, panels, TOKENS, w, next_w, a.n_steps, x, a.x_stride, to, to_row, init, init_row, ahead)
                if lanes != ROWS:
                    for i in range(count):
                        row, source = f32_at(out + i * a.out_stride, lanes), f32_at(spare + i * ROWS * 4, lanes)
                        for r in range(lanes):
                            row[r] = source[r]
                if a.bias:
                    for p in range(n_here):
                        _add_bias(a.bias, out + p * ROWS * 4, a.out_stride, count, g + p, lanes)
                g += n_here
        return 0

    return matmul_panel
