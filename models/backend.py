"""The ops that a decoder needs, and the contract that both backends keep.

A decoder is recorded once: it calls the ops below, which compute nothing but append to a program. `Program.run` then
replays the whole step with one native launch, for one token or for a batch of them; token ids and positions are read
from buffers that belong to the program. kernels_cpu and kernels_gpu provide these ops; neither is imported here.

Every buffer holds one f32 row per token. Everything is laid out by row: a matrix `w` of `n_out` rows of `n_in` maps a
buffer of width n_in to one of width n_out, `out[t, o] = sum_i w[o, i] * x[t, i]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.gguf.reader import Tensor


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary embedding: pair i of the first `n_rot` dimensions turns by `position * inv_freq[i]`.

    style: "norm" pairs (2i, 2i+1), "neox" pairs (i, i + n_rot/2). inv_freq: f64[n_rot/2], with every scaling and
    frequency factor already applied. scale: factor on the rotated values (YaRN's attention factor). Dimensions from
    n_rot on stay as they are. Layers that turn alike share one object, and objects compare by identity: a backend may
    keep one table of cosines per object.
    """

    style: str
    n_rot: int
    inv_freq: NDArray[np.float64]
    scale: float = 1.0


@dataclass(frozen=True)
class Attention:
    """Shape of one layer's attention. scale multiplies q.k; window: positions seen, itself included (0: all). softcap,
    if not 0: scores become softcap * tanh(score / softcap)."""

    n_head: int
    n_head_kv: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True)
class CacheType:
    """How a layer's K and V are stored: names of the backend's table of cache types.

    rotate: each head of Q, K and V goes through an orthogonal Hadamard transform before K and V are stored, and the
    result goes back; True: where head_dim is a multiple of 32, False: never, None: where it is, the type has 8 bits or
    less and no static scales. k_scales, v_scales: for fp8, one scale for each KV head (value = scale * stored number);
    None: a scale for each row, found when the row is stored.
    """

    k: str = "f16"
    v: str = "f16"
    rotate: bool | None = None
    k_scales: tuple[float, ...] | None = None
    v_scales: tuple[float, ...] | None = None


class Run(NamedTuple):
    """Tokens of a batch that stand next to each other in it and in sequence `seq`, from position n_past on."""

    seq: int
    n_past: int
    n_tokens: int


@dataclass(frozen=True)
class Moe:
    """How a mixture of experts is mixed: the n_used experts of a token's greatest logits, weighted by the softmax over
    all logits or (norm) over theirs, times scale. activation: of the gate, see Recorder.gated."""

    n_used: int
    norm: bool
    scale: float
    activation: str


class Weight(Protocol):
    """A matrix in a backend's own form."""

    @property
    def n_in(self) -> int: ...
    @property
    def n_out(self) -> int: ...


class Cache(Protocol):
    """K and V of one layer for some sequences. Groups are those of models.kv_cache.GROUP positions."""

    @property
    def n_ctx(self) -> int:
        """How many of a sequence's last positions are held: n_ctx, or less where the layer has a window. Position p
        stands in row p % n_ctx."""
        ...

    def copy(self, source: int, target: int, n_rows: int, /) -> None:
        """The first n_rows rows of one sequence become another one's."""
        ...

    def shift(self, seq: int, n_past: int, n_keep: int, n_discard: int, rope: Rope | None, /) -> None:
        """Move what is held of positions n_keep + n_discard .. n_past to n_keep ..; keys turn back by n_discard."""
        ...

    def read(self, seq: int, kind: str, first: int, end: int, /) -> NDArray[np.uint8]:
        """The bytes of K or V ("k", "v") of groups first .. end, which must be held."""
        ...

    def write(self, seq: int, kind: str, end: int, data: Any, /) -> int | None:
        """What `read` returned, or as much of its end as can be held; returns `first`. None: no such number of
        bytes."""
        ...


class Buffer(Protocol):
    """f32[n_tokens, width] in a backend's memory, or a range of columns of one."""

    @property
    def width(self) -> int: ...

    def columns(self, start: int, width: int) -> "Buffer":
        """The same rows, columns start .. start + width."""
        ...


class Squares(Protocol):
    """What Recorder.observe collects."""

    def take(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """f64[n, width], the sums over all rows since the last call, and i64[n], how many there were; n is 1, or the
        number of experts, each with its own rows."""
        ...


class Recorder(Protocol):
    """Appends ops to a program; they run in the order of the calls. `out` may be an input where the op says so.

    Tables, weights, vectors, caches and buffers are handles of the backend that made them: only it knows their types,
    so the ops take Any.
    """

    def buffer(self, width: int) -> Buffer:
        """A new buffer: for up to n_batch tokens, or, after `outputs`, for up to n_outputs result rows."""
        ...

    def embed(self, table: Any, out: Any, scale: float = 1.0, /) -> None:
        """out[t] = scale * table[ids[t]]."""
        ...

    def rms_norm(
        self, x: Any, weight: Any, out: Any, eps: float, /, *, n_group: int = 1, residual: Any | None = None
    ) -> None:
        """out = x / sqrt(mean(x^2) + eps) * weight (+ residual). n_group > 1: each of n_group equal parts of a row is
        normed by itself with the same weight (QK-norm). out may be x or residual."""
        ...

    def layer_norm(self, x: Any, weight: Any, bias: Any | None, out: Any, eps: float, /, *, n_group: int = 1) -> None:
        """out = (x - mean) / sqrt(variance + eps) * weight (+ bias). n_group > 1: each of n_group equal parts of a row
        is normed by itself, with its own part of weight and bias. out may be x."""
        ...

    def matmul(self, x: Any, weight: Any, out: Any, /, *, bias: Any | None = None, residual: Any | None = None) -> None:
        """out = x @ weight.T (+ bias) (+ residual). out may be residual, not x."""
        ...

    def matmul_gated(self, x: Any, weight: Any, out: Any, activation: str, /, *, bias: Any | None = None) -> None:
        """out = activation(gate) * up, where gate and up are the left and right half of x @ weight.T (+ bias)."""
        ...

    def rope(self, x: Any, rope: Rope, head_dim: int, /) -> None:
        """Rotate, in place, each head_dim-wide part of x by its token's position."""
        ...

    def attention(
        self, q: Any, k: Any, v: Any, cache: Any, shape: Attention, out: Any, /, *, sinks: Any | None = None
    ) -> None:
        """Append k and v at the tokens' positions, then out = softmax(scale * q.k, causal, window) @ v per head. sinks:
        a vector of n_head logits that count in each row's softmax but have no value."""
        ...

    def gated(self, gate: Any, up: Any | None, out: Any, activation: str, /) -> None:
        """out = activation(gate) * up, or activation(gate); activation: "silu" or "gelu" (the tanh form). out may be
        gate or up."""
        ...

    def moe(
        self, x: Any, logits: Any, experts: Any, shape: Moe, out: Any, /, *, observe: bool = False
    ) -> tuple[Squares, Squares] | None:
        """out += sum over the chosen experts e of weight * down[e] @ (activation(gate[e] @ x) * (up[e] @ x)), biases
        added where the experts have them. logits: [n_tokens, n_expert], overwritten. activation: "swiglu_oai" as well,
        g * sigmoid(1.702 g) * (u + 1) with g = min(gate, 7) and u = up from -7 to 7. out: a whole buffer. observe:
        return the squares of what gate and up read, and down (before it is weighted)."""
        ...

    def gate_rows(self, x: Any, gate: Any, /) -> None:
        """x[t] *= sigmoid(gate[t, 0])."""
        ...

    def softcap(self, x: Any, scale: float, cap: float, /) -> None:
        """x = cap * tanh(scale * x / cap), or scale * x if cap is 0. x: a whole buffer."""
        ...

    def observe(self, x: Any, /) -> Squares:
        """Add the squares of x, column by column, to sums in float64."""
        ...

    def cut(self) -> None:
        """Another part of the program begins, which runs by itself: before it does, Backend.copy_from may write
        buffers."""
        ...

    def outputs(self, x: Any, /) -> Buffer:
        """A copy of the rows of x whose logits are wanted (chosen at run time). Called once: the ops and buffers that
        follow are for those rows only, and leave everything from before as it is, so that they can run again."""
        ...

    def finish(self, result: Any, /) -> "Program":
        """End recording; `result` is what Program.run returns rows of. A program without `outputs` has no result rows:
        what it leaves in its buffers is read with Backend.to_host."""
        ...


class Program(Protocol):
    """A recorded step. n_batch: the most tokens of one run; n_outputs: the most result rows of one pass."""

    @property
    def n_batch(self) -> int: ...
    @property
    def n_outputs(self) -> int: ...

    def run(
        self, ids: NDArray[np.int32], runs: Sequence[Run], rows: Sequence[int], part: int = 0
    ) -> NDArray[np.float32]:
        """Run tokens `ids`, which `runs` deal out to sequences from the first to the last; no sequence has two runs.

        rows: the tokens, by their number in ids, whose results are wanted, at most n_outputs; with none, nothing that
        stands after Recorder.outputs runs. Returns f32[len(rows), width], the program's own memory, overwritten by the
        next run. If the recorder was cut, one part runs, after those before it, with the same ids
        and runs; the last one has the results.
        """
        ...

    @property
    def n_top(self) -> int:
        """How many of the greatest results run_top finds, where that saves the way of all to the host; else 0."""
        ...

    def run_top(
        self, ids: NDArray[np.int32], runs: Sequence[Run], row: int, k: int, part: int = 0
    ) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """As run, but return the columns and values of the k <= n_top greatest results of one token, in order; of equal
        ones the first comes first, and a NaN before all else."""
        ...

    def more(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """Other result rows of the tokens of the last run: only what stands after Recorder.outputs runs again."""
        ...

    def close(self) -> None:
        """Free memory and stop threads. The program cannot run again."""
        ...


class Backend(Protocol):
    """Owns weights and caches on one device and records programs for it."""

    @property
    def name(self) -> str:
        """For people: device, threads ..."""
        ...

    def table(self, tensor: Tensor) -> Any:
        """A matrix from which `embed` reads rows."""
        ...

    def weight(self, tensors: Sequence[Tensor]) -> Weight:
        """A matrix for `matmul`: the tensors' rows one after the other, times their `scales`. Repacked here, in the
        device's panels."""
        ...

    def experts(self, tensors: Sequence[Tensor]) -> Any:
        """A layer's experts for `moe`: the matrices of gate, up and down, [n_expert, n_out, n_in] each, and their
        biases, [n_expert, n_out], if there are any. UnsupportedError if gate and up have different types."""
        ...

    def vector(self, tensors: Sequence[Tensor]) -> Any:
        """f32 values for `rms_norm` or a bias: the tensors' values one after the other."""
        ...

    def cache(self, shape: Attention, n_ctx: int, n_batch: int, n_seq: int = 1, kind: CacheType | None = None) -> Cache:
        """A KV cache for one layer: n_seq sequences of n_ctx positions, of which n_batch are appended at once at most.

        kind: what K and V are stored as; None: the backend's default. Their layout is the backend's own business. With
        a window it may hold no more than the last window + n_batch positions of a sequence.
        """
        ...

    def recorder(self, n_batch: int, n_outputs: int) -> Recorder:
        """Start a program for up to n_batch tokens and n_outputs result rows at a time."""
        ...

    def to_host(self, buffer: Any, n_tokens: int, /) -> NDArray[np.float32]:
        """The first rows of a buffer, valid until the next run: how the hidden state leaves a device."""
        ...

    def copy_from(self, other: "Backend", source: Any, n_tokens: int, target: Any, /) -> None:
        """The first rows of another backend's buffer become those of `target`, before its program runs."""
        ...

    def nbytes(self) -> dict[str, int]:
        """Bytes held, by purpose: "weights", "cache", "buffers"."""
        ...
