"""Quantizing a file, and what each type lost. Slabs of rows go through a pool of threads and are written in order.

Only a few slabs are in memory at any time, however large the tensors are. The input is a mapped file. Its pages are
given back as soon as their slab is written.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import TensorType
from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.formats.gguf.writer import GGUFWriter
from gguf_run.formats.quantizers.quantizer import count_bad, quantize
from gguf_run.runtime.quantize.item import Item
from gguf_run.runtime.quantize.plan import Plan

_SLAB = 1 << 18  # weights of a slab: 1 MB of f32 stays in a core's cache from one step to the next
_AHEAD = 4  # slabs per thread that may wait to be written


@dataclass(frozen=True)
class Loss:
    """What a tensor lost. Both sums are 0 for a tensor that was copied."""

    error: float = 0.0  # sum over its weights of the squared errors
    power: float = 0.0  # sum over its weights of the squares

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.error + other.error, self.power + other.power)

    def relative(self) -> float:
        """Return sqrt(error / power), 0 for a tensor of zeros."""
        return math.sqrt(self.error / self.power) if self.power else 0.0


@dataclass(frozen=True)
class _Slab:
    """Rows first .. end of a tensor. All belong to one expert."""

    item: Item
    first: int
    end: int


def quantize_file(
    plan: Plan,
    path: str | os.PathLike[str],
    n_threads: int,
    progress: Callable[[int, int], None],
    split_max_size: int = 0,
    split_max_tensors: int = 0,
) -> tuple[GGUFWriter, list[Loss]]:
    """Write the planned model. Return the writer, which knows the files, and the loss of each tensor.

    progress: called with the number of input bytes that are done, and with their total.
    split_max_size, split_max_tensors: as in GGUFWriter.
    GgufRunError if weights are NaN or infinite or too large for their type, or if the output cannot be written. Then
    no file is left.
    """
    losses = {item.target.name: Loss() for item in plan.items}
    total, done = sum(item.source.nbytes for item in plan.items), 0
    writer = GGUFWriter(
        path,
        plan.metadata,
        [item.target for item in plan.items],
        split_max_size=split_max_size,
        split_max_tensors=split_max_tensors,
        split=plan.split,
        inputs=plan.inputs,
    )
    pool = ThreadPoolExecutor(n_threads)
    begun: deque[tuple[_Slab, Future[tuple[NDArray[np.uint8], Loss]]]] = deque()
    slabs = _slabs(plan)
    try:
        with writer:
            while True:
                while len(begun) < _AHEAD * n_threads and (slab := next(slabs, None)) is not None:
                    begun.append((slab, pool.submit(_run, slab)))
                if not begun:
                    break
                slab, future = begun.popleft()
                blocks, loss = future.result()
                source, name = slab.item.source, slab.item.target.name
                writer.write(name, blocks)
                source.release(slab.first, slab.end)
                losses[name] += loss
                done += (slab.end - slab.first) * source.type.row_bytes(source.ne[0])
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    return writer, list(losses.values())


def _slabs(plan: Plan) -> Iterator[_Slab]:
    for item in plan.items:
        n_rows = item.target.ne[1] if len(item.target.ne) > 1 else 1
        step = max(1, _SLAB // max(1, item.target.ne[0]))
        for expert in range(0, item.target.n_rows if item.target.nbytes else 0, max(1, n_rows)):
            for first in range(expert, expert + n_rows, step):
                yield _Slab(item, first, min(first + step, expert + n_rows))


def _run(slab: _Slab) -> tuple[NDArray[np.uint8], Loss]:
    """Return the blocks of a slab as the file will hold them, and their loss."""
    item, source, type = slab.item, slab.item.source, slab.item.target.type
    blocks = source.blocks(slab.first, slab.end)
    if source.type.dtype.kind == "i":
        return blocks, Loss()
    x = item.changed(dequantize(blocks, source.type), slab.first)
    if item.is_copy:
        if count_bad(x)[0]:
            raise _bad_weights(source)
        return blocks, Loss()
    importance = item.importance_at(slab.first)
    try:
        blocks = item.rounding(item, x, slab.first)
    except FormatError as reason:
        raise (_bad_weights(source) if count_bad(x)[0] else reason) from None
    loss = _loss(x, blocks, type)
    if math.isfinite(loss.error):
        return blocks, loss
    if importance is not None and math.isfinite(_loss(x, quantize(x, type, n_threads=1), type).error):
        raise GgufRunError(
            f"{item.imatrix_path}: the importance weights of {quoted(source.name)} go up to {importance.max():.3g}, "
            "too large to compute with: make the imatrix again"
        )
    raise GgufRunError(
        f"{source.file.path}: tensor {quoted(source.name)} has weights up to {np.abs(x).max():.3g}, too large for "
        f"{type.name}: choose another type for it"
    )


def _loss(x: NDArray[np.float32], blocks: NDArray[np.uint8], type: TensorType) -> Loss:
    error = dequantize(blocks, type)
    error -= x
    return Loss(_sum_of_squares(error), _sum_of_squares(x))


def _sum_of_squares(x: NDArray[np.float32]) -> float:
    # np.dot would start the threads of the linear algebra library.
    return float(np.einsum("ij,ij->", x, x))


def _bad_weights(tensor: Tensor) -> GgufRunError:
    """Return an error that says how many weights of a tensor are NaN or infinite."""
    step = max(1, _SLAB // tensor.ne[0])
    slabs = [(row, min(row + step, tensor.n_rows)) for row in range(0, tensor.n_rows, step)]
    bad = [count_bad(dequantize(tensor.blocks(row, end), tensor.type)) for row, end in slabs]
    count = sum(n for n, _ in bad)
    first = next(row * tensor.ne[0] + at for (row, _), (n, at) in zip(slabs, bad, strict=True) if n)
    return GgufRunError(
        f"{tensor.file.path}: tensor {quoted(tensor.name)}: {count} of {tensor.n_elements} weights are NaN or "
        f"infinite, the first at index {first}: the file is damaged, get it again"
    )


@dataclass(frozen=True)
class TypeReport:
    """The tensors that are written as one type. Copied tensors have no loss; None: all are copied."""

    type: str
    n_tensors: int
    nbytes: int
    bits_per_weight: float
    rmse: float | None  # root of the mean squared error of a weight
    loss: Loss | None
    worst: tuple[str, Loss] | None  # the tensor with the largest relative loss


def bits_per_weight(tensors: Sequence[TensorInfo]) -> float:
    """Return the bits per weight of all tensors together, 0 without weights."""
    return 8 * sum(t.nbytes for t in tensors) / max(1, sum(t.n_elements for t in tensors))


def type_reports(items: Sequence[Item], losses: Sequence[Loss]) -> list[TypeReport]:
    """Return a report for each type, in the order in which the types first occur. losses: one for each item."""
    reports = []
    for name in dict.fromkeys(item.target.type.name for item in items):
        group = [(item, loss) for item, loss in zip(items, losses, strict=True) if item.target.type.name == name]
        targets = [item.target for item, _ in group]
        converted = [(item.target, loss) for item, loss in group if not item.is_copy]
        rmse = total = worst = None
        if converted:
            total = sum((loss for _, loss in converted), Loss())
            rmse = (total.error / max(1, sum(target.n_elements for target, _ in converted))) ** 0.5
            tensor, loss = max(converted, key=lambda pair: pair[1].relative())
            worst = tensor.name, loss
        nbytes = sum(target.nbytes for target in targets)
        reports.append(TypeReport(name, len(group), nbytes, bits_per_weight(targets), rmse, total, worst))
    return reports
