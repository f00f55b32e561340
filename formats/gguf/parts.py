"""Tensors that are parts of another tensor, or have its rows in another order."""

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.tensors import Tensor


@frozen
class _Matrix(Tensor):
    """One matrix of a tensor of three dimensions."""

    whole: Tensor
    start: int  # the row of `whole` where the matrix begins

    def blocks(self, first: int = 0, end: int | None = None) -> NDArray[np.uint8]:
        return self.whole.blocks(self.start + first, self.start + (self.n_rows if end is None else end))

    def release(self, first: int = 0, end: int | None = None) -> None:
        self.whole.release(self.start + first, self.start + (self.n_rows if end is None else end))


@frozen(eq=False)
class _Ordered(Tensor):
    """A tensor with its rows in another order. It is released as a whole."""

    whole: Tensor
    index: NDArray[np.intp]  # the rows of `whole`

    def blocks(self, first: int = 0, end: int | None = None) -> NDArray[np.uint8]:
        wanted = self.index[first:end]
        low, high = (int(wanted.min()), int(wanted.max()) + 1) if len(wanted) else (0, 0)
        return self.whole.blocks(low, high)[wanted - low]

    def release(self, first: int = 0, end: int | None = None) -> None:
        if end is None:
            self.whole.release()


def matrix_of(tensor: Tensor, i: int) -> Tensor:
    """Return matrix i of a tensor of three dimensions."""
    start, scales = i * tensor.ne[1], tensor.scales[i : i + 1]
    return _Matrix(tensor.name, tensor.ne[:2], tensor.type, tensor.offset, tensor.file, tensor, start, scales=scales)


def ordered(tensor: Tensor, index: NDArray[np.intp]) -> Tensor:
    """Return a tensor with all its rows in another order: row i is the tensor's row index[i]."""
    fields = tensor.name, tensor.ne, tensor.type, tensor.offset, tensor.file, tensor, index
    return _Ordered(*fields, scales=tensor.scales)
