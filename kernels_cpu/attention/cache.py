"""The KV cache of one layer: memory for pages. cache_types.py has the layout of a page."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.frozen import frozen
from gguf_run.kernels_cpu.attention.cache_rows import CacheRows
from gguf_run.models.kv_cache import GROUP
from gguf_run.models.operands import Rotation
from gguf_run.models.pages import PAGE, PageTable


@frozen(eq=False)
class CpuCache:
    """models.handles.CacheHandle: K and V of one layer, or just K if the values are columns of the keys."""

    table: PageTable
    rows_k: CacheRows  # what k holds
    rows_v: CacheRows | None  # what v holds
    k: NDArray[np.uint8]  # [rows_k.nbytes]
    v: NDArray[np.uint8]  # [rows_v.nbytes]; k if rows_v is None

    @property
    def kinds(self) -> str:
        return "kv" if self.rows_v else "k"

    def _groups(self, kind: str) -> NDArray[np.uint8]:
        """Return k or v as u8[n_head_kv, groups, bytes of a group of a head]."""
        n_groups = self.table.n_pages * PAGE // GROUP
        return {"k": self.k, "v": self.v}[kind].reshape(self.rows_k.n_head_kv, n_groups, -1)

    def copy(self, source: int, target: int) -> None:
        for kind in self.kinds:
            pages = self._groups(kind).reshape(self.rows_k.n_head_kv, self.table.n_pages, -1)
            pages[:, target] = pages[:, source]

    def move(
        self, source: NDArray[np.int64], target: NDArray[np.int64], rotation: Rotation | None, distance: int
    ) -> None:
        for kind in self.kinds:
            groups = self._groups(kind)
            moved = groups.take(source, axis=1)
            if kind == "k" and rotation is not None:
                from gguf_run.kernels_cpu.attention.move_rows import turn  # late: few contexts are ever full

                start = 0 if self.rows_v else self.rows_k.head_dim - rotation.n_rot
                turn(self.rows_k, moved, rotation, distance, start)
            groups[:, target] = moved

    def group_bytes(self, kind: str) -> int:
        groups = self._groups(kind)
        return groups.shape[0] * groups.shape[2]

    def read(self, kind: str, groups: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self._groups(kind).take(groups, axis=1).reshape(-1)

    def write(self, kind: str, groups: NDArray[np.int64], data: Any) -> None:
        held = self._groups(kind)
        new = np.frombuffer(data, np.uint8).reshape(held.shape[0], -1, held.shape[2])
        held[:, groups] = new[:, new.shape[1] - len(groups) :]
