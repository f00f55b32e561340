"""What the decoder knows of a backend's handles. Only type checkers read this file: handles inherit nothing."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gguf_run.models.operands import Rotation


class WeightHandle(Protocol):
    """A matrix of n_out rows of n_in, or n_head of them, in the form that the backend multiplies with."""

    @property
    def n_in(self) -> int: ...
    @property
    def n_out(self) -> int: ...


class CacheHandle(Protocol):
    """K and V of one layer for some sequences. Groups are those of models.kv_cache.GROUP positions."""

    @property
    def n_ctx(self) -> int:
        """Positions that the layer holds of a sequence: its last ones. Position p is in row p % n_ctx."""

    @property
    def kinds(self) -> str:
        """What is held: "kv", or "k" if values are columns of the keys."""

    def copy(self, source: int, target: int, n_rows: int, /) -> None:
        """Copy the first n_rows rows of sequence `source` to sequence `target`."""

    def shift(self, seq: int, n_past: int, n_keep: int, n_discard: int, rotation: Rotation | None, /) -> None:
        """Move positions n_keep + n_discard .. n_past down by n_discard, and turn their keys back as far."""

    def read(self, seq: int, kind: str, first: int, end: int, /) -> NDArray[np.uint8]:
        """Return the bytes of K or V ("k", "v") of groups first .. end. All of them must be held."""

    def write(self, seq: int, kind: str, end: int, data: Any, /) -> int | None:
        """Store bytes that `read` returned for groups up to `end`. A smaller cache stores only the last groups.

        Returns the first group that is stored, or None if the bytes are not a whole number of groups.
        """


class StateHandle(Protocol):
    """The state of one recurrent op of a layer: n_slots slots of f32 numbers. A step reads one slot, writes another."""

    @property
    def n_slots(self) -> int: ...

    def copy(self, source: int, target: int, /) -> None:
        """Copy slot `source` to slot `target`."""

    def read(self, slot: int, /) -> NDArray[np.uint8]:
        """Return the bytes of a slot."""

    def write(self, slot: int, data: Any, /) -> bool:
        """Store bytes that `read` returned. Return whether they are as many as a slot has."""


class SquaresHandle(Protocol):
    """Sums of squares that the ops Observe and Moe collect from the inputs of a matrix."""

    def take(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the sums over all rows since the last call, and start again from 0.

        Returns:
            f64[n, width]: the sum of the squares of each column.
            i64[n]: the number of rows.
            n is the number of experts, which see different rows; 1 for a matrix that is not an expert.
        """
