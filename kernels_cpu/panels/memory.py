"""What the CPU backend's handles are: weights as panels, vectors, embedding tables."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf_run.kernels_cpu.panels.panels import ROWS, Panel

LANES = 2 * ROWS  # a cache's positions and the width of V's rows are filled up to this: tiles of two panels


def aligned(n_bytes: int) -> NDArray[np.uint8]:
    """Zeros that start on a cache line. The system provides pages when they are first touched."""
    memory = np.zeros(n_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + n_bytes]


class Arena:
    """Hands out memory from large chunks: NumPy asks the system for huge pages only for those. Streaming weights from
    small pages costs a third of the bandwidth in page-table walks."""

    _CHUNK = 64 << 20

    def __init__(self) -> None:
        self._chunk = aligned(0)

    def take(self, n_bytes: int) -> NDArray[np.uint8]:
        """Zeros that start on a cache line."""
        n_lines = -(-n_bytes // 64) * 64
        if n_lines > len(self._chunk):
            self._chunk = aligned(max(n_lines, self._CHUNK))
        taken, self._chunk = self._chunk[:n_bytes], self._chunk[n_lines:]
        return taken


@dataclass(frozen=True, eq=False)
class WeightPart:
    """Rows first .. first + n_out of a stacked matrix that share a panel shape."""

    panel: Panel
    data: NDArray[np.uint8]
    first: int
    n_out: int


@dataclass(frozen=True, eq=False)
class CpuWeight:
    """A matrix as panels, one part for each run of rows of one panel shape."""

    n_in: int
    n_out: int
    parts: tuple[WeightPart, ...]


@dataclass(frozen=True, eq=False)
class CpuTable:
    """A matrix as it stands in the file (or as float32): embed reads single rows of it."""

    type_name: str
    n_in: int
    blocks: NDArray[np.uint8]
    grid: NDArray[np.int8]
