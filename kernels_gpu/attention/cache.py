"""The KV cache of one layer: rows [n_head_kv, n_pages * PAGE] for K and for V.

cache_types.py says what a row is, models/pages.py which positions are in a page.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor as Array

from gguf_run.kernels_gpu.attention.append import append, read_rows
from gguf_run.kernels_gpu.attention.cache_types import CACHE_FORMATS, CacheFormat
from gguf_run.kernels_gpu.device.device import current
from gguf_run.models.backend import CacheType, rotates
from gguf_run.models.kv_cache import GROUP
from gguf_run.models.operands import AttentionShape, Rotation
from gguf_run.models.pages import PAGE, PageTable


@dataclass(frozen=True, eq=False)
class Rows:
    """K or V."""

    type: CacheFormat
    head_dim: int
    rotates: bool  # rows went through the Hadamard transform
    scales: Array | None  # f32[n_head_kv]: static scales
    qs: Array  # u8[n_head_kv, rows, bytes]
    d: Array | None  # f16[n_head_kv, rows, scales], if the type has scales

    @property
    def pair(self) -> tuple[Array, Array | None]:
        """Both planes, as kernels take them."""
        return self.qs, self.d

    @property
    def planes(self) -> list[Array]:
        """The planes that the type has."""
        return [plane for plane in self.pair if plane is not None]

    @property
    def width(self) -> int:
        """Columns of a kernel's tile."""
        return max(32, triton.next_power_of_2(self.head_dim))

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)


@dataclass(frozen=True, eq=False)
class GpuCache:
    """models.handles.CacheHandle."""

    table: PageTable
    k: Rows
    v: Rows  # k if values are columns of the keys

    @property
    def kinds(self) -> str:
        return "k" if self.v is self.k else "kv"

    @property
    def n_seen(self) -> int:
        """Positions of the pages that a token may see."""
        n_pages, window = self.table.pages.shape[1], self.table.window
        return PAGE * min(n_pages, window // PAGE + 2 if window else n_pages)

    def _groups(self, kind: str, size: int = GROUP) -> list[Array]:
        """Return the planes of K or V as u8[n_head_kv, groups, size, bytes]."""
        planes = {"k": self.k, "v": self.v}[kind].planes
        return [plane.view(torch.uint8).unflatten(1, (-1, size)) for plane in planes]

    def _on_device(self, groups: NDArray[np.int64]) -> Array:
        return torch.from_numpy(groups).to(self.k.qs.device)

    def copy(self, source: int, target: int) -> None:
        for kind in self.kinds:
            for pages in self._groups(kind, PAGE):
                pages[:, target] = pages[:, source]

    def move(
        self, source: NDArray[np.int64], target: NDArray[np.int64], rotation: Rotation | None, distance: int
    ) -> None:
        at, to = self._on_device(source), self._on_device(target)
        for kind in self.kinds:
            if kind == "k" and rotation is not None:
                with current(at.device):
                    self._turn(at, to, rotation, distance)
                continue
            for groups in self._groups(kind):
                groups[:, to] = groups[:, at]

    def _turn(self, source: Array, target: Array, rotation: Rotation, distance: int) -> None:
        """Turn the keys of groups `source` by a distance of positions; store them in groups `target`."""
        k, n_head_kv, device = self.k, len(self.k.qs), source.device
        source, target = (GROUP * x[:, None] + torch.arange(GROUP, device=device) for x in (source, target))
        n = source.numel()
        keys = torch.empty(n_head_kv, n, k.head_dim, device=device)
        read_rows[(n, n_head_kv)](k.pair, source, k.qs.shape[1], keys, k.type.name, k.head_dim, k.width)
        if k.rotates:
            keys = keys @ _hadamard(k.head_dim).to(device)
        angle = torch.from_numpy(np.asarray(distance * rotation.inv_freq, np.float64)).to(device)
        cos, sin = torch.cos(angle).float(), torch.sin(angle).float()  # without the rotation's scale
        part = keys[..., k.head_dim - rotation.n_rot if self.v is k else 0 :][..., : rotation.n_rot]
        pairs = part.unflatten(-1, (2, -1)).mT if rotation.style == "neox" else part.unflatten(-1, (-1, 2))
        a, b = pairs.clone().unbind(-1)
        pairs[..., 0], pairs[..., 1] = a * cos - b * sin, a * sin + b * cos
        keys = keys.transpose(0, 1).reshape(n, -1).contiguous()
        # Position p of a sequence that has all pages is in row p.
        pages = torch.arange(self.table.n_pages, dtype=torch.int32, device=device)
        seqs = torch.zeros(n, dtype=torch.int32, device=device)
        # The grid ends with the heads of k: q and v are only named, so that the kernel compiles.
        append[(n, n_head_kv)](
            keys, keys.stride(0), keys, keys.stride(0), keys, keys.stride(0), None, None, 0.0, k.pair, k.pair, k.scales,
            k.scales, seqs, target.int(), None, 0, pages, 0, len(pages), 0, n_head_kv, None, k.type.name, k.type.name,
            k.rotates, k.rotates, k.head_dim, k.width,
        )  # fmt: skip

    def group_bytes(self, kind: str) -> int:
        return sum(groups[:, 0].nbytes for groups in self._groups(kind))

    def read(self, kind: str, groups: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the bytes of the elements, then those of the scales."""
        at = self._on_device(groups)
        return np.concatenate([held[:, at].cpu().numpy().reshape(-1) for held in self._groups(kind)])

    def write(self, kind: str, groups: NDArray[np.int64], data: Any) -> None:
        at, n = self._on_device(groups), len(data) // self.group_bytes(kind)
        rest = np.frombuffer(data, np.uint8)
        for held in self._groups(kind):
            part, rest = np.split(rest, [n * held[:, 0].nbytes])
            new = torch.from_numpy(part.copy()).view(len(held), n, *held.shape[2:])
            held[:, at] = new[:, n - len(at) :].to(held.device)


def _hadamard(n: int) -> Array:
    """Return the matrix of cache_rows.hadamard. It is its own inverse."""
    block = n & -n
    h = torch.ones(1, 1)
    while len(h) < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return torch.block_diag(*[h / math.sqrt(block)] * (n // block))


def new_cache(shape: AttentionShape, table: PageTable, kind: CacheType, device: torch.device) -> GpuCache:
    """Return memory for K and V of one layer."""

    def rows(name: str, scales: Sequence[float] | None, rotate: bool | None) -> Rows:
        head_dim, size = shape.head_dim, (shape.n_head_kv, table.n_pages * PAGE)
        form = CACHE_FORMATS[name]
        qs = torch.zeros(*size, head_dim * form.bits // 8, dtype=torch.uint8, device=device)
        n_numbers = form.n_numbers(head_dim)
        d = torch.zeros(*size, n_numbers, dtype=torch.float16, device=device) if n_numbers else None
        static = None if scales is None else torch.tensor(scales, device=device)
        return Rows(form, head_dim, rotates(form.bits, head_dim, rotate, scales is not None), static, qs, d)

    k = rows(kind.k, kind.k_scales, False if shape.n_latent else kind.rotate)
    return GpuCache(table, k, k if shape.n_latent else rows(kind.v, kind.v_scales, kind.rotate))
