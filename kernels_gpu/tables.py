"""What attention reads of a step beside its tokens: the pages of each sequence, and which tokens share a tile.

The host writes the tables. The device's copies never move, so graphs may read them.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from gguf_run.models.pages import PageTable


class _Table:
    """int32[n, width] on the host and on the device."""

    def __init__(self, n: int, width: int, device: torch.device) -> None:
        self._memory = torch.zeros(n, width, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.rows = self._memory.to(device, copy=True)  # on the device

    def _send(self, first: int, rows: NDArray[np.int32]) -> None:
        """Replace rows from `first` on. The device must have read what was sent before."""
        part = slice(first, first + len(rows))
        self._memory.numpy()[part] = rows
        self.rows[part].copy_(self._memory[part], non_blocking=True)


class Pages(_Table):
    """The copy of a page table."""

    def __init__(self, table: PageTable, device: torch.device) -> None:
        super().__init__(len(table.pages), table.pages.shape[1], device)
        self._table, self._versions = table, np.full_like(table.versions, -1)  # versions: of the rows of the copy

    def send(self) -> None:
        """Send the rows that have changed, and those between them."""
        changed = np.flatnonzero(self._versions != self._table.versions)
        if len(changed):
            first = int(changed[0])
            self._send(first, self._table.pages[first : changed[-1] + 1])
            self._versions[:] = self._table.versions


class Tiles(_Table):
    """Tiles of tokens of one run: the first token's row in the step, and the number of tokens."""

    def __init__(self, size: int, n: int, device: torch.device) -> None:
        """size: the most tokens of a tile. n: the most tokens of a step."""
        super().__init__(n, 2, device)
        self._size, self.n = size, 0  # n: tiles of this step

    def send(self, run_of: NDArray[np.int32]) -> None:
        """Cut the tokens of a step into tiles. run_of: the number of each token's run."""
        starts = np.flatnonzero(np.diff(run_of, prepend=-1))
        in_run = np.arange(len(run_of)) - np.repeat(starts, np.diff(starts, append=len(run_of)))
        first = np.flatnonzero(in_run % self._size == 0)
        self.n = len(first)
        self._send(0, np.stack([first, np.diff(first, append=len(run_of))], axis=1).astype(np.int32))
