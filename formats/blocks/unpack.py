"""The exact integer form of every block-quantized type: weight = factor[0] * scale[g] * q + factor[1] * minimum[g].

Each type has an unpacker, which is the only place that knows the bits of its blocks: see unpack_legacy.py, unpack_k.py,
unpack_iq.py and unpack_small.py. Dequantizing, embedding and repacking into panels all call it:

    unpack(src, at, q, scale, minimum, factor, grid)

    src      u8[:]                      the block begins at byte `at`
    q        i8[block_size]             filled
    scale    f32[block_size / group]    filled; small integers if the type has `shared` factors
    minimum  f32[block_size / group]    filled if the type has minimums; else left as it is
    factor   f32[2]                     filled if the type has `shared` factors; else left as it is: set it to 1 before
    grid     i8[:]                      the codebook: what `form.grid()` returns

An unpacker is compiled code for other compiled code: give it to a kernel with `jit.specialize`. It allocates nothing
and checks nothing. src must hold the whole block, and all arrays must be C-contiguous.

All products are taken in the reference's order: `(factor[0] * scale) * q`, plus `factor[1] * minimum` if there are
minimums, rounded to float32 after each operation, is the reference's weight bit for bit.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.types import TensorType, type_by_name
from gguf_run.formats.compiler.deferred import imported
from gguf_run.formats.frozen import frozen

NO_GRID: NDArray[np.int8] = np.zeros(0, np.int8)  # the codebook of types that need none
NO_GRID.flags.writeable = False


@frozen
class IntegerForm:
    """One row of the table: a tensor type and its unpacker."""

    type: TensorType
    group: int  # weights of a scale: 16 or 32. Types whose scales cover more repeat them
    q_min: int  # least q that a block can hold
    q_max: int  # greatest q that a block can hold
    has_minimum: bool  # if not, the unpacker leaves `minimum` as it is
    shared: bool  # whether the scales of a block are integers that share a factor. If not, `factor` stays as it is
    unpack: Any  # compiled code, see above
    codebook: str = ""  # name of what the unpacker reads, for grids.codebook; "": nothing

    def grid(self) -> NDArray[np.int8]:
        """Return the codebook that the unpacker reads: read-only, empty if there is none."""
        if not self.codebook:
            return NO_GRID
        from gguf_run.formats.blocks.grids import codebook  # late: most types have none

        return codebook(self.codebook)

    @property
    def constants(self) -> dict[str, Any]:
        """The names that `jit.specialize` gives to a loop over blocks of this type."""
        return {
            "unpack": self.unpack,
            "BLOCK_SIZE": self.type.block_size,
            "TYPE_SIZE": self.type.type_size,
            "GROUP": self.group,
            "HAS_MINIMUM": self.has_minimum,
        }


# fmt: off
_ROWS: tuple[tuple[Any, ...], ...] = (
    # name    group   q_min q_max has_minimum shared unpack_*.py, grid
    ("Q4_0",    32,   -8,   7, False, False, "legacy"),
    ("Q4_1",    32,    0,  15, True,  False, "legacy"),
    ("Q5_0",    32,  -16,  15, False, False, "legacy"),
    ("Q5_1",    32,    0,  31, True,  False, "legacy"),
    ("Q8_0",    32, -128, 127, False, False, "legacy"),
    ("Q8_1",    32, -128, 127, False, False, "legacy"),
    ("Q2_K",    16,    0,   3, True,  True,  "k"),
    ("Q3_K",    16,   -4,   3, False, True,  "k"),
    ("Q4_K",    32,    0,  15, True,  True,  "k"),
    ("Q5_K",    32,    0,  31, True,  True,  "k"),
    ("Q6_K",    16,  -32,  31, False, True,  "k"),
    ("Q8_K",    32, -128, 127, False, False, "k"),
    ("IQ2_XXS", 32,  -43,  43, False, False, "iq", "IQ2_XXS"),
    ("IQ2_XS",  16,  -43,  43, False, False, "iq", "IQ2_XS"),
    ("IQ3_XXS", 32,  -62,  62, False, False, "iq", "IQ3_XXS"),
    ("IQ1_S",   32,   -9,   9, False, False, "iq", "IQ1_S"),
    ("IQ4_NL",  32, -127, 113, False, False, "small", "iq4_nl"),
    ("IQ3_S",   32,  -15,  15, False, False, "iq", "IQ3_S"),
    ("IQ2_S",   16,  -43,  43, False, False, "iq", "IQ2_S"),
    ("IQ4_XS",  32, -127, 113, False, True,  "small", "iq4_nl"),
    ("IQ1_M",   16,   -9,   9, False, False, "iq", "IQ1_S"),
    ("TQ1_0",   32,   -1,   1, False, False, "small"),
    ("TQ2_0",   32,   -1,   2, False, False, "small"),
    ("MXFP4",   32,  -12,  12, False, False, "small", "e2m1"),
    ("NVFP4",   16,  -12,  12, False, False, "small", "e2m1"),
    ("Q1_0",    32,   -1,   1, False, False, "legacy"),
    ("Q2_0",    32,   -1,   2, False, False, "legacy"),
    ("INT8",    32, -128, 127, False, False, "legacy"),
)
# fmt: on


def _form(
    name: str, group: int, q_min: int, q_max: int, has_minimum: bool, shared: bool, family: str, *codebook: str
) -> IntegerForm:
    """Return a row of the table. The unpacker's module is imported when a kernel that contains it is compiled."""
    unpack = imported(f"{__package__}.unpack_{family}", f"unpack_{name.lower()}")
    return IntegerForm(type_by_name(name), group, q_min, q_max, has_minimum, shared, unpack, *codebook)


INTEGER_FORMS: Mapping[str, IntegerForm] = MappingProxyType({name: _form(name, *row) for name, *row in _ROWS})
