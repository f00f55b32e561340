"""Codebooks of the types whose weights are values from a table."""

import functools

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.types import CODEBOOKS


@functools.cache
def codebook(name: str) -> NDArray[np.int8]:
    """Return a codebook, flat and read-only.

    name: one of CODEBOOKS, or a type (IQ1_S, IQ2_*, IQ3_*) whose grid the gguf package has: 8 weights per entry, of
    IQ3 4.
    """
    values: object = CODEBOOKS.get(name)
    if values is None:
        import gguf.quants  # late: the import takes 0.1 s, and few models need a grid

        quant = getattr(gguf.quants, name)
        quant.init_grid()
        values = quant.grid
    array = np.array(values, np.int8).reshape(-1)
    array.flags.writeable = False
    return array
