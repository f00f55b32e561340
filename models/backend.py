"""What passes between the decoder and its backends at run time. protocol.py has what a backend must do."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.frozen import frozen


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


class Results(NamedTuple):
    """Result rows of a step."""

    values: NDArray[np.float32]  # [number of rows, number of columns], memory of the program
    columns: NDArray[np.intp] | None = None  # the column of each value, if there is one row; None: all columns in order
