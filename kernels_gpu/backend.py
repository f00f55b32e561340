"""A GPU as a models.protocol.Backend: Triton kernels over panels."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor as Array

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.gguf.parts import matrix_of
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.kernels_gpu.attention.cache import GpuCache, new_cache
from gguf_run.kernels_gpu.buffers import Memory
from gguf_run.kernels_gpu.device.device import capability, current, measure_limits
from gguf_run.kernels_gpu.device.errors import gpu_errors
from gguf_run.kernels_gpu.device.tuning import AMD, DEFAULT, TUNINGS
from gguf_run.kernels_gpu.panels.memory import GpuExperts, GpuSquares, GpuWeight, WeightPart
from gguf_run.kernels_gpu.panels.repack import Uploader
from gguf_run.kernels_gpu.program import GpuProgram
from gguf_run.kernels_gpu.recurrent.state import GpuState
from gguf_run.models.backend import CacheType
from gguf_run.models.experts import ExpertTensors
from gguf_run.models.operands import AttentionShape, Buffer
from gguf_run.models.pages import PageTable
from gguf_run.models.protocol import Op

GpuOp = Op[WeightPart, GpuWeight, Array, GpuCache, GpuExperts, GpuSquares, GpuState]


class GpuBackend:
    """Weights, caches and programs on one device (device.open_device). Triton's interpreter runs on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tuning = AMD if torch.version.hip else TUNINGS.get(capability(device), DEFAULT)
        self._uploader = Uploader(device)
        self._uploaded: dict[int, tuple[Tensor, WeightPart]] = {}
        self._bytes = {"weights": 0, "cache": 0}

    @property
    def name(self) -> str:
        """For people, for example: GPU 0, NVIDIA H200."""
        if self.device.type != "cuda":
            return f"Triton's interpreter on {self.device}"
        return f"GPU {self.device.index}, {torch.cuda.get_device_name(self.device)}"

    @gpu_errors()
    def limits(self) -> tuple[float, float]:
        """Return the bytes that the device can read and the f16 operations that it can do, per second."""
        with current(self.device):
            return measure_limits(self.device, min(1 << 30, self.free_memory() // 4))

    def free_memory(self) -> int:
        """Return the bytes that can still be allocated: no limit without a GPU."""
        return int(torch.cuda.mem_get_info(self.device)[0]) if self.device.type == "cuda" else 1 << 60

    def _upload(self, tensors: list[Tensor]) -> WeightPart:
        """Return tensors of one type as panels. One tensor is uploaded once: embeddings may be the output too."""
        known = self._uploaded.get(id(tensors[0]))
        if len(tensors) == 1 and known is not None:
            return known[1]
        with current(self.device):
            part = self._uploader.repack(tensors)
        self._bytes["weights"] += part.nbytes
        if len(tensors) == 1:
            self._uploaded[id(tensors[0])] = tensors[0], part
        return part

    def table(self, tensor: Tensor) -> WeightPart:
        return self._upload([tensor])

    def weight(self, tensors: Sequence[Tensor]) -> GpuWeight:
        if len(tensors[0].ne) > 2:
            heads = self.vector(tensors).view(*tensors[0].ne[::-1])
            self._bytes["weights"] += heads.nbytes
            return GpuWeight(tensors[0].ne[0], (), heads)
        runs = itertools.groupby(tensors, key=lambda tensor: tensor.type.name)
        return GpuWeight(tensors[0].ne[0], tuple(self._upload([*run]) for _, run in runs))

    def experts(self, tensors: Sequence[Tensor]) -> GpuExperts:
        held = ExpertTensors.of(tensors)
        with current(self.device):
            into = self._uploader.repack([matrix_of(part, e) for e in range(held.n_expert) for part in held.into])
            down = self._uploader.repack([held.down])
        self._bytes["weights"] += into.nbytes + down.nbytes
        factors = None if held.factors is None else torch.from_numpy(held.factors).to(self.device)
        shifts = [self.vector([bias]).view(held.n_expert, -1) for bias in held.biases]
        bias_into, bias_down = (torch.cat(shifts[:-1], 1), shifts[-1]) if shifts else (None, None)
        return GpuExperts(held.n_expert, into, down, bias_into, bias_down, factors)

    def vector(self, tensors: Sequence[Tensor]) -> Array:
        values = [dequantize(tensor.blocks(), tensor.type).reshape(-1) for tensor in tensors]
        return torch.from_numpy(np.concatenate(values)).to(self.device)

    def cache(self, shape: AttentionShape, table: PageTable, kind: CacheType) -> GpuCache:
        cache = new_cache(shape, table, kind, self.device)
        self._bytes["cache"] += sum(getattr(cache, kind).nbytes for kind in cache.kinds)
        return cache

    def state(self, n_floats: int, n_slots: int) -> GpuState:
        data = torch.zeros(n_slots, n_floats, device=self.device)
        self._bytes["cache"] += data.nbytes
        return GpuState(data)

    def squares(self, width: int, n_expert: int = 1) -> GpuSquares:
        return GpuSquares(n_expert, width, self.device)

    def program(
        self, parts: Sequence[Sequence[GpuOp]], after: Sequence[GpuOp], result: Buffer, n_batch: int, n_outputs: int
    ) -> GpuProgram:
        return GpuProgram(Memory(self.device, self.tuning, n_batch, n_outputs), parts, after, result)

    def close(self) -> None:
        """Forget the weights. Their memory is free when nothing else holds them."""
        self._uploaded.clear()

    def nbytes(self) -> dict[str, int]:
        return dict(self._bytes)
