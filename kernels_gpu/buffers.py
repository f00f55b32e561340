"""The memory of a program: all that its launches read and write. It is made once and never moves.

What changes from step to step (ids, positions, result rows) is read from device memory too. So the launches for one
number of rows can be captured as a graph.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as Array

from gguf_run.kernels_gpu.device.tuning import FEW, GRAPHS, SHORT, Tuning, padded
from gguf_run.kernels_gpu.fuse import BLOCK
from gguf_run.kernels_gpu.panels.memory import GpuExperts
from gguf_run.kernels_gpu.tables import Cut, Items, Pages
from gguf_run.models.adapter_scales import AdapterScales
from gguf_run.models.backend import Run
from gguf_run.models.operands import Buffer, Rotation
from gguf_run.models.pages import PageTable
from gguf_run.models.routing import Mixture

Launch = Callable[[int], None]  # launches the kernels of an op for so many rows
Strided = tuple[Array | None, int]  # rows and the elements between them, as kernels take them


RUN_WORDS = ("first", "n_tokens", "n_past", "reads", "writes")  # first: number of the first token; see backend.Run


class Tokens(NamedTuple):
    """Sequence and position of the tokens of some rows, on the device."""

    seqs: Array  # int32[rows]
    positions: Array  # int32[rows]
    is_long: Array  # int32[rows]: 0 or 1, see models.backend.Run


class StepInput:
    """The tokens of a step and the rows whose results are wanted, on the device.

    Rows that only fill up a bucket (program.bucket) have position -1: they are not appended to any cache.
    """

    def __init__(self, n_batch: int, n_outputs: int, device: torch.device) -> None:
        n_batch, n_outputs = padded(n_batch), padded(n_outputs)
        sizes = 5 * n_batch, len(RUN_WORDS) * n_batch, n_outputs, 3 * n_outputs
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = self._host.to(device, copy=True)
        tokens, runs, self.rows, wanted = self._device.split(sizes)  # rows: int32[n_outputs]
        # int32[n_batch] each. is_long: 0 or 1, see models.backend.Run. run_of: the token's row of runs.
        self.ids, self.seqs, self.positions, self.is_long, self.run_of = tokens.view(5, -1)
        self.runs = runs.view(n_batch, -1)  # int32[n_batch, RUN_WORDS]; rows behind the step's runs are 0
        self._of = Tokens(self.seqs, self.positions, self.is_long), Tokens(*wanted.view(3, -1))
        self._pages, self._items = dict[PageTable, Pages](), dict[tuple[Cut, bool, bool], Items]()
        self._scales = dict[AdapterScales, Array]()
        tokens, runs, rows, wanted = self._host.split(sizes)
        self._tokens, self._runs, self._rows = tokens.view(5, -1).numpy(), runs.view(n_batch, -1).numpy(), rows.numpy()
        self._wanted = wanted.view(3, -1).numpy()
        self._sent = torch.cuda.Event() if device.type == "cuda" else None
        self.n_tokens = self.n_out = self.n_runs = 0
        self.is_wide = [False, False]  # of all tokens, of those whose results are wanted: a run is longer than SHORT

    def n_run(self, n_row: int) -> int:
        """Return the runs to launch for: those of the step. A graph serves any runs: one for each row."""
        return n_row if n_row <= GRAPHS[-1] else self.n_runs

    def pages(self, table: PageTable) -> Array:
        """Return the device's copy of a page table. Each step brings it up to date."""
        if table not in self._pages:
            self._pages[table] = Pages(table, self._device.device)
        return self._pages[table].rows

    def scales(self, scales: AdapterScales) -> Array:
        """Return the device's copy of the scales of adapters."""
        if scales not in self._scales:
            self._scales[scales] = torch.zeros(scales.values.shape, device=self._device.device)
        return self._scales[scales]

    def items(self, cut: Cut, *, wide: bool, outputs: bool) -> Items:
        """Return the items of all tokens, or of those whose results are wanted, in steps that are `wide` or not."""
        key = cut, wide, outputs
        if key not in self._items:
            self._items[key] = Items(cut, len(self.rows) if outputs else len(self.ids), self._device.device)
        return self._items[key]

    def of(self, outputs: bool) -> Tokens:
        """Return all tokens, or those whose results are wanted."""
        return self._of[outputs]

    def set(self, rows: Sequence[int], ids: NDArray[np.int32] | None = None, runs: Sequence[Run] = ()) -> None:
        """Write the wanted rows and the tokens. Without ids the tokens stay."""
        if self._sent is not None:
            self._sent.synchronize()  # the device has read what was sent last
        self.n_out, wanted = len(rows), np.fromiter(rows, np.intp, len(rows))
        self._rows[:] = 0
        self._rows[: len(rows)] = wanted
        if ids is not None:
            self._set_tokens(ids, runs)
            for pages in self._pages.values():
                pages.send()
            for scales, memory in self._scales.items():
                memory.copy_(torch.from_numpy(scales.values), non_blocking=True)
        self._wanted[:] = [[0], [-1], [0]]
        self._wanted[:, : len(rows)] = self._tokens[1:4, wanted]
        if any(outputs for _, _, outputs in self._items):
            first = np.flatnonzero(np.diff(self._tokens[4, wanted], prepend=-1))
            n_tokens = np.diff(first, append=len(rows))
            last = self._tokens[2, wanted[first + n_tokens - 1]]
            self._send_items(True, first, n_tokens, last.astype(np.intp))
        self._device.copy_(self._host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def _send_items(
        self, of: bool, first: NDArray[np.intp], n_tokens: NDArray[np.intp], last: NDArray[np.intp]
    ) -> None:
        """Send the items of all tokens, or `of` those whose results are wanted. See Items.send."""
        self.is_wide[of] = bool(n_tokens.max(initial=0) > SHORT)
        for (_, wide, outputs), items in self._items.items():
            if outputs == of and wide == self.is_wide[of]:
                items.send(first, n_tokens, last)

    def _set_tokens(self, ids: NDArray[np.int32], runs: Sequence[Run]) -> None:
        """Write the tokens of a step and its runs."""
        table = np.fromiter(chain.from_iterable(runs), np.intp, len(Run._fields) * len(runs)).reshape(len(runs), -1).T
        seq, n_past, n_tokens, is_long, reads, writes = table
        first = np.cumsum(n_tokens) - n_tokens
        run_of = np.repeat(np.arange(len(runs)), n_tokens)
        positions = np.arange(len(ids)) + (n_past - first)[run_of]
        self._tokens[:], self._runs[:] = [[0], [0], [-1], [0], [0]], 0
        self._tokens[:, : len(ids)] = ids, seq[run_of], positions, is_long[run_of], run_of
        self._runs[: len(runs)].T[:] = first, n_tokens, n_past, reads, writes
        self.n_tokens, self.n_runs = len(ids), len(runs)
        self._send_items(False, first, n_tokens, n_past + n_tokens - 1)


class Int8(NamedTuple):
    """Rows as blocks of 32 int8 (rows/quantize.py). Kernels take it as a tuple."""

    xq: Array  # int32[rows, n / 4]: four values each
    xd: Array  # f32[rows, n / 32]: factors of the blocks
    xs: Array  # int32[rows, n / 32]: the sums of a block's halves, 16 bits each

    @classmethod
    def empty(cls, n_row: int, n: int, device: torch.device) -> "Int8":
        xq = torch.zeros(n_row, n // 4, dtype=torch.int32, device=device)
        xd = torch.zeros(n_row, n // BLOCK, device=device)
        return cls(xq, xd, torch.zeros_like(xd, dtype=torch.int32))


class Halves(NamedTuple):
    """Rows as f16 (rows/quantize.py). Kernels take it as a tuple."""

    xh: Array  # f16[rows, n filled up to a multiple of 256]
    xm: Array  # f32[rows]: factors of the rows

    @classmethod
    def empty(cls, n_row: int, n: int, device: torch.device) -> "Halves":
        width = -(-n // 256) * 256
        return cls(torch.zeros(n_row, width, dtype=torch.float16, device=device), torch.zeros(n_row, device=device))


class PairMemory:
    """Memory for the pairs of a token and one of its experts. The mixtures of a program use it one after the other."""

    def __init__(self, n_row: int, n_used: int, n_expert: int, n_ff: int, n_embd: int, device: torch.device) -> None:
        n_pairs, n_few = n_row * n_used, FEW * n_used
        self.chosen, self.order = torch.zeros(2, n_pairs, dtype=torch.int32, device=device)  # matmul/moe_route.py
        self.weights = torch.zeros(n_pairs, device=device)
        self.counts = torch.zeros(n_expert, dtype=torch.int32, device=device)
        self.made = torch.zeros(n_few, n_ff, device=device)  # few tokens: the rows that down reads
        self.int8 = Int8.empty(n_few, n_ff, device)  # few tokens: `made` as int8
        self.halves = Halves.empty(n_pairs, n_ff, device)  # many tokens: the rows that down reads
        self.raw = torch.zeros(n_pairs, max(2 * n_ff, n_embd), device=device)  # results of products


_SCRATCH = {
    "weights": torch.float16,  # a part of a matrix, dequantized
    "raw": torch.float32,  # the result of a product
    "counts": torch.int32,  # programs that have finished: 0 before and after a launch
    "sums": torch.float32,  # of attention's parts
    "stats": torch.float32,  # what the sums are relative to
}


class Memory:
    """All memory of a program, by the names of its buffers. bind (launch.py) asks for it; the launches use it."""

    def __init__(self, device: torch.device, tuning: Tuning, n_batch: int, n_outputs: int) -> None:
        self.device, self.tuning, self.n_batch, self.n_outputs = device, tuning, n_batch, n_outputs
        self.step = StepInput(n_batch, n_outputs, device)
        self.scratch = dict[str, Array]()  # by the names of _SCRATCH: ops use it one after the other
        self._n_row = {False: padded(n_batch), True: padded(n_outputs)}
        self._n_scratch = dict.fromkeys(_SCRATCH, 0)
        self._buffers = dict[str, Array]()
        self._int8 = dict[Buffer, Int8]()
        self._halves = dict[Buffer, Halves]()
        self._angles = dict[tuple[Rotation, bool], Array]()
        self._pairs = dict[tuple[int, ...], PairMemory]()

    @cached_property
    def capturing(self) -> tuple[torch.cuda.Stream, Any]:
        """The stream on which graphs are captured, and their memory. cuBLAS keeps up to 32 MB for each such stream."""
        return torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()

    def n_row(self, x: Buffer) -> int:
        """Return the rows of a buffer's memory."""
        return self._n_row[x.outputs]

    def rows(self, x: Buffer) -> Array:
        """Return a buffer's memory, f32[rows, width], as a view."""
        if x.name not in self._buffers:
            self._buffers[x.name] = torch.zeros(self.n_row(x), -(-x.row_width // 4) * 4, device=self.device)
        return self._buffers[x.name][:, x.start : x.start + x.width]

    def strided(self, x: Buffer | None) -> Strided:
        """Return a buffer's memory and the elements between its rows; (None, 0) if there is no buffer."""
        return (None, 0) if x is None else (self.rows(x), self.rows(x).stride(0))

    def int8(self, x: Buffer) -> Int8:
        """Return memory for a buffer's int8 form."""
        if x not in self._int8:
            self._int8[x] = Int8.empty(FEW, x.width, self.device)
        return self._int8[x]

    def halves(self, x: Buffer) -> Halves:
        """Return memory for a buffer's f16 form."""
        if x not in self._halves:
            self._halves[x] = Halves.empty(self.n_row(x), x.width, self.device)
        return self._halves[x]

    def eights(self, halves: Halves, n: int) -> int:
        """Return how n rows are stored as f16, see half_at in rows/quantize.py."""
        return len(halves.xh) // 8 if n <= self.tuning.small else 0

    def angles(self, rotation: Rotation, outputs: bool) -> Array:
        """Return memory for the cosines and sines of a rotation, f32[rows, n_rot / 2, 2]. outputs: as in Buffer."""
        if (rotation, outputs) not in self._angles:
            size = self._n_row[outputs], rotation.n_rot // 2, 2
            self._angles[rotation, outputs] = torch.zeros(*size, device=self.device)
        return self._angles[rotation, outputs]

    def pairs(self, x: Buffer, experts: GpuExperts, mixture: Mixture) -> PairMemory:
        """Return the memory of a mixture. Mixtures of the same sizes share it."""
        key = self.n_row(x), mixture.n_used, experts.n_expert, experts.down.n_in, x.width
        if key not in self._pairs:
            self._pairs[key] = PairMemory(*key, self.device)
        return self._pairs[key]

    def want(self, **sizes: int) -> None:
        """Ask for scratch memory of at least so many elements, by the names of _SCRATCH."""
        self._n_scratch |= {name: max(n, self._n_scratch[name]) for name, n in sizes.items()}

    def allocate(self) -> None:
        """Make the scratch memory. All ops must be bound."""
        for name, n in self._n_scratch.items():
            self.scratch[name] = torch.zeros(n, dtype=_SCRATCH[name], device=self.device)
