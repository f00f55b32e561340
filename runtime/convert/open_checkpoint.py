"""A Hugging Face checkpoint as a GGUF file that is never written: metadata in memory, tensors computed when read.

The result can be used like any GGUF file: quantize/ writes it in any type in one step, and a Model runs it.
"""

import dataclasses
import warnings
from collections import Counter, defaultdict
from collections.abc import Container, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.formats.gguf.writer_metadata import MetaValue
from gguf_run.formats.quantizers.quantizer import quantize
from gguf_run.models.adapters import ENDS
from gguf_run.models.config import ModelConfig
from gguf_run.runtime.convert.card import general_metadata
from gguf_run.runtime.convert.metadata import hyperparameters, layout_of
from gguf_run.runtime.convert.pooling import dense_tensors, pooling_keys
from gguf_run.runtime.convert.quantized.methods import KEPT, RUN, plain_tensors
from gguf_run.runtime.convert.rope import rope_tensors
from gguf_run.runtime.convert.shared import IGNORED, MOST_DRAFTS, N_DRAFT, OTHER_PARTS
from gguf_run.runtime.convert.stored.checkpoint import Checkpoint
from gguf_run.runtime.convert.stored.sources import Source, computed, padded, rows
from gguf_run.runtime.convert.tensors import model_tensors, take_numbers
from gguf_run.runtime.convert.vocabulary.metadata import tokenizer_metadata
from gguf_run.runtime.quantize.file_types import FILE_TYPES, KEEP, FileType
from gguf_run.runtime.quantize.item import Item
from gguf_run.runtime.quantize.plan import Plan

_N_MEASURED = 16  # rows of a matrix


def open_checkpoint(
    directory: Path, *, name: str | None = None, vocab_only: bool = False, keep: Container[str] = KEPT
) -> GGUFFile:
    """Return a checkpoint as the GGUF file that it makes, in the types that it has.

    name: general.name; None: from the card or the folder.
    vocab_only: without weights.
    keep: types whose blocks stay as they are in a checkpoint that is quantized already. Other weights become F32.

    GgufRunError and its kinds, one line each, for anything that is missing, wrong or not known.
    """
    checkpoint = Checkpoint.open(directory, weights=not vocab_only)
    layout, config = layout_of(checkpoint.config)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, MetaValue] = {}
    if not vocab_only:
        n_layer, n_draft = config.integer("num_hidden_layers"), config.integer(N_DRAFT, default=0, low=0)
        drafts = [f"model.layers.{il}." for il in range(n_layer, n_layer + min(n_draft, MOST_DRAFTS))]
        others = (*OTHER_PARTS, *drafts)
        stored = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(others)}
        if n_left_out := len(checkpoint.tensors) - len(stored):
            what = f"{n_left_out} tensors for images, sound or drafts are left out, the file is for text alone"
            warnings.warn(f"{directory}: {what}", stacklevel=2)
        stored = {name: tensor for name, tensor in stored.items() if not name.endswith(IGNORED)}
        plain = dict(plain_tensors(dataclasses.replace(checkpoint, config=config, tensors=stored), keep))
        numbers.update(take_numbers(layout, n_layer, plain))
        tensors = model_tensors(layout, config, plain)
        tensors |= {tensor.name: tensor for tensor in dense_tensors(directory)}
    hyper = hyperparameters(layout, config)
    hyper |= {f"{layout.arch}.{key}": value for key, value in pooling_keys(directory, layout.decoder.is_causal)}
    if not vocab_only:
        n_pairs = hyper.get(f"{layout.arch}.attention.key_length", Typed("u32", 0)).value // 2
        factors = rope_tensors(layout, config, n_pairs)
        tensors |= {key: computed(key, values, config.path) for key, values in factors.items()}
    vocabulary = tokenizer_metadata(directory, config.values)
    if (n_types := config.integer("type_vocab_size", default=0, low=0)) > 0:
        vocabulary["tokenizer.ggml.token_type_count"] = Typed("u32", n_types)
    _fit_vocabulary(directory, tensors, len(vocabulary["tokenizer.ggml.tokens"]))
    metadata: dict[str, MetaValue] = {
        "general.architecture": layout.arch,
        "general.type": "model",
        **general_metadata(directory, name, list(tensors.values())),
        **hyper,
        **numbers,
        **vocabulary,
    }
    file = GGUFFile.of(directory, metadata, tensors)
    if not vocab_only:
        try:  # the decoder knows which tensors there must be, and their shapes
            ModelConfig.from_metadata(file.metadata, file.tensors)
        except GgufRunError as error:
            raise type(error)(f"{directory}: {error}") from None
    return file


def _fit_vocabulary(directory: Path, tensors: dict[str, Tensor], n_tokens: int) -> None:
    """Drop rows of the embeddings beyond the last token, as Gemma 3 has them. FormatError if rows are missing."""
    for name in ("token_embd.weight", "output.weight", "output.bias", "per_layer_token_embd.weight"):
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tensor.ne[-1] < n_tokens and name.startswith("per_layer"):  # images and audio: their tokens have none
            tensors[name] = padded(tensor, n_tokens)
        elif tensor.ne[-1] < n_tokens:
            raise FormatError(f"{directory}: {name} has {tensor.ne[-1]} rows for {n_tokens} tokens: not of one model")
        if tensor.ne[-1] > n_tokens and len(tensor.ne) == 2:
            tensors[name] = rows(tensor, np.arange(n_tokens, dtype=np.int64), (tensor.ne[0], n_tokens))


def auto_type(file: GGUFFile) -> FileType:
    """Return the type that keeps most of a checkpoint.

    BF16 for BF16, F16 for other floats. KEEP for quantized matrices, with the number of the type that most have; what
    must be dequantized becomes F16.
    """
    names = [tensor.type.name for tensor in matrices(file)]
    quantized = Counter(tensor.type.name for tensor in matrices(file) if tensor.type.is_quantized)
    if quantized:
        most = quantized.most_common(1)[0][0]
        known = FILE_TYPES.get("MXFP4_MOE" if most == "MXFP4" else most)
        return dataclasses.replace(KEEP, id=known.id) if known else KEEP
    # F32 matrices beside others may have been FP8.
    first = next((name for name in names if name != "F32"), "F16")
    return FILE_TYPES["BF16" if first == "BF16" else "F16"]


def kept_note(file: GGUFFile, plan: Plan) -> Iterator[str]:
    """Yield a line that says how many quantized matrices of a checkpoint stay as they are, if there are any."""
    names = {tensor.name for tensor in matrices(file)}
    items = [item for item in plan.items if item.source.name in names]
    if not any(item.source.type.is_quantized for item in items):
        return
    kept = Counter(item.target.type.name for item in items if item.source.type.is_quantized and item.is_copy)
    others = Counter(item.target.type.name for item in items) - kept
    first, second = (", ".join(f"{n} {name}" for name, n in c.most_common()) or "none" for c in (kept, others))
    yield f"matrices kept without requantizing: {first}; others: {second}"


def lost_notes(folder: Path, plan: Plan) -> Iterator[str]:
    """Yield a line for each type that GGUF lacks: by how much its matrices change, measured on some of their rows."""
    lost: dict[str, list[tuple[float, float]]] = defaultdict(list)
    exact = open_checkpoint(folder, keep=RUN).tensors
    for item in plan.items:
        source = exact.get(item.target.name)
        if source is not None and source.type.id is None:
            new = _quantized(item)
            x, y = (dequantize(t.blocks(0, min(t.n_rows, _N_MEASURED)), t.type) for t in (source, new))
            lost[f"{source.type.name} to {new.type.name}"].append((float(np.sum((x - y) ** 2)), float(np.sum(x**2))))
    for names, sums in lost.items():
        error, size = np.sum(sums, axis=0)
        yield f"{len(sums)} matrices change from {names}: error {100 * np.sqrt(error / max(size, 1e-38)):.2g} %"


def matrices(file: GGUFFile) -> list[Tensor]:
    """Return the weights of two dimensions and more."""
    ends = (".weight", *ENDS)
    return [tensor for tensor in file.tensors.values() if len(tensor.ne) > 1 and tensor.name.endswith(ends)]


def in_memory(file: GGUFFile, plan: Plan) -> GGUFFile:
    """Return what the plan would write, as a file that is quantized while it is read."""
    return GGUFFile.of(file.path, plan.metadata, {item.target.name: _quantized(item) for item in plan.items})


def _quantized(item: Item) -> Tensor:
    if item.is_copy:
        return item.source
    origin, target = item.source, item.target

    def read(first: int, end: int) -> NDArray[np.uint8]:
        blocks = np.empty((end - first, target.type.row_bytes(target.ne[0])), np.uint8)
        n_rows = target.ne[1] if len(target.ne) > 1 else 1
        for start in range(first, end, n_rows):  # an expert at a time: each has importance weights of its own
            stop = min((start // n_rows + 1) * n_rows, end)
            x = dequantize(origin.blocks(start, stop), origin.type)
            try:
                blocks[start - first : stop - first] = quantize(x, target.type, item.importance_at(start))
            except FormatError as error:
                raise FormatError(f"{origin.file.path}: {target.name}: {error}") from None
        return blocks

    return Source(target.name, target.ne, target.type, origin.file, read, origin.release)
