"""A Hugging Face checkpoint: a folder with config.json and weights. An index lists the files if there are several."""

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_run.formats.errors import FormatError, GgufRunError, UnsupportedError
from gguf_run.formats.gguf.mapped import MappedFile, quoted, read_bytes
from gguf_run.formats.safetensors import StoredArray, read_safetensors

_MAX_JSON_BYTES = 64 << 20
_MAX_SIZE = 2**31 - 1
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_SHARD = re.compile(r"(model|pytorch_model)-(\d{5})-of-(\d{5})\.(?:safetensors|bin)")
# Name of a type in torch -> name in safetensors files.
_TORCH_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "float8_e4m3fn": "F8_E4M3",
                 "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
                 "bool": "BOOL"}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """config.json. In models for images and text, the keys under text_config replace the others."""

    path: Path
    values: Mapping[str, Any]

    def get(self, *keys: str) -> Any:
        """Return the value of the first of these keys that is there and not null, or None."""
        return next((self.values[key] for key in keys if self.values.get(key) is not None), None)

    def integer(self, *keys: str, default: int | None = None, low: int = 1) -> int:
        """Return a whole number from low to 2^31 - 1. FormatError if there is neither one nor a default."""
        value = self.get(*keys)
        value = default if value is None else value
        if type(value) is not int or not low <= value <= _MAX_SIZE:
            raise self.wrong(keys, f"a whole number from {low} to {_MAX_SIZE}")
        return value

    def number(self, *keys: str, default: float | None = None) -> float:
        """Return a number. FormatError if there is neither one nor a default."""
        value = self.get(*keys)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise self.wrong(keys, "a number")
        return float(value)

    def plus(self, **more: Any) -> "Config":
        """Return these values and more, which may replace some. None stands for one that is not there."""
        return Config(self.path, {**self.values, **more})

    def wrong(self, keys: Sequence[str], allowed: str) -> FormatError:
        """Return (not raise) the error that the value of `keys` is not one of the allowed ones."""
        value = self.get(*keys)
        shown = "is missing" if value is None else f"is {json.dumps(value)[:100]}"  # json escapes what is not ASCII
        return FormatError(f"{self.path}: {' or '.join(keys)} {shown}, must be {allowed}")

    def unsupported(self, key: str, allowed: str) -> UnsupportedError:
        """Return the error that a GGUF file cannot tell the value of `key`."""
        return UnsupportedError(f"{self.wrong((key,), allowed)}: a GGUF file has no place for another value")


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint, opened."""

    directory: Path
    config: Config
    tensors: Mapping[str, StoredArray]  # by name, read when they are used

    @classmethod
    def open(cls, directory: Path, weights: bool = True) -> "Checkpoint":
        """Read config.json and, if `weights`, map the weights. GgufRunError if a file is missing or wrong."""
        _check_folder(directory, weights)
        values = read_json(directory / "config.json")
        text = values.get("text_config")
        config = Config(directory / "config.json", values | text if isinstance(text, dict) else values)
        return cls(directory, config, _read_weights(directory) if weights else {})


def _check_folder(path: Path, weights: bool) -> None:
    """GgufRunError, which says what is there, unless `path` is the folder of a checkpoint."""
    if path.is_file():
        if path.suffix == ".gguf":
            advice = "gguf-quantize changes its types, gguf-convert --to-hf makes a checkpoint of it"
            raise GgufRunError(f"{path}: is a GGUF file already: {advice}")
        raise GgufRunError(f"{path}: is a file: name the folder of the checkpoint, {path.absolute().parent}")
    if not path.is_dir():
        raise GgufRunError(f"{path}: no such folder: name the folder of a Hugging Face checkpoint")
    if (path / "adapter_config.json").is_file() and not (weights and has_weights(path)):
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        name = quoted(base) if isinstance(base, str) else "its base model"
        advice = "convert it with gguf-convert, then name it with --lora beside that model"
        raise GgufRunError(f"{path}: is an adapter (LoRA) for {name}, not a model: {advice}")
    if not (path / "config.json").is_file():
        names = sorted(entry.name for entry in path.iterdir())
        shown = f"holds {', '.join(map(quoted, names[:5]))}{', ...' if len(names) > 5 else ''}"
        advice = "there is no config.json: name the folder of a Hugging Face checkpoint"
        raise GgufRunError(f"{path}: {shown if names else 'is an empty folder'}: {advice}")


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a checkpoint, or an index of them."""
    return any((folder / f"{name}{end}").is_file() for name in _WEIGHTS for end in ("", ".index.json")) or any(
        _SHARD.fullmatch(entry.name) for entry in folder.iterdir()
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. If a key occurs twice, the last value counts. FormatError for no object."""
    data = read_bytes(path, _MAX_JSON_BYTES)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is not JSON ({error}): get it again") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds no JSON object: get it again")
    return value


def _read_weights(directory: Path) -> Mapping[str, StoredArray]:
    for name in _WEIGHTS:
        if (directory / name).is_file():
            return _read_file(directory / name)
        if (directory / f"{name}.index.json").is_file():
            return _read_shards(directory / f"{name}.index.json")
    if shards := sorted(entry.name for entry in directory.iterdir() if _SHARD.fullmatch(entry.name)):
        return _read_counted(directory, shards)
    raise GgufRunError(f"{directory}: there are no weights: model.safetensors (or its .index.json) or {_WEIGHTS[1]}")


def _read_counted(directory: Path, names: Sequence[str]) -> dict[str, StoredArray]:
    """Read shards without an index. names: sorted. GgufRunError unless they count from 1 to the last."""
    first = _SHARD.fullmatch(names[0])
    assert first is not None
    stem, count, suffix = first[1], first[3], Path(names[0]).suffix
    wanted = [f"{stem}-{no:05d}-of-{count}{suffix}" for no in range(1, int(count) + 1)]
    if missing := [name for name in wanted if name not in names]:
        lost = f"{missing[0]} is missing ({len(missing)} of {len(wanted)} files)"
        raise GgufRunError(f"{directory}: {lost}, and so is the index, {stem}{suffix}.index.json: get them")
    tensors: dict[str, StoredArray] = {}
    for name in wanted:
        found = _read_file(directory / name)
        if twice := tensors.keys() & found.keys():
            raise FormatError(f"{directory / name}: holds tensor {quoted(min(twice))}, as a file before it does")
        tensors |= found
    return tensors


def _read_file(path: Path) -> Mapping[str, StoredArray]:
    return read_safetensors(path).arrays if path.suffix == ".safetensors" else _read_torch(path)


def _read_shards(index: Path) -> dict[str, StoredArray]:
    """Read all files of an index. FormatError unless they hold the tensors that the index says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise FormatError(f"{index}: weight_map does not tell the file of each tensor")
    tensors: dict[str, StoredArray] = {}
    names = sorted(set(places.values()))
    if bad := [name for name in names if not re.fullmatch(r"[\w-][\w.-]{0,254}", name, re.ASCII)]:
        raise FormatError(f"{index}: names the file {quoted(bad[0])}: must be one in the same folder")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise GgufRunError(f"{index.parent}: {missing[0]} is missing ({len(missing)} of {len(names)} files): get it")
    for file in names:
        for name, tensor in _read_file(index.parent / file).items():
            if places.get(name) != file:
                where = f"in {quoted(places[name])}" if name in places else "nowhere"
                raise FormatError(f"{index.parent / file}: holds tensor {quoted(name)}, which {index.name} has {where}")
            tensors[name] = tensor
    if lost := places.keys() - tensors.keys():
        claim = f"says that {quoted(min(lost))} is in {places[min(lost)]}"
        raise FormatError(f"{index}: {claim}, but it is not ({len(lost)} such tensors)")
    return tensors


def _read_torch(path: Path) -> dict[str, StoredArray]:
    """Read a file of torch.save. The pickle in it runs no code: with weights_only torch builds nothing but tensors."""
    file = MappedFile(path)
    try:
        # By name: an import statement would bind this module to torch, which only these old files need.
        torch = importlib.import_module("torch")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except ImportError:
        install = 'pip install "gguf-run[gpu]", or get the model as safetensors'
        raise GgufRunError(f"{path}: reading it needs torch: {install}") from None
    except Exception as error:  # a pickle can go wrong in any way
        reason = str(error).partition("\n")[0][:150]
        why = f"torch refuses to load it ({reason}): it holds more than weights, or is damaged"
        raise GgufRunError(f"{path}: {why}; get the model as safetensors") from None
    if not isinstance(state, dict):
        raise FormatError(f"{path}: holds no table of tensors")
    tensors = {}
    for name, value in state.items():
        dtype = _TORCH_DTYPES.get(str(getattr(value, "dtype", "")).removeprefix("torch."))
        if not isinstance(name, str) or dtype is None:
            raise FormatError(f"{path}: {quoted(str(name))} is not a tensor of a known type")
        data = value.detach().contiguous().flatten().view(torch.uint8).numpy()
        tensors[name] = StoredArray(name, dtype, tuple(value.shape), data, file)
    return tensors
