"""How the work of attention is cut into pieces. Compiled code alone uses it.

The result of a query row depends on no other row: a prompt gets the same bits in chunks of any size. Split positions
and tiles of FEW rows add in another order, so only a run of few tokens has them.
"""

from typing import NamedTuple

from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.attention.sizes import FEW, MAX_ROWS, PIECES, SPAN, TILE
from gguf_run.models.kv_cache import GROUP

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
    ahead: int  # later positions that a row sees
    few: bool  # whether a tile has FEW rows: all tokens of the sequence in this step fit into it, and `splits` is set


@njit(inline="always")
def _seen(run, window):
    """Positions that the tokens of a run see, all together."""
    seen = run.n_past + run.n_tokens
    return min(seen, window + run.n_tokens) if window else seen


@njit(inline="always")
def plan(runs, n_rep, n_head_kv, window, splits, nth):
    """Cut the work of all runs into about PIECES equal pieces a thread, or more; return how many there are.

    Sequences that see more positions get more pieces. Each has some tokens. The positions of a run of few tokens are
    split too, if `splits` is not 0. The cut is noted in runs (n_per_piece, first_piece, first_part, n_split).
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
            wanted = (run.n_tokens * seen * PIECES * nth + work - 1) // work  # pieces for each KV head
            per = min(most, max(least, (run.n_tokens + wanted - 1) // wanted))
            if splits and run.n_tokens <= least:
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
    low, high, ahead = 0, n_past + n_tokens, 0
    if not a.is_causal:
        ahead = a.window - 1 if a.window else run.n_tokens
        high = min(high + ahead, run.n_past + run.n_tokens)
    if a.window:
        low = n_past // a.window * a.window if a.is_chunked else max(0, n_past + 1 - a.window)
    length = ((high - low + n_split - 1) // n_split + SPAN - 1) // SPAN * SPAN
    start = low // SPAN * SPAN + split * length
    # A range is whole spans. Since the first one begins a little before `low`, the last one is a little longer.
    stop = high if split == n_split - 1 else min(high, start + length)
    place = run.first_part + part if n_split > 1 else -1
    few = a.splits != 0 and run.n_tokens * n_rep <= FEW
    return Piece(run.seq, head, run.first + t0, n_past, n_rep, n_tokens * n_rep, start, stop, place, ahead, few)


@njit(inline="always")
def row_of(piece, r):
    """(token, head) of a query row: the row of q and out, and which of the n_head heads."""
    return piece.first + r // piece.n_rep, piece.head * piece.n_rep + r % piece.n_rep


@njit(inline="always")
def first_of_group(t, n_tokens, positions, run_of):
    """The first token from t on that begins a group or a run. Rows of a group share bytes: one thread stores all."""
    while 0 < t < n_tokens and positions[t] % GROUP and run_of[t] == run_of[t - 1]:
        t += 1
    return t
