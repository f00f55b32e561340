"""Gives the tensors of a file to a backend, which makes handles of them."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.architectures import QKV, Architecture, qkv_of
from gguf_run.models.ops import Cache, Experts, Squares, State, Table, Vector, Weight

if TYPE_CHECKING:
    from gguf_run.models.protocol import Backend

_Handle = TypeVar("_Handle")


@frozen
class Matrix(Generic[Weight, Vector]):
    """The weight and the bias of one matmul."""

    names: tuple[str, ...]  # tensors whose rows, one after the other, make the matrix
    weight: Weight
    bias: Vector | None


class Loader(Generic[Table, Weight, Vector, Cache, Experts, Squares, State]):
    """Takes tensors by name out of the file and gives them to one backend."""

    def __init__(
        self,
        backend: "Backend[Table, Weight, Vector, Cache, Experts, Squares, State]",
        tensors: Mapping[str, Tensor],
        progress: Callable[[int], None],
    ) -> None:
        """progress: called with the number of bytes of each tensor that is loaded."""
        self.backend, self.tensors, self.progress = backend, tensors, progress

    def has(self, name: str) -> bool:
        """Whether the file has the weight of this name."""
        return self._full(name) in self.tensors

    def _full(self, name: str) -> str:
        """Return the name of a weight in the file: with ".weight", unless the file has it without."""
        return name if name in self.tensors else f"{name}.weight"

    def take(self, upload: Callable[[list[Tensor]], _Handle], names: Sequence[str]) -> _Handle:
        """Return what the backend makes of some tensors."""
        taken = [self._scaled(name) for name in names]
        handle = upload(taken)
        for tensor in taken:
            tensor.release()
            self.progress(tensor.nbytes)
        return handle

    def _optional(self, names: Sequence[str]) -> Vector | None:
        """Return the values of some tensors, None if the file has none of them. A file has all or none, see config."""
        return self.take(self.backend.vector, names) if names[0] in self.tensors else None

    def _scaled(self, name: str) -> Tensor:
        """Return a tensor. If the file has a tensor `<name>.scale` for it, its numbers become the tensor's `scales`."""
        tensor, factors = self.tensors[name], self.tensors.get(f"{name.removesuffix('.weight')}.scale")
        if factors is None or not name.endswith(".weight") or ".ffn_gate_inp." in name:
            return tensor
        from gguf_run.models.tensor_scales import with_scales  # late: few files have any

        return with_scales(tensor, factors)

    def table(self, name: str) -> Table:
        """Return a table of embeddings that nothing multiplies. Its rows are read from the file."""
        self.progress(self.tensors[name].nbytes)
        return self.backend.table(self.tensors[name])

    def embeddings(self) -> Table:
        """Return the table of embeddings."""
        # The table reads rows from the file whenever they are needed: its pages are not released.
        tensor = self.tensors["token_embd.weight"]
        if self.has("output"):  # otherwise this tensor is the output matrix too, which counts the progress
            self.progress(tensor.nbytes)
        return self.backend.table(tensor)

    def matrix(
        self,
        *names: str,
        bias: Sequence[str] | None = None,
        orders: Mapping[str, NDArray[np.intp]] = MappingProxyType({}),
    ) -> Matrix[Weight, Vector]:
        """Return a matrix of the rows of some tensors.

        bias: the tensors that hold the bias; None: those of `names`.
        orders: of tensors whose rows the matrix has in another order than the file.
        """
        weights = tuple(f"{name}.weight" for name in names)

        def upload(tensors: list[Tensor]) -> Weight:
            if orders:
                from gguf_run.formats.gguf.parts import ordered  # late: few models need it

                tensors = [
                    ordered(one, orders[name]) if name in orders else one
                    for name, one in zip(names, tensors, strict=True)
                ]
            return self.backend.weight(tensors)

        weight = self.take(upload, weights)
        return Matrix(weights, weight, self._optional([f"{name}.bias" for name in (bias or names)]))

    def qkv(self, arch: Architecture, block: str) -> Matrix[Weight, Vector]:
        """Return the matrix that makes q, k and v. block: "blk.N."."""
        biases = [f"{block}{name}" for name in ("attn_qkv", *QKV) if f"{block}{name}.bias" in self.tensors]
        return self.matrix(*(block + name for name in qkv_of(arch, block, self.tensors)), bias=biases)

    def norm(self, name: str) -> tuple[Vector, Vector | None]:
        """Return weight and bias of a norm."""
        return self.take(self.backend.vector, [self._full(name)]), self._optional([f"{name}.bias"])

    def vector(self, name: str) -> Vector | None:
        """Return a tensor's values, None if the file does not have the tensor."""
        return self._optional([self._full(name)])

    def experts(self, names: Sequence[str]) -> Experts:
        """Return the experts of a layer. names: of their tensors."""
        parts = [f"{name}.{kind}" for kind in ("weight", "bias") for name in names]
        return self.take(self.backend.experts, [part for part in parts if part in self.tensors])
