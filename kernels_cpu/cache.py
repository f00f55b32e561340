"""The KV cache of one layer: n_seq slots, one for each sequence; attention.py has the layout."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.kernels_cpu.attention_softmax import SPAN
from gguf_run.kernels_cpu.memory import LANES, Arena
from gguf_run.kernels_cpu.panels import FLOAT_PANELS, ROWS, Panel

GROUP = 32  # positions that stand side by side in every cache type
CACHE_TYPES = {"f32": ("F32", 4), "f16": ("F16", 2)}


def rows_stored(n_ctx: int, n_batch: int, window: int) -> int:
    """Positions of one sequence that a layer stores: all of them, or its window and a batch, in whole spans.

    A batch is appended before its first token looks back over the window, and a span must not go over the ring's end.
    One more group lets a batch be taken back and what is left be saved, which goes by whole groups.
    """
    ring = -(-(window + n_batch + GROUP) // SPAN) * SPAN
    full = -(-n_ctx // LANES) * LANES
    return min(full, ring) if window else full


@dataclass(frozen=True, eq=False)
class CpuCache:
    """K and V of one layer. n_ctx: positions of a slot as stored; wide: width of V's rows as stored."""

    n_seq: int
    n_head_kv: int
    head_dim: int
    n_ctx: int
    wide: int
    panel: Panel
    element_bytes: int
    k: NDArray[np.uint8]
    v: NDArray[np.uint8]

    def _groups(self, kind: str) -> NDArray[np.uint8]:
        """[n_seq, n_head_kv, n_ctx / GROUP, bytes of a group of a head]"""
        side = {"k": self.k, "v": self.v}[kind]
        return side.reshape(self.n_seq, self.n_head_kv, self.n_ctx // GROUP, -1)

    def copy(self, source: int, target: int, n_rows: int) -> None:
        for kind in "kv":
            groups = self._groups(kind)[:, :, : -(-n_rows // GROUP)]
            groups[target] = groups[source]

    def shift(self, seq: int, n_past: int, n_keep: int, n_discard: int, rope: Any) -> None:
        ring, end = self.n_ctx // GROUP, -(-n_past // GROUP)
        source = np.arange(max((n_keep + n_discard) // GROUP, end - ring), end)
        target = (source - n_discard // GROUP) % ring
        for kind in "kv":
            groups = self._groups(kind)[seq]
            moved = groups.take(source % ring, axis=1)
            if kind == "k" and rope is not None:
                self._turn(moved, rope, -n_discard)
            groups[:, target] = moved

    def _turn(self, groups: NDArray[np.uint8], rope: Any, distance: int) -> None:
        """Turn the keys of groups, uint8[n_head_kv, n, bytes], by a distance of positions."""
        element = np.dtype(f"f{self.element_bytes}")
        keys = groups.view(element).reshape(self.n_head_kv, -1, self.head_dim, ROWS)
        half, angle = rope.n_rot // 2, distance * rope.inv_freq[:, None]
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        pairs = (
            (slice(0, half), slice(half, 2 * half))
            if rope.style == "neox"
            else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        )
        a, b = (keys[:, :, part].astype(np.float32) for part in pairs)
        keys[:, :, pairs[0]], keys[:, :, pairs[1]] = a * cos - b * sin, a * sin + b * cos

    def read(self, seq: int, kind: str, first: int, end: int) -> NDArray[np.uint8]:
        return self._groups(kind)[seq].take(np.arange(first, end) % (self.n_ctx // GROUP), axis=1).reshape(-1)

    def write(self, seq: int, kind: str, end: int, data: Any) -> int | None:
        groups = self._groups(kind)[seq]
        n_heads, ring, n_bytes = groups.shape
        n_groups, rest = divmod(len(data), n_heads * n_bytes)
        if rest or n_groups > end:
            return None
        new = np.frombuffer(data, np.uint8).reshape(n_heads, n_groups, n_bytes)[:, -ring:]
        first = end - new.shape[1]
        groups[:, np.arange(first, end) % ring] = new
        return first


def new_cache(arena: Arena, n_head_kv: int, head_dim: int, n_ctx: int, n_seq: int, cache_type: str = "f16") -> CpuCache:
    """A cache of n_seq slots of n_ctx positions, as rows_stored gives them. cache_type: one of CACHE_TYPES."""
    type_name, element_bytes = CACHE_TYPES[cache_type]
    wide = -(-head_dim // LANES) * LANES
    k, v = (arena.take(n_seq * n_head_kv * n_ctx * width * element_bytes) for width in (head_dim, wide))
    return CpuCache(n_seq, n_head_kv, head_dim, n_ctx, wide, FLOAT_PANELS[type_name], element_bytes, k, v)
