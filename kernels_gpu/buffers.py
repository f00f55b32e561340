"""The memory of a program: all that its launches read and write. It is made once and never moves.

What changes from step to step (ids, positions, result rows) is read from device memory too. So the launches for one
number of rows can be captured as a graph.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as Array

from gguf_run.kernels_gpu.device.tuning import FEW, Tuning, padded
from gguf_run.kernels_gpu.fuse import BLOCK
from gguf_run.kernels_gpu.panels.memory import GpuExperts
from gguf_run.kernels_gpu.tables import Pages, Tiles
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
        self._pages, self._tiles = dict[PageTable, Pages](), dict[tuple[int, bool], Tiles]()
        self._scales = dict[AdapterScales, Array]()
        tokens, runs, rows, wanted = self._host.split(sizes)
        self._tokens, self._runs, self._rows = tokens.view(5, -1).numpy(), runs.view(n_batch, -1).numpy(), rows.numpy()
        self._wanted = wanted.view(3, -1).numpy()
        self._sent = torch.cuda.Event() if device.type == "cuda" else None
        self.n_tokens = self.n_out = self.n_runs = 0

    def n_run(self, n_row: int) -> int:
        """Return the runs to launch for: those of the step. A graph for few rows serves any runs: one for each row."""
        return n_row if n_row <= FEW else self.n_runs

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

    def tiles(self, size: int, outputs: bool) -> Tiles:
        """Return tiles of up to `size` tokens, or of those whose results are wanted. See stands_alone."""
        if (size, outputs) not in self._tiles:
            n_row = len(self.rows) if outputs else len(self.ids)
            self._tiles[size, outputs] = Tiles(size, n_row, self._device.device)
        return self._tiles[size, outputs]

    def stands_alone(self, n_row: int) -> bool:
        """Return whether each of n_row tokens is a tile: always for few, else if most of the runs are one token."""
        return n_row <= FEW or n_row < 2 * self.n_runs

    def of(self, outputs: bool) -> Tokens:
        """Return all tokens, or those whose results are wanted."""
        return self._of[outputs]

    def set(self, rows: Sequence[int], ids: NDArray[np.int32] | None = None, runs: Sequence[Run] = ()) -> None:
        """Write the wanted rows and the tokens. Without ids the tokens stay."""
        if self._sent is not None:
            self._sent.synchronize()  # the device has read what was sent last
        self.n_out = len(rows)
        self._rows[:] = 0
        self._rows[: len(rows)] = rows
        if ids is not None:
            tokens, at = self._tokens, 0
            tokens[:], self._runs[:] = [[0], [0], [-1], [0], [0]], 0
            tokens[0, : len(ids)] = ids
            for i, run in enumerate(runs):
                end = at + run.n_tokens
                tokens[1:, at:end] = [[run.seq], [0], [run.is_long], [i]]
                tokens[2, at:end] = np.arange(run.n_past, run.n_past + run.n_tokens)
                self._runs[i] = at, run.n_tokens, run.n_past, run.reads, run.writes
                at = end
            self.n_tokens, self.n_runs = len(ids), len(runs)
            for pages in self._pages.values():
                pages.send()
            for scales, memory in self._scales.items():
                memory.copy_(torch.from_numpy(scales.values), non_blocking=True)
        self._wanted[:] = [[0], [-1], [0]]
        self._wanted[:, : len(rows)] = self._tokens[1:4, list(rows)]
        for (_, outputs), tiles in self._tiles.items():
            run_of = self._tokens[4, list(rows) if outputs else slice(self.n_tokens)]
            if not self.stands_alone(len(run_of)):
                tiles.send(run_of)
        self._device.copy_(self._host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()


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
