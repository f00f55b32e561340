"""The CPU backend's handles: weights as panels, embedding tables. And the memory that they use."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.frozen import frozen
from gguf_run.kernels_cpu.panels.panels import ROWS, Panel

LANES = 2 * ROWS  # rows of two panels: the most that a tile writes


def aligned(n_bytes: int) -> NDArray[np.uint8]:
    """Return zeros, u8[n_bytes], that start on a cache line. The system provides pages when they are first touched."""
    memory = np.zeros(n_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + n_bytes]


class Arena:
    """Hands out memory from large chunks, for which NumPy asks the system for huge pages.

    With small pages, page-table walks take a third of the bandwidth of weights.
    """

    _CHUNK = 64 << 20

    def __init__(self) -> None:
        self._chunk = aligned(0)

    def take(self, n_bytes: int) -> NDArray[np.uint8]:
        """Return zeros, u8[n_bytes], that start on a cache line."""
        n_lines = -(-n_bytes // 64) * 64
        if n_lines > len(self._chunk):
            self._chunk = aligned(max(n_lines, self._CHUNK))
        taken, self._chunk = self._chunk[:n_bytes], self._chunk[n_lines:]
        return taken


@frozen(eq=False)
class WeightPart:
    """Rows of a stacked matrix that have one kind of panel."""

    panel: Panel
    data: NDArray[np.uint8]  # the panels
    first: int  # first row
    n_out: int  # rows
    rounding: tuple[str, int, float] | None = None  # see Tensor.rounding


@frozen(eq=False)
class CpuWeight:
    """A matrix as panels. Rows that follow each other and have one kind of panel are a part.

    It may also be several matrices, one after the other, as those of heads or experts. Then the panels of each begin at
    a multiple of EXPERT_ROWS (matmul/moe.py).
    """

    n_in: int
    n_out: int
    parts: tuple[WeightPart, ...]


@frozen(eq=False)
class CpuTable:
    """A matrix as in the file, or as float32. `embed` reads single rows of it."""

    type_name: str
    n_in: int
    blocks: NDArray[np.uint8]  # [n_rows, row_bytes]
    grid: NDArray[Any]  # codebook of the type: int8, or the f32 table of a coded type
