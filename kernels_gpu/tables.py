"""What attention reads of a step beside its tokens: the pages of each sequence, and the work of its programs.

The host writes the tables. The device's copies never move, so graphs may read them.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gguf_run.models.pages import PageTable


class Table:
    """int32[n, width] on the host and on the device."""

    def __init__(self, n: int, width: int, device: torch.device) -> None:
        self._memory = torch.zeros(n, width, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.rows = self._memory.to(device, copy=True)  # on the device

    def send_rows(self, first: int, rows: NDArray[np.int32]) -> None:
        """Replace rows from `first` on. The device must have read what was sent before."""
        part = slice(first, first + len(rows))
        self._memory.numpy()[part] = rows
        self.rows[part].copy_(self._memory[part], non_blocking=True)


class Pages(Table):
    """The copy of a page table."""

    def __init__(self, table: PageTable, device: torch.device) -> None:
        super().__init__(len(table.pages), table.pages.shape[1], device)
        self._table, self._versions = table, np.full_like(table.versions, -1)  # versions: of the rows of the copy

    def send(self) -> None:
        """Send the rows that have changed, and those between them."""
        changed = np.flatnonzero(self._versions != self._table.versions)
        if len(changed):
            first = int(changed[0])
            self.send_rows(first, self._table.pages[first : changed[-1] + 1])
            self._versions[:] = self._table.versions


class Cut(NamedTuple):
    """How attention is cut into items. Layers that are cut alike share the items."""

    tokens: int  # the most tokens of an item
    span: int  # positions of a block, which a program reads at a time
    n_blocks: int  # the most blocks that a token sees
    n_part: int  # so many items keep the GPU busy


ITEM_WORDS = ("token", "n_tokens", "part", "n_part", "row")  # row: of the sums that the item's first token gets


class Items(Table):
    """The items of a step: tokens of one run that share a tile, and which part of the positions that they see.

    A row of the table is ITEM_WORDS. The parts of the same tokens are neighbours. Rows behind the last item are 0.
    """

    def __init__(self, cut: Cut, n: int, device: torch.device) -> None:
        """n: the most tokens of a step."""
        self._cut, self.n = cut, 0  # n: items of this step
        self._known = b""  # what the items were made of
        super().__init__(self.most(n), len(ITEM_WORDS), device)

    def most(self, n: int) -> int:
        """Return the most items that n tokens have, however long their sequences are."""
        return min(n + self._cut.n_part, n * self._cut.n_blocks)

    def send(self, first: NDArray[np.intp], n_tokens: NDArray[np.intp], last: NDArray[np.intp]) -> None:
        """Cut the runs of a step into items. last: the position of each run's last token.

        Parts are about equally long, whatever sequence they are of. How many blocks a tile sees is an estimate: the
        kernel finds out where its part begins and ends. So the items of most steps are those of the step before.
        """
        size, span, n_blocks, n_part = self._cut
        n_block = np.minimum(last // span + 1, n_blocks)
        known = first.tobytes() + n_tokens.tobytes() + n_block.tobytes()
        if known == self._known:
            return
        self._known = known
        run, i = _each(-(-n_tokens // size))
        first, n_tokens, n_block = first[run] + i * size, np.minimum(n_tokens[run] - i * size, size), n_block[run]
        n_parts = -(-n_block // max(1, -(-int(n_block.sum()) // n_part)))
        tile, part = _each(n_parts)
        n_tokens = n_tokens[tile]
        rows = np.zeros((len(self.rows), len(ITEM_WORDS)), np.int32)
        rows[: len(tile)].T[:] = first[tile], n_tokens, part, n_parts[tile], np.cumsum(n_tokens) - n_tokens
        self.n = len(tile)
        self.send_rows(0, rows)


def _each(counts: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the number of the group, and the number within the group, of each member of groups of so many."""
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - (np.cumsum(counts) - counts)[group]
