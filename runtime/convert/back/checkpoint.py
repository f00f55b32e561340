"""A GGUF file as a Hugging Face checkpoint: what gguf-convert does, backwards.

The table that converts them also undoes names, order of rows, stacks of experts and offsets of norms.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
from gguf_run.runtime.convert.architectures import Architecture
from gguf_run.runtime.convert.back.config import by_architecture, generation_config, model_config
from gguf_run.runtime.convert.back.tokenizer import tokenizer_files
from gguf_run.runtime.convert.metadata import sizes
from gguf_run.runtime.convert.stored.checkpoint import Config
from gguf_run.runtime.convert.stored.sources import F32, Source, gathered, rows, transposed, unpermuted, values

DTYPES = ("BF16", "F16", "F32")
DEFAULT_SHARD = 5 << 30
_CHUNK = 1 << 24  # values that are converted at a time
_COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def export_hf(
    file: GGUFFile,
    directory: Path,
    dtype: str = "auto",
    shard_size: int = 0,
    vocab_only: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Write config.json, generation_config.json, the tokenizer and safetensors; return the files' names.

    dtype: of DTYPES, or auto: what most matrices have, F16 for quantized ones. shard_size: bytes of tensors in a file,
    0: DEFAULT_SHARD. vocab_only: the tokenizer alone. progress: bytes done, of all. GgufRunError if the directory is
    there and not empty, and for what a checkpoint has no place for; then nothing is left behind.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise GgufRunError(f"{directory}: is there already: name a new folder, or an empty one")
    files: dict[str, Any] = dict(tokenizer_files(file.metadata))
    tensors: dict[str, Tensor] = {}
    dtype = _usual_dtype(file) if dtype == "auto" else dtype
    if not vocab_only:
        entry = by_architecture(file)
        config = model_config(entry, file, dtype)
        tensors = checkpoint_tensors(entry, Config(file.path, config), file)
        files |= {"config.json": config, "generation_config.json": generation_config(file.metadata)}
    try:
        with replacing(directory) as temporary:
            temporary.mkdir(parents=True)
            for name, value in files.items():
                text = json.dumps(value, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2)
                (temporary / name).write_text(text + "\n", encoding="utf-8")
            if tensors:
                _write_tensors(temporary, tensors, dtype, shard_size or DEFAULT_SHARD, progress)
    except OSError as error:
        raise GgufRunError(f"{directory}: cannot be written ({error.strerror or error})") from None
    return sorted(path.name for path in directory.iterdir())


def checkpoint_tensors(entry: Architecture, config: Config, file: GGUFFile) -> dict[str, Tensor]:
    """Return the tensors under the names of the checkpoint. UnsupportedError for one that it does not have."""
    found: dict[str, Tensor] = {}
    left = {name: tensor for name, tensor in file.tensors.items() if name not in _COMPUTED}
    if config.get("tie_word_embeddings"):
        left.pop("output.weight", None)
    for prefix, names in _modules(entry, config):
        for module, target in names.items():
            targets = (target,) if isinstance(target, str) else target
            if targets == ("attn_qkv",) and entry.grouped_qkv:
                targets = ("attn_q", "attn_k", "attn_v")
            for kind in ("weight", "bias"):
                parts = [left.get(f"{prefix[1]}{base}.{kind}") for base in targets]
                if all(part is not None for part in parts):
                    for base in targets:
                        del left[f"{prefix[1]}{base}.{kind}"]
                    found.update(_module(entry, config, prefix[0] + module, targets, kind, parts))  # type: ignore[arg-type]
    if left:
        name = next(iter(left))
        raise UnsupportedError(
            f"{file.path}: tensor {quoted(name)} ({len(left)} such) has no place in a checkpoint of {entry.classes[0]}"
        )
    return found


def _modules(entry: Architecture, config: Config) -> Iterator[tuple[tuple[str, str], Mapping[str, Any]]]:
    """Yield names beside the layers and in each layer, with the checkpoint's prefix and that of the GGUF file."""
    yield ("", ""), entry.model
    for il in range(config.integer("num_hidden_layers")):
        yield (f"model.layers.{il}.", f"blk.{il}."), entry.layer


def _module(
    entry: Architecture, config: Config, module: str, targets: tuple[str, ...], kind: str, parts: list[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield what one module of the checkpoint has of a kind, by name."""
    numbers = sizes(config)
    heads = {"attn_q": numbers["n_head"], "attn_k": numbers["n_head_kv"]} if entry.permuted else {}
    for i, base in enumerate(targets):
        tensor = parts[i]
        if base in heads and tensor.ne[-1] % (2 * heads[base]) == 0:
            tensor = unpermuted(tensor, heads[base], back=True)
        if base.endswith("_norm") and kind == "weight" and entry.norm_offset:
            offset = np.float32(entry.norm_offset)
            tensor = values(tensor, lambda x, offset=offset: x - offset)  # type: ignore[misc]
        parts[i] = tensor
    tensor = parts[0]
    name = f"{module}.{kind}"
    if len(targets) == 3:
        tensor = _grouped(numbers, parts)
    elif len(targets) == 2:
        tensor = _both_halves(parts, entry.interleaved)
    if entry.arch == "gpt-oss" and (base == "attn_sinks" or base.endswith("_exps")):
        name = module if kind == "weight" else f"{module}_bias"
        tensor = transposed(values(tensor)) if kind == "weight" and len(tensor.ne) == 3 else tensor
    if "@" not in name:
        yield name, tensor
        return
    n = tensor.n_rows // tensor.ne[-1]
    for i in range(tensor.ne[-1]):
        index = np.arange(i * n, (i + 1) * n, dtype=np.int64)
        yield name.replace("@", str(i)), rows(tensor, index, tensor.ne[:-1])


def _grouped(numbers: Mapping[str, int], parts: list[Tensor]) -> Tensor:
    """q, k and v as one matrix: for each head of keys its query heads, then itself, then its values."""
    n_kv, head_dim = numbers["n_head_kv"], numbers["head_dim"]
    starts = np.cumsum([0] + [part.n_rows for part in parts])
    index = [
        np.arange(start, start + part.n_rows, dtype=np.int64).reshape(n_kv, -1, head_dim)
        for start, part in zip(starts.tolist(), parts, strict=False)
    ]
    joined = np.concatenate(index, axis=1).reshape(-1)
    return gathered(parts, joined, (parts[0].ne[0], len(joined)))


def _both_halves(parts: list[Tensor], interleaved: bool) -> Tensor:
    """Gate and up as one tensor: of each expert the rows (of a bias the values) in turns, or one after the other."""
    gate = parts[0]
    n, axis = gate.ne[-2], 1 if interleaved else 0
    if len(gate.ne) == 3:
        at = np.arange(2 * gate.n_rows, dtype=np.int64).reshape(2, gate.ne[2], n)
        return gathered(parts, np.stack((at[0], at[1]), axis=1 + axis).reshape(-1), (gate.ne[0], 2 * n, gate.ne[2]))

    def read(first: int, end: int) -> Any:
        both = [dequantize(part.blocks(first, end), part.type) for part in parts]
        return np.stack(both, axis=1 + axis).reshape(end - first, 2 * n)

    return Source(gate.name, (2 * n, gate.ne[1]), F32, 0, gate.file, read)


def _usual_dtype(file: GGUFFile) -> str:
    """The type of most matrices' values. F16 keeps those of quantized ones better than BF16."""
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
