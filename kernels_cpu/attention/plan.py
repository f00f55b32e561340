"""How the work of attention is cut into pieces, and the memory that a piece needs."""

from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.attention.float_tiles import TILE
from gguf_run.kernels_cpu.attention.int_tiles import P_BYTES
from gguf_run.kernels_cpu.attention.softmax import SPAN
from gguf_run.kernels_cpu.panels.panels import BLOCK, ROWS

MAX_ROWS = 64 // TILE * TILE  # query rows of a piece of work, if one token has no more
_PIECES = 4  # pieces of work per thread that splitting the positions aims at
_MIN_SPLIT = 128  # positions below which a split is not worth its merge


@njit(inline="always")
def tokens_at_once(n_rep):  # type: ignore[no-untyped-def]
    """Tokens of a piece of work."""
    return max(1, MAX_ROWS // n_rep)


@njit(inline="always")
def _seen(run, window):  # type: ignore[no-untyped-def]
    """Positions that a run's tokens see, all together."""
    seen = run.n_past + run.n_tokens
    return min(seen, window + run.n_tokens) if window else seen


@njit(inline="always")
def plan(runs, n_rep, n_head_kv, window, nth):  # type: ignore[no-untyped-def]
    """Cut the work of all runs into about _PIECES pieces a thread of alike size; returns how many there are."""
    per = tokens_at_once(n_rep)
    work = 0
    for r in range(len(runs)):
        work += (runs[r].n_tokens + per - 1) // per * n_head_kv * _seen(runs[r], window)
    n_pieces = n_parts = 0
    for r in range(len(runs)):
        run = runs[r]
        seen = _seen(run, window)
        n_split = 1 if nth == 1 else max(1, min((seen * _PIECES * nth + work - 1) // work, seen // _MIN_SPLIT))
        run.first_piece, run.first_part, run.n_split = n_pieces, n_parts, n_split
        n_new = (run.n_tokens + per - 1) // per * n_head_kv * n_split
        n_pieces += n_new
        if n_split > 1:
            n_parts += n_new
    return n_pieces


def max_rows(n_rep: int) -> int:
    """Query rows of a piece of work, filled up to whole tiles."""
    return -(-max(n_rep, MAX_ROWS) // TILE) * TILE


def max_parts(nth: int) -> int:
    """Pieces of work of runs whose positions are split, at most: fewer than twice what was aimed at."""
    return 2 * _PIECES * nth


def part_floats(wide: int, n_rep: int) -> int:
    """f32 numbers of the result of a piece of work: sums, maxima and sums of exponentials of its rows."""
    return -(-max_rows(n_rep) * (wide + 2) // ROWS) * ROWS


def scratch_floats(n_wide: int, wide: int, n_rep: int) -> int:
    """f32 numbers of scratch memory that a thread needs: see attention.py. n_wide: head_dim filled up to blocks; wide:
    V's columns."""
    rows = part_floats(wide, n_rep) + max_rows(n_rep) * (ROWS + n_wide)
    return SPAN * TILE + rows + ROWS + n_wide + TILE * wide // BLOCK * P_BYTES // 4
