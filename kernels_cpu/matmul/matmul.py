"""out = x @ w.T, by tiles of 1 to 8 tokens. A piece of work is some panels, for some tiles of tokens."""

import functools

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import carray, njit
from gguf_run.kernels_cpu.panels.panels import PANELS, ROWS, IntPanel
from gguf_run.kernels_cpu.replay.op import TapeOp, n_shrinking, op, shrinking
from gguf_run.kernels_cpu.vector import isa

if COMPILING:
    from gguf_run.kernels_cpu.matmul.tile import prefetch, tile
    from gguf_run.kernels_cpu.vector.native import f32_at, i64_at

MOST = isa.current().tokens  # tokens of the largest tile
_GROUPS, _TOKENS = 8, 64  # a batch: panels and tokens of a piece. The panels stay in the second-level cache
FEW = 16  # tokens of a batch for which memory is the limit
TUNED = " ahead piece_bytes tile_tokens"  # fields of a kernel that are measured, see vector/isa.py
ONE_HEAD = {"n_head": 1, "w_head": 0, "x_head": 0, "out_head": 0}  # fields of a matrix for whole rows
BATCH_AHEAD = 6144  # as `ahead`, for several tokens. 3 to 12 kB are alike, on each CPU that was measured


@njit(inline="always")
def _add_bias(bias, out, out_stride, n_tokens, g, lanes):
    """Add the bias of panel g to `lanes` columns of n_tokens rows at out."""
    for t in range(n_tokens):
        row = f32_at(out + t * out_stride, lanes)
        for r in range(lanes):
            row[r] += f32_at(bias, (g + 1) * ROWS)[g * ROWS + r]


@njit(inline="always")
def tile_for(n_tokens, left):
    """The tokens of the smallest tile (tile.TILES) for `left` of n_tokens tokens; of the largest if none is enough.

    Only a single token has a tile of 1.
    """
    return 1 if n_tokens == 1 else 2 if left <= 2 else 4 if left <= 4 else MOST


@njit(inline="always")
def cut(piece, n_tokens, n_unit, unit_bytes, piece_bytes, most, nth):
    """Return (number of pieces, first unit, end, first token, end) for a piece of a matmul.

    A unit is some panels, of unit_bytes. A piece has piece_bytes or more if there is one token, else `most` units or
    less.
    """
    if n_tokens == 1:
        n_piece = n_shrinking(n_unit, max(1, piece_bytes // unit_bytes), nth)
        first, end = shrinking(piece, n_unit, n_piece)
        return n_piece, first, end, 0, 1
    units = min(most, max(1, n_unit // (2 * nth)))
    across = (n_unit + units - 1) // units
    first, t0 = piece % across * units, piece // across * _TOKENS
    n_piece = across * ((n_tokens + _TOKENS - 1) // _TOKENS)
    return n_piece, first, min(first + units, n_unit), t0, min(t0 + _TOKENS, n_tokens)


def tile_panels(panel: int) -> int:
    """Return the panels of a tile of 4 tokens: two if the registers hold the sums, and the scales if they are decoded.

    It loads fewer activations than a tile of 8 tokens and a panel does, but unpacks each weight twice as often.
    """
    shape = PANELS[panel]
    return 1 if MOST == 4 or (isinstance(shape, IntPanel) and shape.scales.shared) else 2


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
    n_head, w_head, x_head, out_head: of MatmulHeads, and the bytes from the matrix, x and out of a head to the next.
    TUNED: see vector/isa.py.
    """
    panels = tile_panels(panel)

    @op(
        "rows n_out n_steps group_bytes w x x_stride out out_stride residual residual_stride residual_group bias "
        "scratch scratch_stride n_head w_head x_head out_head" + TUNED
    )
    def matmul_panel(args, piece, ith, nth):
        a = carray(args, 1)[0]
        n_tokens = i64_at(a.rows, 1)[0]
        n_group = (a.n_out + ROWS - 1) // ROWS
        tail = a.n_out % ROWS
        spare = a.scratch + ith * a.scratch_stride
        cut_at = piece // a.n_head  # -1 stays -1
        n_piece, g0, g1, first, end = cut(cut_at, n_tokens, n_group, a.group_bytes, a.piece_bytes, _GROUPS, nth)
        if piece < 0:
            return n_piece * a.n_head
        head = piece % a.n_head
        w_head, x_head, out_head = a.w + head * a.w_head, a.x + head * a.x_head, a.out + head * a.out_head
        ahead = a.ahead if n_tokens == 1 else BATCH_AHEAD
        prefetch(w_head + g0 * a.group_bytes, ahead)
        most = a.tile_tokens if panels > 1 and n_tokens > FEW else MOST
        while first < end:
            count = min(most, tile_for(n_tokens, n_tokens - first))
            x, x_row = x_head + first * a.x_stride, a.x_stride
            g = g0
            while g < g1:
                w = w_head + g * a.group_bytes
                out = out_head + first * a.out_stride + g * ROWS * 4
                init = a.residual + first * a.residual_stride + g * a.residual_group
                init_row, to, to_row, lanes, n_here = a.residual_stride, out, a.out_stride, ROWS, 1
                if tail and g == n_group - 1:
                    # fewer than 16 rows are left: the tile reads and writes spare memory
                    lanes, to, to_row = tail, spare, ROWS * 4
                    for i in range(count):
                        row, source = f32_at(spare + i * ROWS * 4, ROWS), f32_at(init + i * init_row, ROWS)
                        for r in range(tail):
                            row[r] = source[r]
                    init, init_row = spare, ROWS * 4
                elif count == 4 and g + panels <= g1 - (tail > 0 and g1 == n_group):
                    n_here = panels
                next_w = a.group_bytes if n_here > 1 else 0
                tile(panel, panels, count, w, next_w, a.n_steps, x, x_row, to, to_row, init, init_row, ahead)
                if lanes != ROWS:
                    for i in range(count):
                        row, source = f32_at(out + i * a.out_stride, lanes), f32_at(spare + i * ROWS * 4, lanes)
                        for r in range(lanes):
                            row[r] = source[r]
                if a.bias:
                    for p in range(n_here):
                        _add_bias(a.bias, out + p * ROWS * 4, a.out_stride, count, g + p, lanes)
                g += n_here
            first += count
            ahead = -1  # the tiles that follow find the panels in the cache
        return 0

    return matmul_panel
