"""A PEFT adapter (LoRA) as a GGUF adapter: the tensors get the names and the order of rows of the converted model."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import FormatError, GgufRunError, UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.formats.gguf.writer import GGUFWriter
from gguf_run.formats.gguf.writer_metadata import MetaValue
from gguf_run.formats.quantizers.quantizer import quantize
from gguf_run.formats.safetensors import read_safetensors
from gguf_run.runtime.convert.metadata import layout_of
from gguf_run.runtime.convert.stored.checkpoint import Config, read_json
from gguf_run.runtime.convert.stored.sources import Source, floats, values
from gguf_run.runtime.convert.tensors import adapted_rows

CONFIG, WEIGHTS, TYPES = "adapter_config.json", "adapter_model.safetensors", ("F16", "BF16", "F32")
_PREFIX, _ENDS = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
# What a plain adapter has for keys that change the sum which is added to a matrix; null, false and [] are allowed too.
_PLAIN = {
    "bias": "none", "use_dora": False, "lora_bias": False, "fan_in_fan_out": False, "layer_replication": None,
    "modules_to_save": None, "trainable_token_indices": None, "alora_invocation_tokens": None, "use_qalora": False,
    "use_bdlora": None, "target_parameters": None, "arrow_config": None, "kasa_config": None,
}  # fmt: skip


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG).is_file()


def open_adapter(folder: Path, base: Path | None, kind: str = "auto", name: str | None = None) -> GGUFFile:
    """Return a PEFT adapter as a GGUF file that is computed when it is read.

    base: folder with the config.json of the model that is adapted; None: the one that the adapter names, if it is a
        folder.
    kind: one of TYPES, or "auto": BF16 stays, other floats become F16.
    name: general.name; None: that of the folder.

    Raises GgufRunError and its kinds, one line each, for anything that is missing, wrong, or cannot be told by a GGUF
    adapter.
    """
    given = Config(folder / CONFIG, read_json(folder / CONFIG))
    _check_plain(given)
    config_path = _base(given, base) / "config.json"
    told = read_json(config_path)
    text = told.get("text_config")
    layout, config = layout_of(Config(config_path, told | text if isinstance(text, dict) else told))
    rank, alpha, is_root = given.integer("r"), given.number("lora_alpha"), bool(given.get("use_rslora"))
    alpha *= math.sqrt(rank) if is_root else 1.0
    if not alpha:
        raise given.wrong(("lora_alpha",), "a number other than 0")
    tensors: dict[str, Tensor] = {}
    for module, a, b in _pairs(folder / WEIGHTS):
        # The scale that PEFT gives the product, relative to alpha / rank, which readers of the file give it.
        factor = _alpha(given, module) * (math.sqrt(a.n_rows) if is_root else 1.0) / alpha
        for target, rows in adapted_rows(layout, config, f"{module}.weight", b):
            if f"{target}.lora_a" in tensors:
                raise FormatError(f"{folder / WEIGHTS}: two pairs adapt {target}, the second is for {quoted(module)}")
            scaled = rows if abs(factor - 1) < 1e-9 else values(rows, partial(np.multiply, np.float32(factor)))
            for full, half in ((f"{target}.lora_a", a), (f"{target}.lora_b", scaled)):
                tensors[full] = _stored(full, half, kind)
    metadata: dict[str, MetaValue] = {
        "general.type": "adapter",
        "general.architecture": layout.arch,
        "general.name": name or folder.resolve().name,
        "adapter.type": "lora",
        "adapter.lora.alpha": Typed("f32", alpha),
    }
    return GGUFFile.of(folder, metadata, tensors)


def _check_plain(given: Config) -> None:
    if given.get("peft_type") != "LORA":
        raise given.wrong(("peft_type",), '"LORA"')
    for key, plain in _PLAIN.items():
        if given.get(key) and given.get(key) != plain:
            raise given.unsupported(key, "left out" if not plain else f'"{plain}"')


def _base(given: Config, base: Path | None) -> Path:
    """Return the folder of the model that is adapted."""
    named = given.get("base_model_name_or_path")
    found = base or Path(str(named or ""))
    if not (found / "config.json").is_file():
        what = f"{found}: there is no config.json" if base else f"{given.path}: is for {quoted(str(named))}"
        raise GgufRunError(f"{what}: name a folder with the config.json of the model that is adapted, with --base")
    return found


def _alpha(given: Config, module: str) -> float:
    """Return lora_alpha of a module. The keys of alpha_pattern are ends of names of modules."""
    pattern = given.get("alpha_pattern") or {}
    if not isinstance(pattern, dict) or not all(key.replace(".", "").replace("_", "").isalnum() for key in pattern):
        raise given.unsupported("alpha_pattern", "numbers by names of modules, without signs of regular expressions")
    key = next((key for key in pattern if f".{module}".endswith(f".{key}")), None)
    return given.number("lora_alpha") if key is None else Config(given.path, pattern).number(key)


def _pairs(path: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name of each module that is adapted, A [n_in, rank] and B [rank, n_out]."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, stored in read_safetensors(path).arrays.items():
        end = next((end for end in _ENDS if name.endswith(end)), None)
        if end is None or not name.startswith(_PREFIX) or len(stored.shape) != 2:
            raise UnsupportedError(
                f"{path}: tensor {quoted(name)} of the shape {[*stored.shape]} is no half of a plain LoRA pair: DoRA, "
                "embeddings, experts and modules that are saved whole cannot be converted"
            )
        halves.setdefault(name.removeprefix(_PREFIX).removesuffix(end), {})[end] = floats(stored)
    if not halves:
        raise FormatError(f"{path}: holds no tensors")
    for module, pair in halves.items():
        a, b = (pair.get(end) for end in _ENDS)
        if a is None or b is None:
            raise FormatError(f"{path}: {quoted(module)} has only one of {' and '.join(_ENDS)}")
        if a.ne[1] != b.ne[0]:
            shapes = f"{list(a.ne[::-1])} and {list(b.ne[::-1])}"
            raise FormatError(f"{path}: the pair for {quoted(module)} has the shapes {shapes}: they must share a rank")
        yield module, a, b


def _stored(name: str, tensor: Tensor, kind: str) -> Tensor:
    """Return a tensor in a type of TYPES. kind: see open_adapter."""
    target = type_by_name(kind if kind != "auto" else "BF16" if tensor.type.name == "BF16" else "F16")
    if tensor.type == target:
        return replace(tensor, name=name)

    def read(first: int, end: int) -> NDArray[np.uint8]:
        try:
            return quantize(dequantize(tensor.blocks(first, end), tensor.type), target)
        except FormatError as error:
            raise FormatError(f"{tensor.file.path}: {quoted(tensor.name)}: {error}") from None

    return Source(name, tensor.ne, target, tensor.file, read, tensor.release)


def write_adapter(file: GGUFFile, path: Path) -> int:
    """Write an adapter as it is. Return the size of the file in bytes."""
    metadata = {key: file.metadata.typed(key) for key in file.metadata}
    with GGUFWriter(path, metadata, [*file.tensors.values()], inputs=[file.path / WEIGHTS]) as writer:
        for tensor in file.tensors.values():
            writer.copy(tensor)
        return writer.nbytes
