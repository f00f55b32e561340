"""The KV cache of one layer: rows [n_seq, n_head_kv, n_ctx] for K and for V; position p is in row p % n_ctx.

cache_types.py says what a row is.
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
from gguf_run.kernels_gpu.attention.cache_types import CacheFormat, cache_format
from gguf_run.kernels_gpu.device.device import current
from gguf_run.models.backend import CacheType, rotates
from gguf_run.models.kv_cache import GROUP
from gguf_run.models.operands import AttentionShape, Rotation


@dataclass(frozen=True, eq=False)
class Rows:
    """K or V."""

    type: CacheFormat
    head_dim: int
    rotates: bool  # rows went through the Hadamard transform
    scales: Array | None  # f32[n_head_kv]: static scales
    qs: Array  # u8[n_seq, n_head_kv, n_ctx, bytes]
    d: Array | None  # f16[n_seq, n_head_kv, n_ctx, scales], if the type has scales

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

    n_ctx: int  # positions that are held of a sequence
    k: Rows
    v: Rows  # k if values are columns of the keys

    @property
    def kinds(self) -> str:
        return "k" if self.v is self.k else "kv"

    @property
    def _others(self) -> list[Array]:
        """The planes of V, if it has some of its own."""
        return [] if self.v is self.k else self.v.planes

    def _slots(self, first: int, end: int) -> Array:
        """Return the rows of positions first .. end."""
        return torch.arange(first, end, device=self.k.qs.device) % self.n_ctx

    def copy(self, source: int, target: int, n_rows: int) -> None:
        for plane in self.k.planes + self._others:
            plane[target, :, :n_rows] = plane[source, :, :n_rows]

    def shift(self, seq: int, n_past: int, n_keep: int, n_discard: int, rotation: Rotation | None) -> None:
        end = -(-n_past // GROUP) * GROUP
        first = max(n_keep + n_discard, end - self.n_ctx)
        source, target = self._slots(first, end), self._slots(first - n_discard, end - n_discard)
        if rotation is not None:
            with current(self.k.qs.device):
                self._turn(seq, source, target, rotation, -n_discard)
        for plane in ([] if rotation else self.k.planes) + self._others:
            plane[seq][:, target] = plane[seq][:, source]

    def _turn(self, seq: int, source: Array, target: Array, rotation: Rotation, distance: int) -> None:
        """Turn the keys of slots `source` by a distance of positions; store them in slots `target`."""
        k, n, n_head_kv = self.k, len(source), self.k.qs.shape[1]
        keys = torch.empty(n_head_kv, n, k.head_dim, device=k.qs.device)
        first = seq * n_head_kv * self.n_ctx
        read_rows[(n, n_head_kv)](k.pair, source, first, self.n_ctx, keys, k.type.name, k.head_dim, k.width)
        if k.rotates:
            keys = keys @ _hadamard(k.head_dim).to(keys.device)
        angle = torch.from_numpy(np.asarray(distance * rotation.inv_freq, np.float64)).to(keys.device)
        cos, sin = torch.cos(angle).float(), torch.sin(angle).float()  # without the rotation's scale
        part = keys[..., k.head_dim - rotation.n_rot if self.v is k else 0 :][..., : rotation.n_rot]
        pairs = part.unflatten(-1, (2, -1)).mT if rotation.style == "neox" else part.unflatten(-1, (-1, 2))
        a, b = pairs.clone().unbind(-1)
        pairs[..., 0], pairs[..., 1] = a * cos - b * sin, a * sin + b * cos
        keys = keys.transpose(0, 1).reshape(n, -1).contiguous()
        seqs = torch.full((n,), seq, dtype=torch.int32, device=keys.device)
        # The grid ends with the heads of k: q and v are only named, so that the kernel compiles.
        append[(n, n_head_kv)](
            keys, keys.stride(0), keys, keys.stride(0), keys, keys.stride(0), None, None, 0.0, k.pair, k.pair, k.scales,
            k.scales, seqs, target.int(), None, 0, self.n_ctx, 0, n_head_kv, None, k.type.name, k.type.name,
            k.rotates, k.rotates, k.head_dim, k.width,
        )  # fmt: skip

    def read(self, seq: int, kind: str, first: int, end: int) -> NDArray[np.uint8]:
        """Return the bytes of the elements, then those of the scales."""
        slots = self._slots(GROUP * first, GROUP * end)
        parts = [plane[seq][:, slots] for plane in {"k": self.k, "v": self.v}[kind].planes]
        return np.concatenate([part.cpu().numpy().reshape(-1).view(np.uint8) for part in parts])

    def write(self, seq: int, kind: str, end: int, data: Any) -> int | None:
        planes = {"k": self.k, "v": self.v}[kind].planes
        n_head_kv = planes[0].shape[1]
        sizes = [GROUP * n_head_kv * plane.shape[-1] * plane.itemsize for plane in planes]
        n_groups, rest = divmod(len(data), sum(sizes))
        if rest or n_groups > end:
            return None
        n_held = min(n_groups * GROUP, self.n_ctx)
        slots = self._slots(GROUP * end - n_held, GROUP * end)
        data, at = np.frombuffer(data, np.uint8), 0
        for plane, size in zip(planes, sizes, strict=True):
            part = torch.from_numpy(data[at : at + size * n_groups].copy()).view(plane.dtype)
            plane[seq][:, slots] = part.view(n_head_kv, -1, plane.shape[-1])[:, -n_held:].to(plane.device)
            at += size * n_groups
        return end - n_held // GROUP


def _hadamard(n: int) -> Array:
    """Return the matrix of cache_rows.hadamard. It is its own inverse."""
    block = n & -n
    h = torch.ones(1, 1)
    while len(h) < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return torch.block_diag(*[h / math.sqrt(block)] * (n // block))


def new_cache(shape: AttentionShape, kind: CacheType, n_rows: int, n_seq: int, device: torch.device) -> GpuCache:
    """Return memory for K and V of one layer, n_rows (sizes.cache_rows) for each of n_seq sequences."""

    def rows(name: str, scales: Sequence[float] | None, rotate: bool | None) -> Rows:
        head_dim, size = shape.head_dim, (n_seq, shape.n_head_kv, n_rows)
        form = cache_format(name, head_dim)
        qs = torch.zeros(*size, head_dim * form.bits // 8, dtype=torch.uint8, device=device)
        n_scale = form.n_scale(head_dim)
        d = torch.zeros(*size, n_scale, dtype=torch.float16, device=device) if n_scale else None
        static = None if scales is None else torch.tensor(scales, device=device)
        return Rows(form, head_dim, rotates(form.bits, head_dim, rotate, scales is not None), static, qs, d)

    k = rows(kind.k, kind.k_scales, False if shape.n_latent else kind.rotate)
    return GpuCache(n_rows, k, k if shape.n_latent else rows(kind.v, kind.v_scales, kind.rotate))
