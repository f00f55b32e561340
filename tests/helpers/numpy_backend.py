"""The Backend protocol in plain NumPy: the twin that compiled backends are compared with.

Recorded ops are closures, run in order. Weights are dequantized to `dtype` (float32, or float64 as an oracle), which is
also the type of all arithmetic and, unless told otherwise, of the KV cache.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.backend import Attention, CacheType, Moe, Rope, Run
from gguf_run.models.kv_cache import GROUP


@dataclass
class Step:
    """What changes from run to run: the batch, and the rows whose results are wanted."""

    ids: np.ndarray
    sequences: Sequence[Run]
    wanted: Sequence[int] = ()

    @property
    def positions(self) -> np.ndarray:
        return np.concatenate([run.n_past + np.arange(run.n_tokens) for run in self.sequences])


Op = Callable[[Step], None]


@dataclass(frozen=True)
class NumpyWeight:
    data: np.ndarray  # [n_out, n_in]

    @property
    def n_in(self) -> int:
        return self.data.shape[1]

    @property
    def n_out(self) -> int:
        return self.data.shape[0]


@dataclass(frozen=True)
class NumpyBuffer:
    data: np.ndarray
    is_output: bool

    @property
    def width(self) -> int:
        return self.data.shape[1]

    def columns(self, start: int, width: int) -> "NumpyBuffer":
        assert 0 <= start < start + width <= self.width
        return NumpyBuffer(self.data[:, start : start + width], self.is_output)

    def rows(self, step: Step) -> np.ndarray:
        return self.data[: len(step.wanted) if self.is_output else len(step.ids)]


@dataclass(frozen=True)
class NumpyCache:
    """Every position, window or not."""

    k: np.ndarray  # [n_seq, n_ctx, n_head_kv, head_dim]
    v: np.ndarray

    @property
    def n_ctx(self) -> int:
        return self.k.shape[1]

    def copy(self, source: int, target: int, n_rows: int) -> None:
        for side in (self.k, self.v):
            side[target, :n_rows] = side[source, :n_rows]

    def shift(self, seq: int, n_past: int, n_keep: int, n_discard: int, rope: Rope | None) -> None:
        for side in (self.k, self.v):
            moved = side[seq, n_keep + n_discard : n_past].copy()
            if side is self.k and rope is not None:
                moved = rotate(moved, replace(rope, scale=1.0), np.full(len(moved), -n_discard))
            side[seq, n_keep : n_past - n_discard] = moved

    def read(self, seq: int, kind: str, first: int, end: int) -> np.ndarray:
        rows = np.zeros((end * GROUP, *self.k.shape[2:]), self.k.dtype)
        held = getattr(self, kind)[seq, : end * GROUP]
        rows[: len(held)] = held
        return rows[first * GROUP :].reshape(-1).view(np.uint8)

    def write(self, seq: int, kind: str, end: int, data: Any) -> int | None:
        side = getattr(self, kind)[seq]
        rows = np.frombuffer(data, side.dtype).reshape(-1, *side.shape[1:])
        first = end * GROUP - len(rows)
        side[first : end * GROUP] = rows[: len(side) - first]
        return first // GROUP


def rotate(x: np.ndarray, rope: Rope, positions: np.ndarray) -> np.ndarray:
    """x: [n_tokens, n_head, head_dim]."""
    angle = positions[:, None, None] * rope.inv_freq
    cos, sin = (np.cos(angle) * rope.scale).astype(x.dtype), (np.sin(angle) * rope.scale).astype(x.dtype)
    half = rope.n_rot // 2
    one, two = {
        "norm": (slice(0, rope.n_rot, 2), slice(1, rope.n_rot, 2)),
        "neox": (slice(0, half), slice(half, rope.n_rot)),
    }[rope.style]
    out = x.copy()
    out[..., one] = x[..., one] * cos - x[..., two] * sin
    out[..., two] = x[..., one] * sin + x[..., two] * cos
    return out


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    positions: np.ndarray,
    scale: float,
    window: int,
    softcap: float = 0.0,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """q: [n_tokens, n_head, head_dim] at `positions`; k, v: [n_past + n_tokens, n_head_kv, head_dim], from 0 on."""
    n_head_kv, n_gqa = k.shape[1], q.shape[1] // k.shape[1]
    distance = positions[:, None] - np.arange(len(k))
    hidden = (distance < 0) | ((distance >= window) if window else False)
    out = np.empty_like(q)
    for h in range(n_head_kv):
        for head in range(h * n_gqa, (h + 1) * n_gqa):
            scores = (q[:, head] @ k[:, h].T) * q.dtype.type(scale)
            if softcap:
                scores = q.dtype.type(softcap) * np.tanh(scores / q.dtype.type(softcap))
            scores = np.where(hidden, -np.inf, scores)
            if sinks is not None:  # one more position, without a value
                scores = np.pad(scores, ((0, 0), (0, 1)), constant_values=sinks[head])
            out[:, head] = softmax(scores)[:, : len(k)] @ v[:, h]
    return out


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-np.clip(x, -80, None)))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi).astype(x.dtype) * (x + 0.044715 * x * x * x)))


def swiglu_oai(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)


ACTIVATIONS = {"silu": silu, "gelu": gelu}
GATED = {name: lambda gate, up, f=f: f(gate) * up for name, f in ACTIVATIONS.items()} | {"swiglu_oai": swiglu_oai}


class NumpySquares:
    def __init__(self, width: int, n_expert: int = 1) -> None:
        self.sums, self.counts = np.zeros((n_expert, width)), np.zeros(n_expert, np.int64)

    def add(self, rows: np.ndarray, e: int = 0) -> None:
        self.sums[e] += (rows.astype(np.float64) ** 2).sum(axis=0)
        self.counts[e] += len(rows)

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        taken = self.sums, self.counts
        self.sums, self.counts = np.zeros_like(self.sums), np.zeros_like(self.counts)
        return taken


class NumpyRecorder:
    def __init__(self, dtype: Any, n_batch: int, n_outputs: int) -> None:
        self.dtype, self.n_batch, self.n_outputs = dtype, n_batch, n_outputs
        self.ops: list[Op] = []
        self.split: int | None = None  # ops from here on are for the wanted rows
        self.op_names: list[str] = []
        self.cuts: list[int] = []

    def cut(self) -> None:
        self.cuts.append(len(self.ops))

    def _add(self, name: str, op: Op) -> None:
        self.op_names.append(name)
        self.ops.append(op)

    def buffer(self, width: int) -> NumpyBuffer:
        n = self.n_batch if self.split is None else self.n_outputs
        # NaN: an op that reads what no op has written shows.
        return NumpyBuffer(np.full((n, width), np.nan, self.dtype), self.split is not None)

    def embed(self, table: Tensor, out: NumpyBuffer, scale: float = 1.0) -> None:
        def op(step: Step) -> None:
            rows = dequantize(table.blocks()[step.ids], table.type)
            out.rows(step)[:] = rows.astype(self.dtype) * self.dtype(scale)

        self._add("embed", op)

    def rms_norm(
        self, x: Any, weight: Any, out: Any, eps: float, *, n_group: int = 1, residual: Any | None = None
    ) -> None:
        assert x.width == out.width == len(weight) * n_group

        def op(step: Step) -> None:
            part = x.rows(step).reshape(-1, n_group, len(weight))
            mean = (part * part).mean(axis=-1, keepdims=True, dtype=self.dtype)
            result = (part / np.sqrt(mean + self.dtype(eps)) * weight).reshape(-1, x.width)
            out.rows(step)[:] = result if residual is None else result + residual.rows(step)

        self._add("rms_norm", op)

    def layer_norm(self, x: Any, weight: Any, bias: Any, out: Any, eps: float, *, n_group: int = 1) -> None:
        assert x.width == out.width == len(weight)

        def op(step: Step) -> None:
            part = x.rows(step).reshape(-1, n_group, x.width // n_group)
            part = part - part.mean(axis=-1, keepdims=True)
            part = part / np.sqrt((part * part).mean(axis=-1, keepdims=True) + self.dtype(eps))
            out.rows(step)[:] = part.reshape(-1, x.width) * weight + (0 if bias is None else bias)

        self._add("layer_norm", op)

    def matmul(self, x: Any, weight: Any, out: Any, *, bias: Any = None, residual: Any = None) -> None:
        assert (x.width, out.width) == (weight.n_in, weight.n_out)
        assert bias is None or len(bias) == weight.n_out

        def op(step: Step) -> None:
            result = x.rows(step) @ weight.data.T
            if bias is not None:
                result = result + bias
            out.rows(step)[:] = result if residual is None else result + residual.rows(step)

        self._add("matmul", op)

    def rope(self, x: Any, rope: Rope, head_dim: int) -> None:
        def op(step: Step) -> None:
            rows = x.rows(step)
            rows[:] = rotate(rows.reshape(len(rows), -1, head_dim), rope, step.positions).reshape(rows.shape)

        self._add("rope", op)

    def attention(
        self, q: Any, k: Any, v: Any, cache: Any, shape: Attention, out: Any, *, sinks: np.ndarray | None = None
    ) -> None:
        def op(step: Step) -> None:
            at, more = 0, (shape.softcap, sinks)
            for seq, n_past, n in step.sequences:
                rows, stop = slice(at, at + n), n_past + n
                for kept, new in zip((cache.k, cache.v), (k, v), strict=True):
                    kept[seq, n_past:stop] = new.rows(step)[rows].reshape(n, shape.n_head_kv, shape.head_dim)
                keys, values = (kept[seq, :stop].astype(self.dtype) for kept in (cache.k, cache.v))
                queries = q.rows(step)[rows].reshape(n, shape.n_head, shape.head_dim)
                result = attend(queries, keys, values, n_past + np.arange(n), shape.scale, shape.window, *more)
                out.rows(step)[rows] = result.reshape(n, -1)
                at += n

        self._add("attention", op)

    def matmul_gated(self, x: Any, weight: Any, out: Any, activation: str, *, bias: Any = None) -> None:
        wide, n = self.buffer(weight.n_out), weight.n_out // 2
        self.matmul(x, weight, wide, bias=bias)
        self.gated(wide.columns(0, n), wide.columns(n, n), out, activation)

    def gated(self, gate: Any, up: Any, out: Any, activation: str) -> None:
        function = ACTIVATIONS[activation]

        def op(step: Step) -> None:
            out.rows(step)[:] = function(gate.rows(step)) * (up.rows(step) if up else 1)

        self._add("gated", op)

    def moe(
        self, x: Any, logits: Any, experts: Any, shape: Moe, out: Any, *, observe: bool = False
    ) -> tuple[NumpySquares, NumpySquares] | None:
        """One token and one expert at a time."""
        gate, up, down, *biases = experts
        biases = [values for values, _ in biases] or [np.zeros(values.shape[:2], self.dtype) for values, _ in experts]

        squares = tuple(NumpySquares(values.shape[2], len(values)) for values, _ in (gate, down))

        def product(matrix: Any, e: int, row: np.ndarray) -> np.ndarray:
            values, type_name = matrix
            return values[e] @ self.as_read(row, type_name)

        def op(step: Step) -> None:
            for scores, row, to in zip(logits.rows(step), x.rows(step), out.rows(step), strict=True):
                chosen = np.argsort(-scores, kind="stable")[: shape.n_used]
                weights = (softmax(scores[chosen]) if shape.norm else softmax(scores)[chosen]) * shape.scale
                for e, weight in zip(chosen, weights, strict=True):
                    both = product(gate, e, row) + biases[0][e], product(up, e, row) + biases[1][e]
                    made = GATED[shape.activation](*both)
                    to += product(down, e, made * weight) + weight * biases[2][e]
                    for seen, read in zip(squares, (row, made), strict=True):
                        seen.add(read[None], e)

        self._add("moe", op)
        return squares if observe else None

    def as_read(self, x: np.ndarray, type_name: str) -> np.ndarray:
        """What is left of x when it is multiplied with an expert's weights of a type."""
        return x

    def gate_rows(self, x: Any, gate: Any) -> None:
        def op(step: Step) -> None:
            x.rows(step)[:] /= 1 + np.exp(-gate.rows(step))

        self._add("gate_rows", op)

    def softcap(self, x: Any, scale: float, cap: float) -> None:
        def op(step: Step) -> None:
            scaled = x.rows(step) * scale
            x.rows(step)[:] = cap * np.tanh(scaled / cap) if cap else scaled

        self._add("softcap", op)

    def observe(self, x: Any) -> NumpySquares:
        squares = NumpySquares(x.width)

        def op(step: Step) -> None:
            squares.add(x.rows(step))

        self._add("observe", op)
        return squares

    def outputs(self, x: Any) -> NumpyBuffer:
        assert self.split is None, "outputs is called once"
        self.split = len(self.ops)
        out = self.buffer(x.width)

        def op(step: Step) -> None:
            out.rows(step)[:] = x.rows(step)[list(step.wanted)]

        self._add("outputs", op)
        return out

    def finish(self, result: NumpyBuffer) -> "NumpyProgram":
        split = len(self.ops) if self.split is None else self.split
        bounds = itertools.pairwise([0, *self.cuts, split])
        parts = [self.ops[first:end] for first, end in bounds]
        return NumpyProgram(self.n_batch, self.n_outputs, parts, self.ops[split:], result, self.op_names)


@dataclass
class NumpyProgram:
    n_batch: int
    n_outputs: int
    parts: list[list[Op]]
    output_ops: list[Op]
    result: NumpyBuffer
    op_names: list[str]
    step: Step | None = None
    n_top: int = 0

    def run(self, ids: np.ndarray, runs: Sequence[Run], rows: Sequence[int], part: int = 0) -> np.ndarray:
        assert 0 < len(ids) == sum(run.n_tokens for run in runs) <= self.n_batch
        assert len({run.seq for run in runs}) == len(runs)
        assert ids.dtype == np.int32
        assert not rows or part == len(self.parts) - 1
        self.step = Step(ids, runs)
        for op in self.parts[part]:
            op(self.step)
        return self.more(rows)

    def more(self, rows: Sequence[int]) -> np.ndarray:
        assert self.step is not None
        assert all(0 <= row < len(self.step.ids) for row in rows)
        assert len(rows) <= self.n_outputs
        self.step.wanted = rows
        if rows:
            for op in self.output_ops:
                op(self.step)
        return self.result.rows(self.step)

    def close(self) -> None:
        self.parts, self.output_ops = [], []


class NumpyBackend:
    name = "numpy"

    def __init__(self, dtype: Any = np.float32, cache_dtype: Any | None = None) -> None:
        self.dtype, self.cache_dtype = dtype, cache_dtype or dtype
        self._nbytes = {"weights": 0, "cache": 0, "buffers": 0}

    def table(self, tensor: Tensor) -> Tensor:
        return tensor

    def _dequantized(self, tensors: Sequence[Tensor]) -> np.ndarray:
        data = np.concatenate([dequantize(t.blocks(), t.type) for t in tensors]).astype(self.dtype)
        self._nbytes["weights"] += data.nbytes
        return data

    def weight(self, tensors: Sequence[Tensor]) -> NumpyWeight:
        return NumpyWeight(self._dequantized(tensors))

    def experts(self, tensors: Sequence[Tensor]) -> list[tuple[np.ndarray, str]]:
        """Matrices and biases, [n_expert, ...] each, and their types."""
        return [(self._dequantized([t]).reshape(t.ne[::-1]), t.type.name) for t in tensors]

    def vector(self, tensors: Sequence[Tensor]) -> np.ndarray:
        return np.concatenate([dequantize(t.blocks(), t.type).reshape(-1) for t in tensors]).astype(self.dtype)

    def cache(
        self, shape: Attention, n_ctx: int, n_batch: int, n_seq: int = 1, kind: CacheType | None = None
    ) -> NumpyCache:
        k, v = (np.full((n_seq, n_ctx, shape.n_head_kv, shape.head_dim), np.nan, self.cache_dtype) for _ in "kv")
        self._nbytes["cache"] += k.nbytes + v.nbytes
        return NumpyCache(k, v)

    def recorder(self, n_batch: int, n_outputs: int) -> NumpyRecorder:
        return NumpyRecorder(self.dtype, n_batch, n_outputs)

    def to_host(self, buffer: NumpyBuffer, n_tokens: int) -> np.ndarray:
        return buffer.data[:n_tokens]

    def copy_from(self, other: Any, source: Any, n_tokens: int, target: NumpyBuffer) -> None:
        target.data[:n_tokens] = other.to_host(source, n_tokens)

    def nbytes(self) -> dict[str, int]:
        return dict(self._nbytes)
