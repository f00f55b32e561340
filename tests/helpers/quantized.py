"""Reading a quantized checkpoint back as numbers."""

import itertools

import numpy as np

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.runtime.convert.quantized.methods import KEPT, plain_tensors
from gguf_run.runtime.convert.stored.checkpoint import Checkpoint


def decode(folder, keep=KEPT):
    return plain_tensors(Checkpoint.open(folder), keep)


def values(tensor):
    """Return all weights, read in pieces of rows that begin and end anywhere."""
    cuts = sorted({0, 1, 7, tensor.n_rows // 2 + 1, tensor.n_rows} & set(range(tensor.n_rows + 1)))
    parts = [dequantize(tensor.blocks(a, b), tensor.type) for a, b in itertools.pairwise(cuts)]
    return np.concatenate(parts).reshape(tuple(reversed(tensor.ne)))
