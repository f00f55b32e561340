"""The tensors of a checkpoint as those of a GGUF file: names, order of rows, splits and stacks."""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.models.experts import EXPERT_SHAPES
from gguf_run.runtime.convert.layout import CheckpointLayout
from gguf_run.runtime.convert.metadata import sizes
from gguf_run.runtime.convert.shared import names_of
from gguf_run.runtime.convert.stored.checkpoint import Config
from gguf_run.runtime.convert.stored.sources import (
    F32,
    Source,
    gathered,
    halves,
    rows,
    same_values,
    transposed,
    unpermuted,
    values,
)

# Matrices that stay F32: they are small, and choose between experts or are multiplied with a state.
_FLOAT = (
    "ffn_gate_inp", "ffn_gate_inp_shexp", "ssm_conv1d", "conv", "ssm_a", "ssm_d", "position_embd", "token_types",
)  # fmt: skip
_TRUE_IF_MISSING = ("use_bias", "qkv_bias", "bias", "")  # flags of biases
# scale: one number that all weights are multiplied by (NVFP4). input_scale: that of activations rounded to FP8 or int8
_KINDS = ("weight", "bias", "scale", "input_scale")


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the checkpoint belongs."""

    prefix: str  # "blk.3.", or "" beside the layers
    names: tuple[str, ...]  # the GGUF tensors that it makes
    kind: str  # one of _KINDS
    item: int  # its number among the experts (or heads) that make one tensor together; -1: it makes one alone
    bare: bool  # its name in the checkpoint does not end in a kind


def model_tensors(layout: CheckpointLayout, config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by GGUF name.

    FormatError for one that cannot be split or stacked. UnsupportedError for one that the architecture does not have.
    """
    found = _collected(layout, sizes(config), tensors)
    _tie(config, found)
    _check_flags(layout, config, found)
    if layout.tied_copy and "output.weight" not in found and "token_embd.weight" in found:
        found["output.weight"] = found["token_embd.weight"]
    return {_without_kind(layout, name): _final(layout, config, name, tensor) for name, tensor in found.items()}


def take_numbers(layout: CheckpointLayout, n_layer: int, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Typed]]:
    """Take the tensors out that have one number for a layer. Yield the keys of metadata that they make together."""
    for local, key in layout.numbers.items():
        names = [f"model.layers.{il}.{local}" for il in range(n_layer)]
        found = [values(tensors.pop(name)).blocks().view(np.float32).ravel() for name in names if name in tensors]
        if len(found) != n_layer or any(x.size != 1 for x in found):
            raise FormatError(
                f"{len(found)} of {n_layer} layers have a tensor {local}, each must have one of one number"
            )
        yield key, Typed("array[f32]", [float(x[0]) for x in found])


def _tie(config: Config, found: dict[str, Tensor]) -> None:
    """Leave out the output matrix if config.json says that it is the embeddings, and it is."""
    is_tied, output = config.get("tie_word_embeddings"), found.get("output.weight")
    if is_tied is True and output is not None and "token_embd.weight" in found:
        if same_values(output, found["token_embd.weight"]):
            del found["output.weight"]
        else:
            what = "tie_word_embeddings is true, but the output matrix differs from the embeddings: it is kept"
            warnings.warn(f"{config.path}: {what}", stacklevel=2)
    elif is_tied is False and output is None:
        what = "tie_word_embeddings is false, but there is no output matrix: the embeddings take its place"
        warnings.warn(f"{config.path}: {what}", stacklevel=2)


def _check_flags(layout: CheckpointLayout, config: Config, found: Mapping[str, Tensor]) -> None:
    """Raise FormatError if config.json says that there are tensors, and they are not there, or the other way round."""
    flags = {layout.bias_key: "attn_q.bias"}
    if layout.bias_key == "attention_bias":
        flags["mlp_bias"] = "ffn_up.bias"
    optional = layout.decoder.optional_norms
    if "attn_q_norm" in optional and "ffn_norm" in optional:
        flags |= {"qk_layernorm": "attn_q_norm.weight", "use_parallel_residual": "ffn_norm.weight"}
    elif "attn_q_norm" in optional:
        flags["use_qk_norm"] = "attn_q_norm.weight"
    for key, name in flags.items():
        value, is_there = config.get(key), f"blk.0.{name}" in found
        other = is_there != (key == "use_parallel_residual")
        if value is None and other and key not in _TRUE_IF_MISSING and layout.arch != "gpt-oss":
            what = f"has no {key}, so transformers takes it as false, but the tensors say true: this is converted"
            warnings.warn(f"{config.path}: {what}", stacklevel=2)
        if value is not None and value != other:
            shown = "is a tensor" if is_there else "is no tensor"
            raise FormatError(f"{config.path}: {key} is {value}, but there {shown} for blk.0.{name}: not of one model")


def _wrong_shape(tensor: Tensor, name: str, problem: str) -> FormatError:
    return FormatError(f"{tensor.file.path}: {name} has the shape {list(tensor.ne[::-1])}, {problem}")


def _collected(
    layout: CheckpointLayout, numbers: Mapping[str, int], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors by GGUF name, split and stacked. FormatError if two make the same one."""
    found: dict[str, Tensor] = {}
    items: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        place = _place(layout, numbers, name, tensor)
        for base, part in zip(place.names, _parts(layout, numbers, place, tensor), strict=True):
            full = f"{place.prefix}{base}.{place.kind}"
            if full in found or (place.item < 0 and full in items) or place.item in items.get(full, ()):
                raise FormatError(f"{tensor.file.path}: two tensors make {full}, {quoted(name)} is the second")
            if place.item < 0:
                found[full] = part
            else:
                items[full][place.item] = part
    return found | {full: _stacked(full, experts) for full, experts in items.items()}


def adapted_rows(layout: CheckpointLayout, config: Config, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the rows of a tensor by the GGUF tensors that the rows of a checkpoint's matrix `name` make.

    UnsupportedError for experts, embeddings, and a matrix that is more than split and put in another order.
    """
    for full, part in _collected(layout, sizes(config), {name: tensor}).items():
        is_edited = layout.edit is not None and layout.edit(config, full, part) is not part
        if is_edited or len(part.ne) > 2 or full.endswith(("_exps.weight", "token_embd.weight")):
            what = "experts, embeddings and matrices that the conversion changes cannot be adapted"
            raise UnsupportedError(f"{tensor.file.path}: adapts {quoted(name)}, in a GGUF file {full}: {what}")
        yield full, part


def _place(layout: CheckpointLayout, numbers: Mapping[str, int], name: str, tensor: Tensor) -> _Place:
    short = name.replace("language_model.", "", 1).replace("model.model.", "model.", 1)
    short = re.sub(r"^backbone\.", "model.", short)
    short = re.sub(r"^(?:encoder\.)?layers?\.(?=\d)", "model.layers.", short)
    module, dot, kind = short.rpartition(".")
    bare = not dot or kind not in _KINDS
    if bare:
        module, kind = (short[: -len("_bias")], "bias") if short.endswith("_bias") else (short, "weight")
    layer = re.fullmatch(r"model\.layers\.(\d{1,6})\.(.+)", module, re.ASCII)
    local = layer[2] if layer else module
    item = re.search(
        r"\.(?:experts|norms|altup_projections|altup_unembed_projections)\.(\d{1,6})(?=\.|$)", local, re.ASCII
    )
    if item:
        local = local[: item.start(1)] + "@" + local[item.end(1) :]
    target = (layout.layer if layer else layout.model).get(local)
    n_layer = numbers["n_layer"]
    if target is None or (layer and int(layer[1]) >= n_layer):
        raise UnsupportedError(
            f"{tensor.file.path}: tensor {quoted(name)} is not a part of a {layout.arch} model of {n_layer} layers as "
            "this program knows it: without it the results would be wrong"
        )
    if isinstance(target, str) and target.endswith(".scale"):
        target, kind = target.removesuffix(".scale"), "scale"
    prefix = f"blk.{int(layer[1])}." if layer else ""
    return _Place(prefix, names_of(target), kind, int(item[1]) if item else -1, bare)


def _parts(
    layout: CheckpointLayout, numbers: Mapping[str, int], place: _Place, tensor: Tensor
) -> Iterator[Tensor] | tuple[Tensor, ...]:
    """Return the tensor itself, or what it is split into, with rows in GGUF's order."""
    if place.kind.endswith("scale") or place.names[0] in layout.whole:
        return (tensor,) * len(place.names)
    if place.bare and place.kind == "weight" and place.names[0] in layout.bare and len(tensor.ne) == 3:
        n_in, n_out, _ = tensor.ne
        if n_in == n_out or n_in != numbers[EXPERT_SHAPES[place.names[0]][0]]:
            tensor = transposed(tensor)
    if len(place.names) == 2:
        split = 1 if place.kind == "weight" else 0  # the dimension of which each half makes a tensor
        if not 2 <= len(tensor.ne) <= split + 2 or tensor.ne[split] % 2:
            made = f"of which {' and '.join(place.names)} cannot be made"
            raise _wrong_shape(tensor, quoted(tensor.name), f"{made}: it is damaged, or of another model")
        return halves(tensor, layout.interleaved, place.kind == "bias")
    parts = _groups(numbers, tensor) if len(place.names) == 3 else (tensor,)
    return (in_pairs(layout, numbers, name, part) for name, part in zip(place.names, parts, strict=True))


def in_pairs(
    layout: CheckpointLayout, numbers: Mapping[str, int], name: str, tensor: Tensor, back: bool = False
) -> Tensor:
    """Return q or k with the rows of each head in GGUF's order, and any other tensor as it is.

    back: from GGUF's order to the checkpoint's. A tensor of a wrong shape stays as it is: a later check refuses it.
    """
    heads = {"attn_q": numbers["n_head"], "attn_k": numbers["n_head_kv"]} if layout.permuted else {}
    fits = name in heads and len(tensor.ne) < 3 and tensor.ne[-1] % (2 * heads[name]) == 0
    return unpermuted(tensor, heads[name], back) if fits else tensor


def _groups(numbers: Mapping[str, int], tensor: Tensor) -> tuple[Tensor, ...]:
    """Take q, k and v out of a matrix that has for each head of keys: its query heads, its keys, its values."""
    n_group, head_dim = numbers["n_head"] // numbers["n_head_kv"], numbers["head_dim"]
    n_rows = numbers["n_head_kv"] * (n_group + 2) * head_dim
    if tensor.ne[1:] != (n_rows,):  # an adapter has other columns
        raise _wrong_shape(tensor, quoted(tensor.name), f"by config.json it must have {[n_rows, numbers['n_embd']]}")
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
    if name.endswith(".scale"):
        scales = np.concatenate([values(tensor).blocks() for tensor in tensors])
        return Source(name, (len(items),), F32, first.file, lambda start, end: scales)
    return gathered(name, tensors, None, (*first.ne, len(items)))


def _without_kind(layout: CheckpointLayout, name: str) -> str:
    """Return the name of a tensor in the file. Some have no ".weight"."""
    base = name.split(".")[-2]
    is_bare = base in ("ssm_a", "ssm_d") or (base == "ffn_norm" and layout.arch == "falcon-h1")
    return name.removesuffix(".weight") if is_bare else name


def _final(layout: CheckpointLayout, config: Config, name: str, tensor: Tensor) -> Tensor:
    """Return the tensor under its name. Norms, biases and vectors become F32."""
    base, kind = name.split(".")[-2:]
    if layout.edit is not None:
        tensor = layout.edit(config, name, tensor)
    is_norm = base.endswith("_norm")
    if is_norm and kind == "weight" and layout.norm_offset and base != "ssm_norm":
        offset = np.float32(layout.norm_offset)
        tensor = values(tensor, lambda x: x + offset)
    elif len(tensor.ne) < 2 or kind == "bias" or is_norm or base in _FLOAT:
        tensor = values(tensor)
    return replace(tensor, name=_without_kind(layout, name))
