"""Second moments of what matrices read: sums of x xT, added up chunk by chunk for gguf-imatrix --full.

The products of a chunk are made in float32 by NumPy's BLAS, in strips of the upper triangle. Sums over chunks are
float32 too: their error, about 1e-6, is far below the damping of those who invert them.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.moments import Moments, n_packed
from gguf_run.models.config import ModelConfig
from gguf_run.models.step import Observed
from gguf_run.runtime.load.machine import available_memory
from gguf_run.runtime.terminal.text import size_text

_STRIP = 256  # rows of the product that are made at once
_PROBE = 1024  # input channels of the product that is timed


class Products:
    """Sums of x xT by the first name of the matrices that read x: f32[n_expert, n (n + 1) / 2], as files have them."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        """Add up the second moments of files. FormatError for a file without, GgufRunError for other models'."""
        self.sums: dict[str, NDArray[np.float32]] = {}
        self._takes: dict[str, Callable[[], tuple[NDArray[np.float32], NDArray[np.int64]]]] = {}
        for path in paths:
            with Moments.open(path) as file:
                for first in {*file.imatrix.inputs.values()}:
                    sums = file.sums(first)
                    if self.sums.get(first, sums).shape != sums.shape:
                        raise GgufRunError(f"{path}: entry {first} is of another size: it is another model's imatrix")
                    self.sums[first] = self.sums[first] + sums if first in self.sums else sums.copy()

    def keep(self, observed: Sequence[Observed], n_ctx: int, config: ModelConfig, n_tokens: int) -> str:
        """Have the model keep what matrices read in a chunk of n_ctx tokens. Return what n_tokens cost, for people.

        GgufRunError if there is too little memory, UnsupportedError if a backend cannot keep them.
        """
        needed = work = 0
        shapes = [item.squares.take()[0].shape for item in observed]
        n_reads = [config.moe.n_used if config.moe and n_expert > 1 else 1 for n_expert, _ in shapes]
        for item, (n_expert, n), n_read in zip(observed, shapes, n_reads, strict=True):
            needed += 4 * n * n_ctx * n_read + 4 * n_expert * n_packed(n) * (item.names[0] not in self.sums)
            work += n_packed(n) * n_read * n_tokens
        available = available_memory()
        if available is not None and needed > available:
            raise GgufRunError(
                f"second moments need {size_text(needed)} of memory, {size_text(available)} are available: leave out "
                "--full, or take a machine with more memory"
            )
        for item, (n_expert, n), n_read in zip(observed, shapes, n_reads, strict=True):
            self.sums.setdefault(item.names[0], np.zeros((n_expert, n_packed(n)), np.float32))
            self._takes[item.names[0]] = item.squares.keep(n_ctx * n_read)
        return f"second moments: {size_text(needed)} of memory, about {work / _speed():.0f} s for their products"

    def add_chunk(self) -> None:
        """Add the products of the chunk that has just run."""
        for first, take in self._takes.items():
            rows, experts = take()
            sums = self.sums[first]
            for expert in np.unique(experts):
                add_product(sums[expert], rows if len(sums) == 1 else rows[experts == expert])


def add_product(packed: NDArray[np.float32], x: NDArray[np.float32]) -> None:
    """packed += the upper triangle of xT x, f32[n (n + 1) / 2]. x: f32[n_rows, n]."""
    at = 0
    for first in range(0, x.shape[1], _STRIP):
        for i, row in enumerate(x[:, first : first + _STRIP].T @ x[:, first:]):
            part = packed[at : at + len(row) - i]
            part += row[i:]
            at += len(part)


def _speed() -> float:
    """Return how many values of a triangle, times rows, are multiplied and added in a second: measured."""
    packed, x = np.zeros(n_packed(_PROBE), np.float32), np.ones((_PROBE // 2, _PROBE), np.float32)
    for _ in range(2):  # BLAS starts its threads at the first
        start = time.perf_counter()
        add_product(packed, x)
    return len(x) * packed.size / (time.perf_counter() - start)


@contextmanager
def unbroken() -> Iterator[None]:
    """Let Ctrl-C wait for the end of a block."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python runs handlers in the main thread alone
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
