"""What passes between the decoder and its backends at run time. protocol.py has what a backend must do."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.frozen import frozen

BLOCK = 32  # columns of a row that share a scale, in cache types with blocks; only heads of whole blocks are rotated
_MOST_ROTATED_BITS = 8  # rotation lowers the divergence of 8-bit types by a quarter to a third, see docs/kv_cache.md


@frozen
class CacheType:
    """How a layer's K and V are stored."""

    k: str = "f16"  # name in the backend's table of cache types
    v: str = "f16"
    # Whether each head of Q, K and V goes through an orthogonal Hadamard transform before K and V are stored. The
    # result of attention goes back through the transform. None: only types of at most 8 bits without static scales do
    # so. Heads whose head_dim is not a multiple of 32 never do.
    rotate: bool | None = None
    # For fp8, one scale for each KV head: value = scale * stored number. None: each row gets a scale when it is stored.
    k_scales: tuple[float, ...] | None = None
    v_scales: tuple[float, ...] | None = None


def rotates(bits: int, head_dim: int, rotate: bool | None, has_scales: bool) -> bool:
    """Return whether a head's rows go through the Hadamard transform before they are stored.

    bits: bits of a stored element.
    rotate: what the user wants, see CacheType.
    has_scales: whether the type has static scales. These were measured on rows that are not rotated.
    """
    wanted = bits <= _MOST_ROTATED_BITS and not has_scales if rotate is None else rotate
    return wanted and head_dim % BLOCK == 0


class Run(NamedTuple):
    """Tokens of one sequence, which stand side by side in the batch of a step."""

    seq: int  # number of the sequence
    n_past: int  # position of the first token
    n_tokens: int
    is_long: bool = False  # the tokens turn by Rotation.long_inv_freq
    # Slots of a recurrent layer's state: the one that the run reads, unused if n_past is 0 (the state is then all 0),
    # and the one that the run writes, never the same: a step that is interrupted leaves the old state as it was.
    reads: int = 0
    writes: int = 1


class Top(NamedTuple):
    """Not all values of a result row are wanted, but the greatest ones."""

    n: int
    # A bit for each column, 32 in a word, the lowest first. 0: a finite value counts as less than all others.
    mask: NDArray[np.uint32] | None = None


Tops = Sequence[Top | None]  # of some result rows; None: all values are wanted


class Results(NamedTuple):
    """Result rows of a step."""

    values: NDArray[np.float32]  # [rows without a Top, columns], memory of the program
    # [rows with a Top, n]: the greatest values in descending order, and their columns. Equal values are in the order of
    # their columns. NaN counts as the greatest. What is missing is -inf, of column -1.
    greatest: NDArray[np.float32] = np.empty((0, 0), np.float32)
    columns: NDArray[np.intp] = np.empty((0, 0), np.intp)
