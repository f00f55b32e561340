"""What quantizing will write. Tensors, types, metadata and importance weights are decided before a weight is read."""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.formats.gguf.imatrix import Imatrix
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.reader import GGUFFile, Tensor
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.formats.gguf.writer_metadata import MetaValue, as_typed
from gguf_run.formats.quantizers.quantizer import SEARCHES
from gguf_run.runtime.quantize.file_types import FileType
from gguf_run.runtime.quantize.item import Item, searched
from gguf_run.runtime.quantize.rules import MixtureFacts, Overrides, choose_types, layer_order

_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml: the meaning of the blocks

_N_ZERO = 16  # weights that share a scale in the types with the smallest blocks (Q2_K, Q3_K, Q6_K)
_Entries = Mapping[str, NDArray[np.float32]]  # of an imatrix, by tensor name


@dataclass(frozen=True)
class Options:
    """What the user wants."""

    kind: FileType
    overrides: Overrides = field(default_factory=Overrides)
    imatrix: Imatrix | None = None
    imatrix_path: str = ""  # the path that is noted in the file
    use_entries: tuple[str, ...] = ()  # use imatrix entries whose names hold one of these texts; (): all
    skip_entries: tuple[str, ...] = ()  # skip imatrix entries whose names hold one of these texts
    metadata: Mapping[str, MetaValue] = field(default_factory=dict)  # keys to set
    prune: frozenset[int] = frozenset()  # numbers of the layers to leave out
    keep_split: bool = False  # write as many files as the input has, with the same tensors


@dataclass(frozen=True)
class Plan:
    """The whole job."""

    items: Sequence[Item]  # in the order of the output
    metadata: Mapping[str, MetaValue]
    split: Sequence[int]  # the number of tensors in each file to write; empty: one file
    inputs: Sequence[Path]  # files that must not be overwritten
    notes: Sequence[str]  # lines for the user


def make_plan(file: GGUFFile, options: Options) -> Plan:
    """Decide everything. OptionError for a layer that does not exist, GgufRunError for an imatrix of another model.

    A UserWarning names the tensors whose importance weights are all 0.
    """
    keys: dict[str, Any] = {**file.metadata, **{key: as_typed(value).value for key, value in options.metadata.items()}}
    layers = sorted({layer_order(name)[0] for name in file.tensors} - {-1})
    if missing := options.prune - set(layers):
        there = f"layers {layers[0]} to {layers[-1]}" if layers else "no layers"
        raise OptionError(f"--prune-layers {min(missing)}: the model has {there}")
    kept = [il for il in layers if il not in options.prune]
    names = {name: _renumbered(name, kept) for name in file.tensors if layer_order(name)[0] not in options.prune}
    sources = [file.tensors[name] for name in _ordered(file, options.keep_split) if name in names]
    weights = [TensorInfo(names[source.name], source.ne, source.type) for source in sources]

    importance = _entries(options)
    facts = MixtureFacts.from_metadata(keys, max(layers, default=-1) + 1, bool(importance))
    choices = choose_types(weights, facts, options.kind, options.overrides)
    quantized = {
        s.name: s for s, c in zip(sources, choices, strict=True) if c.type.is_quantized and c.type is not s.type
    }
    _check_entries(options.imatrix_path or "--imatrix", importance, quantized)
    items = [
        Item(
            source,
            TensorInfo(weight.name, weight.ne, choice.type),
            choice,
            _importance(source, importance) if source.name in quantized else None,
            options.imatrix_path,
        )
        for source, weight, choice in zip(sources, weights, choices, strict=True)
    ]
    if options.imatrix is not None and not any(name in options.imatrix.sums for name in file.tensors):
        raise GgufRunError(
            f"{options.imatrix_path}: none of its {len(options.imatrix.sums)} entries is a tensor of {file.path}: it "
            "is of another model"
        )
    metadata = _metadata(file, options, facts, kept, len(importance))
    parts = Counter(item.source.file.path for item in items)
    split = list(parts.values()) if options.keep_split else []
    inputs = {tensor.file.path for tensor in file.tensors.values()}
    inputs |= {Path(options.imatrix_path)} if options.imatrix_path else set()
    return Plan(items, metadata, split, list(inputs), list(_notes(items, options)))


def _renumbered(name: str, kept: Sequence[int]) -> str:
    """Return the name with the new number of its layer."""
    layer, _ = layer_order(name)
    return name if layer < 0 else name.replace(f"blk.{layer}.", f"blk.{kept.index(layer)}.", 1)


def _ordered(file: GGUFFile, keep_split: bool) -> list[str]:
    """Return the names in the order of the output: that of the input if it stays split, else llama.cpp's."""
    if not keep_split:
        return sorted(file.tensors, key=layer_order)
    parts = list(dict.fromkeys(tensor.file.path for tensor in file.tensors.values()))
    return sorted(file.tensors, key=lambda name: (parts.index(file.tensors[name].file.path), file.tensors[name].offset))


def _entries(options: Options) -> _Entries:
    """Return the entries of the imatrix that are wanted, by tensor name in the input file."""
    if options.imatrix is None:
        return {}
    return {
        name: values
        for name, values in options.imatrix.entries.items()
        if not any(text in name for text in options.skip_entries)
        and (not options.use_entries or any(text in name for text in options.use_entries))
    }


def _check_entries(path: str, entries: _Entries, quantized: Mapping[str, Tensor]) -> None:
    """GgufRunError for entries of another size than their tensors, a warning for entries with channels that are 0.

    path: the imatrix.
    Any size is allowed for token_embd.weight: a row is looked up, not multiplied, so no program collects one value for
    each channel.
    """
    zeros, wrong = [], []
    for name in (name for name in quantized if name in entries):
        importance = _importance(quantized[name], entries)
        if importance is not None and _has_zeros(importance):
            zeros.append(name)
        elif importance is None and not name.endswith("token_embd.weight"):
            wrong.append(name)
    if wrong:
        first = quantized[wrong[0]]
        sizes = f"{entries[first.name].size} values, the tensor needs {first.ne[0] * _n_expert(first)}"
        raise GgufRunError(
            f"{path}: the entry of {quoted(first.name)} has {sizes}: it is of another model{_more(wrong)}"
        )
    if zeros:
        what = f"importance weights of a matrix, or of {_N_ZERO} columns of it, are all 0, which makes these weights 0"
        advice = "make it again with a longer text, or leave such entries out (--exclude-weights)"
        warnings.warn(f"{path}: {what}: {quoted(zeros[0])}{_more(zeros)}: {advice}", stacklevel=3)


def _has_zeros(importance: NDArray[np.float32]) -> bool:
    """Whether all columns of a block are 0. importance: float32[n_expert, n_in]."""
    n = _N_ZERO if importance.shape[1] % _N_ZERO == 0 else importance.shape[1]
    return not importance.reshape(-1, n).any(axis=1).all()


def _n_expert(source: Tensor) -> int:
    return source.ne[2] if len(source.ne) > 2 else 1


def _importance(source: Tensor, entries: _Entries) -> NDArray[np.float32] | None:
    """Return float32[n_expert, ne[0]], or None if there is no entry that fits."""
    values, n_expert = entries.get(source.name), _n_expert(source)
    return values.reshape(n_expert, -1) if values is not None and values.size == source.ne[0] * n_expert else None


def _more(names: Sequence[str]) -> str:
    """Return the names after the first one, at most 20: ", also of ..."."""
    shown = ", ".join(map(quoted, names[1:20]))
    return f", also {shown}{f' and {len(names) - 20} more' if len(names) > 20 else ''}" if shown else ""


def check_plan(plan: Plan, allow_requantize: bool) -> None:
    """Check that the result is of use.

    GgufRunError if quantized tensors would be converted without allow_requantize, and for a tensor that has no
    importance weights and a type that needs them.
    """
    converted = [item for item in plan.items if not item.is_copy]
    again = [item.source for item in converted if item.source.type.is_quantized]
    if again and not allow_requantize:
        raise GgufRunError(
            f"{again[0].file.path}: {_tensors(len(again))} quantized already, {quoted(again[0].name)} is "
            f"{again[0].type.name}: start from F16, BF16 or F32, or give --allow-requantize, which costs quality"
        )
    for item in converted:
        if item.choice.needs_imatrix and item.importance is None:
            raise GgufRunError(
                f"tensor {quoted(item.target.name)} would be {item.target.type.name} without importance weights, which "
                "is of no use: give --imatrix FILE with an entry for it, or choose a type of more bits"
            )


def with_search(plan: Plan) -> Plan:
    """Return the plan with better scales than ggml's. OptionError if no tensor gets a type that has a search."""
    found = [item.target.type.name in SEARCHES and not item.is_copy for item in plan.items]
    if not any(found):
        types = sorted({item.target.type.name for item in plan.items if item.target.type.is_quantized})
        raise OptionError(
            f"--search: only {' and '.join(SEARCHES)} have one, and the tensors become {' '.join(types) or 'floats'}"
        )
    items = [replace(item, rounding=searched) if one else item for item, one in zip(plan.items, found, strict=True)]
    return replace(plan, items=items)


def _metadata(
    file: GGUFFile, options: Options, facts: MixtureFacts, kept: Sequence[int], n_entries: int
) -> dict[str, MetaValue]:
    """Return the input's keys, then those that quantizing changes, as llama-quantize writes them."""
    metadata: dict[str, MetaValue] = {key: file.metadata.typed(key) for key in file.metadata}
    changes: dict[str, MetaValue] = {"general.quantization_version": Typed("u32", _QUANTIZATION_VERSION)}
    if options.kind.id is not None:
        changes["general.file_type"] = Typed("u32", options.kind.id)
    changes.update(options.metadata)
    if options.imatrix is not None and n_entries:
        changes["quantize.imatrix.file"] = options.imatrix_path
        if options.imatrix.datasets and options.imatrix.datasets[0]:
            changes["quantize.imatrix.dataset"] = options.imatrix.datasets[0]
        changes["quantize.imatrix.entries_count"] = Typed("u32", n_entries)
        if options.imatrix.chunk_count:
            changes["quantize.imatrix.chunks_count"] = Typed("u32", options.imatrix.chunk_count)
    if options.prune:
        changes[f"{facts.arch}.block_count"] = Typed("u32", len(kept))
        for key, value in file.metadata.items():  # arrays with one value for each layer
            ours = key.startswith(f"{facts.arch}.") and not key.startswith(f"{facts.arch}.rope.")
            if ours and isinstance(value, np.ndarray) and len(value) == facts.n_layer:
                metadata[key] = Typed(file.metadata.type_name(key), value[kept])
    return {key: value for key, value in metadata.items() if key not in changes} | changes


def _notes(items: Sequence[Item], options: Options) -> Iterator[str]:
    """Yield lines about types that did not fit and importance weights that are missing."""
    replaced = Counter((item.choice.wanted, item.target.type, item.target.ne[0]) for item in items)
    for (wanted, type, n), count in replaced.items():
        if wanted is not None:
            reason = f"cannot be {wanted.name}, whose blocks hold {wanted.block_size}: {type.name} instead"
            yield f"{_tensors(count)} with rows of {n} weights {reason}"
    if options.imatrix is not None:
        without = [i for i in items if i.importance is None and not i.is_copy and i.target.type.is_quantized]
        if without:
            names = [item.target.name for item in without]
            yield f"{_tensors(len(names))} without importance weights: {quoted(names[0])}{_more(names)}"


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' if count != 1 else ''}"
