"""A Hugging Face checkpoint as a GGUF file that is never written: metadata in memory, tensors read when used.

What it returns goes wherever a GGUF file goes: into quantize_plan and quantize_file, which write it in any type in one
step, or into a Model, which runs it.
"""

import dataclasses
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import numpy as np

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.errors import FormatError
from gguf_run.formats.gguf.mapped import MemoryFile
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.formats.gguf.writer_metadata import MetaValue
from gguf_run.formats.quantizers.quantizer import quantize
from gguf_run.runtime.convert.architectures import IGNORED, OTHER_PARTS
from gguf_run.runtime.convert.card import general_metadata
from gguf_run.runtime.convert.metadata import hyperparameters, layout_of, rope_tensors
from gguf_run.runtime.convert.quantized.methods import KEPT, plain_tensors
from gguf_run.runtime.convert.stored.checkpoint import Checkpoint
from gguf_run.runtime.convert.stored.sources import F32, rows, source
from gguf_run.runtime.convert.tensors import model_tensors
from gguf_run.runtime.convert.vocabulary.metadata import tokenizer_metadata
from gguf_run.runtime.quantize.file_types import FILE_TYPES, KEEP, FileType
from gguf_run.runtime.quantize.plan import Item, Plan


def open_checkpoint(
    directory: Path, *, name: str | None = None, vocab_only: bool = False, keep: Container[str] = KEPT
) -> GGUFFile:
    """Return a checkpoint as the GGUF file that it makes, in the types that it has. name: general.name. keep: of what
    is quantized already only these types are kept; the rest is F32.

    GgufRunError and its kinds, one line each, for anything that is missing, wrong or not known.
    """
    checkpoint = Checkpoint.open(directory, weights=not vocab_only)
    layout, config = layout_of(checkpoint.config)
    tensors: dict[str, Tensor] = {}
    if not vocab_only:
        stored = {
            name: tensor
            for name, tensor in checkpoint.tensors.items()
            if not name.endswith(IGNORED) and not name.startswith(OTHER_PARTS)
        }
        plain = plain_tensors(dataclasses.replace(checkpoint, config=config, tensors=stored), keep)
        tensors = model_tensors(layout, config, plain)
        for key, values in rope_tensors(config).items():
            file = MemoryFile(config.path, values.tobytes())
            tensors[key] = source(key, values.shape, F32, file, lambda first, end, values=values: values)  # type: ignore[misc]
    vocabulary = tokenizer_metadata(directory, config.values)
    _fit_vocabulary(directory, tensors, vocabulary)
    metadata: dict[str, MetaValue] = {
        "general.architecture": layout.arch,
        "general.type": "model",
        **general_metadata(directory, name, list(tensors.values())),
        **hyperparameters(layout, config),
        **vocabulary,
    }
    return GGUFFile.of(directory, metadata, tensors)


def _fit_vocabulary(directory: Path, tensors: dict[str, Tensor], vocabulary: Mapping[str, MetaValue]) -> None:
    """Drop rows of the embeddings beyond the last token, as Gemma 3 has them; FormatError if rows are missing."""
    tokens = vocabulary.get("tokenizer.ggml.tokens")
    tokens = tokens.value if isinstance(tokens, Typed) else tokens
    for name in ("token_embd.weight", "output.weight", "output.bias"):
        if name in tensors and isinstance(tokens, Sequence):
            tensor, n = tensors[name], len(tokens)
            if tensor.ne[-1] < n:
                raise FormatError(f"{directory}: {name} has {tensor.ne[-1]} rows for {n} tokens: not of one model")
            if tensor.ne[-1] > n and len(tensor.ne) == 2:
                tensors[name] = rows(tensor, np.arange(n, dtype=np.int64), (tensor.ne[0], n))


def auto_type(file: GGUFFile) -> tuple[FileType, int | None]:
    """Return the type that keeps most of a checkpoint, and general.file_type where that does not tell it: BF16 for
    BF16, F16 for other floats, KEEP (and F16 for what must be dequantized) where tensors are quantized."""
    names = [tensor.type.name for tensor in matrices(file)]
    quantized = Counter(tensor.type.name for tensor in matrices(file) if tensor.type.is_quantized)
    if quantized:
        name = {"MXFP4": "MXFP4_MOE"}.get(most := quantized.most_common(1)[0][0], most)
        return KEEP, FILE_TYPES[name].id if name in FILE_TYPES else None
    first = next((name for name in names if name != "F32"), "F16")  # F32: perhaps FP8 before, whatever the others are
    return FILE_TYPES["BF16" if first == "BF16" else "F16"], None


def kept_note(file: GGUFFile, plan: Plan) -> str | None:
    """Return a line that tells which quantized matrices of a checkpoint stay as they are, None if there are none."""
    types = {tensor.name: tensor.type for tensor in matrices(file)}
    if not any(type.is_quantized for type in types.values()):
        return None
    items = [item for item in plan.items if item.source.name in types]
    kept = Counter(item.target.type.name for item in items if item.source.type.is_quantized and item.is_copy)
    others = Counter(item.target.type.name for item in items) - kept
    first, second = (", ".join(f"{n} {name}" for name, n in c.most_common()) or "none" for c in (kept, others))
    return f"matrices kept without requantizing: {first}; others: {second}"


def matrices(file: GGUFFile) -> list[Tensor]:
    """Return the weights of two dimensions and more."""
    return [tensor for tensor in file.tensors.values() if len(tensor.ne) > 1 and tensor.name.endswith(".weight")]


def in_memory(file: GGUFFile, plan: Plan) -> GGUFFile:
    """Return what the plan would write as a file that is quantized while it is read."""
    return GGUFFile.of(file.path, plan.metadata, {item.target.name: _quantized(item) for item in plan.items})


def _quantized(item: Item) -> Tensor:
    if item.is_copy:
        return item.source
    origin, target = item.source, item.target

    def read(first: int, end: int) -> "np.typing.NDArray[np.uint8]":
        blocks = np.empty((end - first, target.type.row_bytes(target.ne[0])), np.uint8)
        n_rows = target.ne[1] if len(target.ne) > 1 else 1
        for start in range(first, end, n_rows):  # an expert at a time: each has importance weights of its own
            expert, stop = start // n_rows, min((start // n_rows + 1) * n_rows, end)
            importance = None if item.importance is None else item.importance[expert % len(item.importance)]
            x = dequantize(origin.blocks(start, stop), origin.type)
            try:
                blocks[start - first : stop - first] = quantize(x, target.type, importance)
            except FormatError as error:
                raise FormatError(f"{origin.file.path}: {target.name}: {error}") from None
        return blocks

    return source(target.name, target.ne[::-1], target.type, origin.file, read, origin.release)
