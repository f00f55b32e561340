"""The state of a recurrent op: one row of numbers for each slot. models/kv_cache.py says which slot holds what."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as Array


@dataclass(frozen=True, eq=False)
class GpuState:
    """models.handles.StateHandle."""

    data: Array  # f32[n_slots, n_floats]

    @property
    def n_slots(self) -> int:
        return len(self.data)

    def copy(self, source: int, target: int) -> None:
        self.data[target] = self.data[source]

    def read(self, slot: int) -> NDArray[np.uint8]:
        values: NDArray[np.uint8] = self.data[slot].cpu().numpy().view(np.uint8)
        return values.copy()

    def write(self, slot: int, data: Any) -> bool:
        values = np.frombuffer(data, np.uint8)
        fits = values.nbytes == self.data[slot].nbytes
        if fits:
            self.data[slot] = torch.from_numpy(values.view(np.float32).copy())
        return fits
