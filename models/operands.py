"""The operands of ops: buffers, numbers of the model, and handles of a backend.

Each backend has its own classes of handles. Ops and backends are generic in these classes, so that mypy finds code that
gives a handle of one backend to another backend.
"""

from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.frozen import frozen


@frozen
class Buffer:
    """f32[rows, width]: some columns of a memory. Buffers compare by value.

    A memory is only a name here. The backend allocates one memory for each name in the lists of a program.
    """

    name: str  # of the memory
    row_width: int  # columns of the memory
    start: int  # first column of this buffer
    width: int  # columns of this buffer
    outputs: bool = False  # rows are the tokens whose results are wanted; False: all tokens of the step

    @classmethod
    def whole(cls, name: str, width: int, *, outputs: bool = False) -> "Buffer":
        """Return all columns of a memory."""
        return cls(name, width, 0, width, outputs)

    def columns(self, start: int, width: int) -> "Buffer":
        """Return columns start .. start + width of this buffer, with the same rows."""
        if not 0 <= start < start + width <= self.width:
            raise ValueError(f"columns {start} .. {start + width} of {self.name}, which has {self.width}")
        return replace(self, start=self.start + start, width=width)


@frozen(eq=False)
class Rotation:
    """Rotary embedding: pair i of the first n_rot dimensions of a head turns by `position * inv_freq[i]`.

    Objects compare by identity. A backend keeps one table of cosines for each object, so layers with equal numbers
    share an object.
    """

    style: str  # pairs are "norm": (2i, 2i + 1), or "neox": (i, i + n_rot / 2)
    n_rot: int  # dimensions that turn; the others stay as they are
    inv_freq: NDArray[np.float64]  # [n_rot / 2], scaling and factors of the model applied
    scale: float = 1.0  # factor on the rotated values: YaRN's attention factor
    long_inv_freq: NDArray[np.float64] | None = None  # LongRoPE: inv_freq of sequences of more than n_short tokens
    n_short: int = 0

    @property
    def inv_freqs(self) -> NDArray[np.float64]:
        """f64[2, n_rot / 2]: of short sequences, and of long ones."""
        return np.stack([self.inv_freq, self.inv_freq if self.long_inv_freq is None else self.long_inv_freq])

    def of(self, is_long: bool) -> "Rotation":
        """Return the rotation of a sequence."""
        return replace(self, inv_freq=self.inv_freqs[int(is_long)], long_inv_freq=None)


@frozen
class Temperature:
    """Factor on the queries at position p, for long contexts: 1 + scale * ln(1 + floor((p + offset) / length))."""

    scale: float
    length: int  # positions
    offset: int = 0


@frozen
class AttentionShape:
    """The numbers of one layer's attention."""

    n_head: int  # heads of queries
    n_head_kv: int  # heads of keys and values, each for n_head / n_head_kv heads of queries
    head_dim: int
    scale: float  # factor on q.k
    window: int = 0  # positions that a token sees, its own included; 0: all
    softcap: float = 0.0  # scores become softcap * tanh(score / softcap); 0: they stay
    is_chunked: bool = False  # windows begin at multiples of `window`: a token sees its own one up to itself
    n_latent: int = 0  # the value of a position is the first n_latent columns of its key; 0: values have their own rows

    @property
    def n_value(self) -> int:
        """Columns of a value, and of a head of the result."""
        return self.n_latent or self.head_dim


# How the scores of experts follow from their logits. "sparsemixer" (Phi-3.5-MoE): an expert's score is its softmax over
# the experts that are not chosen yet and have almost its logit l: l - logit <= NEAR max(|logit|, l). It needs no bias.
# Kernels know a gating as its place in this tuple.
GATINGS = ("softmax", "sigmoid", "sparsemixer")
NEAR = 0.02
MIN_SUM = 1e-20  # the least sum that weights are divided by


@frozen
class Mixture:
    """How a token's experts are chosen and weighted: by scores, which are the gating of the router's logits.

    The experts with the greatest score + bias are chosen (bias: of ops.Moe). An expert's weight is its score.
    """

    n_used: int  # experts per token
    norm: bool  # whether the weights are divided by their sum
    scale: float  # factor on the weights
    activation: str  # of the gate, one of ops.ACTIVATIONS
    gating: str = "softmax"  # one of GATINGS
    n_group: int = 1  # groups of n_expert / n_group neighbours; 1: none
    n_group_used: int = 1  # experts are chosen from so many groups: those whose best experts have the greatest sum
    n_group_best: int = 2  # best experts of a group, by score + bias: 1 or 2
    weighs_input: bool = False  # the weight is a factor on what gate and up make of x, not on the expert's result


class WeightHandle(Protocol):
    """A matrix of n_out rows of n_in, or n_head of them, in the form that the backend multiplies with."""

    @property
    def n_in(self) -> int: ...
    @property
    def n_out(self) -> int: ...


class CacheHandle(Protocol):
    """K and V of one layer for some sequences. Groups are those of models.kv_cache.GROUP positions."""

    @property
    def n_ctx(self) -> int:
        """Positions that the layer holds of a sequence: its last ones. Position p is in row p % n_ctx."""

    @property
    def kinds(self) -> str:
        """What is held: "kv", or "k" if values are columns of the keys."""

    def copy(self, source: int, target: int, n_rows: int, /) -> None:
        """Copy the first n_rows rows of sequence `source` to sequence `target`."""

    def shift(self, seq: int, n_past: int, n_keep: int, n_discard: int, rotation: Rotation | None, /) -> None:
        """Move positions n_keep + n_discard .. n_past down by n_discard, and turn their keys back as far."""

    def read(self, seq: int, kind: str, first: int, end: int, /) -> NDArray[np.uint8]:
        """Return the bytes of K or V ("k", "v") of groups first .. end. All of them must be held."""

    def write(self, seq: int, kind: str, end: int, data: Any, /) -> int | None:
        """Store bytes that `read` returned for groups up to `end`. A smaller cache stores only the last groups.

        Returns the first group that is stored, or None if the bytes are not a whole number of groups.
        """


class StateHandle(Protocol):
    """The state of one recurrent op of a layer: n_slots slots of f32 numbers. A step reads one slot, writes another."""

    @property
    def n_slots(self) -> int: ...

    def copy(self, source: int, target: int, /) -> None:
        """Copy slot `source` to slot `target`."""

    def read(self, slot: int, /) -> NDArray[np.uint8]:
        """Return the bytes of a slot."""

    def write(self, slot: int, data: Any, /) -> bool:
        """Store bytes that `read` returned. Return whether they are as many as a slot has."""


class SquaresHandle(Protocol):
    """Sums of squares that the ops Observe and Moe collect from the inputs of a matrix."""

    def take(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the sums over all rows since the last call, and start again from 0.

        Returns:
            f64[n, width]: the sum of the squares of each column.
            i64[n]: the number of rows.
            n is the number of experts, which see different rows; 1 for a matrix that is not an expert.
        """


Table = TypeVar("Table")  # a matrix whose rows are looked up: the embeddings
Weight = TypeVar("Weight", bound=WeightHandle)  # a matrix that is multiplied
Vector = TypeVar("Vector")  # f32 numbers: the weight of a norm, a bias
Cache = TypeVar("Cache", bound=CacheHandle)
Experts = TypeVar("Experts")  # the three matrices of all experts of a layer, and their biases
Squares = TypeVar("Squares", bound=SquaresHandle)
State = TypeVar("State", bound=StateHandle)
