"""The sizes of attention's tiles and pieces, and the memory that a piece of work needs. plan.py cuts the work."""

from typing import NamedTuple

from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.panels.panels import BLOCK, ROWS
from gguf_run.kernels_cpu.vector import isa
from gguf_run.models.pages import PAGE

SPAN = PAGE  # positions of a tile of scores
# Query rows of a tile, by Isa.lanes. A run with no more than FEW rows has tiles of FEW rows.
FEW, TILE = 4, {16: 8, 8: 6, 4: 4}[isa.current().lanes]
# Fields of p of a row and a block, when p is integers: pairs of 16 bits [SPAN / 2], f32 factor, i32 start of the sums,
# f32 minimum.
P_FACTOR, P_START, P_MINIMUM, P_BYTES = 128, 132, 136, 160
LATENT_BYTES = 4 * SPAN * BLOCK  # of 32 columns of the values of a span as f32
MAX_ROWS = 64 // TILE * TILE  # query rows of a piece of work, unless one token has more
PIECES = 4  # pieces of work for each thread that `plan` aims at


class Memory(NamedTuple):
    """Addresses of the memory that a piece of work uses."""

    scores: int  # f32[TILE, SPAN]: scores of a tile, later their exponentials
    zeros: int  # f32[ROWS]
    query: int  # f32[n_wide]: a query before it is made int8
    lane_sums: int  # f32[max_rows, ROWS]: sums of exponentials, lane by lane
    queries: int  # [max_rows]: scaled queries, f32[head_dim] or activation blocks
    p: int  # [TILE, wide / 32]: exponentials as integers, see quantize_p; or, for latents, see latent_values
    sums: int  # f32[max_rows, wide]: sums of exponentials times v
    most: int  # f32[max_rows]: maxima; for split positions, f32[max_rows] totals of exponentials follow


@njit(inline="always")
def layout(a, ith, piece, p_bytes):
    """Place a piece's memory in the thread's scratch, and its results in `parts` if the positions are split.

    p_bytes: bytes of Memory.p for 32 columns.
    """
    scores = a.scratch + ith * a.scratch_stride
    zeros = scores + TILE * SPAN * 4
    query = zeros + ROWS * 4
    lane_sums = query + a.n_wide * 4
    queries = lane_sums + a.max_rows * ROWS * 4
    p = queries + a.max_rows * a.n_wide * 4
    sums = p + a.wide // BLOCK * p_bytes
    if piece.part >= 0:
        sums = a.parts + piece.part * a.part_bytes
    return Memory(scores, zeros, query, lane_sums, queries, p, sums, sums + a.max_rows * a.wide * 4)


def max_rows(n_rep: int) -> int:
    """Return the query rows of a piece of work, filled up to whole tiles."""
    return -(-max(n_rep, MAX_ROWS) // TILE) * TILE


def max_parts(nth: int) -> int:
    """Return an upper bound for the pieces whose positions are split: `plan` makes fewer than twice what it aims at."""
    return 2 * PIECES * nth


def part_floats(wide: int, n_rep: int) -> int:
    """Return the f32 numbers of a part: sums, maxima and totals of exponentials of its rows."""
    return -(-max_rows(n_rep) * (wide + 2) // ROWS) * ROWS


def scratch_floats(n_wide: int, wide: int, n_rep: int, p_bytes: int) -> int:
    """Return the f32 numbers of scratch memory that a thread needs for `layout`.

    n_wide: head_dim filled up to blocks of 32. wide: columns of a row of V as stored.
    """
    rows = part_floats(wide, n_rep) + max_rows(n_rep) * (ROWS + n_wide)
    return SPAN * TILE + rows + ROWS + n_wide + wide // BLOCK * p_bytes // 4
