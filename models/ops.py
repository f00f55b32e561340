"""The ops of a decoder. A step is a list of them: data that interpreters read.

step.py builds the lists. kernels_cpu, kernels_gpu and the NumPy twin of the tests run them. op_costs.py counts their
bytes. Ops run in the order of the list.

All values of a step are f32, one row per token. A weight `w` has n_out rows of n_in columns. It maps x of width n_in to
out of width n_out: `out[t, o] = sum_i w[o, i] * x[t, i]`. `out` may be an input only where the op says so. Weights,
vectors, tables, experts, caches and squares are handles of a backend (operands.py).
"""

from typing import Any, Generic

from gguf_run.formats.frozen import frozen
from gguf_run.models.operands import (
    AttentionShape,
    Buffer,
    Cache,
    Experts,
    Mixture,
    Rotation,
    Squares,
    State,
    Table,
    Temperature,
    Vector,
    Weight,
)

# gelu is the tanh form, relu2 is max(x, 0)^2. Only Moe has swiglu_oai. Kernels are compiled for an activation as its
# place in this tuple. Xielu is an op of its own: it has parameters.
ACTIVATIONS = ("silu", "gelu", "swiglu_oai", "relu2", "sigmoid", "identity")


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
class LayerNorm(Generic[Vector]):
    """out = (x - mean(x)) / sqrt(variance(x) + eps) * weight (+ bias)"""

    x: Buffer
    weight: Vector  # f32[x.width]
    bias: Vector | None  # f32[x.width]
    out: Buffer  # may be x
    eps: float
    n_group: int = 1  # each row has n_group equal parts; each part is normed by itself, with its own weight and bias


@frozen
class Matmul(Generic[Weight, Vector]):
    """out = x @ weight.T (+ bias) (+ residual)"""

    x: Buffer
    weight: Weight
    out: Buffer  # may be residual, not x
    bias: Vector | None = None  # f32[n_out]
    residual: Buffer | None = None


@frozen
class MatmulHeads(Generic[Weight]):
    """out = [x[: n_in] @ weight[head].T, x[n_in :]] for each head of x: each has a matrix of its own."""

    x: Buffer  # n_head heads
    weight: Weight  # n_head matrices
    out: Buffer  # n_head heads, each wider by n_out - n_in than a head of x; not x
    n_head: int


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
class Temper:
    """x[t] *= the factor of the temperature at the token's position"""

    x: Buffer
    temperature: Temperature


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
class Xielu:
    """out = alpha_p x^2 + beta x where x > 0, else alpha_n (e^min(x, eps) - 1 - x) + beta x

    Huang, 2024, arXiv:2411.13010.
    """

    x: Buffer  # a whole buffer, or columns in multiples of 16
    out: Buffer  # as x; may be x
    alpha_p: float
    alpha_n: float
    beta: float
    eps: float  # negative, next to 0


@frozen
class ShortConv(Generic[State, Vector]):
    """out[t, c] = activation(bias[c] + sum over j of taps[c, j] * x[t - n_taps + 1 + j, c]) for each channel c

    The state has the rows of x before the batch, the last n_taps - 1 of them. They are 0 before the first token.
    """

    x: Buffer
    taps: Vector  # f32[x.width, n_taps]; the last one is for the token itself
    bias: Vector | None  # f32[x.width]
    state: State  # f32[n_taps - 1, x.width]
    out: Buffer  # may be x
    n_taps: int
    activation: str  # "silu" or "identity"


@frozen
class DeltaRule(Generic[State, Vector]):
    """The gated delta rule of each value head, token by token, with the head's state S f32[d_k, d_v]:

    S = exp(g) S, then S = S + beta k (v - S^T k)^T, then out = S^T q
    g = a * softplus(alpha + dt), beta = sigmoid(beta)
    Each head of q and k is first divided by sqrt(sum of its squares + eps). q is divided by sqrt(d_k) too.

    Yang et al., 2024, arXiv:2412.06464.
    """

    q: Buffer  # n_head_k heads of d_k columns
    k: Buffer  # as q
    v: Buffer  # n_head_v heads of d_v columns
    alpha: Buffer  # n_head_v columns
    beta: Buffer  # n_head_v columns
    a: Vector  # f32[n_head_v], at most 0
    dt: Vector  # f32[n_head_v]
    state: State  # f32[n_head_v, d_k, d_v], in an order of axes that the backend chooses
    out: Buffer  # as v; may be v
    n_head_k: int
    n_head_v: int  # a multiple of n_head_k
    is_tiled: bool  # value head i has key head i % n_head_k; False: i // (n_head_v / n_head_k)
    eps: float


@frozen
class Scan(Generic[State, Vector]):
    """The state space of Mamba 2 of each head, token by token, with the head's state S f32[columns of a head, n_state]:

    S = exp(delta * a) S + (delta x) b^T, then out = S c + d x, where delta = softplus(dt + dt_bias)

    Dao and Gu, 2024, arXiv:2405.21060.
    """

    x: Buffer  # n_head heads
    b: Buffer  # n_group parts of n_state columns; head i reads part i // (n_head / n_group)
    c: Buffer  # as b
    dt: Buffer  # n_head columns
    dt_bias: Vector  # f32[n_head]
    a: Vector  # f32[n_head], negative
    d: Vector  # f32[n_head]
    state: State  # f32[n_head, columns of a head, n_state], in an order of axes that the backend chooses
    out: Buffer  # as x; may be x
    n_head: int
    n_group: int


@frozen
class Moe(Generic[Experts, Vector, Squares]):
    """out += sum over the token's experts e of weight[e] * down[e] @ (activation(gate[e] @ x) * (up[e] @ x))

    Experts without a gate have activation(up[e] @ x) in its place. Biases are added to each product if the experts have
    them. The activation "swiglu_oai" is g * sigmoid(1.702 g) * (u + 1) with g = min(gate, 7) and u = up from -7 to 7.
    """

    x: Buffer
    logits: Buffer  # f32[rows, n_expert], overwritten
    experts: Experts
    mixture: Mixture
    out: Buffer  # a whole buffer
    squares: tuple[Squares, Squares] | None = None  # of the input of gate and up, of the input of down
    bias: Vector | None = None  # f32[n_expert], see Mixture
    accumulate: bool = True  # False: out = the sum


@frozen
class GateRows:
    """x[t] *= sigmoid(gate[t, 0])"""

    x: Buffer
    gate: Buffer  # one column


@frozen
class Softcap:
    """x = cap * tanh(scale * x / cap), or scale * x if cap is 0"""

    x: Buffer  # a whole buffer
    scale: float
    cap: float


@frozen
class Mix:
    """out_i = base_i + sum over j of (coef[t, n i + j] + shift) * (x_j - minus), for the parts i of out and 0 .. n of x

    A part is `width` columns (AltUp: Baykal et al., 2023, arXiv:2301.13310).
    """

    base: Buffer
    x: Buffer
    out: Buffer  # as wide as base; base or another memory than the others
    width: int
    coef: Buffer | None = None  # None: 0
    minus: Buffer | None = None  # one part; None: 0
    shift: float = 0.0


@frozen
class MatchRms:
    """Each part of x, as wide as `like`, is scaled: x *= sqrt(mean(like^2) / max(mean(x^2), least))"""

    x: Buffer
    like: Buffer
    least: float


@frozen
class Threshold:
    """x = max(0, x - mean(x) - factor * sqrt(variance(x)))"""

    x: Buffer
    factor: float


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


Op = (
    Embed[Table]
    | Matmul[Weight, Vector]
    | MatmulHeads[Weight]
    | MatmulGated[Weight, Vector]
    | RmsNorm[Vector]
    | LayerNorm[Vector]
    | Rope
    | Temper
    | Attend[Cache, Vector]
    | Gated
    | Xielu
    | Moe[Experts, Vector, Squares]
    | GateRows
    | Softcap
    | Mix
    | MatchRms
    | Threshold
    | Observe[Squares]
    | Outputs
    | ShortConv[State, Vector]
    | DeltaRule[State, Vector]
    | Scan[State, Vector]
)


def written(op: Any) -> Buffer | None:
    """Return the buffer whose contents an op replaces: its `out`, or x if it works in place."""
    if isinstance(op, Observe):
        return None
    buffer: Buffer = op.x if isinstance(op, Rope | Temper | GateRows | Softcap | MatchRms | Threshold) else op.out
    return buffer
