"""A recorded step on the GPU: what changes from step to step is written to device memory, then the launches follow."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gguf_run.kernels_gpu.device import current
from gguf_run.kernels_gpu.matmul import FEW
from gguf_run.kernels_gpu.memory import GpuBuffer, padded


def bucket(n_row: int) -> int:
    """How many rows run for n_row: few kinds of small steps, so that each is compiled, or captured, once."""
    return next((m for m in (1, 2, 4, FEW) if n_row <= m), n_row)


class StepInput:
    """ids, seqs, positions int32[n_batch] of the tokens and rows int32[n_outputs] of the wanted results, on the device.

    Rows that only fill a bucket up have position -1: they are not appended to any cache.
    """

    def __init__(self, n_batch: int, n_outputs: int, device: torch.device) -> None:
        n_batch, n_outputs = padded(n_batch), padded(n_outputs)
        self._host = torch.zeros(3, n_batch, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._host_rows = torch.zeros(n_outputs, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = self._host.to(device, copy=True)
        self.ids, self.seqs, self.positions = self._device
        self.rows = self._host_rows.to(device, copy=True)
        self.n_tokens = self.n_out = 0

    def set_tokens(self, ids: NDArray[np.int32], runs: Sequence[Any]) -> None:
        """runs: models.backend.Run."""
        tokens = self._host.numpy()
        self.n_tokens = len(ids)
        tokens[:] = 0
        tokens[2] = -1
        tokens[0, : len(ids)] = ids
        at = 0
        for seq, n_past, n_tokens in runs:
            tokens[1, at : at + n_tokens] = seq
            tokens[2, at : at + n_tokens] = np.arange(n_past, n_past + n_tokens)
            at += n_tokens
        self._device.copy_(self._host)  # waits: the host's memory is written again before the next step

    def set_rows(self, rows: Sequence[int]) -> None:
        self.n_out = len(rows)
        self._host_rows.zero_()
        self._host_rows.numpy()[: len(rows)] = rows
        self.rows.copy_(self._host_rows)


class GpuProgram:
    """models.backend.Program."""

    def __init__(
        self,
        step: StepInput,
        before: Sequence[Callable[[int], None]],
        after: Sequence[Callable[[int], None]],
        result: GpuBuffer,
        n_batch: int,
        n_outputs: int,
    ) -> None:
        """before, after: ops before the choice of result rows, and from it on."""
        self.n_batch, self.n_outputs = n_batch, n_outputs
        self._step, self._before, self._after, self._result = step, list(before), list(after), result

    def run(self, ids: NDArray[np.int32], runs: Sequence[Any], rows: Sequence[int]) -> NDArray[np.float32]:
        if not self._before:  # its memory is gone
            raise ValueError("the program is closed")
        self._step.set_tokens(ids, runs)
        self._step.set_rows(rows)
        self._launch(self._before, len(ids))
        return self._results(len(rows))

    def more(self, rows: Sequence[int]) -> NDArray[np.float32]:
        self._step.set_rows(rows)
        return self._results(len(rows))

    def _results(self, n_row: int) -> NDArray[np.float32]:
        if n_row:
            self._launch(self._after, n_row)
        return self._result.data[:n_row].cpu().numpy()

    def _launch(self, ops: Sequence[Callable[[int], None]], n_row: int) -> None:
        with current(self._result.memory.device):
            for op in ops:
                op(bucket(n_row))

    def close(self) -> None:
        self._before.clear()
        self._after.clear()
