"""How the work of attention is cut into pieces, and the memory that a piece needs.

The result of a query row depends on no other row: a prompt gets the same bits in chunks of any size. Split positions
and tiles of FEW rows add in another order, so only a run of few tokens has them.
"""

from typing import NamedTuple

from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.panels.panels import BLOCK, ROWS
from gguf_run.kernels_cpu.vector import isa

SPAN = 64  # positions of a tile of scores
# Query rows of a tile, by Isa.lanes. A run with no more than FEW rows has tiles of FEW rows.
FEW, TILE = 4, {16: 8, 8: 6, 4: 4}[isa.current().lanes]
# Fields of p of a row and a block, when p is integers: pairs of 16 bits [SPAN / 2], f32 factor, i32 start of the sums,
# f32 minimum.
P_FACTOR, P_START, P_MINIMUM, P_BYTES = 128, 132, 136, 160
MAX_ROWS = 64 // TILE * TILE  # query rows of a piece of work, unless one token has more
_PIECES = 4  # pieces of work for each thread that `plan` aims at
_MIN_SPLIT = 128  # a split of fewer positions costs more in `merge` than it gains


class Piece(NamedTuple):
    """A piece of work: the heads of one KV head, for some tokens of one sequence, over a range of its positions."""

    seq: int
    head: int  # the KV head
    first: int  # row of q and out that belongs to the first token
    n_past: int  # position of the first token
    n_rep: int  # heads of a token that share the KV head
    n_rows: int  # query rows: tokens times n_rep
    start: int  # first position to read
    stop: int  # end of the positions to read
    part: int  # place in `parts` for the result, -1 if the positions are not split
    few: bool  # whether all tokens of the sequence in this step fit into a tile of FEW rows


class Memory(NamedTuple):
    """Addresses of the memory that a piece of work uses."""

    scores: int  # f32[TILE, SPAN]: scores of a tile, later their exponentials
    zeros: int  # f32[ROWS]
    query: int  # f32[n_wide]: a query before it is made int8
    lane_sums: int  # f32[max_rows, ROWS]: sums of exponentials, lane by lane
    queries: int  # [max_rows]: scaled queries, f32[head_dim] or activation blocks
    p: int  # [TILE, wide / 32]: exponentials as integers, see quantize_p
    sums: int  # f32[max_rows, wide]: sums of exponentials times v
    most: int  # f32[max_rows]: maxima; for split positions, f32[max_rows] totals of exponentials follow


@njit(inline="always")
def _seen(run, window):
    """Positions that the tokens of a run see, all together."""
    seen = run.n_past + run.n_tokens
    return min(seen, window + run.n_tokens) if window else seen


@njit(inline="always")
def plan(runs, n_rep, n_head_kv, window, nth):
    """Cut the work of all runs into about _PIECES equal pieces a thread, or more; return how many there are.

    Sequences that see more positions get more pieces. Each has some tokens. The positions of a run of few tokens are
    split too. The cut is noted in runs (n_per_piece, first_piece, first_part, n_split).
    """
    least, most = max(1, TILE // n_rep), max(1, MAX_ROWS // n_rep)  # tokens of a piece
    work = 0
    for r in range(len(runs)):
        work += runs[r].n_tokens * n_head_kv * _seen(runs[r], window)
    n_pieces = n_parts = 0
    for r in range(len(runs)):
        run = runs[r]
        seen, per, n_split = _seen(run, window), most, 1
        if nth > 1:
            wanted = (run.n_tokens * seen * _PIECES * nth + work - 1) // work  # pieces for each KV head
            per = min(most, max(least, (run.n_tokens + wanted - 1) // wanted))
            if run.n_tokens <= least:
                n_split = max(1, min(wanted, seen // _MIN_SPLIT))
        run.n_per_piece, run.first_piece, run.first_part, run.n_split = per, n_pieces, n_parts, n_split
        n_new = (run.n_tokens + per - 1) // per * n_head_kv * n_split
        n_pieces += n_new
        if n_split > 1:
            n_parts += n_new
    return n_pieces


@njit(inline="always")
def piece_of(a, runs, number):
    """Find the run and the range of positions of a piece of work."""
    r = len(runs) - 1
    while runs[r].first_piece > number:
        r -= 1
    run = runs[r]
    n_rep, n_split, part = a.n_head // a.n_head_kv, run.n_split, number - run.first_piece
    split, head = part % n_split, part // n_split % a.n_head_kv
    t0 = part // (n_split * a.n_head_kv) * run.n_per_piece
    n_tokens = min(run.n_tokens - t0, run.n_per_piece)
    n_past = run.n_past + t0
    low, high = 0, n_past + n_tokens
    if a.window:
        low = max(0, n_past + 1 - a.window)
    length = ((high - low + n_split - 1) // n_split + SPAN - 1) // SPAN * SPAN
    start = low // SPAN * SPAN + split * length
    # A range is whole spans. Since the first one begins a little before `low`, the last one is a little longer.
    stop = high if split == n_split - 1 else min(high, start + length)
    place = run.first_part + part if n_split > 1 else -1
    few = run.n_tokens * n_rep <= FEW
    return Piece(run.seq, head, run.first + t0, n_past, n_rep, n_tokens * n_rep, start, stop, place, few)


@njit(inline="always")
def layout(a, ith, piece):
    """Place a piece's memory in the thread's scratch, and its results in `parts` if the positions are split."""
    scores = a.scratch + ith * a.scratch_stride
    zeros = scores + TILE * SPAN * 4
    query = zeros + ROWS * 4
    lane_sums = query + a.n_wide * 4
    queries = lane_sums + a.max_rows * ROWS * 4
    p = queries + a.max_rows * a.n_wide * 4
    sums = p + TILE * (a.wide // BLOCK) * P_BYTES
    if piece.part >= 0:
        sums = a.parts + piece.part * a.part_bytes
    return Memory(scores, zeros, query, lane_sums, queries, p, sums, sums + a.max_rows * a.wide * 4)


def max_rows(n_rep: int) -> int:
    """Return the query rows of a piece of work, filled up to whole tiles."""
    return -(-max(n_rep, MAX_ROWS) // TILE) * TILE


def max_parts(nth: int) -> int:
    """Return an upper bound for the pieces whose positions are split: `plan` makes fewer than twice what it aims at."""
    return 2 * _PIECES * nth


def part_floats(wide: int, n_rep: int) -> int:
    """Return the f32 numbers of a part: sums, maxima and totals of exponentials of its rows."""
    return -(-max_rows(n_rep) * (wide + 2) // ROWS) * ROWS


def scratch_floats(n_wide: int, wide: int, n_rep: int) -> int:
    """Return the f32 numbers of scratch memory that a thread needs for `layout`.

    n_wide: head_dim filled up to blocks of 32. wide: columns of a row of V as stored.
    """
    rows = part_floats(wide, n_rep) + max_rows(n_rep) * (ROWS + n_wide)
    return SPAN * TILE + rows + ROWS + n_wide + TILE * wide // BLOCK * P_BYTES // 4
