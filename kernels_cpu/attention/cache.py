"""The KV cache of one layer: n_seq slots, one for each sequence. cache_types.py has the layout."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.frozen import frozen
from gguf_run.kernels_cpu.attention.cache_rows import CacheRows
from gguf_run.kernels_cpu.attention.sizes import SPAN
from gguf_run.models import kv_cache
from gguf_run.models.kv_cache import GROUP
from gguf_run.models.operands import Rotation


def rows_stored(n_ctx: int, n_batch: int, window: int) -> int:
    """Return how many positions of a sequence a layer stores, see kv_cache.rows_stored."""
    return kv_cache.rows_stored(n_ctx, n_batch, window, multiple=GROUP, span=SPAN)


@frozen(eq=False)
class CpuCache:
    """K and V of one layer, or just K if the values are columns of the keys."""

    n_seq: int
    rows_k: CacheRows  # what a slot of k holds
    rows_v: CacheRows | None  # what a slot of v holds
    k: NDArray[np.uint8]  # [n_seq, rows_k.nbytes]
    v: NDArray[np.uint8]  # [n_seq, rows_v.nbytes]; k if rows_v is None

    @property
    def n_ctx(self) -> int:
        """Positions of a slot as stored."""
        return self.rows_k.n_rows

    @property
    def kinds(self) -> str:
        return "kv" if self.rows_v else "k"

    def _groups(self, kind: str) -> NDArray[np.uint8]:
        """Return k or v as u8[n_seq, n_head_kv, n_ctx / GROUP, bytes of a group of a head]."""
        return {"k": self.k, "v": self.v}[kind].reshape(self.n_seq, self.rows_k.n_head_kv, self.n_ctx // GROUP, -1)

    def copy(self, source: int, target: int, n_rows: int) -> None:
        for kind in self.kinds:
            groups = self._groups(kind)[:, :, : -(-n_rows // GROUP)]
            groups[target] = groups[source]

    def shift(self, seq: int, n_past: int, n_keep: int, n_discard: int, rotation: Rotation | None) -> None:
        ring, end = self.n_ctx // GROUP, -(-n_past // GROUP)
        source = np.arange(max((n_keep + n_discard) // GROUP, end - ring), end)
        target = (source - n_discard // GROUP) % ring
        for kind in self.kinds:
            groups = self._groups(kind)[seq]
            moved = groups.take(source % ring, axis=1)
            if kind == "k" and rotation is not None:
                from gguf_run.kernels_cpu.attention.move_rows import turn  # late: few contexts are ever full

                start = 0 if self.rows_v else self.rows_k.head_dim - rotation.n_rot
                turn(self.rows_k, moved, rotation, -n_discard, start)
            groups[:, target] = moved

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
