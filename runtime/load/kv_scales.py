"""A calibration file for KV caches: how large a model's keys and values get, and which type each layer should have.

It is JSON, so that people can read and change it:

    {"format": "gguf-run kv-scales", "version": 1, "model": name, "text": name, "n_tokens": n,
     "layers": [{"k_max": [largest |K| of each KV head], "v_max": [...], "k": "q8_0", "v": "q4_0"}, ...],
     "sensitivity": {"q4_0": {"k": [KL of each layer], "v": [...]}}}

"k" and "v", the cache types of a layer, may be missing. "sensitivity" is not read, it is for people.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_run.formats.atomic import replacing
from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.mapped import read_bytes
from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS
from gguf_run.models.config import ModelConfig

FORMAT, VERSION = "gguf-run kv-scales", 1
HEADROOM = 2.0  # other texts have larger values; a float loses nothing by leaving its last octave empty
_LARGEST_FILE = 64 << 20
# Scales are stored as f16. The largest maximum makes no scale that is infinite there; smaller scales than _LEAST are 0.
_MOST, _LEAST = 1e7, 2.0**-24


@dataclass(frozen=True)
class LayerScales:
    """What a calibration file says of one layer."""

    k_max: tuple[float, ...]  # largest |K| of each KV head
    v_max: tuple[float, ...]  # largest |V| of each KV head
    types: tuple[str, str] | None = None  # cache types of K and V, None: the file names none

    def scales(self, type_name: str, kind: str) -> tuple[float, ...] | None:
        """The static scale of each KV head of the keys (kind "k") or values ("v"); None if the type is not fp8."""
        if not type_name.startswith("fp8"):
            return None
        largest = CACHE_FORMATS[type_name].largest
        maxima = self.k_max if kind == "k" else self.v_max
        return tuple(max(HEADROOM * (value or 1.0) / largest, _LEAST) for value in maxima)


def read_scales(path: str | os.PathLike[str], config: ModelConfig) -> tuple[LayerScales, ...]:
    """Read and check a calibration file; return what it says of each layer.

    FormatError if it is no calibration file of this version. GgufRunError if it is of a model with another number of
    layers or KV heads.
    """
    data = read_bytes(Path(path), _LARGEST_FILE)
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise FormatError(f"{path}: is not a calibration file: `gguf-eval kv-scales MODEL -f TEXT -o FILE` makes one")
    if (version := facts.get("version")) != VERSION:
        raise FormatError(f"{path}: is of version {version!r:.40}, this program reads {VERSION}: make it again")
    layers: Any = facts.get("layers")
    if _length(layers) != config.n_layer:
        raise GgufRunError(
            f"{path}: is of a model with {_length(layers)} layers, this one has {config.n_layer}: make one for it"
        )
    shapes = [config.attention(il) for il in range(config.n_layer)]
    return tuple(
        _layer(f"{path}: layer {il}", layer, shape.n_head_kv, shape.head_dim)
        for il, (layer, shape) in enumerate(zip(layers, shapes, strict=True))
    )


def write_scales(path: Path, layers: Sequence[LayerScales], **facts: Any) -> None:
    """Write a file that read_scales takes. facts: the other keys, which are for people."""
    entries = [
        {"k_max": layer.k_max, "v_max": layer.v_max} | dict(zip("kv", layer.types or (), strict=False))
        for layer in layers
    ]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, "version": VERSION, **facts, "layers": entries}, indent=1))


def _length(values: Any) -> int | str:
    return len(values) if isinstance(values, list) else "no"


def _layer(name: str, layer: Any, n_head_kv: int, head_dim: int) -> LayerScales:
    if not isinstance(layer, dict):
        raise FormatError(f"{name} is {str(layer)[:40]!r}, must be an object: make the file again")
    for key in ("k_max", "v_max"):
        values: Any = layer.get(key)
        if _length(values) != n_head_kv:
            raise GgufRunError(f"{name} has {_length(values)} values of {key}, the model has {n_head_kv} KV heads")
        if not all(type(value) in (int, float) and 0 <= value <= _MOST for value in values):
            raise FormatError(f"{name}: {key} must be numbers from 0 to {_MOST:g}: make the file again")
    k_max, v_max = (tuple(map(float, layer[key])) for key in ("k_max", "v_max"))
    if layer.get("k") is None and layer.get("v") is None:
        return LayerScales(k_max, v_max)
    allowed = [type_name for type_name, form in CACHE_FORMATS.items() if form.allows(head_dim)]
    for type_name in (layer.get("k"), layer.get("v")):
        if type_name not in allowed:
            raise FormatError(f"{name} has the cache type {type_name!r:.40}; allowed: {', '.join(allowed)}")
    return LayerScales(k_max, v_max, (layer["k"], layer["v"]))
