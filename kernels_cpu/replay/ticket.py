"""The ticket of a team: which op runs, and how many of its pieces nobody has taken. See team.py, which calls this."""

from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.vector.native import (
    atomic_add,
    atomic_load,
    atomic_store,
    atomic_swap_if,
    call_op,
    i64_at,
    pause,
    yield_cpu,
)

# Byte offsets in the team's shared words.
TICKET = 64  # serial number of the op << PIECE_BITS | number of pieces that nobody has taken
_UNFINISHED = 128  # number of pieces of the op that are not done
PIECE_BITS = 24
_SPINS = 2000  # pauses before a waiting thread offers its core to others


@njit
def open_op(shared, tape, serial, base, n_ops, nth):
    """Move the ticket to the op with this serial number, or to the first later one that has work."""
    ops = i64_at(tape, 2 * n_ops)
    n_pieces = 0
    while serial < base + n_ops:
        i = serial - base
        n_pieces = call_op(ops[2 * i], ops[2 * i + 1], -1, 0, nth)
        if n_pieces > 0:
            break
        serial += 1
        n_pieces = 0
    atomic_store(shared + _UNFINISHED, n_pieces)
    atomic_store(shared + TICKET, serial << PIECE_BITS | n_pieces)


@njit
def take_pieces(shared, tape, base, n_ops, ith, nth):
    """Take pieces until the last op of the step is done. A thread that holds no piece touches nothing of the step."""
    spins = 0
    while True:
        ticket = atomic_load(shared + TICKET)
        serial, left = ticket >> PIECE_BITS, ticket & ((1 << PIECE_BITS) - 1)
        if serial >= base + n_ops:
            return
        if left == 0:
            spins += 1
            if spins < _SPINS:
                pause()
            else:
                yield_cpu()
        elif atomic_swap_if(shared + TICKET, ticket, ticket - 1):
            ops = i64_at(tape, 2 * n_ops)
            call_op(ops[2 * (serial - base)], ops[2 * (serial - base) + 1], left - 1, ith, nth)
            if atomic_add(shared + _UNFINISHED, -1) == 1:
                open_op(shared, tape, serial + 1, base, n_ops, nth)
            spins = 0
