"""The ops of a step with adapters: each product of an adapted matrix is followed, or preceded, by that of its adapters.

For out = x W^T, with the adapters' A one below the other, and for each tensor of W the adapters' B side by side:

    u = x A^T;    u *= the scales of the token's sequence;    out += u B^T
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import OptionError
from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.memory_file import MemoryFile
from gguf_run.formats.gguf.parts import ordered
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.adapter_scales import AdapterScales
from gguf_run.models.adapters import Adapter
from gguf_run.models.operands import Buffer
from gguf_run.models.ops import Gated, Matmul, MatmulGated
from gguf_run.models.rare_ops import ScaleAdapters
from gguf_run.models.step import Step
from gguf_run.models.weights import Loader, Matrix

if TYPE_CHECKING:
    from gguf_run.models.protocol import Program

AnyStep: TypeAlias = Step[Any, Any, Any, Any, Any, Any, Any]
_FLOATS = ("F16", "BF16", "F32")


@frozen
class _Part:
    """The rows of one tensor of a matrix."""

    first: int  # row of the matrix
    n_rows: int
    start: int  # column of u
    width: int  # columns of u
    b: Any  # a backend's weight [n_rows, width]


@frozen
class _Adapted:
    """What adapters add to one matrix."""

    weight: Any  # of the matrix
    a: Any  # a backend's weight [width of u, n_in]
    columns: tuple[tuple[int, int, float], ...]  # see ScaleAdapters.columns
    parts: tuple[_Part, ...]
    is_whole: bool  # whether the parts have all rows


class _Loader(Loader[Any, Any, Any, Any, Any, Any, Any]):
    """Loads the adapters of each matrix beside the matrix."""

    def __init__(self, load: Loader[Any, Any, Any, Any, Any, Any, Any], adapters: Sequence[Adapter], used: set[str]):
        """used: gets the names of the tensors that are adapted."""
        super().__init__(load.backend, load.tensors, load.progress)
        self._adapters, self._used, self._adapted = adapters, used, dict[int, _Adapted]()

    def of(self, weight: Any) -> _Adapted | None:
        """Return what adapters add to a weight."""
        return self._adapted.get(id(weight))

    def matrix(
        self, *names: str, bias: Sequence[str] | None = None, orders: Mapping[str, NDArray[np.intp]] | None = None
    ) -> Matrix[Any, Any]:
        orders = orders or {}
        matrix = super().matrix(*names, bias=bias, orders=orders)
        first = start = 0
        columns: list[tuple[int, int, float]] = []
        parts: list[_Part] = []
        rows: list[Tensor] = []
        for name, full in zip(names, matrix.names, strict=True):
            found = [(i, one.pairs[full]) for i, one in enumerate(self._adapters) if full in one.pairs]
            n_rows, width = self.tensors[full].n_rows, sum(pair.rank for _, pair in found)
            if found:
                b = _joined([pair.b for _, pair in found], axis=1)
                b = ordered(b, orders[name]) if name in orders else b
                parts.append(_Part(first, n_rows, start, width, self.backend.weight([b])))
                columns += [(i, pair.rank, pair.factor) for i, pair in found]
                rows += [pair.a for _, pair in found]
                self._used.add(full)
                self.progress(sum(pair.a.nbytes + pair.b.nbytes for _, pair in found))
            first, start = first + n_rows, start + width
        if parts:
            a, is_whole = self.backend.weight([_joined(rows, axis=0)]), sum(part.n_rows for part in parts) == first
            made = _Adapted(matrix.weight, a, tuple(columns), tuple(parts), is_whole)
            self._adapted[id(matrix.weight)] = made
        return matrix


def _joined(tensors: Sequence[Tensor], axis: int) -> Tensor:
    """Return matrices one below the other (axis 0) or side by side (axis 1), in their float type if it is one."""
    types = {tensor.type.name for tensor in tensors}
    name = next(iter(types)) if len(types) == 1 and types <= {*_FLOATS} else "F32"
    parts = [
        tensor.blocks() if tensor.type.name == name else dequantize(tensor.blocks(), tensor.type).view(np.uint8)
        for tensor in tensors
    ]
    data, kind = np.concatenate(parts, axis), type_by_name(name)
    ne = data.shape[1] // kind.type_size, data.shape[0]
    return Tensor(tensors[0].name, ne, kind, 0, MemoryFile(tensors[0].file.path, data.tobytes()))


class Adapters:
    """The adapters of a model that is loaded."""

    def __init__(self, loaded: Sequence[tuple[Adapter, float]], n_seq: int) -> None:
        """loaded: with the scale that each sequence uses until `scales` says otherwise."""
        self.loaded = [adapter for adapter, _ in loaded]
        self.scales = AdapterScales({adapter.name: scale for adapter, scale in loaded}, n_seq)

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for adapter in self.loaded for pair in adapter.pairs.values() for tensor in (pair.a, pair.b)]

    def check(self, used: Collection[str]) -> None:
        """Raise OptionError for a tensor that no product of the model reads as it is."""
        for adapter in self.loaded:
            for name in adapter.pairs.keys() - used:
                what = "only matrices that are multiplied as they are in the file can be adapted: leave it out"
                raise OptionError(f"--lora {adapter.name}: adapts {quoted(name)}: {what}")

    def step_class(self, base: type[AnyStep]) -> type[AnyStep]:
        """Return a class of steps with the adapters. base: the class for the model without them."""
        adapters, scales, used = self.loaded, self.scales, set[str]()
        check = self.check

        class AdaptedStep(base):  # type: ignore[misc, valid-type]
            def __init__(self, load: Any, config: Any, observed: Any) -> None:
                super().__init__(_Loader(load, adapters, used), config, observed)

            def program(self, n_batch: int, n_outputs: int) -> "Program":
                check(used)  # the ops of all backends are listed
                return super().program(n_batch, n_outputs)

            def add(self, op: Any) -> None:
                """Append an op, and those that add the adapters of its matrix.

                Where they change all columns, they come first: what follows the product may still be fused with it.
                """
                made = self.load.of(op.weight) if isinstance(op, Matmul | MatmulGated) else None
                if made is None:
                    super().add(op)
                elif isinstance(op, MatmulGated):
                    n = op.out.width
                    both = _buffer("gate and up of adapters", 2 * n, op.out)
                    self.add(Matmul(op.x, op.weight, both, op.bias))
                    super().add(Gated(both.columns(0, n), both.columns(n, n), op.out, op.activation))
                elif made.is_whole:
                    self._add_adapters(made, op, op.residual)
                    super().add(replace(op, residual=op.out))
                else:
                    super().add(op)
                    self._add_adapters(made, op, op.out)

            def _add_adapters(self, made: _Adapted, op: Matmul[Any, Any], onto: Buffer | None) -> None:
                """op.out = onto + what adapters add"""
                u = _buffer("adapters", made.a.n_out, op.out)
                super().add(Matmul(op.x, made.a, u))
                super().add(ScaleAdapters(u, scales, made.columns))
                for part in made.parts:
                    rows = part.first, part.n_rows
                    residual, x = onto and onto.columns(*rows), u.columns(part.start, part.width)
                    super().add(Matmul(x, part.b, op.out.columns(*rows), None, residual))

        return AdaptedStep


def _buffer(name: str, width: int, like: Buffer) -> Buffer:
    """Return a buffer with the rows of another one. Those of one width share a memory."""
    return Buffer.whole(f"{name}, {width}{', wanted' * like.outputs}", width, outputs=like.outputs)
