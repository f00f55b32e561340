"""A calibration file for KV caches: how large a model's keys and values get, and which type each layer should have.

JSON, so that it can be read and changed by hand:

    {"format": "gguf-run kv-scales", "version": 1, "model": name, "text": name, "n_tokens": n,
     "layers": [{"k_max": [largest |K| of each KV head], "v_max": [...], "k": "q8_0", "v": "q4_0"}, ...],
     "sensitivity": {"q4_0": {"k": [KL of each layer], "v": [...]}}}

k and v, the types of a layer, may be missing; sensitivity is for people.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS
from gguf_run.models.config import ModelConfig

FORMAT, VERSION = "gguf-run kv-scales", 1
HEADROOM = 2.0  # other texts have larger values; a float loses nothing by leaving its last octave empty
_LARGEST_FILE = 64 << 20


@dataclass(frozen=True)
class LayerScales:
    """k_max, v_max: largest absolute value of each KV head. types: of K and V, None where the file names none."""

    k_max: tuple[float, ...]
    v_max: tuple[float, ...]
    types: tuple[str, str] | None = None

    def scales(self, type_name: str, kind: str) -> tuple[float, ...] | None:
        """The static scale of each KV head, for types that can have one: fp8."""
        if not type_name.startswith("fp8"):
            return None
        largest = CACHE_FORMATS[type_name].largest
        return tuple(HEADROOM * (value or 1.0) / largest for value in (self.k_max if kind == "k" else self.v_max))


@dataclass(frozen=True)
class KvScales:
    """What a calibration file holds. sensitivity: by type and "k" or "v", the KL divergence of each layer."""

    model: str
    text: str
    n_tokens: int
    layers: tuple[LayerScales, ...]
    sensitivity: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike[str], config: ModelConfig) -> "KvScales":
        """Read and check a file. FormatError unless it is a calibration file of this version, GgufRunError if it is of
        a model with another number of layers or KV heads."""
        with open(path, "rb") as file:
            data = file.read(_LARGEST_FILE + 1)
        try:
            facts = json.loads(data) if len(data) <= _LARGEST_FILE else None
        except (ValueError, RecursionError):
            facts = None
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise FormatError(
                f"{path}: is not a calibration file: `gguf-eval kv-scales MODEL -f TEXT -o FILE` makes one"
            )
        if facts.get("version") != VERSION:
            raise FormatError(
                f"{path}: is of version {facts.get('version')!r}, this program reads {VERSION}: make it again"
            )
        layers = facts.get("layers")
        if not isinstance(layers, list) or len(layers) != config.n_layer:
            n = len(layers) if isinstance(layers, list) else "no"
            raise GgufRunError(f"{path}: is of a model with {n} layers, this one has {config.n_layer}: make one for it")
        checked = tuple(_layer(path, il, layer, config) for il, layer in enumerate(layers))
        return cls(str(facts.get("model")), str(facts.get("text")), 0, checked)

    def write(self, path: Path) -> None:
        """Write the file under a temporary name, then rename it."""
        layers = []
        for layer in self.layers:
            types = dict(zip("kv", layer.types, strict=True)) if layer.types else {}
            layers.append({"k_max": layer.k_max, "v_max": layer.v_max} | types)
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "text": self.text,
            "n_tokens": self.n_tokens,
        }
        text = json.dumps(facts | {"layers": layers, "sensitivity": self.sensitivity}, indent=1)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(text)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _layer(path: str | os.PathLike[str], il: int, layer: Any, config: ModelConfig) -> LayerScales:
    shape = config.attention(il)
    if not isinstance(layer, dict):
        raise FormatError(f"{path}: layer {il} is {str(layer)[:40]!r}, must be an object: make the file again")
    limits: dict[str, Any] = {}
    for key in ("k_max", "v_max"):
        values = layer.get(key)
        if not isinstance(values, list) or len(values) != shape.n_head_kv:
            n = len(values) if isinstance(values, list) else "no"
            raise GgufRunError(f"{path}: layer {il} has {n} values of {key}, the model has {shape.n_head_kv} KV heads")
        if not all(isinstance(value, int | float) and 0 <= value < math.inf for value in values):
            raise FormatError(f"{path}: layer {il}: {key} must be numbers from 0 on: make the file again")
        limits[key] = tuple(map(float, values))
    if layer.get("k") is None and layer.get("v") is None:
        return LayerScales(**limits)
    for name in (layer.get("k"), layer.get("v")):
        if not isinstance(name, str) or name not in CACHE_FORMATS or not CACHE_FORMATS[name].allows(shape.head_dim):
            allowed = [other for other, form in CACHE_FORMATS.items() if form.allows(shape.head_dim)]
            raise FormatError(f"{path}: layer {il} has the cache type {name!r}; allowed: {', '.join(allowed)}")
    return LayerScales(**limits, types=(layer["k"], layer["v"]))
