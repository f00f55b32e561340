"""What the decoder knows of a backend's handles. Only type checkers read this file: handles inherit nothing."""

from collections.abc import Callable
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
    """K and V of one layer: pages of models.pages.PAGE positions, which PageTable gives to sequences.

    A group is half a page: models.kv_cache.GROUP positions. Groups 2 p and 2 p + 1 are page p.
    """

    @property
    def kinds(self) -> str:
        """What is held: "kv", or "k" if values are columns of the keys."""

    def copy(self, source: int, target: int, /) -> None:
        """Copy page `source` to page `target`."""

    def move(
        self, source: NDArray[np.int64], target: NDArray[np.int64], rotation: Rotation | None, distance: int, /
    ) -> None:
        """Copy groups to other groups, which may be among the first ones.

        With a rotation, the keys turn by a distance of positions.
        """

    def group_bytes(self, kind: str, /) -> int:
        """Return the bytes of K or V ("k", "v") of a group."""

    def read(self, kind: str, groups: NDArray[np.int64], /) -> NDArray[np.uint8]:
        """Return the bytes of K or V of some groups."""

    def write(self, kind: str, groups: NDArray[np.int64], data: Any, /) -> None:
        """Store bytes that `read` has returned for these groups, or for more of which these are the last."""


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
    """Sums of squares that the ops Observe and Moe collect from the inputs of a matrix, and the inputs themselves."""

    def take(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the sums over all rows since the last call, and start again from 0.

        Returns:
            f64[n, width]: the sum of the squares of each column.
            i64[n]: the number of rows.
            n is the number of experts, which see different rows; 1 for a matrix that is not an expert.
        """

    def keep(self, n_rows: int, /) -> Callable[[], tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Keep the rows from now on. UnsupportedError if the backend cannot.

        n_rows: the most that are kept.
        Returns a function that returns them as they came, and starts again. The next step overwrites them.
            f32[n, width]: the rows.
            i64[n]: the expert that read each.
        """
