"""The state of a recurrent op: one row of numbers for each slot. models/kv_cache.py says which slot holds what."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.frozen import frozen


@frozen(eq=False)
class CpuState:
    """models.handles.StateHandle."""

    data: NDArray[np.float32]  # [n_slots, n_floats]

    @property
    def n_slots(self) -> int:
        return len(self.data)

    def copy(self, source: int, target: int) -> None:
        self.data[target] = self.data[source]

    def read(self, slot: int) -> NDArray[np.uint8]:
        return self.data[slot].view(np.uint8).copy()

    def write(self, slot: int, data: Any) -> bool:
        values = np.frombuffer(data, np.uint8)
        fits = values.nbytes == self.data[slot].nbytes
        if fits:
            self.data[slot].view(np.uint8)[:] = values
        return fits
