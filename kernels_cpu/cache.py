"""The KV cache of one layer: n_seq slots, one for each sequence; attention.py has the layout."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf_run.kernels_cpu.attention_softmax import SPAN
from gguf_run.kernels_cpu.memory import LANES, Arena
from gguf_run.kernels_cpu.panels import FLOAT_PANELS, Panel

CACHE_TYPES = {"f32": ("F32", 4), "f16": ("F16", 2)}


def rows_stored(n_ctx: int, n_batch: int, window: int) -> int:
    """Positions of one sequence that a layer stores: all of them, or its window and a batch, in whole spans.

    A batch is appended before its first token looks back over the window, and a span must not go over the ring's end.
    """
    ring = -(-(window + n_batch) // SPAN) * SPAN
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


def new_cache(arena: Arena, n_head_kv: int, head_dim: int, n_ctx: int, n_seq: int, cache_type: str = "f16") -> CpuCache:
    """A cache of n_seq slots of n_ctx positions, as rows_stored gives them. cache_type: one of CACHE_TYPES."""
    type_name, element_bytes = CACHE_TYPES[cache_type]
    wide = -(-head_dim // LANES) * LANES
    k, v = (arena.take(n_seq * n_head_kv * n_ctx * width * element_bytes) for width in (head_dim, wide))
    return CpuCache(n_seq, n_head_kv, head_dim, n_ctx, wide, FLOAT_PANELS[type_name], element_bytes, k, v)
