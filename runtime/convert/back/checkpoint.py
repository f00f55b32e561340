"""A GGUF file as a Hugging Face checkpoint: what gguf-convert does, backwards.

The table of architectures.py is read backwards: names, order of rows, stacks of experts, offsets of norms.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.atomic import replacing
from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import GgufRunError, UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.formats.quantizers.quantizer import quantize
from gguf_run.formats.safetensors import writing_safetensors
from gguf_run.models.architectures import ROPE_FACTORS
from gguf_run.runtime.convert.back.config import generation_config, layout_of_file, model_config
from gguf_run.runtime.convert.back.tokenizer import tokenizer_files
from gguf_run.runtime.convert.layout import CheckpointLayout
from gguf_run.runtime.convert.metadata import sizes
from gguf_run.runtime.convert.shared import names_of
from gguf_run.runtime.convert.stored.checkpoint import Config
from gguf_run.runtime.convert.stored.sources import F32, Source, gathered, rows, transposed, values
from gguf_run.runtime.convert.tensors import in_pairs

DTYPES = ("BF16", "F16", "F32")
DEFAULT_SHARD = 5 << 30
_CHUNK = 1 << 24  # values that are converted at a time


def export_hf(
    file: GGUFFile,
    directory: Path,
    dtype: str = "auto",
    shard_size: int = 0,
    vocab_only: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Write config.json, generation_config.json, the tokenizer and safetensors. Return the files' names.

    dtype: one of DTYPES, or "auto": the type of most matrices, F16 if they are quantized.
    shard_size: bytes of tensors in a file; 0: DEFAULT_SHARD.
    vocab_only: write the tokenizer alone.
    progress: called with the bytes done and the bytes of all tensors.

    GgufRunError if the directory exists and is not empty, and for anything that a checkpoint has no place for. Nothing
    is left behind then.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise GgufRunError(f"{directory}: is there already: name a new folder, or an empty one")
    files: dict[str, Any] = dict(tokenizer_files(file.metadata))
    tensors: dict[str, Tensor] = {}
    dtype = _usual_dtype(file) if dtype == "auto" else dtype
    if not vocab_only:
        layout = layout_of_file(file)
        config = model_config(layout, file, dtype)
        tensors = checkpoint_tensors(layout, Config(file.path, config), file)
        files |= {"config.json": config, "generation_config.json": generation_config(file.metadata)}
    try:
        directory.absolute().parent.mkdir(parents=True, exist_ok=True)
        with replacing(directory) as temporary:
            temporary.mkdir()
            for name, value in files.items():
                text = json.dumps(value, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2)
                (temporary / name).write_text(text + "\n", encoding="utf-8")
            if tensors:
                _write_tensors(temporary, tensors, dtype, shard_size or DEFAULT_SHARD, progress)
    except OSError as error:
        raise GgufRunError(f"{directory}: cannot be written ({error.strerror or error})") from None
    return sorted(path.name for path in directory.iterdir())


def checkpoint_tensors(layout: CheckpointLayout, config: Config, file: GGUFFile) -> dict[str, Tensor]:
    """Return the tensors under the names of the checkpoint. UnsupportedError for one that it does not have."""
    found: dict[str, Tensor] = {}
    left = {name: tensor for name, tensor in file.tensors.items() if name not in ROPE_FACTORS}
    if config.get("tie_word_embeddings"):
        left.pop("output.weight", None)
    numbers = sizes(config)
    layers = ((f"model.layers.{il}.", f"blk.{il}.", layout.layer) for il in range(numbers["n_layer"]))
    # Prefix of names in the checkpoint, prefix in the GGUF file, names.
    for there, here, names in chain([("", "", layout.model)], layers):
        for (module, target), kind in product(names.items(), ("weight", "bias")):
            bases = names_of(target)
            full = [f"{here}{base}.{kind}" for base in bases]
            if all(name in left for name in full):
                parts = {base: left.pop(name) for base, name in zip(bases, full, strict=True)}
                found.update(_module(layout, numbers, there + module, kind, parts))
    if left:
        name, kind = quoted(next(iter(left))), next(iter(layout.classes))
        raise UnsupportedError(f"{file.path}: tensor {name} ({len(left)} such) has no place in a checkpoint of {kind}")
    return found


def _module(
    layout: CheckpointLayout, numbers: Mapping[str, int], module: str, kind: str, parts: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield by name the weights or the biases of one module of the checkpoint. parts: what it has in the GGUF file."""
    tensors = [in_pairs(layout, numbers, base, tensor, back=True) for base, tensor in parts.items()]
    tensor, first = tensors[0], next(iter(parts))
    if len(tensors) == 3:
        tensor = _grouped(numbers, tensors)
    elif len(tensors) == 2:
        tensor = _both_halves(tensors, layout.interleaved)
    elif layout.norm_offset and kind == "weight" and first.endswith("_norm"):
        offset = np.float32(layout.norm_offset)
        tensor = values(tensor, lambda x: x - offset)
    name = f"{module}.{kind}"
    if first in layout.bare:
        name = module if kind == "weight" else f"{module}_bias"
        tensor = transposed(values(tensor)) if kind == "weight" and len(tensor.ne) == 3 else tensor
    if "@" not in name:
        yield name, tensor
        return
    n = tensor.n_rows // tensor.ne[-1]
    for i in range(tensor.ne[-1]):
        index = np.arange(i * n, (i + 1) * n, dtype=np.int64)
        yield name.replace("@", str(i)), rows(tensor, index, tensor.ne[:-1])


def _grouped(numbers: Mapping[str, int], parts: Sequence[Tensor]) -> Tensor:
    """Return q, k and v as one matrix that has for each head of keys: its query heads, its keys, its values."""
    n_kv, head_dim = numbers["n_head_kv"], numbers["head_dim"]
    n_rows = sum(part.n_rows for part in parts)
    ends = np.cumsum([part.n_rows for part in parts])[:-1]
    index = [part.reshape(n_kv, -1, head_dim) for part in np.split(np.arange(n_rows, dtype=np.int64), ends)]
    return gathered(parts[0].name, parts, np.concatenate(index, axis=1).reshape(-1), (parts[0].ne[0], n_rows))


def _both_halves(parts: Sequence[Tensor], interleaved: bool) -> Tensor:
    """Return gate and up as one tensor: their rows (of a bias: values) in turns, or one matrix after the other."""
    gate = parts[0]
    n, axis = gate.ne[-2], 1 if interleaved else 0
    if len(gate.ne) == 3:
        at = np.arange(2 * gate.n_rows, dtype=np.int64).reshape(2, gate.ne[2], n)
        index = np.stack((at[0], at[1]), axis=1 + axis).reshape(-1)
        return gathered(gate.name, parts, index, (gate.ne[0], 2 * n, gate.ne[2]))

    def read(first: int, end: int) -> NDArray[np.float32]:
        both = [dequantize(part.blocks(first, end), part.type) for part in parts]
        return np.stack(both, axis=1 + axis).reshape(end - first, 2 * n)

    return Source(gate.name, (2 * n, gate.ne[1]), F32, gate.file, read)


def _usual_dtype(file: GGUFFile) -> str:
    """Return the type of most matrices. F16 holds dequantized values better than BF16."""
    count: Counter[str] = Counter()
    for tensor in file.tensors.values():
        if len(tensor.ne) > 1:
            count[tensor.type.name] += tensor.n_rows * tensor.ne[0]
    most = count.most_common(1)[0][0] if count else "F32"
    return most if most in DTYPES else "F16"


def _write_tensors(
    directory: Path, tensors: Mapping[str, Tensor], dtype: str, shard_size: int, progress: Callable[[int, int], None]
) -> None:
    """Write one file, or several and an index of them."""
    size = {name: tensor.n_rows * tensor.ne[0] * (4 if dtype == "F32" else 2) for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    for name in tensors:
        if shards[-1] and sum(size[other] for other in shards[-1]) + size[name] > shard_size:
            shards.append([])
        shards[-1].append(name)
    total = sum(size.values())
    places: dict[str, str] = {}
    done = 0
    for i, names in enumerate(shards):
        path = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        arrays = {name: (dtype, tensors[name].ne[::-1]) for name in names}
        with writing_safetensors(directory / path, arrays, {"format": "pt"}) as append:
            for name in names:
                for blocks in _converted(name, tensors[name], dtype):
                    append(name, blocks)
                    done += blocks.nbytes
                    progress(done, total)
        places |= dict.fromkeys(names, path)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _converted(name: str, tensor: Tensor, dtype: str) -> Iterator[NDArray[np.uint8]]:
    """Yield the tensor's bytes in that type, some rows at a time."""
    target = type_by_name(dtype)
    n_matrix = tensor.ne[1] if len(tensor.ne) > 2 else 1  # whole matrices: transposing reads all of one
    step = max(1, _CHUNK // tensor.ne[0] // n_matrix) * n_matrix
    for first in range(0, tensor.n_rows, step):
        end = min(first + step, tensor.n_rows)
        blocks = tensor.blocks(first, end)
        if tensor.type is not target:
            x = dequantize(blocks, tensor.type)
            if dtype == "F16" and np.abs(x).max(initial=0.0) > np.finfo(np.float16).max:
                raise GgufRunError(f"{name} has values beyond those of F16 (65504): use --type BF16 or F32")
            blocks = quantize(x, target)
        yield np.ascontiguousarray(blocks)
        tensor.release(first, end)
