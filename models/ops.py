"""The ops of a decoder. A step is a list of them: data that interpreters read.

step.py builds the lists. kernels_cpu, kernels_gpu and the NumPy twin of the tests run them. op_costs.py counts their
bytes. Ops run in the order of the list. rare_ops.py has more ops, which only some architectures use.

All values of a step are f32, one row per token. A weight `w` has n_out rows of n_in columns. It maps x of width n_in to
out of width n_out: `out[t, o] = sum_i w[o, i] * x[t, i]`. `out` may be an input only where the op says so. Weights,
vectors, tables, experts, caches, states and squares are handles of a backend (handles.py), which has classes of its own
for them. Ops and backends are generic in these classes, so that mypy finds code that gives a handle of one backend to
another backend.
"""

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gguf_run.formats.frozen import frozen
from gguf_run.models.operands import AttentionShape, Buffer, Rotation

if TYPE_CHECKING:
    from gguf_run.models.handles import CacheHandle, SquaresHandle, StateHandle, WeightHandle

Table = TypeVar("Table")  # a matrix whose rows are looked up: the embeddings
Weight = TypeVar("Weight", bound="WeightHandle")  # a matrix that is multiplied
Vector = TypeVar("Vector")  # f32 numbers: the weight of a norm, a bias
Cache = TypeVar("Cache", bound="CacheHandle")
Experts = TypeVar("Experts")  # the three matrices of all experts of a layer, and their biases
Squares = TypeVar("Squares", bound="SquaresHandle")
State = TypeVar("State", bound="StateHandle")

# gelu is the tanh form, gelu_erf the one with erf, relu2 is max(x, 0)^2. Only Moe has swiglu_oai. Kernels are compiled
# for an activation as its place in this tuple. Xielu is an op of its own: it has parameters.
ACTIVATIONS = ("silu", "gelu", "swiglu_oai", "relu2", "sigmoid", "identity", "gelu_erf")


@frozen
class Embed(Generic[Table]):
    """out[t] = scale * table[ids[t]]"""

    table: Table
    out: Buffer
    scale: float = 1.0


@frozen
class RmsNorm(Generic[Vector]):
    """out = x / sqrt(mean(x^2) + eps) * weight (+ residual)"""

    x: Buffer
    weight: Vector  # f32[x.width / n_group], or f32[x.width] if is_grouped
    out: Buffer  # may be x or residual
    eps: float
    n_group: int = 1  # each row has n_group equal parts; each part is normed by itself
    residual: Buffer | None = None
    is_grouped: bool = False  # whether each part has its own part of the weight; False: all have the same weight


@frozen
class Matmul(Generic[Weight, Vector]):
    """out = x @ weight.T (+ bias) (+ residual)"""

    x: Buffer
    weight: Weight
    out: Buffer  # may be residual, not x
    bias: Vector | None = None  # f32[n_out]
    residual: Buffer | None = None


@frozen
class MatmulGated(Generic[Weight, Vector]):
    """out = activation(gate) * up, where gate and up are the left and the right half of x @ weight.T (+ bias)"""

    x: Buffer
    weight: Weight
    out: Buffer  # half as wide as weight.n_out; not x
    activation: str  # one of ACTIVATIONS
    bias: Vector | None = None  # f32[n_out]


@frozen
class Rope:
    """Rotate the first columns of each part of x of head_dim columns, in place, by its token's position."""

    x: Buffer  # the last part may be shorter
    rotation: Rotation
    head_dim: int


@frozen
class Attend(Generic[Cache, Vector]):
    """Append k and v to the cache. Then out = softmax(scale * q.k, causal, window) @ v for each head.

    Without k and v, the cache stays as it is: it is that of an earlier layer.
    """

    q: Buffer
    k: Buffer | None
    v: Buffer | None  # the columns of k that are values if shape.n_latent is not 0
    cache: Cache
    shape: AttentionShape
    out: Buffer  # shape.n_value columns for each head; none of q, k, v
    sinks: Vector | None = None  # f32[n_head]: one more score in each head's softmax, which has no v


@frozen
class Gated:
    """out = activation(gate) * up, or activation(gate) if there is no up"""

    gate: Buffer
    up: Buffer | None
    out: Buffer  # may be gate or up
    activation: str  # one of ACTIVATIONS


@frozen
class Observe(Generic[Squares]):
    """Add the square of each column of x to the column's sum in float64."""

    x: Buffer
    squares: Squares


@frozen
class Outputs:
    """out = the rows of x that Program.run is asked for. This is the first op of a program's `after`."""

    x: Buffer
    out: Buffer


def written(op: Any) -> Buffer | None:
    """Return the buffer whose contents an op replaces: its `out`, or x if it works in place."""
    return None if isinstance(op, Observe) else vars(op).get("out") or op.x
