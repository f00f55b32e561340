"""Codebooks of the types whose weights are values from a table: flat, read-only int8 arrays."""

import functools

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.types import CODEBOOKS


def _frozen(values: object) -> NDArray[np.int8]:
    """Return values as a flat, read-only int8 array."""
    array = np.array(values, np.int8).reshape(-1)
    array.flags.writeable = False
    return array


@functools.cache
def iq4_nl() -> NDArray[np.int8]:
    """Return the 16 values of IQ4_NL and IQ4_XS."""
    return _frozen(CODEBOOKS["iq4_nl"])


@functools.cache
def e2m1() -> NDArray[np.int8]:
    """Return the 16 values of e2m1, times 2."""
    return _frozen(CODEBOOKS["e2m1"])


@functools.cache
def codebook(name: str) -> NDArray[np.int8]:
    """Return the grid of a type (IQ1_S, IQ2_*, IQ3_*) from the gguf package: 8 weights per entry, for IQ3 4."""
    import gguf.quants  # late: the import takes 0.1 s, and few models need a grid

    quant = getattr(gguf.quants, name)
    quant.init_grid()
    return _frozen(quant.grid)


iq1 = functools.partial(codebook, "IQ1_S")
iq2_xxs = functools.partial(codebook, "IQ2_XXS")
iq2_xs = functools.partial(codebook, "IQ2_XS")
iq2_s = functools.partial(codebook, "IQ2_S")
iq3_xxs = functools.partial(codebook, "IQ3_XXS")
iq3_s = functools.partial(codebook, "IQ3_S")
