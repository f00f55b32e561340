"""The Backend protocol in plain NumPy: the twin that compiled backends are compared with.

FUNCTIONS has one function for each op. Weights are dequantized to `dtype`: float32, or float64 as an oracle. All
arithmetic is in `dtype` too, and so is the KV cache unless a test says otherwise.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.gguf.parts import matrix_of
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models import ops, rare_ops
from gguf_run.models.backend import CacheType, Results, Run, Top
from gguf_run.models.experts import ExpertTensors
from gguf_run.models.kv_cache import GROUP
from gguf_run.models.operands import AttentionShape, Buffer, Rotation
from gguf_run.models.pages import PAGE, PageTable
from gguf_run.models.routing import Mixture


@dataclass(frozen=True)
class NumpyWeight:
    data: np.ndarray  # [n_out, n_in], or [n_head, n_out, n_in]

    @property
    def n_in(self) -> int:
        return self.data.shape[-1]

    @property
    def n_out(self) -> int:
        return self.data.shape[-2]

    def product(self, x: np.ndarray) -> np.ndarray:
        """x @ weight.T, [..., n_out]"""
        result: np.ndarray = x @ self.data.T
        return result


@dataclass(frozen=True)
class NumpyExperts:
    into: list[NumpyWeight]  # one for each expert: the rows of gate, then those of up, or of up alone
    down: list[NumpyWeight]
    biases: list[np.ndarray]  # of into and down, [n_expert, n_out]
    factors: np.ndarray  # [n_expert]


@dataclass(frozen=True)
class NumpyCache:
    """Rows that nobody has written are NaN."""

    table: PageTable
    k: np.ndarray  # [n_pages * PAGE, n_head_kv, head_dim]
    v: np.ndarray  # [n_pages * PAGE, n_head_kv, n_value]
    kinds = "kv"

    def slots(self, seq: int, end: int) -> np.ndarray:
        """The rows of positions 0 .. end of a sequence; -1 for pages behind the window."""
        positions = np.arange(end)
        pages = self.table.pages[seq, positions // PAGE].astype(int)
        return np.where(pages < 0, -1, pages * PAGE + positions % PAGE)

    def copy(self, source: int, target: int) -> None:
        for side in (self.k, self.v):
            side[target * PAGE : (target + 1) * PAGE] = side[source * PAGE : (source + 1) * PAGE]

    def move(self, source: np.ndarray, target: np.ndarray, rotation: Rotation | None, distance: int) -> None:
        for side in (self.k, self.v):
            groups = side.reshape(-1, GROUP, *side.shape[1:])
            moved = groups[source].reshape(-1, *side.shape[1:])
            if side is self.k and rotation is not None:
                # the keys of latent attention turn at their end
                part = moved[..., self.k.shape[-1] - rotation.n_rot :] if self.k.shape != self.v.shape else moved
                part[:] = rotate(part, replace(rotation, scale=1.0), np.full(len(moved), distance))
            groups[target] = moved.reshape(-1, *groups.shape[1:])

    def group_bytes(self, kind: str) -> int:
        return GROUP * int(getattr(self, kind)[0].nbytes)

    def read(self, kind: str, groups: np.ndarray) -> np.ndarray:
        side = getattr(self, kind)
        return side.reshape(-1, GROUP, *side.shape[1:])[groups].reshape(-1).view(np.uint8)

    def write(self, kind: str, groups: np.ndarray, data: Any) -> None:
        side = getattr(self, kind)
        new = np.frombuffer(data, side.dtype).reshape(-1, GROUP, *side.shape[1:])
        side.reshape(-1, GROUP, *side.shape[1:])[groups] = new[len(new) - len(groups) :]


@dataclass(frozen=True)
class NumpyState:
    data: np.ndarray  # [n_slots, n_floats]

    @property
    def n_slots(self) -> int:
        return len(self.data)

    def copy(self, source: int, target: int) -> None:
        self.data[target] = self.data[source]

    def read(self, slot: int) -> np.ndarray:
        return self.data[slot].view(np.uint8).copy()

    def write(self, slot: int, data: Any) -> bool:
        fits = len(data) == self.data[slot].nbytes
        if fits:
            self.data[slot] = np.frombuffer(data, self.data.dtype)
        return fits


def rotate(x: np.ndarray, rotation: Rotation, positions: np.ndarray) -> np.ndarray:
    """x: [n_tokens, n_head, head_dim]."""
    angle = positions[:, None, None] * rotation.inv_freq
    cos, sin = (np.cos(angle) * rotation.scale).astype(x.dtype), (np.sin(angle) * rotation.scale).astype(x.dtype)
    half = rotation.n_rot // 2
    one, two = {
        "norm": (slice(0, rotation.n_rot, 2), slice(1, rotation.n_rot, 2)),
        "neox": (slice(0, half), slice(half, rotation.n_rot)),
    }[rotation.style]
    out = x.copy()
    out[..., one] = x[..., one] * cos - x[..., two] * sin
    out[..., two] = x[..., one] * sin + x[..., two] * cos
    return out


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def visible(positions: np.ndarray, n: int, window: int, is_chunked: bool = False, is_causal: bool = True) -> np.ndarray:
    """Which of the positions 0 .. n - 1 the tokens at `positions` see, bool[len(positions), n]."""
    distance = positions[:, None] - np.arange(n)
    if not is_causal:
        return np.abs(distance) < (window or n)
    seen = positions % window + 1 if is_chunked else np.full(len(positions), window or n)
    return (distance >= 0) & (distance < seen[:, None])


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    positions: np.ndarray,
    scale: float,
    window: int,
    softcap: float = 0.0,
    sinks: np.ndarray | None = None,
    is_chunked: bool = False,
    is_causal: bool = True,
) -> np.ndarray:
    """q: [n_tokens, n_head, head_dim] at `positions`; k, v: [n_past + n_tokens, n_head_kv, columns], from 0 on."""
    n_head_kv, n_gqa = k.shape[1], q.shape[1] // k.shape[1]
    hidden = ~visible(positions, len(k), window, is_chunked, is_causal)
    out = np.empty((*q.shape[:2], v.shape[2]), q.dtype)
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


ACTIVATIONS = {
    "silu": silu,
    "gelu": gelu,
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": lambda x: 1 / (1 + np.exp(-np.clip(x, -80, None))),
    "identity": lambda x: x,
    "gelu_erf": lambda x: x * np.vectorize(math.erfc, otypes=[x.dtype])(-x / math.sqrt(2)) / 2,
}
GATED = {name: lambda gate, up, f=f: f(gate) * up for name, f in ACTIVATIONS.items()} | {"swiglu_oai": swiglu_oai}


class NumpySquares:
    def __init__(self, width: int, n_expert: int = 1) -> None:
        self.sums, self.counts = np.zeros((n_expert, width)), np.zeros(n_expert, np.int64)
        self.rows: list[tuple[np.ndarray, int]] = []

    def add(self, rows: np.ndarray, e: int = 0) -> None:
        self.rows += [(row.copy(), e) for row in rows]
        self.sums[e] += (rows.astype(np.float64) ** 2).sum(axis=0)
        self.counts[e] += len(rows)

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        taken = self.sums, self.counts
        self.sums, self.counts = np.zeros_like(self.sums), np.zeros_like(self.counts)
        return taken

    def keep(self, n_rows: int) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
        self.rows.clear()
        return lambda: (np.array([row for row, _ in self.rows]), np.array([e for _, e in self.rows]))


@dataclass
class NumpyProgram:
    """Runs its ops one by one. program[buffer] are the rows of a buffer that the step uses."""

    backend: "NumpyBackend"
    parts: Sequence[Sequence[Any]]
    after: Sequence[Any]
    result: Buffer
    n_batch: int
    n_outputs: int
    n_top = 0

    def __post_init__(self) -> None:
        self.ids, self.runs, self.wanted = np.zeros(0, np.int32), list[Run](), list[int]()
        self._memories: dict[str, np.ndarray] = {}

    def memory(self, buffer: Buffer) -> np.ndarray:
        """All rows of a buffer."""
        shape = (self.n_outputs if buffer.outputs else self.n_batch), buffer.row_width
        # NaN: an op that reads what no op has written shows.
        memory = self._memories.setdefault(buffer.name, np.full(shape, np.nan, self.backend.dtype))
        assert memory.shape == shape
        return memory[:, buffer.start : buffer.start + buffer.width]

    def __getitem__(self, buffer: Buffer) -> np.ndarray:
        return self.memory(buffer)[: len(self.wanted) if buffer.outputs else len(self.ids)]

    def runs_of(self, x: Buffer) -> list[Run]:
        """The runs that the rows of a buffer are: wanted rows are one each."""
        if not x.outputs:
            return self.runs
        tokens = [run._replace(n_past=run.n_past + i, n_tokens=1) for run in self.runs for i in range(run.n_tokens)]
        return [tokens[row] for row in self.wanted]

    def _do(self, step: Sequence[Any]) -> None:
        for op in step:
            rows, out = FUNCTIONS[type(op)](self, op), ops.written(op)
            if out is not None:
                assert rows.shape == self[out].shape
                self[out][:] = rows

    def run(
        self, ids: np.ndarray, runs: Sequence[Run], rows: Sequence[int], part: int = 0, tops: Sequence[Top | None] = ()
    ) -> Results:
        assert not tops
        assert 0 < len(ids) == sum(run.n_tokens for run in runs) <= self.n_batch
        assert len({run.seq for run in runs}) == len(runs)
        assert ids.dtype == np.int32
        assert not rows or part == len(self.parts) - 1
        self.ids, self.runs = ids, list(runs)
        self._do(self.parts[part])
        return Results(self.more(rows))

    def more(self, rows: Sequence[int]) -> np.ndarray:
        assert all(0 <= row < len(self.ids) for row in rows)
        assert len(rows) <= self.n_outputs
        self.wanted = list(rows)
        if rows:
            self._do(self.after)
        return self.memory(self.result)[: len(rows)]

    def to_host(self, buffer: Buffer, n_tokens: int) -> np.ndarray:
        return self.memory(buffer)[:n_tokens]

    def copy_from(self, other: Any, source: Buffer, n_tokens: int, target: Buffer) -> None:
        self.memory(target)[:n_tokens] = other.to_host(source, n_tokens)

    def close(self) -> None:
        self.parts, self.after = [], []


# Each function returns the new rows of the buffer that its op writes.


def rms_norm(p: NumpyProgram, op: ops.RmsNorm[np.ndarray]) -> np.ndarray:
    part = p[op.x].reshape(-1, op.n_group, op.x.width // op.n_group)
    mean = (part * part).mean(axis=-1, keepdims=True, dtype=part.dtype)
    weight = op.weight.reshape(op.n_group if op.is_grouped else 1, -1)
    rows = (part / np.sqrt(mean + part.dtype.type(op.eps)) * weight).reshape(-1, op.x.width)
    return rows if op.residual is None else rows + p[op.residual]


def layer_norm(p: NumpyProgram, op: rare_ops.LayerNorm[np.ndarray]) -> np.ndarray:
    part = p[op.x].reshape(-1, op.n_group, op.x.width // op.n_group)
    part = part - part.mean(axis=-1, keepdims=True)
    part = part / np.sqrt((part * part).mean(axis=-1, keepdims=True) + part.dtype.type(op.eps))
    return part.reshape(-1, op.x.width) * op.weight + (0 if op.bias is None else op.bias)


def matmul(p: NumpyProgram, op: Any) -> np.ndarray:
    return op.weight.product(p[op.x]) + (0 if op.bias is None else op.bias)


def rope(p: NumpyProgram, op: ops.Rope) -> np.ndarray:
    rows = p[op.x]
    filled = np.pad(rows, ((0, 0), (0, -rows.shape[1] % op.head_dim)))  # the last head may be shorter
    heads, at, parts = filled.reshape(len(rows), -1, op.head_dim), 0, []
    for _, n_past, n, is_long, *_ in p.runs_of(op.x):
        parts.append(rotate(heads[at : at + n], op.rotation.of(is_long), n_past + np.arange(n)))
        at += n
    return np.concatenate(parts).reshape(filled.shape)[:, : rows.shape[1]]


def add_positions(p: NumpyProgram, op: rare_ops.AddPositions[np.ndarray]) -> np.ndarray:
    positions = np.concatenate([run.n_past + np.arange(run.n_tokens) for run in p.runs_of(op.x)])
    return p[op.x] + op.table.reshape(op.n_row, -1)[np.minimum(positions, op.n_row - 1)]


def temper(p: NumpyProgram, op: rare_ops.Temper) -> np.ndarray:
    positions = np.concatenate([run.n_past + np.arange(run.n_tokens) for run in p.runs_of(op.x)])
    n_whole = np.floor((positions + op.temperature.offset) / op.temperature.length)
    return p[op.x] * (1 + op.temperature.scale * np.log(1 + n_whole))[:, None]


def attention(p: NumpyProgram, op: ops.Attend[NumpyCache, np.ndarray]) -> np.ndarray:
    shape, cache, parts = op.shape, op.cache, []
    at = 0
    for seq, n_past, n, *_ in p.runs_of(op.q):
        rows, slots = slice(at, at + n), cache.slots(seq, n_past + n)
        for kept, new in ((cache.k, op.k), (cache.v, op.v)):
            if new is not None:
                kept[slots[n_past:]] = p[new][rows].reshape(n, shape.n_head_kv, -1)
        held = (slots >= 0)[:, None, None]
        keys, values = (np.where(held, kept[slots], 0).astype(p[op.q].dtype) for kept in (cache.k, cache.v))
        queries, positions = p[op.q][rows].reshape(n, shape.n_head, shape.head_dim), n_past + np.arange(n)
        limits = shape.scale, shape.window, shape.softcap, op.sinks, shape.is_chunked, shape.is_causal
        result = attend(queries, keys, values, positions, *limits)
        parts.append(result.reshape(n, -1))
        at += n
    return np.concatenate(parts)


def by_run(p: NumpyProgram, state: NumpyState, shape: tuple[int, ...]) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the rows of each run, and the state that its tokens change."""
    at = 0
    for run in p.runs:
        old, new = (state.data[slot].reshape(shape) for slot in (run.reads, run.writes))
        assert run.reads != run.writes
        new[:] = old if run.n_past else 0
        yield slice(at, at + run.n_tokens), new
        at += run.n_tokens


def short_conv(p: NumpyProgram, op: rare_ops.ShortConv[NumpyState, np.ndarray]) -> np.ndarray:
    n, parts = op.n_taps, []
    for rows, state in by_run(p, op.state, (n - 1, op.x.width)):
        x = np.concatenate([state, p[op.x][rows]])
        state[:] = x[len(x) - n + 1 :]
        sums = sum(op.taps.reshape(-1, n)[:, j] * x[j : len(x) - n + 1 + j] for j in range(n))
        parts.append(sums + (0 if op.bias is None else op.bias))
    return ACTIVATIONS[op.activation](np.concatenate(parts))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x, 0)


def delta_rule(p: NumpyProgram, op: rare_ops.DeltaRule[NumpyState, np.ndarray]) -> np.ndarray:
    n_k, n_v = op.n_head_k, op.n_head_v
    heads = np.arange(n_v) % n_k if op.is_tiled else np.arange(n_v) // (n_v // n_k)
    q, k = (p[x].reshape(-1, n_k, op.q.width // n_k)[:, heads] for x in (op.q, op.k))
    q, k = (x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + op.eps) for x in (q, k))
    v, parts = p[op.v].reshape(-1, n_v, op.v.width // n_v), []
    decay, beta = np.exp(op.a * softplus(p[op.alpha] + op.dt)), 1 / (1 + np.exp(-p[op.beta]))
    for rows, s in by_run(p, op.state, (n_v, k.shape[-1], v.shape[-1])):
        for t in range(rows.start, rows.stop):
            s *= decay[t, :, None, None]
            change = beta[t, :, None] * (v[t] - np.einsum("hkv,hk->hv", s, k[t]))
            s += k[t, :, :, None] * change[:, None]
            parts.append(np.einsum("hkv,hk->hv", s, q[t]) / np.sqrt(k.shape[-1]))
    return np.concatenate(parts).reshape(p[op.v].shape)


def matmul_heads(p: NumpyProgram, op: rare_ops.MatmulHeads[NumpyWeight]) -> np.ndarray:
    x, n = p[op.x].reshape(len(p[op.x]), op.n_head, -1), op.weight.n_in
    made = np.einsum("hoi,thi->tho", op.weight.data, x[..., :n])
    return np.concatenate([made, x[..., n:]], axis=2).reshape(len(x), -1)


def moe(p: NumpyProgram, op: rare_ops.Moe[NumpyExperts, np.ndarray, NumpySquares]) -> np.ndarray:
    """Compute one token and one expert at a time."""
    mixture, experts, result = op.mixture, op.experts, p[op.out].copy() if op.accumulate else np.zeros_like(p[op.out])
    for logits, row, out in zip(p[op.logits], p[op.x], result, strict=True):
        for e, weight in route(mixture, logits, op.bias):
            wide = experts.into[e].product(row) + experts.biases[0][e]
            before, after = (weight, 1) if mixture.weighs_input else (1, weight * experts.factors[e])
            halves = np.split(wide * before, wide.size // experts.down[e].n_in)
            made = GATED[mixture.activation](*halves) if len(halves) == 2 else ACTIVATIONS[mixture.activation](*halves)
            out += experts.down[e].product(made * after) + after * experts.biases[1][e]
            for seen, read in zip(op.squares or (), (row, made), strict=False):
                seen.add(read[None], e)
    return result


def scan(p: NumpyProgram, op: Any) -> np.ndarray:
    x = p[op.x].reshape(-1, op.n_head, op.x.width // op.n_head)
    b, c = (p[buffer].reshape(len(x), op.n_group, -1) for buffer in (op.b, op.c))
    b, c = (np.repeat(part, op.n_head // op.n_group, axis=1) for part in (b, c))
    delta = np.logaddexp(0, p[op.dt] + op.dt_bias)[..., None]
    kept, added = np.exp(delta * op.a[:, None])[..., None], (delta * x)[..., None] * b[:, :, None]
    out, at = np.empty_like(x), 0
    for run in p.runs:
        s = op.state.data[run.reads].reshape(added.shape[1:]) if run.n_past else np.zeros(added.shape[1:], x.dtype)
        for t in range(at, at + run.n_tokens):
            s = kept[t] * s + added[t]
            out[t] = (s * c[t, :, None]).sum(axis=-1) + op.d[:, None] * x[t]
        op.state.data[run.writes] = s.reshape(-1)
        at += run.n_tokens
    return out.reshape(len(x), -1)


def route(mixture: Mixture, logits: np.ndarray, bias: np.ndarray | None) -> list[tuple[int, float]]:
    """Return a token's experts and their weights, as models.routing.Mixture says."""
    left = logits.copy()
    scores = ACTIVATIONS["sigmoid"](logits) if mixture.gating == "sigmoid" else softmax(logits)
    if bias is not None or mixture.n_group > 1:
        left = scores + (0 if bias is None else bias)
        groups = left.reshape(mixture.n_group, -1)
        best = np.sort(groups)[:, -mixture.n_group_best :].sum(axis=1)
        groups[np.argsort(-best, kind="stable")[mixture.n_group_used :]] = -np.inf
    chosen = []
    for _ in range(mixture.n_used):
        e = int(np.argmax(left))
        if mixture.gating == "sparsemixer":
            m = left[e]
            near = [x for x in left if np.isfinite(x) and m - x <= 0.02 * max(abs(x), m)]
            scores[e] = 1 / np.exp(np.array(near) - m).sum()
        chosen.append(e)
        left[e] = -np.inf
    weights = scores[chosen] * mixture.scale / (scores[chosen].sum() if mixture.norm else 1)
    return list(zip(chosen, weights, strict=True))


def xielu(x: np.ndarray, op: rare_ops.Xielu) -> np.ndarray:
    low = op.alpha_n * (np.expm1(np.minimum(x, op.eps)) - x)
    return op.beta * x + np.where(x > 0, op.alpha_p * x * x, low)


def mix(p: NumpyProgram, op: rare_ops.Mix) -> np.ndarray:
    base, x = (p[buffer].reshape(len(p[buffer]), -1, op.width) for buffer in (op.base, op.x))
    coef = op.shift + (0 if op.coef is None else p[op.coef].reshape(len(x), base.shape[1], x.shape[1]))
    coef = np.broadcast_to(coef, (len(x), base.shape[1], x.shape[1]))
    moved = x if op.minus is None else x - p[op.minus][:, None]
    return (base + np.einsum("tij,tjk->tik", coef, moved)).reshape(len(x), -1)


def match_rms(p: NumpyProgram, op: rare_ops.MatchRms) -> np.ndarray:
    parts, like = p[op.x].reshape(len(p[op.x]), -1, op.like.width), p[op.like][:, None]
    wanted, found = ((x * x).mean(axis=-1, keepdims=True) for x in (like, parts))
    return (parts * np.sqrt(wanted / np.maximum(found, op.least))).reshape(len(parts), -1)


def threshold(p: NumpyProgram, op: rare_ops.Threshold) -> np.ndarray:
    x = p[op.x]
    return np.maximum(0, x - x.mean(axis=-1, keepdims=True) - op.factor * x.std(axis=-1, keepdims=True))


def scale_adapters(p: NumpyProgram, op: rare_ops.ScaleAdapters) -> np.ndarray:
    seqs = np.concatenate([np.full(run.n_tokens, run.seq) for run in p.runs_of(op.x)])
    adapters, factors = zip(*op.columns, strict=True)
    scales = op.scales.values[seqs][:, adapters].astype(p.backend.dtype)
    return np.where(scales == 0, 0, p[op.x] * scales * np.array(factors))


def softcap(x: np.ndarray, scale: float, cap: float) -> np.ndarray:
    return cap * np.tanh(x * scale / cap) if cap else x * scale


FUNCTIONS: Mapping[type, Callable[[NumpyProgram, Any], Any]] = {
    ops.Embed: lambda p, op: dequantize(op.table.blocks()[p.ids], op.table.type).astype(p[op.out].dtype) * op.scale,
    ops.RmsNorm: rms_norm,
    rare_ops.LayerNorm: layer_norm,
    ops.Matmul: lambda p, op: matmul(p, op) + (0 if op.residual is None else p[op.residual]),
    rare_ops.MatmulHeads: matmul_heads,
    ops.MatmulGated: lambda p, op: GATED[op.activation](*np.split(matmul(p, op), 2, axis=1)),
    ops.Rope: rope,
    rare_ops.Temper: temper,
    rare_ops.AddPositions: add_positions,
    ops.Attend: attention,
    ops.Gated: lambda p, op: ACTIVATIONS[op.activation](p[op.gate]) * (1 if op.up is None else p[op.up]),
    rare_ops.ShortConv: short_conv,
    rare_ops.DeltaRule: delta_rule,
    rare_ops.Xielu: lambda p, op: xielu(p[op.x], op),
    rare_ops.Moe: moe,
    rare_ops.Scan: scan,
    rare_ops.GateRows: lambda p, op: p[op.x] / (1 + np.exp(-p[op.gate])),
    rare_ops.Softcap: lambda p, op: softcap(p[op.x], op.scale, op.cap),
    rare_ops.ScaleAdapters: scale_adapters,
    rare_ops.Mix: mix,
    rare_ops.MatchRms: match_rms,
    rare_ops.Threshold: threshold,
    ops.Observe: lambda p, op: op.squares.add(p[op.x]),
    ops.Outputs: lambda p, op: p[op.x][p.wanted],
}


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
        data = self._dequantized(tensors)
        return NumpyWeight(data.reshape(*tensors[0].ne[:0:-1], -1) if len(tensors[0].ne) > 2 else data)

    def experts(self, tensors: Sequence[Tensor]) -> NumpyExperts:
        held = ExpertTensors.of(tensors)
        into = [self.weight([matrix_of(t, e) for t in held.into]) for e in range(held.n_expert)]
        down = [self.weight([matrix_of(held.down, e)]) for e in range(held.n_expert)]
        zeros = [np.zeros((held.n_expert, side[0].n_out), self.dtype) for side in (into, down)]
        shifts = [self.vector([t]).reshape(held.n_expert, -1) for t in held.biases]
        biases = [np.concatenate(shifts[:-1], 1), shifts[-1]] if shifts else zeros
        return NumpyExperts(into, down, biases, np.ones(held.n_expert) if held.factors is None else held.factors)

    def vector(self, tensors: Sequence[Tensor]) -> np.ndarray:
        return np.concatenate([dequantize(t.blocks(), t.type).reshape(-1) for t in tensors]).astype(self.dtype)

    def cache(self, shape: AttentionShape, table: PageTable, kind: CacheType) -> NumpyCache:
        size = table.n_pages * PAGE, shape.n_head_kv
        k, v = (np.full((*size, n), np.nan, self.cache_dtype) for n in (shape.head_dim, shape.n_value))
        self._nbytes["cache"] += k.nbytes + v.nbytes
        return NumpyCache(table, k, v)

    def state(self, n_floats: int, n_slots: int) -> NumpyState:
        data = np.full((n_slots, n_floats), np.nan, self.dtype)
        self._nbytes["cache"] += data.nbytes
        return NumpyState(data)

    def squares(self, width: int, n_expert: int = 1) -> NumpySquares:
        return NumpySquares(width, n_expert)

    def program(
        self, parts: Sequence[Sequence[Any]], after: Sequence[Any], result: Buffer, n_batch: int, n_outputs: int
    ) -> NumpyProgram:
        return NumpyProgram(self, parts, after, result, n_batch, n_outputs)

    def nbytes(self) -> dict[str, int]:
        return dict(self._nbytes)
