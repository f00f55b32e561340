"""A model whose products take other activations. By themselves, integer types take them rounded to int8 on the CPU.

float      as they are
dynamic    rounded as vLLM rounds them for INT8 and FP8: one scale for a token, or for 128 columns of it
static     the same with the scales of the checkpoint, tensors "... .input_scale"
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from gguf_run.formats.blocks.coded import CODED_FORMS
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.blocks.unpack import INTEGER_FORMS
from gguf_run.formats.errors import OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.runtime.convert.stored.sources import values


def with_activations(file: GGUFFile, kind: str) -> GGUFFile:
    """Return the file with other types for its matrices, which hold the same weights: F32 if there is no other one."""
    metadata = {key: file.metadata.typed(key) for key in file.metadata}
    tensors = {name: _changed(tensor, kind, file.tensors) for name, tensor in file.tensors.items()}
    return GGUFFile.of(file.path, metadata, tensors)


def _changed(tensor: Tensor, kind: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if len(tensor.ne) < 2:
        return tensor
    name = tensor.type.name
    if kind != "float" and name.startswith(("INT8", "FP8")):
        tensor = replace(tensor, rounding=_rounding(tensor, kind, tensors))
    if f"{name}_F32" in CODED_FORMS:
        return replace(tensor, type=type_by_name(f"{name}_F32"))
    return values(tensor) if name in INTEGER_FORMS else tensor


def _rounding(tensor: Tensor, kind: str, tensors: Mapping[str, Tensor]) -> tuple[str, int, float]:
    """Return Tensor.rounding."""
    if len(tensor.ne) > 2:
        raise OptionError(f"--activations {kind}: {tensor.name} has several matrices, allowed are auto and float")
    columns = tensor.type.block_size if tensor.type.name.endswith("_128") else 0
    scale = tensors.get(tensor.name.removesuffix(".weight") + ".input_scale") if kind == "static" else None
    if kind == "static" and scale is None:
        raise OptionError(f"--activations static: {tensor.name} has no input_scale: give --activations dynamic")
    number = float(scale.blocks().view(np.float32)[0, 0]) if scale else 0.0
    if scale and not 0 < number < np.inf:
        raise OptionError(f"--activations static: {scale.name} is {number}, must be positive: give dynamic")
    return "int8" if tensor.type.name == "INT8" else "fp8", columns, number
