"""Which backend runs which ops: a model on several backends is a sequence of stages."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal

from gguf_run.formats.reader import Tensor
from gguf_run.models.backend import AnyBackend, Backend, Program
from gguf_run.models.config import ModelConfig
from gguf_run.models.kv_cache import CacheLayer
from gguf_run.models.layer import Loader
from gguf_run.models.operands import Buffer, Cache, Experts, Rotation, Squares, Table, Vector, Weight
from gguf_run.models.ops import Op
from gguf_run.models.step import Observed, Step


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


class _Side(Generic[Table, Weight, Vector, Cache, Experts, Squares]):
    """What is on one backend: weights, and the lists of a program."""

    def __init__(
        self,
        backend: Backend[Table, Weight, Vector, Cache, Experts, Squares],
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        progress: Callable[[int], None],
        observed: list[Observed] | None,
    ) -> None:
        self._config, self._observed = config, observed
        self._load = Loader(backend, tensors, progress)
        self._tied = "output.weight" not in tensors  # the embeddings are the output matrix too
        self.step = Step(backend, config, observed)

    def embed(self) -> None:
        self.step.embed(self._load.embeddings(tied=self._tied))

    def add(self, piece: _Piece, cache: Cache, rotation: Rotation | None) -> None:
        """Load the weights of a piece and append its ops. cache: that of the layer, on this backend."""
        il, step = piece.il, self.step
        if piece.what == "experts":
            step.experts(self._load.experts(il))
            return
        weights = self._load.layer(self._config, il, cache, rotation)
        is_whole = piece.what == "layer"
        experts = self._load.experts(il) if is_whole and self._config.has_experts(il) else None
        step.attention(weights)
        if is_whole and il == self._config.n_layer - 1 and self._observed is None:
            step.only_outputs()
        step.ffn(weights, experts)

    def logits(self) -> Buffer:
        """Append the ops from the hidden state to the logits. Returns the buffer of these."""
        if not self.step.after:
            self.step.only_outputs()
        norm = self._load.norm("output_norm")
        assert norm is not None  # config has checked it
        return self.step.logits(norm, self._load.matrix("token_embd" if self._tied else "output", bias=["output"]))


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
    sides = {key: _Side(backend, config, tensors, progress, observed) for key, backend in backends.items()}
    stages: list[tuple[int, int, tuple[Buffer, ...], tuple[Buffer, ...]]] = []
    for backend, pieces in plan:
        side = sides[id(backend)]
        step = side.step
        step.new_part()
        if not stages:
            side.embed()
        reads = step.to_experts if pieces and pieces[0].what == "experts" else (step.x,)
        for piece in pieces:
            side.add(piece, layers[piece.il].cache, layers[piece.il].rotation)
        leaves = step.to_experts if pieces and pieces[-1].what == "before experts" else (step.x,)
        stages.append((id(backend), len(step.parts) - 1, reads, leaves))
    results = {key: side.step.x for key, side in sides.items()} | {id(backend): side.logits()}
    programs = {
        key: backends[key].program(side.step.parts, side.step.after, results[key], n_batch, n_outputs)
        for key, side in sides.items()
    }
    return [Stage(programs[key], part, reads, leaves) for key, part, reads, leaves in stages]


def list_ops(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    backend: Backend[Table, Weight, Vector, Cache, Experts, Squares],
    caches: Sequence[Cache],
    rotations: Sequence[Rotation | None],
) -> list[Op[Table, Weight, Vector, Cache, Experts, Squares]]:
    """Return the ops of a whole model on one backend. caches, rotations: one for each layer."""
    side = _Side(backend, config, tensors, lambda n_bytes: None, None)
    side.step.new_part()
    side.embed()
    for il, (cache, rotation) in enumerate(zip(caches, rotations, strict=True)):
        side.add(_Piece(il, "layer"), cache, rotation)
    side.logits()
    return [*side.step.parts[0], *side.step.after]
