"""Counts the bytes that each op of a step reads for one token, and the operations that it computes.

The counts tell where the time of a decoded token goes. No weights are loaded: the handles of the ops hold only sizes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models import ops, rare_ops
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.operands import AttentionShape
from gguf_run.models.pages import PageTable
from gguf_run.models.stages import cache_layers, page_tables
from gguf_run.models.step import step_class
from gguf_run.models.weights import Loader


@dataclass(frozen=True)
class OpCost:
    """One op, for one token."""

    op: str  # name of its class in ops.py
    tensors: tuple[str, ...]
    types: tuple[str, ...]  # of the tensors, each once; of K and V
    nbytes: int  # bytes of weights and KV cache that the op reads
    operations: int  # additions and multiplications; an estimate for all but matmuls


@dataclass(frozen=True)
class Held:
    """A handle without numbers: of some tensors, or of a KV cache."""

    names: tuple[str, ...]
    types: tuple[str, ...]
    n_in: int
    n_out: int  # rows of all tensors; positions of a cache
    n_weights: int
    nbytes: int


@dataclass(frozen=True)
class Sizes:
    """A backend that makes handles without numbers. It makes no programs."""

    matrix_bytes: Callable[[str, int, int], int]  # of a tensor type, row length and number of rows
    # Of types of K and V, heads, columns of a head, positions, AttentionShape.n_latent.
    cache_bytes: Callable[[str, str, int, int, int, int], int]
    n_ctx: int = 0  # positions that a token sees
    name: str = "handles without numbers"

    def _held(self, tensors: Sequence[Tensor], nbytes: int) -> Held:
        names, types = tuple(t.name for t in tensors), tuple(t.type.name for t in tensors)
        n_rows, n_weights = sum(t.n_rows for t in tensors), sum(t.n_elements for t in tensors)
        return Held(names, types, tensors[0].ne[0], n_rows, n_weights, nbytes)

    def table(self, tensor: Tensor) -> Held:
        return self._held([tensor], tensor.type.row_bytes(tensor.ne[0]))

    def weight(self, tensors: Sequence[Tensor]) -> Held:
        return self._held(tensors, sum(self.matrix_bytes(t.type.name, t.ne[0], t.n_rows) for t in tensors))

    def vector(self, tensors: Sequence[Tensor]) -> Held:
        return self._held(tensors, 4 * sum(t.n_elements for t in tensors))

    experts = weight

    def cache(self, shape: AttentionShape, table: PageTable, kind: CacheType) -> Any:
        """Return a Held: a cache of which a token sees all n_ctx positions, or those of its window."""
        n_seen = min(shape.window or self.n_ctx, self.n_ctx)
        nbytes = self.cache_bytes(kind.k, kind.v, shape.n_head_kv, shape.head_dim, n_seen, shape.n_latent)
        return Held((), (kind.k, kind.v), shape.head_dim, n_seen, 0, nbytes)

    def state(self, n_floats: int, n_slots: int) -> Any:
        return Held((), ("F32",), n_floats, n_slots, 0, 4 * n_floats)

    def squares(self, width: int, n_expert: int = 1) -> Any:
        raise NotImplementedError(self.name)

    def program(self, *_: Any) -> NoReturn:
        raise NotImplementedError(self.name)

    def nbytes(self) -> dict[str, int]:
        return {}


# Additions and multiplications of an op for one token. An exponential or a root counts as one.
OPERATIONS: Mapping[type, Callable[[Any], int]] = {
    ops.Embed: lambda op: op.out.width,
    ops.RmsNorm: lambda op: 4 * op.x.width,
    rare_ops.LayerNorm: lambda op: 7 * op.x.width,
    ops.Matmul: lambda op: 2 * op.weight.n_weights,
    rare_ops.MatmulHeads: lambda op: 2 * op.weight.n_weights,
    ops.MatmulGated: lambda op: 2 * op.weight.n_weights,
    ops.Rope: lambda op: 3 * op.rotation.n_rot * -(-op.x.width // op.head_dim),
    rare_ops.Temper: lambda op: op.x.width,
    rare_ops.AddPositions: lambda op: op.x.width,
    ops.Attend: lambda op: 2 * op.shape.n_head * (op.shape.head_dim + op.shape.n_value) * op.cache.n_out,
    ops.Gated: lambda op: 5 * op.out.width,
    rare_ops.ShortConv: lambda op: (2 * op.n_taps + 5) * op.x.width,
    rare_ops.DeltaRule: lambda op: 8 * op.state.n_in,
    rare_ops.Xielu: lambda op: 6 * op.out.width,
    rare_ops.Moe: lambda op: 2 * op.experts.n_weights * op.mixture.n_used // op.logits.width,
    rare_ops.Scan: lambda op: 5 * op.x.width * op.b.width // op.n_group,
    rare_ops.GateRows: lambda op: op.x.width,
    rare_ops.ScaleAdapters: lambda op: 2 * op.x.width,
    rare_ops.Softcap: lambda op: 3 * op.x.width,
    rare_ops.Mix: lambda op: 3 * op.out.width * op.x.width // op.width,
    rare_ops.MatchRms: lambda op: 5 * op.x.width,
    rare_ops.Threshold: lambda op: 6 * op.x.width,
    ops.Outputs: lambda op: 0,
}


def op_costs(
    config: ModelConfig, tensors: Mapping[str, Tensor], kinds: Sequence[CacheType], n_ctx: int, sizes: Sizes
) -> list[OpCost]:
    """Return the costs of all ops of a token, in their order.

    kinds: the cache type of each layer.
    n_ctx: positions that the token sees, its own included.
    """
    step = step_class(config)(Loader(sizes, tensors, lambda n_bytes: None), config, None)
    step.new_part()
    step.embed()
    sizes, tables = replace(sizes, n_ctx=n_ctx), page_tables(config, n_ctx, 1, 1, None)
    for il, layer in enumerate(cache_layers(config, tensors, [sizes] * config.n_layer, kinds, n_ctx, tables)):
        step.layer(il, layer, experts=True)
    step.logits()
    return [_cost(op) for op in (*step.parts[0], *step.after)]


def _cost(op: Any) -> OpCost:
    held = [value for value in vars(op).values() if isinstance(value, Held)]
    nbytes = sum(handle.nbytes for handle in held)
    if isinstance(op, rare_ops.Moe):
        nbytes = nbytes * op.mixture.n_used // op.logits.width
    if isinstance(op, rare_ops.AddPositions):
        nbytes //= op.n_row
    names = tuple(name for handle in held for name in handle.names)
    types = tuple(dict.fromkeys(name for handle in held for name in handle.types))
    return OpCost(type(op).__name__, names, types, nbytes, OPERATIONS[type(op)](op))
