"""Layers that share keys and values, and tensors that few architectures have."""

from collections.abc import Sequence
from typing import Any

from gguf_run.models.architectures import LAYER_SHAPES
from gguf_run.models.keys import Keys


def kv_layers_of(keys: Keys, kinds: Sequence[object]) -> list[int]:
    """Return the layer whose keys and values each layer reads: its own, or the last one of its kind that has some.

    kinds: of the layers. Layers of one kind have caches of one shape.
    """
    n_own = len(kinds) - keys.integer("attention.shared_kv_layers", 0, low=0, high=len(kinds) - 1)
    last = {kind: il for il, kind in enumerate(kinds[:n_own])}
    if alone := [il for il, kind in enumerate(kinds) if kind not in last]:
        allowed = f"so few that a layer whose keys and values layer {alone[0]} can read is left"
        raise keys.wrong("attention.shared_kv_layers", allowed)
    return [il if il < n_own else last[kind] for il, kind in enumerate(kinds)]


def add_more(config: Any, required: dict[str, tuple[int, ...]], optional: dict[str, tuple[int, ...]]) -> None:
    """Add the tensors of Architecture.more of a ModelConfig, with their ne.

    A layer that reads other layers' keys and values may have tensors that make some. They are not read.
    """
    arch = config.arch
    for il, layer in enumerate(config.layers):
        for name, words in arch.more.items():
            known = optional if name.rpartition(".")[0].removeprefix("blk.N.") in arch.optional_norms else required
            known[name.replace("blk.N.", f"blk.{il}.")] = config.sizes(il, words)
        for name in ("attn_k", "attn_v", "attn_k_norm") if layer.kv_layer != il else ():
            required.pop(f"blk.{il}.{name}.weight", None)
            optional[f"blk.{il}.{name}.weight"] = config.sizes(il, {**LAYER_SHAPES, **arch.shapes}[name])
    for name in [name for name, ne in required.items() if 0 in ne]:
        del required[name]
