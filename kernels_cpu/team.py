"""A team of threads that runs tapes: the list of ops of a step, one after the other, all threads on each.

A tape is int64[n_ops, 2]: the address of an op's function and of its arguments. Between two ops the threads meet at a
barrier: they spin for some microseconds, then let other processes run. Between two steps the helpers spin for a moment
too, since the next step of a decode follows at once, and then sleep on a lock until they are called.
"""

import queue
import threading
import weakref

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.jit import njit
from gguf_run.kernels_cpu.native import atomic_add, atomic_load, atomic_store, call_op, i64_at, pause, yield_cpu

# The team's shared words; each that threads write to has a cache line (8 words) of its own.
_STEP, _ARRIVED, _TAPE, _N_OPS, _BASE, _STOP = 0, 8, 16, 17, 18, 19
_ASLEEP = 24  # one word for each helper follows
_SPINS = 2000  # times `pause` before a waiting thread offers its core to others
MAX_THREADS = 62  # one bit of a word each
_IDLE_SPINS = 20000  # the same for a helper between two steps, before it sleeps


@njit
def _run(shared, n_ops, ith, nth):  # type: ignore[no-untyped-def]
    """Run the tape as thread ith of nth."""
    words = i64_at(shared, 24)
    tape = i64_at(words[_TAPE], 2 * n_ops)
    target = words[_BASE]
    for i in range(n_ops):
        call_op(tape[2 * i], tape[2 * i + 1], ith, nth)
        if nth > 1:
            target += nth
            atomic_add(shared + 8 * _ARRIVED, 1)
            spins = 0
            while atomic_load(shared + 8 * _ARRIVED) < target:
                spins += 1
                if spins < _SPINS:
                    pause()
                else:
                    yield_cpu()


@njit
def _help(shared, step, ith, nth):  # type: ignore[no-untyped-def]
    """Take part in every step after number `step`; return the last number when none has come for a while."""
    spins = 0
    while spins < _IDLE_SPINS:
        if atomic_load(shared + 8 * _STEP) != step:
            if atomic_load(shared + 8 * _STOP):
                return -1
            step += 1
            _run(shared, i64_at(shared, 24)[_N_OPS], ith, nth)
            spins = 0
        spins += 1
        pause()
    atomic_store(shared + 8 * (_ASLEEP + ith), 1)
    # a step that was started before that store is seen here, one started after it wakes this thread by its lock
    if atomic_load(shared + 8 * _STEP) != step:
        atomic_store(shared + 8 * (_ASLEEP + ith), 0)
    return step


@njit
def _announce(shared, tape, n_ops, nth):  # type: ignore[no-untyped-def]
    """Tell the helpers of a step. Returns the helpers that sleep and must be woken, as bits."""
    words = i64_at(shared, 24)
    words[_TAPE], words[_N_OPS] = tape, n_ops
    words[_BASE] = atomic_load(shared + 8 * _ARRIVED)
    atomic_add(shared + 8 * _STEP, 1)
    asleep = 0
    for ith in range(1, nth):
        if atomic_load(shared + 8 * (_ASLEEP + ith)):
            atomic_store(shared + 8 * (_ASLEEP + ith), 0)
            asleep |= 1 << ith
    return asleep


@njit
def _bump(address):  # type: ignore[no-untyped-def]
    atomic_add(address, 1)


def _helper(words: NDArray[np.int64], calls: "queue.SimpleQueue[None]", ith: int, nth: int) -> None:
    step = 0
    while (step := _help(words.ctypes.data, step, ith, nth)) >= 0:
        if words[_ASLEEP + ith]:
            calls.get()  # one call too many is harmless: the next round of _help finds no new step


def _stop(words: NDArray[np.int64], calls: "list[queue.SimpleQueue[None]]") -> None:
    words[_STOP] = 1
    _bump(words.ctypes.data)
    for call in calls:
        call.put(None)


class Team:
    """n_threads threads, the caller's included. Its helpers end with close() or when the team is collected."""

    def __init__(self, n_threads: int) -> None:
        if not 1 <= n_threads <= MAX_THREADS:
            raise ValueError(f"n_threads is {n_threads}; allowed are 1 to {MAX_THREADS}")
        self.n_threads = n_threads
        memory = np.zeros(_ASLEEP + n_threads + 8, np.int64)
        self._words = memory[-memory.ctypes.data % 64 // 8 :]
        self._calls = [queue.SimpleQueue[None]() for _ in range(1, n_threads)]
        for ith, calls in enumerate(self._calls, 1):
            threading.Thread(target=_helper, args=(self._words, calls, ith, n_threads), daemon=True).start()
        self.close = weakref.finalize(self, _stop, self._words, self._calls)

    def run(self, tape: NDArray[np.int64]) -> None:
        """Run a tape, int64[n_ops, 2]; returns when every op is done."""
        shared, n_ops = self._words.ctypes.data, len(tape)
        asleep = _announce(shared, tape.ctypes.data, n_ops, self.n_threads)
        for ith, calls in enumerate(self._calls, 1):
            if asleep >> ith & 1:
                calls.put(None)
        _run(shared, n_ops, 0, self.n_threads)
