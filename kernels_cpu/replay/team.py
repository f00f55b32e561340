"""A team of threads that runs tapes: the ops of a step, one after the other, all threads on each op.

A tape is int64[n_ops, 2]: the addresses of an op's function and of its arguments. The work of an op is cut into pieces.
One shared word, the ticket, holds the serial number of the running op and the number of pieces that nobody has taken.
Pieces are taken from the last to the first. The thread that ends the last unfinished piece of an op moves the ticket to
the next op.

There is no barrier at which all threads must arrive. If the system suspends a thread, the others wait for it only if it
holds a piece, and it joins again wherever they are. A thread that finds no piece spins for some microseconds, then
offers its core to other processes.

Between two steps the helpers spin too, because the next step of a decode follows at once. Then they sleep until they
are called.
"""

import queue
import threading
import weakref

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import njit

if COMPILING:
    from gguf_run.kernels_cpu.replay.ticket import PIECE_BITS, TICKET, open_op, take_pieces
    from gguf_run.kernels_cpu.vector.native import atomic_add, atomic_load, atomic_store, pause

MAX_THREADS = 64  # with more, threads mostly wait for each other
# Byte offsets of the team's shared words. Each word that threads fight for has a cache line of its own.
# Those of ticket.py are at 64 and 128.
_STEP = 0  # number of the step, times 2; odd while its description is being written
_TAPE, _N_OPS, _BASE, _STOP = range(192, 192 + 32, 8)  # _BASE: serial number of the step's first op
_ASLEEP = 256  # one word for each helper follows
_IDLE_SPINS = 20000  # pauses of a helper between two steps before it sleeps


@njit
def _help(shared, step, ith, nth):
    """Take part in steps after number `step`. When none comes for a while, return the number of the last one.

    -1 if the team has stopped.
    """
    atomic_store(shared + _ASLEEP + 8 * ith, 0)
    spins = 0
    while spins < _IDLE_SPINS:
        now = atomic_load(shared + _STEP)
        if now != step and now & 1 == 0:
            if atomic_load(shared + _STOP):
                return -1
            tape, base = atomic_load(shared + _TAPE), atomic_load(shared + _BASE)
            n_ops = atomic_load(shared + _N_OPS)
            if atomic_load(shared + _STEP) == now:  # else the step has ended, and the words may be of two steps
                step = now
                take_pieces(shared, tape, base, n_ops, ith, nth)
            spins = 0
        spins += 1
        pause()
    atomic_store(shared + _ASLEEP + 8 * ith, 1)
    # A step announced before that store is seen here. One announced after it sees the store, and calls this helper.
    if atomic_load(shared + _STEP) != step:
        atomic_store(shared + _ASLEEP + 8 * ith, 0)
    return step


@njit
def _announce(shared, tape, n_ops, nth):
    """Announce a step to the helpers."""
    base = atomic_load(shared + TICKET) >> PIECE_BITS
    atomic_add(shared + _STEP, 1)
    atomic_store(shared + _TAPE, tape)
    atomic_store(shared + _BASE, base)
    atomic_store(shared + _N_OPS, n_ops)
    open_op(shared, tape, base, base, n_ops, nth)
    atomic_add(shared + _STEP, 1)


@njit
def _lead(shared, nth):
    """Take part in the step that was announced last, until it is done."""
    take_pieces(shared, atomic_load(shared + _TAPE), atomic_load(shared + _BASE), atomic_load(shared + _N_OPS), 0, nth)


@njit
def _stop(shared):
    atomic_store(shared + _STOP, 1)
    atomic_add(shared + _STEP, 2)


def _helper(words: NDArray[np.int64], calls: "queue.SimpleQueue[None]", ith: int, nth: int) -> None:
    step = 0
    while (step := _help(words.ctypes.data, step, ith, nth)) >= 0:
        if words[_ASLEEP // 8 + ith]:
            calls.get()  # a call too many does no harm: the next round of _help finds no new step


def _end(words: NDArray[np.int64], calls: "list[queue.SimpleQueue[None]]") -> None:
    _stop(words.ctypes.data)
    for call in calls:
        call.put(None)


class Team:
    """n_threads threads: the caller's and helpers. The helpers end with close() or when the team is collected."""

    def __init__(self, n_threads: int) -> None:
        if not 1 <= n_threads <= MAX_THREADS:
            raise ValueError(f"n_threads is {n_threads}; allowed are 1 to {MAX_THREADS}")
        self.n_threads = n_threads
        memory = np.zeros(_ASLEEP // 8 + n_threads + 8, np.int64)
        self._words = memory[-memory.ctypes.data % 64 // 8 :]
        self._announce, self._lead = _announce.bare(*["i8"] * 4), _lead.bare("i8", "i8")
        self._outcome = np.zeros(2, np.int64)  # of _announce and _lead; nobody reads it
        self._calls = [queue.SimpleQueue[None]() for _ in range(1, n_threads)]
        for ith, calls in enumerate(self._calls, 1):
            threading.Thread(target=_helper, args=(self._words, calls, ith, n_threads), daemon=True).start()
        self.close = weakref.finalize(self, _end, self._words, self._calls)

    def run(self, tape: NDArray[np.int64]) -> None:
        """Run a tape, int64[n_ops, 2]. Returns when all ops are done."""
        shared, n_ops, address = self._words.ctypes.data, len(tape), tape.ctypes.data
        outcome = self._outcome.ctypes.data
        try:
            self._announce(shared, address, n_ops, self.n_threads, outcome)
            for ith, calls in enumerate(self._calls, 1):
                if self._words[_ASLEEP // 8 + ith] and calls.empty():
                    calls.put(None)
        finally:  # Ctrl-C may interrupt: a step that helpers have begun is always finished
            self._lead(shared, self.n_threads, outcome)
