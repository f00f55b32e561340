"""The KV cache of one layer: rows [n_seq, n_head_kv, n_ctx] for K and for V; position p is in row p % n_ctx.

cache_types.py has what a row is.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as Array

from gguf_run.kernels_gpu.attention.append import append, read_rows
from gguf_run.kernels_gpu.attention.cache_types import GROUP, CacheFormat
from gguf_run.kernels_gpu.device.device import current
from gguf_run.kernels_gpu.rows.activations import power_of_2


@dataclass(frozen=True, eq=False)
class Rows:
    """K or V. qs: u8[n_seq, n_head_kv, n_ctx, bytes]; d: f16[n_seq, n_head_kv, n_ctx, scales], if the type has any.
    rotates: rows went through the Hadamard transform. scales: static ones, f32[n_head_kv], or None."""

    form: CacheFormat
    head_dim: int
    rotates: bool
    scales: Array | None
    qs: Array
    d: Array | None

    @property
    def planes(self) -> list[Array]:
        return [self.qs] if self.d is None else [self.qs, self.d]

    @property
    def width(self) -> int:
        """Columns of a kernel's tile."""
        return max(32, power_of_2(self.head_dim))

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)


@dataclass(frozen=True, eq=False)
class GpuCache:
    """models.backend.Cache."""

    n_ctx: int
    k: Rows
    v: Rows

    def _slots(self, first: int, end: int) -> Array:
        """Where positions first .. end stand."""
        return torch.arange(first, end, device=self.k.qs.device) % self.n_ctx

    def copy(self, source: int, target: int, n_rows: int) -> None:
        for plane in self.k.planes + self.v.planes:
            plane[target, :, :n_rows] = plane[source, :, :n_rows]

    def shift(self, seq: int, n_past: int, n_keep: int, n_discard: int, rope: Any) -> None:
        end = -(-n_past // GROUP) * GROUP
        first = max(n_keep + n_discard, end - self.n_ctx)
        source, target = self._slots(first, end), self._slots(first - n_discard, end - n_discard)
        if rope is not None:
            with current(self.k.qs.device):
                self._turn(seq, source, target, rope, -n_discard)
        for plane in ([] if rope else self.k.planes) + self.v.planes:
            plane[seq][:, target] = plane[seq][:, source]

    def _turn(self, seq: int, source: Array, target: Array, rope: Any, distance: int) -> None:
        """Keys of slots `source`, turned by a distance of positions, into slots `target`."""
        k, n, n_head_kv = self.k, len(source), self.k.qs.shape[1]
        keys = torch.empty(n_head_kv, n, k.head_dim, device=k.qs.device)
        first = seq * n_head_kv * self.n_ctx
        read_rows[(n, n_head_kv)](k.qs, k.d, source, first, self.n_ctx, keys, k.form.name, k.head_dim, k.width)
        h = _hadamard(k.head_dim).to(keys.device) if k.rotates else None
        keys = keys if h is None else keys @ h
        half = rope.n_rot // 2
        angle = torch.from_numpy(np.asarray(distance * rope.inv_freq, np.float64)).to(keys.device)
        cos, sin = torch.cos(angle).float(), torch.sin(angle).float()
        neox = rope.style == "neox"
        one, two = (slice(0, half), slice(half, 2 * half)) if neox else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        a, b = keys[..., one].clone(), keys[..., two].clone()
        keys[..., one], keys[..., two] = a * cos - b * sin, a * sin + b * cos
        keys = (keys if h is None else keys @ h).transpose(0, 1).reshape(n, -1).contiguous()
        seqs = torch.full((n,), seq, dtype=torch.int32, device=keys.device)
        append[(n, n_head_kv)](
            None, 0, keys, keys.stride(0), None, 0, None, None, 0.0, k.qs, k.d, None, None, k.scales, None, seqs,
            target.int(), None, 0, self.n_ctx, 0, n_head_kv, None, k.form.name, k.form.name, False, False, k.head_dim,
            k.width,
        )  # fmt: skip

    def read(self, seq: int, kind: str, first: int, end: int) -> NDArray[np.uint8]:
        """Bytes of the elements, then those of the scales."""
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
    """The matrix of hadamard.py's transform, which is its own inverse."""
    block = n & -n
    h = torch.ones(1, 1)
    while len(h) < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return torch.block_diag(*[h / math.sqrt(block)] * (n // block))


def new_rows(
    form: CacheFormat, shape: Any, n_rows: int, n_seq: int, rotate: bool | None, scales: Any, device: torch.device
) -> Rows:
    """shape: models.backend.Attention. n_rows: see rows_stored. rotate, scales: models.backend.CacheType's."""
    size, head_dim = (n_seq, shape.n_head_kv, n_rows), shape.head_dim
    qs = torch.zeros(*size, head_dim * form.bits // 8, dtype=torch.uint8, device=device)
    n_scale = form.n_scale(head_dim)
    d = torch.zeros(*size, n_scale, dtype=torch.float16, device=device) if n_scale else None
    static = None if scales is None else torch.tensor(scales, device=device)
    return Rows(form, head_dim, form.rotates(head_dim, rotate, scales is not None), static, qs, d)
