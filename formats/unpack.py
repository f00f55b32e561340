"""The exact integer form of every block-quantized type: weight = scale[g] * q + minimum[g].

Each type's bit layout stands once, in its unpacker (unpack_legacy.py, unpack_k.py, unpack_iq.py, unpack_small.py).
Dequantizing and repacking into panels are both built on it:

    unpack(src, at, q, scale, minimum, grid)

reads the block at byte `at` of src uint8[:] and fills q int8[block_size], scale f32[block_size // group] and, for types
with minimums only, minimum f32[block_size // group]. grid is what `form.grid()` returned. It is compiled code to be
called from compiled code: give it to a kernel with `jit.specialize`. It allocates nothing and checks nothing, so src
must hold the whole block and all arrays must be C-contiguous.

The products and sums that make scale and minimum are in the reference's order, so that `scale * q` (or, with minimums,
`scale * q + minimum`), rounded to float32 after each operation, is the reference's weight bit for bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats import unpack_k, unpack_legacy
from gguf_run.formats.grids import no_grid
from gguf_run.formats.types import TensorType, type_by_name


@dataclass(frozen=True)
class IntegerForm:
    """One type's row. group: weights per scale, 16 or 32 (a scale that covers more is repeated). q_min, q_max: the
    least and greatest q that any block can hold. has_minimum: false means that `minimum` is left untouched.
    grid() returns the codebook int8[:] that the unpacker wants (read-only; empty for most types)."""

    type: TensorType
    group: int
    q_min: int
    q_max: int
    has_minimum: bool
    unpack: Any
    grid: Callable[[], NDArray[np.int8]] = no_grid

    @property
    def n_groups(self) -> int:
        """Scales per block."""
        return self.type.block_size // self.group


_ROWS: tuple[tuple[Any, ...], ...] = (
    # name, group, q_min, q_max, has_minimum, unpack, grid
    ("Q4_0", 32, -8, 7, False, unpack_legacy.unpack_q4_0),
    ("Q4_1", 32, 0, 15, True, unpack_legacy.unpack_q4_1),
    ("Q5_0", 32, -16, 15, False, unpack_legacy.unpack_q5_0),
    ("Q5_1", 32, 0, 31, True, unpack_legacy.unpack_q5_1),
    ("Q8_0", 32, -128, 127, False, unpack_legacy.unpack_q8_0),
    ("Q4_K", 32, 0, 15, True, unpack_k.unpack_q4_k),
    ("Q6_K", 16, -32, 31, False, unpack_k.unpack_q6_k),
)

INTEGER_FORMS: Mapping[str, IntegerForm] = MappingProxyType(
    {name: IntegerForm(type_by_name(name), *row) for name, *row in _ROWS}
)
