"""Quantizing a file: slabs of rows go through a pool of threads and are written in order.

Only a few slabs are in memory at any time, whatever the size of the tensors; the input is a mapped file, whose
pages are given back as soon as their slab is done.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.formats.gguf.writer import GGUFWriter
from gguf_run.formats.quantizers.quantizer import count_bad, quantize
from gguf_run.runtime.quantize.plan import Item, Plan

_SLAB = 1 << 18  # weights: 1 MB of f32, which stays in a core's cache from one step to the next
_AHEAD = 4  # slabs per thread that are begun before they are written


@dataclass(frozen=True)
class Loss:
    """What a tensor lost: sums over its weights of the squared errors and of the squares. Zero where it was copied."""

    error: float = 0.0
    power: float = 0.0

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.error + other.error, self.power + other.power)

    def relative(self) -> float:
        """Root of error by power, 0 for a tensor of zeros."""
        return math.sqrt(self.error / self.power) if self.power else 0.0


@dataclass(frozen=True)
class _Slab:
    """Rows first .. end of a tensor, all of one expert."""

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
    """Write the planned model; return the writer, which knows the files, and what each tensor lost.

    progress: is told the bytes of the input that are done, and all. GgufRunError if weights are NaN or infinite, too
    large for their type, or if the output cannot be written: then nothing of it is left.
    """
    losses = [Loss() for _ in plan.items]
    index = {item.target.name: i for i, item in enumerate(plan.items)}
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
                writer.write(slab.item.target.name, blocks)
                source = slab.item.source
                source.release(slab.first, slab.end)
                losses[index[slab.item.target.name]] += loss
                done += (slab.end - slab.first) * source.type.row_bytes(source.ne[0])
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    return writer, losses


def _slabs(plan: Plan) -> Iterator[_Slab]:
    for item in plan.items:
        n_rows = item.target.ne[1] if len(item.target.ne) > 1 else 1
        step = max(1, _SLAB // item.target.ne[0])
        for expert in range(0, item.target.n_rows, n_rows):
            for first in range(expert, expert + n_rows, step):
                yield _Slab(item, first, min(first + step, expert + n_rows))


def _run(slab: _Slab) -> tuple[NDArray[np.uint8], Loss]:
    """Return the blocks of a slab as they will be written, and what they lost."""
    item, source, type = slab.item, slab.item.source, slab.item.target.type
    blocks = source.blocks(slab.first, slab.end)
    if source.type.dtype.kind == "i":
        return blocks, Loss()
    x = dequantize(blocks, source.type)
    if item.is_copy:
        if count_bad(x)[0]:
            raise _bad_weights(source)
        return blocks, Loss()
    importance = item.importance
    if importance is not None:
        importance = importance[slab.first // source.ne[1] % len(importance)]
    try:
        blocks = quantize(x, type, importance, n_threads=1)
    except FormatError as reason:
        raise (_bad_weights(source) if count_bad(x)[0] else reason) from None
    error = dequantize(blocks, type)
    error -= x
    loss = Loss(_sum_of_squares(error), _sum_of_squares(x))
    if not math.isfinite(loss.error):
        raise GgufRunError(
            f"{source.file.path}: tensor {quoted(source.name)} has weights up to {np.abs(x).max():.3g}, too large for "
            f"{type.name}: choose another type for it"
        )
    return blocks, loss


def _sum_of_squares(x: NDArray[np.float32]) -> float:
    # A dot product would start threads of the linear algebra library's own.
    return float(np.einsum("ij,ij->", x, x))


def _bad_weights(tensor: Tensor) -> GgufRunError:
    """The error that tells of all weights of a tensor that are no numbers."""
    step = max(1, _SLAB // tensor.ne[0])
    count, first = 0, -1
    for row in range(0, tensor.n_rows, step):
        n_bad, at = count_bad(dequantize(tensor.blocks(row, min(row + step, tensor.n_rows)), tensor.type))
        if n_bad and first < 0:
            first = row * tensor.ne[0] + at
        count += n_bad
    return GgufRunError(
        f"{tensor.file.path}: tensor {quoted(tensor.name)}: {count} of {tensor.n_elements} weights are NaN or "
        f"infinite, the first at index {first}: the file is damaged, get it again"
    )
