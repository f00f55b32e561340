"""The tensors of a checkpoint as those of a GGUF file: names, order of rows, splits and stacks, shapes checked."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.runtime.convert.architectures import Architecture
from gguf_run.runtime.convert.metadata import shape, sizes
from gguf_run.runtime.convert.stored.checkpoint import Config
from gguf_run.runtime.convert.stored.sources import (
    F32,
    columns,
    halves,
    renamed,
    rows,
    source,
    stacked,
    transposed,
    unpermuted,
    values,
)

_FLOAT = ("ffn_gate_inp", "ffn_gate_inp_shexp")  # matrices that stay F32: they are small and choose between experts
_KINDS = ("weight", "bias", "scale")  # scale: one number that all weights are multiplied by, of NVFP4


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the checkpoint belongs. prefix: "blk.3." or "", kind: in _KINDS, item: its number
    among the experts (or heads) that make one tensor, or -1; bare: its name ends in no kind."""

    prefix: str
    names: tuple[str, ...]
    kind: str
    item: int
    bare: bool


def model_tensors(entry: Architecture, config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by GGUF name. FormatError for one that is missing or has another shape than config.json
    says, UnsupportedError for one that the architecture does not have."""
    numbers = sizes(config)
    found: dict[str, Tensor] = {}
    items: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        place = _place(entry, config, name, tensor)
        for base, part in zip(place.names, _parts(entry, numbers, place, tensor), strict=True):
            full = f"{place.prefix}{base}.{place.kind}"
            if full in found or (place.item < 0 and full in items) or place.item in items.get(full, ()):
                raise FormatError(f"{tensor.file.path}: two tensors make {full}, {quoted(name)} is the second")
            if place.item < 0:
                found[full] = part
            else:
                items[full][place.item] = part
    for full, experts in items.items():
        found[full] = _stacked(full, experts)
    if config.get("tie_word_embeddings") is True:
        found.pop("output.weight", None)
    if entry.tied_copy and "output.weight" not in found and "token_embd.weight" in found:
        found["output.weight"] = found["token_embd.weight"]
    found = {name: _final(entry, name, tensor) for name, tensor in found.items()}
    _check_complete(entry, config, found)
    for name, tensor in found.items():
        ne = shape(entry, name.removeprefix(_prefix(name)), numbers)
        if _size(tensor.ne) != _size(ne) and not name.endswith(".scale"):
            raise FormatError(
                f"{tensor.file.path}: {name} has the shape {list(tensor.ne[::-1])}, by config.json it must have "
                f"{list(ne[::-1])}: they are not of one model"
            )
    return found


def _place(entry: Architecture, config: Config, name: str, tensor: Tensor) -> _Place:
    short = name.replace("language_model.", "", 1).replace("model.model.", "model.", 1)
    module, dot, kind = short.rpartition(".")
    bare = not dot or kind not in _KINDS
    if bare:
        module, kind = (short[: -len("_bias")], "bias") if short.endswith("_bias") else (short, "weight")
    layer = re.fullmatch(r"model\.layers\.(\d{1,6})\.(.+)", module, re.ASCII)
    local = layer[2] if layer else module
    item = re.search(r"\.(?:experts|norms)\.(\d{1,6})(?=\.|$)", local, re.ASCII)
    if item:
        local = local[: item.start(1)] + "@" + local[item.end(1) :]
    target = (entry.layer if layer else entry.model).get(local)
    if target is None or (layer and int(layer[1]) >= config.integer("num_hidden_layers")):
        raise UnsupportedError(
            f"{tensor.file.path}: tensor {quoted(name)} is not a part of a {entry.arch} model of "
            f"{config.integer('num_hidden_layers')} layers as this program knows it: without it the results would be "
            "wrong"
        )
    names: tuple[str, ...] = (target,) if isinstance(target, str) else target
    if names == ("attn_qkv",) and entry.grouped_qkv:
        names = ("attn_q", "attn_k", "attn_v")
    return _Place(f"blk.{int(layer[1])}." if layer else "", names, kind, int(item[1]) if item else -1, bare)


def _parts(
    entry: Architecture, numbers: Mapping[str, int], place: _Place, tensor: Tensor
) -> Iterator[Tensor] | tuple[Tensor, ...]:
    """The tensor itself, or what it is split into, with rows in GGUF's order."""
    if place.kind == "scale":
        return (tensor,) * len(place.names)
    split = {"weight": 1, "bias": 0}[place.kind]  # the dimension of which each half makes a tensor
    if len(place.names) == 2 and len(tensor.ne) != split + 2:
        raise _misshapen(tensor, place)
    if entry.transposed and place.bare and place.kind == "weight" and len(tensor.ne) == 3:
        tensor = transposed(tensor)
    if len(place.names) == 2:
        if tensor.ne[split] % 2:
            raise _misshapen(tensor, place)
        return halves(tensor, entry.interleaved) if split else (columns(tensor, 0, 2), columns(tensor, 1, 2))
    parts = _groups(numbers, tensor) if len(place.names) == 3 else (tensor,)
    heads = {"attn_q": numbers["n_head"], "attn_k": numbers["n_head_kv"]} if entry.permuted else {}
    return (
        unpermuted(part, heads[name])
        if name in heads and len(part.ne) < 3 and part.ne[-1] % (2 * heads[name]) == 0
        else part  # of a wrong shape, which is found out where all are checked
        for name, part in zip(place.names, parts, strict=True)
    )


def _misshapen(tensor: Tensor, place: _Place) -> FormatError:
    return FormatError(
        f"{tensor.file.path}: {quoted(tensor.name)} has the shape {list(tensor.ne[::-1])}, of which "
        f"{' and '.join(place.names)} cannot be made: it is damaged, or of another model"
    )


def _groups(numbers: Mapping[str, int], tensor: Tensor) -> tuple[Tensor, ...]:
    """q, k and v of a matrix that holds for each head of keys its query heads, then itself, then its values."""
    n_group, head_dim = numbers["n_head"] // numbers["n_head_kv"], numbers["head_dim"]
    n_rows = numbers["n_head_kv"] * (n_group + 2) * head_dim
    if tensor.ne != (numbers["n_embd"], n_rows):
        raise FormatError(
            f"{tensor.file.path}: {quoted(tensor.name)} has the shape {list(tensor.ne[::-1])}, by config.json it must "
            f"have {[n_rows, numbers['n_embd']]}"
        )
    index = np.arange(n_rows, dtype=np.int64).reshape(-1, n_group + 2, head_dim)
    parts = (index[:, :n_group], index[:, n_group], index[:, n_group + 1])
    return tuple(rows(tensor, part.reshape(-1), (tensor.ne[0], part.size)) for part in parts)


def _stacked(name: str, items: Mapping[int, Tensor]) -> Tensor:
    first = next(iter(items.values()))
    if missing := set(range(len(items))) - items.keys():
        raise FormatError(f"{first.file.path}: number {min(missing)} of what makes {name} is missing")
    for tensor in items.values():
        if tensor.ne != first.ne:
            raise FormatError(f"{tensor.file.path}: {quoted(tensor.name)} and {quoted(first.name)} differ in shape")
    tensors = [items[i] for i in range(len(items))]
    if len({tensor.type for tensor in tensors}) > 1:  # some were quantized in a way that blocks cannot hold
        tensors = [values(tensor) for tensor in tensors]
    if name.endswith(".scale"):
        all = np.concatenate([values(tensor).blocks() for tensor in tensors]).view(np.float32).reshape(-1)
        return source(name, all.shape, F32, first.file, lambda start, end: all)
    return stacked(name, tensors)


def _final(entry: Architecture, name: str, tensor: Tensor) -> Tensor:
    """With its name, and as F32 what is no matrix."""
    base, kind = name.removeprefix(_prefix(name)).split(".")
    is_norm = base.endswith("_norm")
    if is_norm and kind == "weight" and entry.norm_offset:
        offset = np.float32(entry.norm_offset)
        tensor = values(tensor, lambda x: x + offset)
    elif len(tensor.ne) < 2 or kind == "bias" or is_norm or base in _FLOAT:
        tensor = values(tensor)
    return renamed(tensor, name)


def _check_complete(entry: Architecture, config: Config, found: Mapping[str, Tensor]) -> None:
    """FormatError unless every layer has all its tensors: no program could load the file."""
    sources = {
        name: source
        for source, target in entry.layer.items()
        for name in ([target] if isinstance(target, str) else target)
    }
    for il in range(-1, config.integer("num_hidden_layers")):
        sets = [[f"blk.{il}.{name}.weight" for name in ffn] for ffn in entry.ffn]
        wanted = [f"blk.{il}.{name}.weight" for name in entry.required]
        wanted += max(sets, key=lambda names: sum(name in found for name in names))
        for name in wanted if il >= 0 else ("token_embd.weight", "output_norm.weight"):
            if name not in found:
                base = name.removeprefix(_prefix(name)).removesuffix(".weight")
                shown = f"{name} ({sources.get(base, base)})"
                raise FormatError(f"{config.path.parent}: there is no tensor for {shown}: weights are missing")


def _prefix(name: str) -> str:
    match = re.match(r"blk\.\d+\.", name)
    return match[0] if match else ""


def _size(ne: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes without those of 1 at the end."""
    return ne if not ne or ne[-1] != 1 else _size(ne[:-1])
