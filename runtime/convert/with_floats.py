"""A model whose products take activations as they are. With integer types the CPU rounds them to int8."""

from dataclasses import replace

from gguf_run.formats.blocks.coded import CODED_FORMS
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.blocks.unpack import INTEGER_FORMS
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.runtime.convert.stored.sources import values


def with_floats(file: GGUFFile) -> GGUFFile:
    """Return the file with other types for its matrices, which hold the same weights: F32 if there is no other one."""
    metadata = {key: file.metadata.typed(key) for key in file.metadata}
    return GGUFFile.of(file.path, metadata, {name: _as_floats(tensor) for name, tensor in file.tensors.items()})


def _as_floats(tensor: Tensor) -> Tensor:
    name = f"{tensor.type.name}_F32"
    if len(tensor.ne) > 1 and name in CODED_FORMS:
        return replace(tensor, type=type_by_name(name))
    return values(tensor) if len(tensor.ne) > 1 and tensor.type.name in INTEGER_FORMS else tensor
