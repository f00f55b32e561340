"""An adapter merged into its model: a plan that writes the sums, and how much of the adapter rounding loses."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile, Tensor
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.formats.quantizers.quantizer import QUANTIZERS
from gguf_run.models.adapters import Pair, read_adapter
from gguf_run.runtime.convert.stored.sources import F32, Source
from gguf_run.runtime.quantize.file import Loss
from gguf_run.runtime.quantize.file_types import KEEP, FileType
from gguf_run.runtime.quantize.plan import Options, Plan, make_plan


@dataclass(frozen=True)
class Merge:
    """A merge that is about to be written."""

    plan: Plan
    power: Mapping[str, float]  # sum of the squares of what is added to each adapted tensor

    def lost(self, losses: Sequence[Loss]) -> Iterator[tuple[str, float]]:
        """Yield the adapted tensors whose rounding is larger than what was added: name, and how many times.

        losses: of quantize_file.
        """
        for item, loss in zip(self.plan.items, losses, strict=True):
            power = self.power.get(item.target.name, 0.0)
            if power and loss.error > power:
                yield item.target.name, (loss.error / power) ** 0.5


def plan_merge(file: GGUFFile, adapter: GGUFFile, kind: FileType | None, scale: float = 1.0) -> Merge:
    """Return what merging will write. kind: the file's type; None: each tensor keeps its type.

    GgufRunError for a type that cannot be written again; errors of read_adapter.
    """
    pairs = read_adapter(str(adapter.path), adapter, str(file.metadata["general.architecture"]), file.tensors).pairs
    sums = {name: _sum(file.tensors[name], pair, scale) for name, pair in pairs.items()}
    made = GGUFFile.of(file.path, {key: file.metadata.typed(key) for key in file.metadata}, {**file.tensors, **sums})
    plan = make_plan(made, Options(kind or KEEP))
    if kind is None:
        types = {name: tensor.type for name, tensor in file.tensors.items()}
        for name in pairs:
            if types[name].name not in QUANTIZERS:
                what = f"{name} is {types[name].name}, which cannot be written"
                raise GgufRunError(f"{file.path}: {what}: name a type, as --type Q8_0")
        items = [replace(i, target=TensorInfo(i.target.name, i.target.ne, types[i.target.name])) for i in plan.items]
        plan = replace(plan, items=items)
    plan = replace(plan, inputs=[*file.paths, *adapter.paths])
    return Merge(plan, {name: _power(pair, scale) for name, pair in pairs.items()})


def _halves(pair: Pair, scale: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    a, b = (dequantize(half.blocks(), half.type) for half in (pair.a, pair.b))
    return a, b * np.float32(pair.factor * scale)


def _sum(tensor: Tensor, pair: Pair, scale: float) -> Source:
    """Return a tensor with what a pair adds, F32."""
    a, b = _halves(pair, scale)
    read = partial(_rows, tensor, a, b)
    return Source(tensor.name, tensor.ne, F32, tensor.file, read, tensor.release)


def _rows(tensor: Tensor, a: NDArray[np.float32], b: NDArray[np.float32], first: int, end: int) -> NDArray[np.float32]:
    added: NDArray[np.float32] = dequantize(tensor.blocks(first, end), tensor.type) + b[first:end] @ a
    return added


def _power(pair: Pair, scale: float) -> float:
    """Return the sum of the squares of b @ a, by products of rank x rank."""
    a, b = (half.astype(np.float64) for half in _halves(pair, scale))
    return float(((b.T @ b) * (a @ a.T)).sum())
