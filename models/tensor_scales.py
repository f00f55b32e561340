"""Factors of whole matrices, which NVFP4 and some mixtures of experts have in tensors of their own."""

import math
from dataclasses import replace

import numpy as np

from gguf_run.formats.errors import FormatError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.reader import Tensor


def with_scales(tensor: Tensor, factors: Tensor) -> Tensor:
    """Return a tensor with factors as its `scales`, one for each of its matrices."""
    if factors.type.name != "F32" or factors.n_elements != math.prod(tensor.ne[2:]):
        raise FormatError(
            f"tensor {quoted(factors.name)} has {factors.n_elements} values of {factors.type.name}, must have one "
            f"F32 for each matrix of {quoted(tensor.name)}"
        )
    return replace(tensor, scales=tuple(factors.blocks().reshape(-1).view(np.float32).tolist()))
