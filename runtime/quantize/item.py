"""A tensor to write, and how its rows become blocks: ggml's own rounding, or a method that the user named."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.gguf.reader import Tensor
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.formats.quantizers.quantizer import quantize
from gguf_run.runtime.quantize.rules import Choice


def plain(item: "Item", x: NDArray[np.float32], first: int) -> NDArray[np.uint8]:
    """Quantize as ggml does, byte for byte."""
    return quantize(x, item.target.type, item.importance_at(first), n_threads=1)


def searched(item: "Item", x: NDArray[np.float32], first: int) -> NDArray[np.uint8]:
    """Quantize with better scales than ggml's, of the types that have a search."""
    return quantize(x, item.target.type, item.importance_at(first), n_threads=1, search=True)


# Makes the blocks of rows first, first + 1, ... of an item: (item, weights f32[n_rows, ne[0]], first) returns
# uint8[n_rows, row_bytes]. All rows belong to one expert. Several threads call it. FormatError for bad weights.
Rounding = Callable[["Item", NDArray[np.float32], int], NDArray[np.uint8]]


@dataclass(frozen=True)
class Change:
    """Factors of a tensor's weights, made up for by those of its neighbours: the model computes the same."""

    columns: NDArray[np.float32]  # f32[n_expert, ne[0]], or f32[1, ne[0]] for all experts
    rows: NDArray[np.float32]  # f32[n_rows]

    def moments(self, h: NDArray[np.float32], expert: int = 0) -> NDArray[np.float32]:
        """Return E[x xT] of what the changed matrix gets, f32[n, n]. h: of what the matrix of the source gets."""
        s = self.columns[expert % len(self.columns)]
        return h / (s * s[:, None])


@dataclass(frozen=True)
class Item:
    """A tensor to write."""

    source: Tensor  # in the input
    target: TensorInfo  # in the output
    choice: Choice
    importance: NDArray[np.float32] | None = None  # float32[n_expert, ne[0]]
    imatrix_path: str = ""  # the file that the importance is from
    rounding: Rounding = plain  # what makes the blocks
    change: Change | None = None  # made to the weights before they become blocks; `importance` takes it into account

    @property
    def is_copy(self) -> bool:
        return self.source.type is self.target.type and self.change is None

    def changed(self, x: NDArray[np.float32], first: int) -> NDArray[np.float32]:
        """Return rows first, first + 1, ... as they are to be written. x: those of the source, all of one expert."""
        if self.change is None:
            return x
        columns, rows = self.change.columns, self.change.rows[first : first + len(x), None]
        return x * columns[self.expert(first) % len(columns)] * rows

    def importance_at(self, row: int) -> NDArray[np.float32] | None:
        """Return the importance of the columns of a row: each expert has its own."""
        return None if self.importance is None else self.importance[self.expert(row) % len(self.importance)]

    def expert(self, row: int) -> int:
        """Return the expert that a row belongs to."""
        return row // self.source.ne[1] if len(self.source.ne) > 1 else 0
