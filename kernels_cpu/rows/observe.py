"""sums += x^2, column by column: how strongly a matrix uses each of its input channels."""

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

    def take(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        taken = self.sums.copy(), self.counts.copy()
        self.sums[:] = 0
        self.counts[:] = 0
        return taken

    def fields(self) -> dict[str, Any]:
        """Return the fields of a kernel that adds to the sums."""
        return {"n": self.sums.shape[1], "sums": self.sums, "counts": self.counts}


@njit(inline="always")
def add_squares(sums, x, scale, n):
    """sums += (scale * x)^2, f64[n]."""
    for i in range(n):
        value = np.float64(x[i]) * scale
        sums[i] += value * value


@row_op("rows n x x_stride sums counts", n_items=lambda a: a.n, grain=COLUMNS)
def observe(a, first, end):
    """sums[i] += sum over t of x[t, i]^2; counts[0] += rows. Squares of float32 are exact in float64."""
    sums = carray(pointer(a.sums + 8 * first), end - first, np.float64)
    n_tokens = n_rows(a)
    for t in range(n_tokens):
        add_squares(sums, f32_at(a.x + t * a.x_stride + 4 * first, end - first), 1.0, end - first)
    if first == 0:
        i64_at(a.counts, 1)[0] += n_tokens
