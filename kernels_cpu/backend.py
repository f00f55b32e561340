"""The CPU as a models.protocol.Backend: numba kernels over panels, run by a team of threads."""

import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.coded import CODED_FORMS
from gguf_run.formats.blocks.unpack import INTEGER_FORMS, NO_GRID
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.kernels_cpu.attention.cache import CpuCache
from gguf_run.kernels_cpu.attention.cache_rows import CacheRows
from gguf_run.kernels_cpu.int8_forms import CpuOp
from gguf_run.kernels_cpu.lower import lower
from gguf_run.kernels_cpu.panels.memory import Arena, CpuTable, CpuWeight, WeightPart
from gguf_run.kernels_cpu.panels.panels import ROWS, panel_for
from gguf_run.kernels_cpu.panels.repack import floats, repack
from gguf_run.kernels_cpu.replay.op import TapeOp
from gguf_run.kernels_cpu.replay.team import Team
from gguf_run.kernels_cpu.rows.embed import FLOAT_TABLES
from gguf_run.kernels_cpu.tape import CpuProgram, Tape
from gguf_run.kernels_cpu.vector import isa
from gguf_run.models.backend import CacheType
from gguf_run.models.operands import AttentionShape, Buffer
from gguf_run.models.pages import PAGE, PageTable

if TYPE_CHECKING:
    from gguf_run.kernels_cpu.matmul.moe import CpuExperts
    from gguf_run.kernels_cpu.recurrent.state import CpuState
    from gguf_run.kernels_cpu.rows.observe import CpuSquares

_QUEUED = 64  # pieces of weights to be repacked: enough that no thread waits between two tensors


class CpuBackend:
    """Runs on n_threads threads, the `team`. `tune` changes `tuning`, for all programs."""

    def __init__(self, n_threads: int, *, deterministic: bool = False) -> None:
        """deterministic: a token gets the same bits whatever else is in its step, of its own sequence or of others.

        Attention then never splits the positions that a token sees, which keeps all threads busy in a long context.
        """
        self.n_threads, self.tuning, self._splits = n_threads, isa.Tuning(), not deterministic
        self._tapes: weakref.WeakSet[Tape] = weakref.WeakSet()
        self.team = Team(n_threads)  # runs programs; between two steps it may do other work
        self._executor = ThreadPoolExecutor(n_threads, "repack")
        self._repacking: deque[Future[None]] = deque()
        self._arena = Arena()
        self._bytes = {"weights": 0, "cache": 0}

    @property
    def name(self) -> str:
        """For people, for example: CPU, 2 threads, AVX2."""
        return f"CPU, {self.n_threads} thread{'s' * (self.n_threads > 1)}, {isa.current().name}"

    def table(self, tensor: Tensor) -> CpuTable:
        name, blocks, form = tensor.type.name, tensor.blocks(), INTEGER_FORMS.get(tensor.type.name)
        grid: NDArray[Any] = form.grid() if form else NO_GRID
        if coded := CODED_FORMS.get(name):
            grid = coded.table
        elif form is None and name not in FLOAT_TABLES:
            name, blocks = "F32", floats(tensor).view(np.uint8)
        return CpuTable(name, tensor.ne[0], blocks, grid)

    def weight(self, tensors: Sequence[Tensor]) -> CpuWeight:
        n_in = tensors[0].ne[0]
        if len(tensors[0].ne) > 2:
            from gguf_run.kernels_cpu.experts import load_matrices

            heads = load_matrices(tensors[0], self._store)
            return CpuWeight(n_in, heads.n_out, (WeightPart(heads.panel, heads.data, 0, heads.n_out),))
        parts: list[WeightPart] = []
        first = 0
        for run in _runs(tensors):
            panel = panel_for(run[0].type.name)
            n_out = sum(tensor.n_rows for tensor in run)
            data = self._store([run], -(-n_out // ROWS) * panel.group_bytes(n_in))
            parts.append(WeightPart(panel, data, first, n_out, run[0].rounding))
            first += n_out
        return CpuWeight(n_in, first, tuple(parts))

    def _store(self, groups: Sequence[list[Tensor]], n_bytes: int) -> NDArray[np.uint8]:
        """Return memory that the threads fill. groups: tensors that share panels; all groups have as many bytes."""
        data = self._arena.take(n_bytes)
        for group, to in zip(groups, data.reshape(len(groups), -1), strict=True):
            self._repack(group, to)
        self._bytes["weights"] += n_bytes
        return data

    def _repack(self, tensors: list[Tensor], to: NDArray[np.uint8]) -> None:
        """Have the threads repack tensors that share panels."""
        self._repacking += repack(tensors, to, self._executor, self.n_threads)
        self.wait(_QUEUED)

    def experts(self, tensors: Sequence[Tensor]) -> "CpuExperts":
        from gguf_run.kernels_cpu.experts import load_experts  # late: most models have no experts

        return load_experts(tensors, self._store)

    def vector(self, tensors: Sequence[Tensor]) -> NDArray[np.float32]:
        return np.concatenate([floats(tensor).reshape(-1) for tensor in tensors])

    def cache(self, shape: AttentionShape, table: PageTable, kind: CacheType) -> CpuCache:
        size = shape.n_head_kv, shape.head_dim, table.n_pages * PAGE
        rows_k = CacheRows(kind.k, False, *size, False if shape.n_latent else kind.rotate, kind.k_scales)
        rows_v = None if shape.n_latent else CacheRows(kind.v, True, *size, kind.rotate, kind.v_scales)
        held = [self._arena.take(rows.nbytes) for rows in (rows_k, rows_v) if rows]
        self._bytes["cache"] += sum(part.nbytes for part in held)
        return CpuCache(table, rows_k, rows_v, held[0], held[-1])

    def state(self, n_floats: int, n_slots: int) -> "CpuState":
        from gguf_run.kernels_cpu.recurrent.state import CpuState

        data = self._arena.take(4 * n_slots * n_floats).view(np.float32).reshape(n_slots, n_floats)
        self._bytes["cache"] += data.nbytes
        return CpuState(data)

    def squares(self, width: int, n_expert: int = 1) -> "CpuSquares":
        from gguf_run.kernels_cpu.rows.observe import CpuSquares

        return CpuSquares(width, n_expert)

    def program(
        self, parts: Sequence[Sequence[CpuOp]], after: Sequence[CpuOp], result: Buffer, n_batch: int, n_outputs: int
    ) -> CpuProgram:
        tape = Tape(self.n_threads, n_batch, n_outputs, splits=self._splits)
        ends = [lower(tape, part) for part in parts]
        lower(tape, after)
        # Attention takes longest to compile. It is last here: the second process begins with the last kernel.
        self._compile(sorted(dict.fromkeys(tape.kernels), key=lambda op: op.function.__name__ == "attend_rows"))
        self.wait()
        tape.tune(self.tuning)
        self._tapes.add(tape)
        return CpuProgram(self.team, tape, ends, result)

    def tune(self, tuning: isa.Tuning) -> None:
        """Give the kernels numbers of this machine. No program may run meanwhile."""
        self.tuning = tuning
        for tape in self._tapes:
            tape.tune(tuning)

    def _compile(self, kernels: Sequence[TapeOp]) -> None:
        """Compile kernels, while weights are repacked."""
        for kernel in kernels:
            kernel.compiled  # noqa: B018

    def wait(self, n_jobs: int = 0) -> None:
        """Wait until at most n_jobs pieces of weights are left to repack."""
        while len(self._repacking) > n_jobs:
            self._repacking.popleft().result()

    def nbytes(self) -> dict[str, int]:
        return dict(self._bytes)

    def close(self) -> None:
        """Stop the threads. Programs of this backend cannot run any more."""
        self.team.close()
        self._executor.shutdown(cancel_futures=True)


def _runs(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Consecutive tensors that can share panels: of one kind, and all but the last of whole panels."""
    runs: list[list[Tensor]] = []
    for tensor in tensors:
        last = runs[-1][-1] if runs else None
        if last is None or (last.type, last.rounding) != (tensor.type, tensor.rounding) or last.n_rows % ROWS:
            runs.append([])
        runs[-1].append(tensor)
    return runs
