"""Makes random weights and caches on the GPU itself. A file or the host would take minutes."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from gguf_run.formats.gguf.reader import Tensor
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.kernels_gpu.attention.cache import GpuCache
from gguf_run.kernels_gpu.backend import GpuBackend
from gguf_run.kernels_gpu.panels.memory import WeightPart, empty
from gguf_run.kernels_gpu.panels.panels import IntPanel, panel_for
from gguf_run.kernels_gpu.panels.repack import Uploader

STD = 0.02  # standard deviation of the weights; their mean is about 0


class NoFile(Tensor):
    """A tensor without bytes."""

    def release(self, first: int = 0, end: int | None = None) -> None:
        pass


def no_file(info: TensorInfo) -> NoFile:
    nothing: Any = None
    return NoFile(info.name, info.ne, info.type, 0, nothing)


def random_part(type_name: str, n_in: int, n_out: int, device: torch.device) -> WeightPart:
    """Return a matrix of random codes, with scales that differ from group to group."""
    panel = panel_for(type_name)
    part = empty(panel, n_in, n_out, device)
    if not isinstance(panel, IntPanel):
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[panel.scales]
        part.qs.view(dtype)[:, :n_in].normal_(0, STD)
        return part
    for plane in (part.qs, part.high):
        if plane is not None:
            plane.random_()
    n_code = 1 << panel.bits + panel.high
    first = -128 if panel.bits == 8 else -panel.offset
    codes = torch.tensor(panel.book or range(first, first + n_code), dtype=torch.float64)
    mean, size = codes.mean().item(), STD / codes.std().item()
    scale = part.scale
    assert scale is not None
    if panel.scales == "e8m0":  # powers of two; codes are doubled
        middle = round(128 + math.log2(size))
        scale.random_(middle - 1, middle + 2)
        return part
    if panel.scales == "k8":  # of both signs
        scale.view(torch.int8).random_(-32, 32)
        size /= 18.5
    elif panel.scales == "k6m":  # a scale and the same number as minimum
        pairs = scale.unflatten(1, (-1, 2))
        pairs.copy_(torch.randint(0, 64, (*pairs.shape[:2], 1), dtype=torch.uint8, device=device).expand_as(pairs))
        size /= 36.5
    elif panel.scales == "k4":
        scale.random_(0, 16).mul_(17)
        size /= 8.8
    factors = (scale if part.d is None else part.d).view(torch.float16)
    if panel.scales in ("f16m", "k6m", "k4"):  # the minimum makes the mean 0; it is subtracted where it has a scale
        d = factors[:, ::2].uniform_(0.5 * size, 1.5 * size)
        factors[:, 1::2] = d * (mean if panel.d_bytes else -mean)
    else:
        factors.uniform_(0.5 * size, 1.5 * size)
        signs = torch.randint(0, 2, factors.shape, dtype=torch.int8, device=device)
        factors.mul_(signs * 2 - 1)
    return part


class _RandomUploader(Uploader):
    def repack(self, tensors: Sequence[Tensor]) -> WeightPart:
        n_out = sum(tensor.n_rows for tensor in tensors)
        return random_part(tensors[0].type.name, tensors[0].ne[0], n_out, self.device)


class RandomBackend(GpuBackend):
    """Makes tensors without a file: random matrices, vectors of ones, caches filled with random rows."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._uploader = _RandomUploader(device)

    def vector(self, tensors: Sequence[Any]) -> torch.Tensor:
        return torch.ones(sum(tensor.n_elements for tensor in tensors), device=self.device)

    def cache(self, *args: Any, **options: Any) -> GpuCache:
        cache = super().cache(*args, **options)
        for rows in (cache.k, cache.v):
            if rows.type.bits == 16:
                rows.qs.view(torch.float16 if rows.type.name == "f16" else torch.bfloat16).normal_()
            else:
                rows.qs.random_(0, 120)  # no NaN in any format
            if rows.d is not None:
                rows.d.uniform_(0.005, 0.015)
        return cache
