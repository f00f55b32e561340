"""A recorded step on the GPU: what changes from step to step is written to device memory, then the launches follow."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gguf_run.kernels_gpu.device.device import current
from gguf_run.kernels_gpu.device.errors import gpu_errors
from gguf_run.kernels_gpu.matmul.launch import FEW
from gguf_run.kernels_gpu.panels.memory import GpuBuffer, padded
from gguf_run.kernels_gpu.rows.top import SIZES, Top


def bucket(n_row: int) -> int:
    """How many rows run for n_row: few kinds of small steps, so that each is compiled, or captured, once."""
    return next((m for m in (1, 2, 4, FEW) if n_row <= m), n_row)


class StepInput:
    """ids, seqs, positions int32[n_batch] of the tokens and rows int32[n_outputs] of the wanted results, on the device.

    Rows that only fill a bucket up have position -1: they are not appended to any cache.
    """

    def __init__(self, n_batch: int, n_outputs: int, device: torch.device) -> None:
        n_batch, n_outputs = padded(n_batch), padded(n_outputs)
        self._host = torch.zeros(3 * n_batch + n_outputs, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = self._host.to(device, copy=True)
        self.ids, self.seqs, self.positions = self._device[: 3 * n_batch].view(3, -1)
        self.rows = self._device[3 * n_batch :]
        self._tokens, self._rows = np.split(self._host.numpy(), [3 * n_batch])
        self._sent = torch.cuda.Event() if device.type == "cuda" else None
        self.n_tokens = self.n_out = 0

    def set(self, rows: Sequence[int], ids: NDArray[np.int32] | None = None, runs: Sequence[Any] = ()) -> None:
        """runs: models.backend.Run; without ids, the tokens stay."""
        if self._sent is not None:
            self._sent.synchronize()  # what was sent last has been read
        self.n_out = len(rows)
        self._rows[:] = 0
        self._rows[: len(rows)] = rows
        if ids is not None:
            tokens = self._tokens.reshape(3, -1)
            self.n_tokens = at = 0
            tokens[:] = [[0], [0], [-1]]
            tokens[0, : len(ids)] = ids
            for seq, n_past, n_tokens in runs:
                tokens[1, at : at + n_tokens] = seq
                tokens[2, at : at + n_tokens] = np.arange(n_past, n_past + n_tokens)
                at += n_tokens
            self.n_tokens = len(ids)
        self._device.copy_(self._host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()


class Launches:
    """Ops that follow each other. On a GPU, those for a few rows are captured as a graph, one for each bucket."""

    def __init__(self, ops: Sequence[Callable[[int], None]], device: torch.device, capture: bool) -> None:
        self._ops, self._graphs = list(ops), dict[int, torch.cuda.CUDAGraph]()
        self._most = FEW if capture and device.type == "cuda" else 0
        self._device = device

    def run(self, n_row: int) -> None:
        n = bucket(n_row)
        if n in self._graphs:
            self._graphs[n].replay()
            return
        for op in self._ops:
            op(n)
        if n <= self._most:  # that has compiled and loaded all kernels: now they are recorded, which runs nothing
            graph = torch.cuda.CUDAGraph()
            # torch's own stream for captures is one device's; what other threads do meanwhile is no error
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for op in self._ops:
                    op(n)
            self._graphs[n] = graph

    def followed_by(self, op: Callable[[int], None]) -> "Launches":
        return Launches([*self._ops, op], self._device, self._most > 0)

    def clear(self) -> None:
        self._ops.clear()
        self._graphs.clear()


class GpuProgram:
    """models.backend.Program."""

    def __init__(
        self,
        step: StepInput,
        parts: Sequence[Launches],
        after: Launches,
        result: GpuBuffer,
        n_batch: int,
        n_outputs: int,
    ) -> None:
        """parts, after: ops before the choice of result rows, and from it on."""
        self.n_batch, self.n_outputs = n_batch, n_outputs
        self._step, self._parts, self._after, self._result = step, parts, after, result
        self._device = result.memory.device
        self._host = torch.zeros(padded(n_outputs), result.width, pin_memory=self._device.type == "cuda")
        self._tops = dict[int, tuple[Launches, Top]]()
        self._closed = False

    @property
    def n_top(self) -> int:
        return SIZES[-1]

    @gpu_errors()
    def run(
        self, ids: NDArray[np.int32], runs: Sequence[Any], rows: Sequence[int], part: int = 0
    ) -> NDArray[np.float32]:
        with current(self._device):
            self._run_before(ids, runs, rows, part)
            return self._results(len(rows))

    @gpu_errors()
    def run_top(
        self, ids: NDArray[np.int32], runs: Sequence[Any], row: int, k: int, part: int = 0
    ) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        size = next(n for n in SIZES if k <= n)
        with current(self._device):
            self._run_before(ids, runs, [row], part)
            if size not in self._tops:
                top = Top(self._result, size)
                self._tops[size] = self._after.followed_by(top.launch), top
            launches, top = self._tops[size]
            launches.run(1)
            return top.fetch(k)

    def _run_before(self, ids: NDArray[np.int32], runs: Sequence[Any], rows: Sequence[int], part: int) -> None:
        if self._closed:  # its memory is gone
            raise ValueError("the program is closed")
        if part == 0:
            self._step.set(rows, ids, runs)
        elif rows:
            self._step.set(rows)
        self._parts[part].run(len(ids))

    @gpu_errors()
    def more(self, rows: Sequence[int]) -> NDArray[np.float32]:
        with current(self._device):
            self._step.set(rows)
            return self._results(len(rows))

    def _results(self, n_row: int) -> NDArray[np.float32]:
        host = self._host[:n_row]
        if n_row:
            self._after.run(n_row)
            host.copy_(self._result.data[:n_row], non_blocking=True)
            if self._device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        return host.numpy()

    def close(self) -> None:
        self._closed = True
        for launches in (*self._parts, self._after, *(launches for launches, _ in self._tops.values())):
            launches.clear()
        self._tops.clear()
