"""Which backend runs which ops: a model on several backends is a sequence of stages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.kv_cache import N_STATES, CacheLayer
from gguf_run.models.operands import Buffer
from gguf_run.models.ops import Cache, State
from gguf_run.models.pages import PageTable
from gguf_run.models.rope import rotations
from gguf_run.models.step import Observed, step_class
from gguf_run.models.weights import Loader

if TYPE_CHECKING:
    from gguf_run.models.adapted_step import Adapters
    from gguf_run.models.protocol import AnyBackend, Backend, Program


@frozen
class Placed:
    """Where the parts of a model are."""

    layers: "Sequence[AnyBackend]"  # one for each layer; the last one has the output matrix too
    experts: "Sequence[AnyBackend]"  # one for the experts of each layer; the layer's own if the layer has no experts
    embedding: "AnyBackend"  # looks up the embeddings


@frozen
class Stage:
    """A part of a program. Stages run one after the other."""

    program: "Program"
    part: int
    reads: tuple[Buffer, ...]  # the buffers that the `leaves` of the stage before are copied to
    leaves: tuple[Buffer, ...]  # the tokens' hidden state; for experts also their input and the router's logits


class _Piece(NamedTuple):
    """A layer, or a half of one whose experts are on another backend."""

    il: int
    what: str  # "layer", "before experts" or "experts"


def _pieces(placed: Placed) -> "list[tuple[AnyBackend, list[_Piece]]]":
    """Return the backend and the pieces of each stage.

    The first stage, which looks up the embeddings, and the last one, which makes the logits, may have no pieces.
    """
    stages: list[tuple[AnyBackend, list[_Piece]]] = [(placed.embedding, [])]
    for il, (own, others) in enumerate(zip(placed.layers, placed.experts, strict=True)):
        halves = [(own, "layer")] if others is own else [(own, "before experts"), (others, "experts")]
        for backend, what in halves:
            if backend is not stages[-1][0]:
                stages.append((backend, []))
            stages[-1][1].append(_Piece(il, what))
    if placed.layers[-1] is not stages[-1][0]:
        stages.append((placed.layers[-1], []))
    return stages


def page_tables(config: ModelConfig, n_ctx: int, n_batch: int, n_seq: int, n_cells: int | None) -> list[PageTable]:
    """Return a table for each window of the layers' attention, first that of all positions. See PageTable.new."""
    windows = {config.attention(il).window for il in range(config.n_layer)}
    narrow = sorted(window for window in windows if 0 < window < n_ctx)
    return [PageTable.new(window, n_ctx, n_batch, n_seq, n_cells) for window in (0, *narrow)]


def cache_layers(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    backends: "Sequence[Backend[Any, Any, Any, Cache, Any, Any, State]]",
    kinds: Sequence[CacheType],
    n_ctx: int,
    tables: Sequence[PageTable],
) -> list[CacheLayer[Cache, State]]:
    """Return the caches of all layers. backends, kinds: of each layer."""
    layers: list[CacheLayer[Cache, State]] = []
    n_states = len(tables[0].versions) * N_STATES
    for il, rotation in enumerate(rotations(config, tensors, n_ctx)):
        if (owner := config.layers[il].kv_layer) != il:
            layers.append(replace(layers[owner], is_shared=True))
            continue
        backend, shape = backends[il], config.attention(il)
        table = next((table for table in tables if table.window == shape.window), tables[0])
        cache = backend.cache(shape, table, kinds[il]) if shape.n_head else None
        sizes = config.mixer.states(il) if config.mixer is not None else ()
        states = tuple(backend.state(n_floats, n_states) for n_floats in sizes)
        layers.append(CacheLayer(cache, table.window, rotation, states))
    return layers


def build(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    placed: Placed,
    layers: Sequence[CacheLayer[Any, Any]],
    n_batch: int,
    n_outputs: int,
    progress: Callable[[int], None],
    observed: list[Observed] | None,
    has_logits: bool,
    adapters: "Adapters | None",
) -> list[Stage]:
    """Load the weights and make the backends' programs. Return the stages in the order of their run.

    layers: the KV caches, made by the backends of `placed`. The other arguments are those of Decoder.
    """
    plan = _pieces(placed)
    backends = {id(backend): backend for backend, _ in plan}
    new = adapters.step_class(step_class(config)) if adapters else step_class(config)
    steps = {key: new(Loader(backend, tensors, progress), config, observed) for key, backend in backends.items()}
    stages: list[tuple[int, int, tuple[Buffer, ...], tuple[Buffer, ...]]] = []
    for backend, pieces in plan:
        step = steps[id(backend)]
        step.new_part()
        if not stages:
            step.embed()
        at = pieces[0].il if pieces else config.n_layer if stages else 0
        reads = step.to_experts if pieces and pieces[0].what == "experts" else step.before(at)
        for il, what in pieces:
            if what == "experts":
                step.experts(il)
            else:
                step.layer(il, layers[il], experts=what == "layer")
        leaves = step.to_experts if pieces and pieces[-1].what == "before experts" else step.before(at + len(pieces))
        stages.append((id(backend), len(step.parts) - 1, reads, leaves))
    (step.logits if has_logits else step.hidden)()
    programs = {key: step.program(n_batch, n_outputs) for key, step in steps.items()}
    return [Stage(programs[key], part, reads, leaves) for key, part, reads, leaves in stages]
