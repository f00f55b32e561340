"""sums += x^2, column by column: how strongly each input channel of a matrix is used."""

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.jit import carray
from gguf_run.kernels_cpu.native import f32_at, i64_at, pointer
from gguf_run.kernels_cpu.op import items, n_pieces, op

_COLUMNS = 64  # a thread takes whole columns, so that sums do not depend on the number of threads


class CpuSquares:
    """models.backend.Squares."""

    def __init__(self, width: int) -> None:
        self.sums = np.zeros(width)

    def take(self) -> NDArray[np.float64]:
        taken = self.sums.copy()
        self.sums[:] = 0
        return taken


@op("rows n x x_stride sums")
def observe(args, piece, ith, nth):  # type: ignore[no-untyped-def]
    """sums[i] += sum over t of x[t, i]^2. Squares of float32 are exact in float64."""
    a = carray(args, 1)[0]
    if piece < 0:
        return n_pieces(a.n, _COLUMNS, nth)
    first, end = items(piece, a.n, _COLUMNS, nth)
    sums = carray(pointer(a.sums + 8 * first), end - first, np.float64)
    for t in range(i64_at(a.rows, 1)[0]):
        x = f32_at(a.x + t * a.x_stride + 4 * first, end - first)
        for i in range(end - first):
            value = np.float64(x[i])
            sums[i] += value * value
    return 0
