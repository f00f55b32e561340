"""The CPU as a models.backend.Backend: numba kernels over panels, a team of threads."""

import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.unpack import INTEGER_FORMS
from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.kernels_cpu.attention.cache import CpuCache, new_cache, rows_stored
from gguf_run.kernels_cpu.attention.cache_rows import CacheRows
from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS
from gguf_run.kernels_cpu.matmul.moe import EXPERT_ROWS, CpuExperts, ExpertMatrix
from gguf_run.kernels_cpu.panels.memory import Arena, CpuBuffer, CpuTable, CpuWeight, WeightPart
from gguf_run.kernels_cpu.panels.panels import ROWS, Panel, panel_for
from gguf_run.kernels_cpu.panels.repack import repack
from gguf_run.kernels_cpu.recorder import CpuRecorder
from gguf_run.kernels_cpu.replay.op import TapeOp
from gguf_run.kernels_cpu.replay.team import Team
from gguf_run.kernels_cpu.rows.embed import FLOAT_TABLES
from gguf_run.kernels_cpu.vector import isa

_QUEUED = 64  # pieces of weights to be repacked: enough that no thread waits between two tensors


class CpuBackend:
    """Runs on n_threads threads; KV caches hold cache_type, one of CACHE_FORMATS, if not told
    otherwise.

    dry: weights stay empty, and programs are compiled from the last op to the first, but cannot run.
    """

    def __init__(self, n_threads: int, cache_type: str = "f16", *, dry: bool = False) -> None:
        if cache_type not in CACHE_FORMATS:
            raise ValueError(f"cache_type is {cache_type}; known are {', '.join(CACHE_FORMATS)}")
        self.n_threads = n_threads
        self._cache_type = cache_type
        self._dry = dry
        self._team = Team(n_threads)
        self._executor = ThreadPoolExecutor(n_threads, "repack")
        self._repacking: deque[Future[None]] = deque()
        self._arena = Arena()
        self._bytes = {"weights": 0, "cache": 0}

    @property
    def name(self) -> str:
        """For people, for example: CPU, 2 threads, AVX2."""
        return f"CPU, {self.n_threads} thread{'s' * (self.n_threads > 1)}, {isa.current().name}"

    def table(self, tensor: Tensor) -> CpuTable:
        form = INTEGER_FORMS.get(tensor.type.name)
        if form is not None:
            return CpuTable(tensor.type.name, tensor.ne[0], tensor.blocks(), form.grid())
        no_grid = np.zeros(0, np.int8)
        if tensor.type.name in FLOAT_TABLES:
            return CpuTable(tensor.type.name, tensor.ne[0], tensor.blocks(), no_grid)
        values = dequantize(tensor.blocks(), tensor.type)
        return CpuTable("F32", tensor.ne[0], values.view(np.uint8), no_grid)

    def weight(self, tensors: Sequence[Tensor]) -> CpuWeight:
        n_in = tensors[0].ne[0]
        parts: list[WeightPart] = []
        first = 0
        for panel, run in _runs(tensors):
            n_out = sum(tensor.n_rows for tensor in run)
            data = self._arena.take(-(-n_out // ROWS) * panel.group_bytes(n_in))
            if not self._dry:
                self._repacking += repack(run, data, self._executor, self.n_threads)
                self.wait(_QUEUED)
            parts.append(WeightPart(panel, data, first, n_out))
            self._bytes["weights"] += data.nbytes
            first += n_out
        return CpuWeight(n_in, first, tuple(parts))

    def experts(self, tensors: Sequence[Tensor]) -> CpuExperts:
        types = [tensor.type.name for tensor in tensors[:2]]
        if types[0] != types[1]:
            names = " and ".join(tensor.name for tensor in tensors[:2])
            raise UnsupportedError(f"{names} have the types {' and '.join(types)}; this version needs one for both")
        n_expert = math.prod(tensors[0].ne[2:])
        biases: Sequence[NDArray[np.float32] | None] = [self.vector([tensor]) for tensor in tensors[3:]] or [None] * 3
        parts = [self._expert_matrix(t, n_expert, bias) for t, bias in zip(tensors[:3], biases, strict=True)]
        return CpuExperts(n_expert, *parts)

    def _expert_matrix(self, tensor: Tensor, n_expert: int, bias: NDArray[np.float32] | None) -> ExpertMatrix:
        n_in, n_out = tensor.ne[0], tensor.ne[1]
        empty = ExpertMatrix(panel_for(tensor.type.name), np.zeros(0, np.uint8), n_in, n_out, bias)
        data = self._arena.take(n_expert * empty.expert_bytes)
        # experts of whole panels can be repacked as one tall matrix
        parts = [tensor] if n_out % EXPERT_ROWS == 0 else [tensor.matrix(e) for e in range(n_expert)]
        for part, to in zip(parts, data.reshape(len(parts), -1), strict=True):
            if not self._dry:
                self._repacking += repack([part], to, self._executor, self.n_threads)
                self.wait(_QUEUED)
        self._bytes["weights"] += data.nbytes
        return replace(empty, data=data)

    def vector(self, tensors: Sequence[Tensor]) -> NDArray[np.float32]:
        return np.concatenate([dequantize(tensor.blocks(), tensor.type).reshape(-1) for tensor in tensors])

    def cache(self, shape: Any, n_ctx: int, n_batch: int, n_seq: int = 1, kind: Any = None) -> CpuCache:
        size = shape.n_head_kv, shape.head_dim, rows_stored(n_ctx, n_batch, shape.window)
        if kind is None:
            k, v = (CacheRows(self._cache_type, is_v, *size) for is_v in (False, True))
        else:
            k = CacheRows(kind.k, False, *size, kind.rotate, kind.k_scales)
            v = CacheRows(kind.v, True, *size, kind.rotate, kind.v_scales)
        cache = new_cache(self._arena, n_seq, k, v)
        self._bytes["cache"] += cache.k.nbytes + cache.v.nbytes
        return cache

    def recorder(self, n_batch: int, n_outputs: int) -> CpuRecorder:
        return CpuRecorder(self._team, n_batch, n_outputs, self._compile)

    def _compile(self, ops: Iterable[TapeOp]) -> None:
        """Compile a program's ops, while weights are repacked, and wait until these are."""
        for op in reversed([*ops]) if self._dry else ops:
            op.compiled  # noqa: B018
        self.wait()

    def wait(self, n_jobs: int = 0) -> None:
        """Until at most n_jobs pieces of weights are yet to be repacked."""
        while len(self._repacking) > n_jobs:
            self._repacking.popleft().result()

    def to_host(self, buffer: CpuBuffer, n_tokens: int) -> NDArray[np.float32]:
        return buffer.memory[:n_tokens, buffer.start : buffer.start + buffer.width]

    def copy_from(self, other: Any, source: Any, n_tokens: int, target: CpuBuffer) -> None:
        self.to_host(target, n_tokens)[:] = other.to_host(source, n_tokens)

    def nbytes(self) -> dict[str, int]:
        return dict(self._bytes)

    def close(self) -> None:
        """Stop the threads. Programs of this backend cannot run any more."""
        self._team.close()
        self._executor.shutdown(cancel_futures=True)


def _runs(tensors: Sequence[Tensor]) -> list[tuple[Panel, list[Tensor]]]:
    """Consecutive tensors that can share panels: of one type, and all but the last of whole panels."""
    runs: list[tuple[Panel, list[Tensor]]] = []
    for _, group in itertools.groupby(tensors, key=lambda tensor: tensor.type.id):
        fresh = True
        for tensor in group:
            if fresh:
                runs.append((panel_for(tensor.type.name), []))
            runs[-1][1].append(tensor)
            fresh = tensor.n_rows % ROWS != 0
    return runs
