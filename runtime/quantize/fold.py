"""Channel scales (AWQ, arXiv:2306.00978): factors of a matrix's columns, by which what makes its inputs is divided.

The model computes the same. Columns that matter more become larger: they lose less of what they share a block with.
Scales are moved between a producer and its readers:

producer           readers                                              channels
norm of attention  q, k and v, or what a mixer has in place of them     of the residual stream
norm of the ffn    gate and up, router, experts                         of the residual stream
rows of up         columns of down, where a gate multiplies up          of the ffn, of each expert its own
rows of v          columns of attn_output                               of v: heads that share a v share its scales

The norm of the output keeps its scale: its rows are a result, as embeddings.
"""

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.errors import FormatError, GgufRunError, OptionError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.moments import Moments
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.formats.gguf.writer_metadata import as_typed
from gguf_run.formats.quantizers.quantizer import quantize
from gguf_run.models.architectures import qkv_of
from gguf_run.models.config import ModelConfig
from gguf_run.models.experts import experts_of
from gguf_run.runtime.quantize.item import Change, Item
from gguf_run.runtime.quantize.plan import Plan

# Scales are the mean squares of the channels to the power of half of one of these. 0: no scales.
ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
_LEAST = 1e-6  # of the mean of all mean squares: channels with less are scaled as if they had that

# Tensors that read the norm of attention, those that read the norm of the ffn, and those that read neither.
_ATTN = (
    *("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_q_a", "attn_kv_a_mqa", "attn_gate"),
    *("ssm_in", "ssm_beta", "ssm_alpha", "ssm_ba", "shortconv.in_proj"),
)
_FFN = (
    *("ffn_gate", "ffn_up", "ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", "ffn_gate_shexp", "ffn_up_shexp"),
    *("ffn_gate_inp", "ffn_gate_inp_shexp"),
)
_OTHER = (
    *("attn_output", "attn_q_b", "attn_kv_b", "attn_k_b", "attn_v_b", "ssm_out", "shortconv.out_proj"),
    *("ffn_down", "ffn_down_exps", "ffn_down_shexp"),
)
_LINEAR = ("silu", "gelu")  # activations of an ffn that is activation(gate) * up


@dataclass(frozen=True)
class Place:
    """Neighbours that scales can be moved between."""

    producer: str  # a norm, or a matrix whose last rows (of each expert) are divided
    n_expert: int  # of the producer; 1: it has none
    biases: tuple[str, ...]  # whose last elements are divided
    readers: tuple[str, ...]  # tensors whose columns are multiplied
    channels: NDArray[np.intp]  # for each column of the readers, its channel of the producer


def places(plan: Plan) -> Iterator[Place]:
    """Yield the places of a model. Layers that have more than this file knows have none.

    Errors of ModelConfig for a model that this program cannot run.
    """
    tensors = {item.target.name: item.source for item in plan.items}
    config = ModelConfig.from_metadata({key: as_typed(value).value for key, value in plan.metadata.items()}, tensors)
    if config.arch.step or any(layer.kv_layer != il for il, layer in enumerate(config.layers)):
        return
    for il in range(config.n_layer):
        block = f"blk.{il}."
        # Full names by short ones: a file may leave out the ".weight" of a norm.
        here = {name[len(block) :].removesuffix(".weight"): name for name in tensors if name.startswith(block)}
        unknown = [tensors[here[name]].ne for name in here.keys() - {*_ATTN, *_FFN, *_OTHER} if ".bias" not in name]
        if any(len(ne) > 1 and ne[0] == config.n_embd for ne in unknown):
            continue
        for producer, readers, channels in _pairs(config, il, tensors, here):
            found = tuple(here[name] for name in readers if name in here)
            bias = (producer, "attn_v") if producer == "attn_qkv" else (producer,)
            biases = tuple(here[f"{name}.bias"] for name in bias if f"{name}.bias" in here)
            if producer in here and found and all(len(tensors[name].ne) == 1 for name in biases):
                full = here[producer]
                yield Place(full, math.prod(tensors[full].ne[2:]), biases, found, channels)


def _pairs(
    config: ModelConfig, il: int, tensors: Mapping[str, Tensor], here: Container[str]
) -> Iterator[tuple[str, Sequence[str], NDArray[np.intp]]]:
    """Yield the producer, the readers and the channels of the places of a layer. A tensor may be missing.

    here: the short names of the layer's tensors.
    """
    arch, layer, block, stream = config.arch, config.layers[il], f"blk.{il}.", np.arange(config.n_embd)
    if arch.ffn_norm in here and arch.ffn_norm != "attn_norm":
        yield "attn_norm", _ATTN, stream
        yield arch.ffn_norm, _FFN, stream
    else:  # attention and ffn read the same norm
        yield "attn_norm", (*_ATTN, *_FFN), stream
    experts = experts_of(arch, block, tensors) if layer.has_experts else ()
    for names, activation in (
        (config.ffn(il), arch.activation),
        (experts, arch.expert_activation or arch.activation),
    ):
        if names and arch.gated and activation in _LINEAR:
            yield names[-2], names[-1:], np.arange(tensors[f"{block}{names[-1]}.weight"].ne[0])
    if layer.n_head and (qkv := qkv_of(arch, block, tensors)):
        of_head = np.arange(layer.n_embd_kv).reshape(layer.n_head_kv, 1, layer.head_dim)
        yield qkv[-1], ("attn_output",), of_head.repeat(layer.n_head // layer.n_head_kv, axis=1).reshape(-1)


def awq(plan: Plan, moments: Moments | None, n_threads: int, progress: Callable[[int, int], None]) -> Plan:
    """Return the plan with channel scales, those of least loss for each place. No scales are a choice too.

    The loss of a place is that of its readers, tr(E H ET) for the errors E of a matrix and the second moments H of its
    inputs. H is the diagonal of the importance matrix where `moments` has none. Trials round as ggml does.
    progress: called with the number of places that are done, and with their total.
    OptionError without importance weights, and for a model without places. GgufRunError for bad weights.
    """
    items = {item.target.name: item for item in plan.items}
    found = [(place, readers) for place in places(plan) if (readers := _quantized(place, items))]
    if not found:
        raise OptionError(
            "--method awq: finds no place for channel scales: give --imatrix FILE and a type of fewer bits; some "
            "architectures have none"
        )
    chosen = []
    for i, (place, readers) in enumerate(found):
        scales = best_scales(place, readers, moments, n_threads)
        chosen += [(place, scales)] if (scales != 1).any() else []
        progress(i + 1, len(found))
    note = f"channel scales at {len(chosen)} of {len(found)} places: adapters made for the input do not fit the output"
    return replace(fold(plan, chosen), notes=[*plan.notes, note])


def _quantized(place: Place, items: Mapping[str, Item]) -> list[Item]:
    """Return the readers that lose something, [] if the importance of one of them is not known."""
    readers = [items[name] for name in place.readers]
    readers = [item for item in readers if item.target.type.is_quantized and not item.is_copy]
    return readers if all(item.importance is not None for item in readers) else []


def best_scales(place: Place, readers: Sequence[Item], moments: Moments | None, n_threads: int) -> NDArray[np.float32]:
    """Return the scales of least loss, f32[n_expert, n_channels]. Their geometric mean is 1. All are 1: no scales."""
    known = [item.importance for item in readers if item.importance is not None]
    means = np.concatenate(known).reshape(-1, place.n_expert, len(place.channels)).mean(axis=0)
    squares = np.stack([np.bincount(place.channels, row) for row in means]) / np.bincount(place.channels)
    logs = np.log(np.maximum(squares, max(_LEAST * squares.mean(), 1e-30))) / 2
    logs -= logs.mean(axis=1, keepdims=True)
    tried = [np.exp(alpha * logs).astype(np.float32) for alpha in ALPHAS]
    columns = [scales[:, place.channels] for scales in tried]
    losses = sum(_losses(item, columns, moments, n_threads) for item in readers)
    return tried[np.argmin(np.where(np.isfinite(losses), losses, np.inf))]


def _losses(
    item: Item, scales: Sequence[NDArray[np.float32]], moments: Moments | None, n_threads: int
) -> NDArray[np.float64]:
    """Return tr(E H ET) of a matrix, f64[len(scales)]. scales: f32[n_expert, ne[0]], or f32[1, ne[0]], of columns."""
    source, type, losses = item.source, item.target.type, np.zeros(len(scales))
    importance, has_moments = item.importance, moments is not None and moments.group(source.name) is not None
    assert importance is not None
    n_rows = source.n_rows // len(importance)
    for e, diagonal in enumerate(importance):
        x = dequantize(source.blocks(e * n_rows, (e + 1) * n_rows), source.type)
        h = moments.mean(source.name, e) if moments is not None and has_moments else None
        for i, s in enumerate(scales):
            s = s[e % len(s)]
            try:
                blocks = quantize(x * s, type, diagonal / (s * s), n_threads)
            except FormatError as reason:
                raise GgufRunError(f"{source.file.path}: tensor {quoted(source.name)}: {reason}") from None
            error = dequantize(blocks, type) / s - x
            losses[i] += np.sum(error * (error * diagonal if h is None else error @ h), dtype=np.float64)
    return losses


def fold(plan: Plan, chosen: Sequence[tuple[Place, NDArray[np.float32]]]) -> Plan:
    """Return the plan with scales f32[n_expert, n_channels] at some places: readers times them, producers by them."""
    tensors = {item.target.name: item.source for item in plan.items}
    changes: dict[str, Change] = {}

    def times(name: str, columns: NDArray[np.float32] | float, rows: NDArray[np.float32] | float) -> None:
        ne, n_rows = tensors[name].ne, tensors[name].n_rows
        old = changes.get(name) or Change(np.ones((1, ne[0]), np.float32), np.ones(n_rows, np.float32))
        changes[name] = Change(old.columns * columns, old.rows * rows)

    for place, scales in chosen:
        for name in place.readers:
            times(name, scales[:, place.channels], 1.0)
        for name in (place.producer, *place.biases):
            ne = tensors[name].ne
            parts = np.ones((place.n_expert, ne[0] if len(ne) == 1 else ne[1]), np.float32)
            parts[:, parts.shape[1] - scales.shape[1] :] /= scales
            times(name, *((parts, 1.0) if len(ne) == 1 else (1.0, parts.reshape(-1))))
    return replace(plan, items=[_with(item, changes.get(item.target.name)) for item in plan.items])


def _with(item: Item, change: Change | None) -> Item:
    """Return the item with a change, and the importance of its new columns."""
    if change is None:
        return item
    importance = None if item.importance is None else item.importance / (change.columns * change.columns)
    return replace(item, change=change, importance=importance)
