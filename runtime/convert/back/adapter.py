"""A GGUF adapter as a PEFT adapter: what adapter.py does, backwards."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gguf_run.formats.atomic import replacing
from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.errors import GgufRunError, UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.reader import GGUFFile, Tensor
from gguf_run.formats.safetensors import writing_safetensors
from gguf_run.models.adapters import read_adapter
from gguf_run.runtime.convert.adapter import CONFIG, WEIGHTS
from gguf_run.runtime.convert.back.config import layout_of_file, model_config
from gguf_run.runtime.convert.layout import CheckpointLayout
from gguf_run.runtime.convert.metadata import sizes
from gguf_run.runtime.convert.shared import names_of
from gguf_run.runtime.convert.stored.checkpoint import Config
from gguf_run.runtime.convert.tensors import in_pairs


def export_peft(adapter: GGUFFile, model: GGUFFile, folder: Path) -> None:
    """Write a PEFT adapter, F32. model: the model that is adapted.

    GgufRunError if the folder exists and is not empty; UnsupportedError for a matrix that is a part of another one in
    a checkpoint. Nothing is left behind then.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise GgufRunError(f"{folder}: is there already: name a new folder, or an empty one")
    arch = str(model.metadata["general.architecture"])
    pairs = read_adapter(str(adapter.path), adapter, arch, model.tensors).pairs
    layout = layout_of_file(model)
    config = Config(model.path, model_config(layout, model, "F32"))
    found = _by_module(layout, sizes(config), {full: pair.b for full, pair in pairs.items()})
    if left := [full for full in pairs if full not in found]:
        what = "is no module of its own in a checkpoint"
        raise UnsupportedError(f"{adapter.path}: adapts {quoted(left[0])}, which {what}: PEFT has no place for it")
    ranks = {module: b.ne[0] for module, b in found.values()}
    rank = max(ranks.values())
    # PEFT's factor is lora_alpha / rank of each pair; those of other ranks are in patterns.
    alphas = {module: pairs[full].factor * b.ne[0] for full, (module, b) in found.items()}
    most = next(alphas[module] for module, r in ranks.items() if r == rank)
    about = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "", "r": rank, "lora_alpha": most,
        "lora_dropout": 0.0, "bias": "none", "target_modules": sorted({module.split(".", 3)[-1] for module in ranks}),
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != most},
    }  # fmt: skip
    halves = {}
    for full, (module, b) in found.items():
        for end, half in (("A", pairs[full].a), ("B", b)):
            halves[f"base_model.model.{module}.lora_{end}.weight"] = dequantize(half.blocks(), half.type)
    with replacing(folder) as temporary:
        temporary.mkdir()
        (temporary / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        arrays = {name: ("F32", x.shape) for name, x in halves.items()}
        with writing_safetensors(temporary / WEIGHTS, arrays, {"format": "pt"}) as append:
            for name, x in halves.items():
                append(name, np.ascontiguousarray(x))


def _by_module(
    layout: CheckpointLayout, numbers: Mapping[str, int], parts: Mapping[str, Tensor]
) -> dict[str, tuple[str, Tensor]]:
    """Return the module of the checkpoint of each tensor that is one by itself, and its rows in that order."""
    found = {}
    places = [("", "", layout.model)]
    places += [(f"model.layers.{il}.", f"blk.{il}.", layout.layer) for il in range(numbers["n_layer"])]
    for there, here, names in places:
        for module, target in names.items():
            bases = names_of(target)
            full = f"{here}{bases[0]}.weight"
            if len(bases) == 1 and full in parts and bases[0] not in layout.bare:
                found[full] = there + module, in_pairs(layout, numbers, bases[0], parts[full], back=True)
    return found
