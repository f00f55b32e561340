"""Layers with a window, layers that share keys and values, and tensors that few architectures have."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.keys import MAX_LAYERS, Keys

Ne = tuple[int, ...]


@frozen
class AltUp:
    """The numbers of Gemma 3n."""

    n_stream: int  # streams of hidden states
    n_laurel: int  # rank of Laurel's product
    sparsity: tuple[float, ...]  # factor of rare_ops.Threshold in each layer; -inf: there is none


def read_altup(keys: Keys, tensors: Mapping[str, Tensor], n_layer: int) -> AltUp:
    """Return the numbers. The rank of Laurel is that of a tensor: no key tells it."""
    keys.integer("altup.active_idx", 0, low=0, high=0)
    laurel, sparsity = tensors.get("blk.0.laurel_l.weight"), keys.get("activation_sparsity_scale")
    if not isinstance(sparsity, np.ndarray) or sparsity.shape != (n_layer,) or sparsity.dtype.kind != "f":
        raise keys.wrong("activation_sparsity_scale", f"{n_layer} numbers, one for a layer")
    n_stream = keys.integer("altup.num_inputs", low=2, high=16)
    return AltUp(n_stream, laurel.ne[-1] if laurel else 0, tuple(sparsity.tolist()))


def swa_layers(keys: Keys, n_layer: int, period: int) -> tuple[bool, ...]:
    """Return which layers have the window: as the file lists, or all but every period-th layer (0: all layers)."""
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        if pattern.shape != (n_layer,) or pattern.dtype.kind not in "biu":
            raise keys.wrong("attention.sliding_window_pattern", f"{n_layer} values of true or false, one for a layer")
        return tuple(bool(v) for v in pattern)
    default = period if period >= 0 else None
    period = keys.integer("attention.sliding_window_pattern", default, low=0, high=MAX_LAYERS)
    return tuple(period == 0 or (il + 1) % period != 0 for il in range(n_layer))


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


def add_more(config: Any, tensors: Mapping[str, Tensor], required: dict[str, Ne], optional: dict[str, Ne]) -> None:
    """Add the tensors of Architecture.more of a ModelConfig, with their ne. Take out those that other layers have.

    A layer that reads another layer's keys and values may have tensors that make some. They are not read.
    """
    arch = config.arch
    for il, layer in enumerate(config.layers):
        for name, words in arch.more.items():
            known = optional if name.rpartition(".")[0].removeprefix("blk.N.") in arch.optional_norms else required
            known[name.replace("blk.N.", f"blk.{il}.")] = tuple(config.size(il, word) for word in words)
        unread = ("attn_k", "attn_v", "attn_k_norm") if layer.kv_layer != il else ("attn_v",) if arch.v_of_k else ()
        for name in (f"blk.{il}.{name}.weight" for name in unread):
            if name in required and (name not in tensors or layer.kv_layer != il):
                optional[name] = required.pop(name)
    for name in [name for name, ne in required.items() if 0 in ne]:
        del required[name]
