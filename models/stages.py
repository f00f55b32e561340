"""Which backend runs which ops: a model on several backends is a sequence of stages."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.backend import AnyBackend, Program
from gguf_run.models.config import ModelConfig
from gguf_run.models.kv_cache import CacheLayer
from gguf_run.models.operands import Buffer
from gguf_run.models.step import Observed, Step
from gguf_run.models.weights import Loader


@dataclass(frozen=True)
class Placed:
    """Where the parts of a model are."""

    layers: Sequence[AnyBackend]  # of each layer; the last one has the output matrix too
    experts: Sequence[AnyBackend]  # of the experts of each layer; the layer's own if it has none
    embedding: AnyBackend  # which looks up the embeddings


@dataclass(frozen=True)
class Stage:
    """A part of a program. Stages run one after the other."""

    program: Program
    part: int
    reads: tuple[Buffer, ...]  # what must be copied here from the stage before, from its `leaves`
    leaves: tuple[Buffer, ...]  # the tokens' hidden state, and what experts read besides


@dataclass(frozen=True)
class _Piece:
    """A layer, or a half of one whose experts are on another backend."""

    il: int
    what: Literal["layer", "before experts", "experts"]


def _pieces(placed: Placed) -> list[tuple[AnyBackend, list[_Piece]]]:
    """Return the backend and the pieces of each stage.

    The first stage, which looks up the embeddings, and the last one, which makes the logits, may have no pieces.
    """
    pieces: list[tuple[AnyBackend, _Piece]] = []
    for il, (backend, others) in enumerate(zip(placed.layers, placed.experts, strict=True)):
        if others is backend:
            pieces.append((backend, _Piece(il, "layer")))
        else:
            pieces += [(backend, _Piece(il, "before experts")), (others, _Piece(il, "experts"))]
    runs = [[*run] for _, run in itertools.groupby(pieces, key=lambda piece: id(piece[0]))]
    stages = [(run[0][0], [piece for _, piece in run]) for run in runs]
    if placed.embedding is not stages[0][0]:
        stages.insert(0, (placed.embedding, []))
    if placed.layers[-1] is not stages[-1][0]:
        stages.append((placed.layers[-1], []))
    return stages


def build(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    placed: Placed,
    layers: Sequence[CacheLayer],
    n_batch: int,
    n_outputs: int,
    progress: Callable[[int], None],
    observed: list[Observed] | None,
) -> list[Stage]:
    """Load the weights and make the backends' programs: the embeddings first, the logits last of all.

    layers: the KV caches, made by the backends of `placed`. The other arguments are those of Decoder.
    """
    plan = _pieces(placed)
    backends = {id(backend): backend for backend, _ in plan}
    steps = {key: Step(Loader(backend, tensors, progress), config, observed) for key, backend in backends.items()}
    stages: list[tuple[int, int, tuple[Buffer, ...], tuple[Buffer, ...]]] = []
    for backend, pieces in plan:
        step = steps[id(backend)]
        step.new_part()
        if not stages:
            step.embed()
        reads = step.to_experts if pieces and pieces[0].what == "experts" else (step.x,)
        for piece in pieces:
            if piece.what == "experts":
                step.experts(piece.il)
            else:
                layer = layers[piece.il]
                step.layer(piece.il, layer.cache, layer.rotation, experts=piece.what == "layer")
        leaves = step.to_experts if pieces and pieces[-1].what == "before experts" else (step.x,)
        stages.append((id(backend), len(step.parts) - 1, reads, leaves))
    results = {key: step.x for key, step in steps.items()} | {id(backend): step.logits()}
    programs = {
        key: backends[key].program(step.parts, step.after, results[key], n_batch, n_outputs)
        for key, step in steps.items()
    }
    return [Stage(programs[key], part, reads, leaves) for key, part, reads, leaves in stages]
