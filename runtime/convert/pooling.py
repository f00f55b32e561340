"""What a folder for sentence-transformers says of embeddings: the pooling, and matrices that follow it."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.formats.safetensors import read_safetensors
from gguf_run.models.pooling import DENSE
from gguf_run.runtime.convert.stored.checkpoint import read_json
from gguf_run.runtime.convert.stored.sources import floats, values

_MODES = ("mean_tokens", "cls_token", "lasttoken")  # in the order of the numbers 1 to 3 in GGUF files


def _folders(directory: Path, kind: str) -> list[Path]:
    """Return the folders of the modules of a kind, in their order."""
    path = directory / "modules.json"
    try:
        modules = json.loads(path.read_text()) if path.is_file() else []
        found = [directory / module["path"] for module in modules if module["type"].endswith(f".{kind}")]
        for folder in found:
            folder.resolve().relative_to(directory.resolve())
    except (ValueError, RecursionError, TypeError, LookupError, AttributeError):
        raise FormatError(f"{path}: must be a list of modules, each with a type, and a path in this folder") from None
    return found


def pooling_keys(directory: Path, is_causal: bool) -> Iterator[tuple[str, Typed]]:
    """Yield the keys of metadata, without the architecture's name."""
    if not is_causal:
        yield "attention.causal", Typed("bool", False)
    for folder in _folders(directory, "Pooling"):
        config = read_json(folder / "config.json")
        modes = [i for i, mode in enumerate(_MODES, 1) if config.get(f"pooling_mode_{mode}") is True]
        if len(modes) != 1:
            raise UnsupportedError(f"{folder}: the pooling must be one of {', '.join(_MODES)}")
        yield "pooling_type", Typed("u32", modes[0])


def dense_tensors(directory: Path) -> Iterator[Tensor]:
    """Yield the matrices that the pooled row is multiplied with, under their names in a GGUF file."""
    folders = _folders(directory, "Dense")
    for name, folder in zip(DENSE, folders, strict=False):
        activation = read_json(folder / "config.json").get("activation_function")
        if len(folders) > len(DENSE) or activation not in (None, "torch.nn.modules.linear.Identity"):
            raise UnsupportedError(f"{folder}: at most {len(DENSE)} modules of Dense without an activation are known")
        for key, stored in read_safetensors(folder / "model.safetensors").arrays.items():
            kind = key.rpartition(".")[2]
            tensor = floats(stored)
            yield dataclasses.replace(values(tensor) if kind == "bias" else tensor, name=f"{name}.{kind}")
