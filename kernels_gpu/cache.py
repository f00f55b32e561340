"""The KV cache of one layer: f16[n_seq, n_ctx, n_head_kv, head_dim] for K and for V; position p is in row p % n_ctx."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as Array

GROUP = 32  # positions that are moved together, see models.kv_cache


def rows_stored(n_ctx: int, n_batch: int, window: int) -> int:
    """Positions of one sequence that a layer stores: all of them, or its window and a batch, and one more group, so
    that a batch can be taken back and what is left be saved, which goes by whole groups."""
    full = -(-n_ctx // GROUP) * GROUP
    return min(full, -(-(window + n_batch + GROUP) // GROUP) * GROUP) if window else full


@dataclass(frozen=True, eq=False)
class GpuCache:
    """models.backend.Cache."""

    n_ctx: int
    k: Array
    v: Array

    def _rows(self, first: int, end: int) -> Array:
        """Where positions first .. end stand."""
        return torch.arange(first, end, device=self.k.device) % self.n_ctx

    def copy(self, source: int, target: int, n_rows: int) -> None:
        for side in (self.k, self.v):
            side[target, :n_rows] = side[source, :n_rows]

    def shift(self, seq: int, n_past: int, n_keep: int, n_discard: int, rope: Any) -> None:
        end = -(-n_past // GROUP) * GROUP
        first = max(n_keep + n_discard, end - self.n_ctx)
        source, target = self._rows(first, end), self._rows(first - n_discard, end - n_discard)
        for side in (self.k, self.v):
            moved = side[seq, source]
            if side is self.k and rope is not None:
                _turn(moved, rope, -n_discard)
            side[seq, target] = moved

    def read(self, seq: int, kind: str, first: int, end: int) -> NDArray[np.uint8]:
        rows = {"k": self.k, "v": self.v}[kind][seq, self._rows(GROUP * first, GROUP * end)]
        return rows.cpu().numpy().reshape(-1).view(np.uint8)

    def write(self, seq: int, kind: str, end: int, data: Any) -> int | None:
        side = {"k": self.k, "v": self.v}[kind][seq]
        n_groups, rest = divmod(len(data), GROUP * side[0].nbytes)
        if rest or n_groups > end:
            return None
        new = torch.from_numpy(np.frombuffer(data, np.float16).copy()).view(-1, *side.shape[1:])[-self.n_ctx :]
        first = end - len(new) // GROUP
        side[self._rows(GROUP * first, GROUP * end)] = new.to(side.device)
        return first


def _turn(keys: Array, rope: Any, distance: int) -> None:
    """Turn keys f16[n, n_head_kv, head_dim] by a distance of positions."""
    half = rope.n_rot // 2
    angle = torch.from_numpy(np.asarray(distance * rope.inv_freq, np.float64)).to(keys.device)
    cos, sin = torch.cos(angle).float(), torch.sin(angle).float()
    neox = rope.style == "neox"
    one, two = (slice(0, half), slice(half, 2 * half)) if neox else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    a, b = keys[..., one].float(), keys[..., two].float()
    keys[..., one], keys[..., two] = (a * cos - b * sin).half(), (a * sin + b * cos).half()


def new_cache(shape: Any, n_rows: int, n_seq: int, device: torch.device) -> GpuCache:
    """shape: models.backend.Attention. n_rows: as rows_stored gives them."""
    size = (n_seq, n_rows, shape.n_head_kv, shape.head_dim)
    k, v = (torch.zeros(size, dtype=torch.float16, device=device) for _ in "kv")
    return GpuCache(n_rows, k, v)
