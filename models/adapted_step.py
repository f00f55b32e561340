"""The ops of a step with adapters: the product of an adapted matrix comes with those of its adapters.

For out = x W^T, with the adapters' A one below the other, and for each tensor of W the adapters' B side by side:

    u = x A^T;    u *= the scales of the token's sequence;    out += u B^T
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import OptionError
from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.memory_file import MemoryFile
from gguf_run.formats.gguf.parts import ordered
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.formats.quantizers.quantizer import quantize
from gguf_run.models.adapter_scales import AdapterScales
from gguf_run.models.adapters import Adapter
from gguf_run.models.operands import Buffer
from gguf_run.models.ops import Gated, Matmul, MatmulGated
from gguf_run.models.rare_ops import ScaleAdapters
from gguf_run.models.step import Step
from gguf_run.models.weights import Loader, Matrix

AnyStep: TypeAlias = Step[Any, Any, Any, Any, Any, Any, Any]
AnyLoader: TypeAlias = Loader[Any, Any, Any, Any, Any, Any, Any]


@frozen
class _Adapted:
    """What adapters add to one matrix. Weights are those of a backend."""

    weight: Any  # of the matrix
    a: Any  # [columns of u, n_in]
    columns: tuple[tuple[int, float], ...]  # of u, see ScaleAdapters
    parts: tuple[tuple[int, int, Any], ...]  # of each tensor that is adapted: first row, first column of u, its B
    is_whole: bool  # whether the parts have all rows of the matrix


class Adapters:
    """The adapters of a model that is loaded."""

    def __init__(self, loaded: Sequence[tuple[Adapter, float]], n_seq: int) -> None:
        """loaded: with the scale that each sequence uses until `scales` says otherwise."""
        self.loaded = [adapter for adapter, _ in loaded]
        self.scales = AdapterScales({adapter.name: scale for adapter, scale in loaded}, n_seq)

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for adapter in self.loaded for pair in adapter.pairs.values() for tensor in (pair.a, pair.b)]

    def step_class(self, base: type[AnyStep]) -> type[AnyStep]:
        """Return a class of steps with the adapters. base: the class for the model without them."""
        unread = {full: adapter.name for adapter in self.loaded for full in adapter.pairs}
        adapters, scales = self.loaded, self.scales

        class AdaptedStep(base):  # type: ignore[misc, valid-type]
            def __init__(self, load: AnyLoader, *others: Any) -> None:
                super().__init__(_Loader(load, adapters, unread), *others)

            def program(self, n_batch: int, n_outputs: int) -> Any:
                for full, name in unread.items():  # the ops of all backends are listed now
                    what = "only matrices that are multiplied as they are in the file can be adapted: leave it out"
                    raise OptionError(f"--lora {name}: adapts {quoted(full)}: {what}")
                return super().program(n_batch, n_outputs)

            def add(self, op: Any) -> None:
                """Append an op, and those that add the adapters of its matrix.

                Where they change all columns, they come first: what follows the product may still be fused with it.
                """
                made = self.load.adapted.get(id(op.weight)) if isinstance(op, Matmul | MatmulGated) else None
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
                for first, start, b in made.parts:
                    x, out = u.columns(start, b.n_in), op.out.columns(first, b.n_out)
                    super().add(Matmul(x, b, out, None, onto and onto.columns(first, b.n_out)))

        return AdaptedStep


class _Loader(AnyLoader):
    """Loads the adapters of each matrix beside the matrix."""

    def __init__(self, load: AnyLoader, adapters: Sequence[Adapter], unread: dict[str, str]) -> None:
        """unread: loses the names of the tensors whose adapters are loaded."""
        super().__init__(load.backend, load.tensors, load.progress)
        self._adapters, self._unread = adapters, unread
        self.adapted = dict[int, _Adapted]()  # by the id of the weight

    def matrix(self, *names: str, **options: Any) -> Matrix[Any, Any]:
        matrix, orders = super().matrix(*names, **options), options.get("orders", {})
        first = 0  # row of the matrix
        columns, parts, rows = list[tuple[int, float]](), list[tuple[int, int, Any]](), list[Tensor]()
        for name, full in zip(names, matrix.names, strict=True):
            found = [(i, one.pairs[full]) for i, one in enumerate(self._adapters) if full in one.pairs]
            if found:
                self._unread.pop(full, None)
                b = _joined([pair.b for _, pair in found], axis=1)
                b = ordered(b, orders[name]) if name in orders else b
                parts.append((first, len(columns), self.backend.weight([b])))
                columns += [(i, pair.factor) for i, pair in found for _ in range(pair.b.ne[0])]
                rows += [pair.a for _, pair in found]
                self.progress(sum(pair.a.nbytes + pair.b.nbytes for _, pair in found))
            first += self.tensors[full].n_rows
        if parts:
            weight, a = matrix.weight, self.backend.weight([_joined(rows, axis=0)])
            is_whole = sum(b.n_out for _, _, b in parts) == first
            self.adapted[id(weight)] = _Adapted(weight, a, tuple(columns), tuple(parts), is_whole)
        return matrix


def _joined(tensors: Sequence[Tensor], axis: int) -> Tensor:
    """Return matrices one below the other (axis 0) or side by side (axis 1), as F32 unless all are F16, or all BF16."""
    first, is_one = tensors[0], len({tensor.type for tensor in tensors}) == 1
    kind = first.type if is_one and not first.type.is_quantized else type_by_name("F32")
    values = np.concatenate([dequantize(tensor.blocks(), tensor.type) for tensor in tensors], axis)
    file = MemoryFile(first.file.path, quantize(values, kind).tobytes())
    return Tensor(first.name, values.shape[::-1], kind, 0, file)


def _buffer(name: str, width: int, like: Buffer) -> Buffer:
    """Return a buffer with the rows of another one. Those of one width share a memory."""
    return Buffer.whole(f"{name}, {width}{', wanted' * like.outputs}", width, outputs=like.outputs)
