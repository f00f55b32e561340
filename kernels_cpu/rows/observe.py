"""sums += x^2, column by column: how strongly a matrix uses each of its input channels. Rows are kept on request."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.compiler.jit import carray, njit
from gguf_run.kernels_cpu.replay.op import n_rows, row_op
from gguf_run.kernels_cpu.vector.native import f32_at, i64_at, pointer

COLUMNS = 64  # columns of a piece. A thread sums whole columns: sums do not depend on the number of threads


class CpuSquares:
    """Sums of squares of what one matrix reads, or n_expert matrices: models.handles.SquaresHandle."""

    def __init__(self, width: int, n_expert: int = 1) -> None:
        self.sums, self.counts = np.zeros((n_expert, width)), np.zeros(n_expert, np.int64)
        self.kept = np.zeros(3, np.int64)  # addresses of the rows and of their experts, room for so many rows
        self.ends = np.zeros(width, np.int64)  # rows kept of each column: pieces of a step do not wait for each other

    def take(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        taken = self.sums.copy(), self.counts.copy()
        self.sums[:] = 0
        self.counts[:] = 0
        return taken

    def keep(self, n_rows: int) -> Callable[[], tuple[NDArray[np.float32], NDArray[np.int64]]]:
        rows, experts = np.empty((n_rows, self.sums.shape[1]), np.float32), np.empty(n_rows, np.int64)
        self.kept[:] = rows.ctypes.data, experts.ctypes.data, n_rows

        def take() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
            n = self.ends[0]
            self.ends[:] = 0
            return rows[:n], experts[:n]

        return take

    def fields(self) -> dict[str, Any]:
        """Return the fields of a kernel that adds to the sums."""
        return {"n": self.sums.shape[1], "sums": self.sums, "counts": self.counts, "kept": self.kept, "ends": self.ends}


@njit(inline="always")
def add_squares(a, address, scale, expert, first, end):
    """sums[expert] += (scale * x)^2, and keep scale * x, of the columns first .. end of a row at an address."""
    x = f32_at(address + 4 * first, end - first)
    sums = carray(pointer(a.sums + 8 * (expert * a.n + first)), end - first, np.float64)
    for i in range(end - first):
        value = np.float64(x[i]) * scale
        sums[i] += value * value
    kept, ends = i64_at(a.kept, 3), i64_at(a.ends + 8 * first, end - first)
    at = ends[0]
    if at < kept[2]:
        row = f32_at(kept[0] + 4 * (at * a.n + first), end - first)
        for i in range(end - first):
            row[i], ends[i] = x[i] * scale, at + 1
        if first == 0:
            i64_at(kept[1], kept[2])[at] = expert


@row_op("rows n x x_stride sums counts kept ends", n_items=lambda a: a.n, grain=COLUMNS)
def observe(a, first, end):
    """sums[i] += sum over t of x[t, i]^2; counts[0] += rows. Squares of float32 are exact in float64."""
    n_tokens = n_rows(a)
    for t in range(n_tokens):
        add_squares(a, a.x + t * a.x_stride, 1.0, 0, first, end)
    if first == 0:
        i64_at(a.counts, 1)[0] += n_tokens
