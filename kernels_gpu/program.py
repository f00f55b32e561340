"""A step on the GPU: what changes from step to step is written to device memory, then the launches follow."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from gguf_run.kernels_gpu.buffers import Launch, Memory
from gguf_run.kernels_gpu.device.device import current
from gguf_run.kernels_gpu.device.errors import gpu_errors
from gguf_run.kernels_gpu.device.tuning import FEW, GRAPHS, padded
from gguf_run.kernels_gpu.fuse import fuse
from gguf_run.kernels_gpu.launch import bind
from gguf_run.kernels_gpu.rows.top import SIZES, Finder, Masks
from gguf_run.models.backend import Results, Run, Tops
from gguf_run.models.operands import Buffer, Rotation
from gguf_run.models.ops import Observe, Rope

if TYPE_CHECKING:
    from gguf_run.models.protocol import Program


def bucket(n_row: int) -> int:
    """Return how many rows run for n_row: few kinds of small steps, so that each is compiled, or captured, once."""
    return next((m for m in GRAPHS if n_row <= m), n_row)


class Launches:
    """Launches that follow each other: those for few rows, or those for more.

    On a GPU those of a bucket are captured as a graph: one for steps that are wide (StepInput.is_wide), one for others.
    """

    def __init__(self, few: Sequence[Launch], many: Sequence[Launch], memory: Memory, capture: bool) -> None:
        self._few, self._many, self._graphs = list(few), list(many), dict[tuple[int, bool], torch.cuda.CUDAGraph]()
        self._captures, self._memory = capture and memory.device.type == "cuda", memory

    def run(self, n_row: int, is_wide: bool) -> None:
        n = bucket(n_row)
        if (n, is_wide) in self._graphs:
            self._graphs[n, is_wide].replay()
            return
        self.launch(n)
        if n <= GRAPHS[-1] and self._captures:  # all kernels are compiled and loaded now; capturing runs nothing
            graph, (stream, pool) = torch.cuda.CUDAGraph(), self._memory.capturing
            # what other threads do meanwhile is no error
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                self.launch(n)
            self._graphs[n, is_wide] = graph

    def launch(self, n: int) -> None:
        """Launch all kernels for n rows, a bucket."""
        for launch in self._few if n <= FEW else self._many:
            launch(n)

    def followed_by(self, launch: Launch) -> "Launches":
        return Launches([*self._few, launch], [*self._many, launch], self._memory, self._captures)

    def clear(self) -> None:
        for held in (self._few, self._many, self._graphs):
            held.clear()


class GpuProgram:
    """models.protocol.Program."""

    n_top = SIZES[-1]

    def __init__(self, memory: Memory, parts: Sequence[Sequence[Any]], after: Sequence[Any], result: Buffer) -> None:
        """Bind lists of ops to memory. See models.protocol.Backend.program."""
        self.n_batch, self.n_outputs = memory.n_batch, memory.n_outputs
        self.memory, self._result = memory, memory.rows(result)
        capture = not any(isinstance(op, Observe) for ops in (*parts, after) for op in ops)  # its rows change each step
        known: set[Rotation] = set()
        launches = []
        for ops in (*parts, after):
            if ops is after:  # its rows are others
                known.clear()
            few, many = (bind(fuse(ops, few=few, known=known), memory) for few in (True, False))
            launches.append(Launches(few, many, memory, capture))
            known |= {op.rotation for op in ops if isinstance(op, Rope)}
        *self._parts, self._after = launches
        memory.allocate()
        self._host = torch.zeros(padded(self.n_outputs), result.width, pin_memory=memory.device.type == "cuda")
        self._finders = dict[int, tuple[Launches, Finder]]()
        self._masks: Masks | None = None  # made with the first finder
        self._closed = False

    @gpu_errors()
    def run(
        self, ids: NDArray[np.int32], runs: Sequence[Run], rows: Sequence[int], part: int = 0, tops: Tops = ()
    ) -> Results:
        if self._closed:  # its memory is gone
            raise ValueError("the program is closed")
        with current(self.memory.device):
            if part == 0:
                self.memory.step.set(rows, ids, runs)
            elif rows:
                self.memory.step.set(rows)
            self._parts[part].run(len(ids), self.memory.step.is_wide[False])
            if any(tops):
                return self._greatest(tops)
            return Results(self._results(len(rows)))

    def _greatest(self, tops: Tops) -> Results:
        """Return the greatest values of result rows, and all values of those without a Top."""
        few, most = [i for i, top in enumerate(tops) if top is not None], max(top.n for top in tops if top is not None)
        size = next(n for n in SIZES if most <= n)
        if self._masks is None:
            self._masks = Masks(len(self._result), self._result.shape[1], self.memory.device)
        if size not in self._finders:
            finder = Finder(self._result, size, self._masks)
            self._finders[size] = self._after.followed_by(finder.launch), finder
        launches, finder = self._finders[size]
        self._masks.send(tops)
        launches.run(len(tops), self.memory.step.is_wide[True])
        whole = [i for i, top in enumerate(tops) if top is None]
        for at, i in enumerate(whole):
            self._host[at].copy_(self._result[i], non_blocking=True)
        values, columns = finder.fetch(len(tops))  # waits for all copies
        return Results(self._host[: len(whole)].numpy(), values[few, :most], columns[few, :most])

    @gpu_errors()
    def more(self, rows: Sequence[int]) -> NDArray[np.float32]:
        with current(self.memory.device):
            self.memory.step.set(rows)
            return self._results(len(rows))

    def _results(self, n_row: int) -> NDArray[np.float32]:
        host = self._host[:n_row]
        if n_row:
            self._after.run(n_row, self.memory.step.is_wide[True])
            host.copy_(self._result[:n_row], non_blocking=True)
            if self.memory.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        return host.numpy()

    @gpu_errors()
    def to_host(self, buffer: Buffer, n_tokens: int) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = self.memory.rows(buffer)[:n_tokens].cpu().numpy()
        return rows

    @gpu_errors()
    def copy_from(self, other: "Program", source: Buffer, n_tokens: int, target: Buffer) -> None:
        """Copy rows. From GPU to GPU the host does not wait: torch orders the copy after earlier work of both GPUs."""
        to = self.memory.rows(target)[:n_tokens]
        if isinstance(other, GpuProgram):
            to.copy_(other.memory.rows(source)[:n_tokens], non_blocking=True)
        else:
            to.copy_(torch.from_numpy(other.to_host(source, n_tokens)))

    def close(self) -> None:
        self._closed = True
        for launches in (*self._parts, self._after, *(launches for launches, _ in self._finders.values())):
            launches.clear()
        self._finders.clear()
