"""A PEFT adapter (LoRA) as a GGUF adapter: the tensors get the names and the order of rows of the converted model."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from gguf_run.formats.errors import FormatError, GgufRunError, UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.formats.safetensors import read_safetensors
from gguf_run.runtime.convert.metadata import layout_of
from gguf_run.runtime.convert.stored.checkpoint import Checkpoint, Config, read_json
from gguf_run.runtime.convert.stored.sources import floats, values
from gguf_run.runtime.convert.tensors import adapted_rows

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _ENDS = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
# Keys that change more than a product A B. A plain adapter has none, or null, false, [] or "none".
_NOT_PLAIN = (
    "bias", "use_dora", "lora_bias", "fan_in_fan_out", "layer_replication", "modules_to_save",
    "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora", "target_parameters",
    "arrow_config", "kasa_config",
)  # fmt: skip


def open_adapter(folder: Path, base: Path | None, name: str | None = None) -> GGUFFile:
    """Return a PEFT adapter as a GGUF file, in the types that it has.

    base: folder with the config.json of the model that is adapted; None: the one that the adapter names.
    name: general.name; None: that of the folder.

    Raises GgufRunError and its kinds, one line each, for anything that is missing, wrong, or cannot be told by a GGUF
    adapter.
    """
    given = Config(folder / CONFIG, read_json(folder / CONFIG))
    if given.get("peft_type") != "LORA":
        raise given.wrong(("peft_type",), '"LORA"')
    if changed := [key for key in _NOT_PLAIN if given.get(key) and given.get(key) != "none"]:
        raise given.unsupported(changed[0], "left out")
    model = base or Path(str(given.get("base_model_name_or_path")))
    if not (model / "config.json").is_file():
        what = f"name a folder with the config.json of the model that is adapted, with --base, not {quoted(str(model))}"
        raise GgufRunError(f"{given.path}: {what}")
    layout, config = layout_of(Checkpoint.open(model, weights=False).config)
    root = math.sqrt if given.get("use_rslora") else float
    rank = given.integer("r")
    alpha = given.number("lora_alpha") * rank / root(rank)
    if not alpha:
        raise given.wrong(("lora_alpha",), "a number other than 0")
    tensors: dict[str, Tensor] = {}
    for module, a, b in _pairs(folder / WEIGHTS):
        # The scale that PEFT gives the product, relative to alpha / rank, which readers of the GGUF file give it.
        factor = _alpha(given, module) / root(a.n_rows) / (alpha / a.n_rows)
        b = b if abs(factor - 1) < 1e-9 else values(b, partial(np.multiply, np.float32(factor)))
        for target, rows in adapted_rows(layout, config, f"{module}.weight", b):
            for full, half in ((f"{target}.lora_a", a), (f"{target}.lora_b", rows)):
                if full in tensors:
                    raise FormatError(f"{folder / WEIGHTS}: two pairs make {full}, {quoted(module)} is the second")
                tensors[full] = replace(half, name=full)
    metadata = {"general.type": "adapter", "general.architecture": layout.arch, "adapter.type": "lora"}
    metadata["general.name"] = name or folder.resolve().name
    return GGUFFile.of(folder, {**metadata, "adapter.lora.alpha": Typed("f32", alpha)}, tensors)


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
        end = name[-len(_ENDS[0]) :]
        if end not in _ENDS or not name.startswith(_PREFIX) or len(stored.shape) != 2:
            what = "is no half of a plain LoRA pair: DoRA, embeddings, experts and modules that are saved whole are not"
            raise UnsupportedError(f"{path}: tensor {quoted(name)} of the shape {[*stored.shape]} {what} converted")
        halves.setdefault(name.removeprefix(_PREFIX).removesuffix(end), {})[end] = floats(stored)
    if not halves:
        raise FormatError(f"{path}: holds no tensors")
    for module, pair in halves.items():
        a, b = (pair.get(end) for end in _ENDS)
        if a is None or b is None or a.ne[1] != b.ne[0]:
            raise FormatError(f"{path}: {quoted(module)} must have {' and '.join(_ENDS)}, which share a rank")
        yield module, a, b
