"""The ops of a step as differentiable functions of torch. FUNCTIONS is the table: an op that it lacks has no gradient.

Each function takes the buffers and an op, and returns the new rows of the buffer that the op writes. Weights and
vectors are handles of backend.py. All sequences begin at position 0.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from gguf_run.models import ops, rare_ops
from gguf_run.models.operands import AttentionShape, Rotation
from gguf_run.models.routing import MIN_SUM, NEAR, Mixture
from gguf_run.runtime.train.memory import Memory

Rows: TypeAlias = torch.Tensor  # [rows, width]


def _swiglu_oai(gate: Rows, up: Rows) -> Rows:
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


_ACTIVATIONS: Mapping[str, Callable[[Rows], Rows]] = {
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


def _gated(activation: str, gate: Rows, up: Rows | None) -> Rows:
    if activation == "swiglu_oai":
        assert up is not None
        return _swiglu_oai(gate, up)
    made = _ACTIVATIONS[activation](gate)
    return made if up is None else made * up


def _positions(m: Memory) -> torch.Tensor:
    """Return the position of each row, int64[rows]."""
    return torch.arange(m.ids.shape[1], device=m.ids.device).repeat(m.ids.shape[0])


def _embed(m: Memory, op: Any) -> Rows:
    return op.table.rows(m.ids.reshape(-1)) * op.scale


def _rms_norm(m: Memory, op: Any) -> Rows:
    x = m[op.x]
    part = x.reshape(len(x), op.n_group, -1)
    weight = op.weight.values().reshape(op.n_group if op.is_grouped else 1, -1)
    made = (part * torch.rsqrt(part.square().mean(-1, keepdim=True) + op.eps) * weight).reshape(x.shape)
    return made if op.residual is None else made + m[op.residual]


def _layer_norm(m: Memory, op: Any) -> Rows:
    x = m[op.x]
    part = x.reshape(len(x), op.n_group, -1)
    part = part - part.mean(-1, keepdim=True)
    part = part * torch.rsqrt(part.square().mean(-1, keepdim=True) + op.eps)
    made = part.reshape(x.shape) * op.weight.values()
    return made if op.bias is None else made + op.bias.values()


def _product(m: Memory, op: Any) -> Rows:
    made = op.weight.product(m[op.x])
    return made if op.bias is None else made + op.bias.values()


def _matmul(m: Memory, op: Any) -> Rows:
    made = _product(m, op)
    return made if op.residual is None else made + m[op.residual]


def _matmul_gated(m: Memory, op: Any) -> Rows:
    return _gated(op.activation, *_product(m, op).chunk(2, dim=1))


def _matmul_heads(m: Memory, op: Any) -> Rows:
    x = m[op.x].reshape(len(m[op.x]), op.n_head, -1)
    made = torch.einsum("hoi,thi->tho", op.weight.values(), x[..., : op.weight.n_in])
    return torch.cat([made, x[..., op.weight.n_in :]], 2).reshape(len(x), -1)


def _angles(rotation: Rotation, n_tokens: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines, [n_tokens, 1, n_rot / 2]."""
    freqs = torch.from_numpy(rotation.of(n_tokens > rotation.n_short).inv_freq)
    angle = torch.arange(n_tokens, dtype=torch.float64)[:, None, None] * freqs
    cos, sin = torch.cos(angle) * rotation.scale, torch.sin(angle) * rotation.scale
    return cos.to(like), sin.to(like)


def _rope(m: Memory, op: Any) -> Rows:
    x, (n_seq, n), n_rot = m[op.x], m.ids.shape, op.rotation.n_rot
    filled = F.pad(x, (0, -x.shape[1] % op.head_dim))  # the last head may be shorter
    heads = filled.reshape(n_seq, n, -1, op.head_dim)
    cos, sin = _angles(op.rotation, n, x)
    turning, rest = heads[..., :n_rot], heads[..., n_rot:]
    if op.rotation.style == "norm":
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turning.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return torch.cat([turned, rest], -1).reshape(filled.shape)[:, : x.shape[1]]


def _visible(shape: AttentionShape, n: int, device: Any) -> torch.Tensor:
    """Return which positions (columns) a position (row) sees, bool[n, n]."""
    at = torch.arange(n, device=device)
    distance = at[:, None] - at
    if not shape.is_causal:
        return distance.abs() < (shape.window or n)
    seen = at % shape.window + 1 if shape.is_chunked else torch.full_like(at, shape.window or n)
    return (distance >= 0) & (distance < seen[:, None])


def _attend(m: Memory, op: Any) -> Rows:
    shape, (n_seq, n) = op.shape, m.ids.shape

    def heads(x: Rows, n_head: int) -> torch.Tensor:
        return x.reshape(n_seq, n, n_head, -1).transpose(1, 2)

    if op.k is not None:
        m.keep(op.cache, *(heads(m[side], shape.n_head_kv) for side in (op.k, op.v)))
    q = heads(m[op.q], shape.n_head)
    k, v = (side.repeat_interleave(shape.n_head // shape.n_head_kv, 1) for side in m.kept(op.cache))
    if op.sinks is None and not shape.softcap:
        is_plain = shape.is_causal and not 0 < shape.window < n
        mask = None if is_plain else _visible(shape, n, q.device)
        made = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_plain, scale=shape.scale)
    else:
        scores = q @ k.transpose(2, 3) * shape.scale
        scores = torch.tanh(scores / shape.softcap) * shape.softcap if shape.softcap else scores
        scores = scores.masked_fill(~_visible(shape, n, q.device), -math.inf)
        if op.sinks is not None:  # one more position, without a value
            scores = torch.cat([scores, op.sinks.values()[:, None, None].expand(n_seq, -1, n, 1)], 3)
        made = scores.softmax(3)[..., :n] @ v
    return made.transpose(1, 2).reshape(n_seq * n, -1)


def _temper(m: Memory, op: Any) -> Rows:
    t = op.temperature
    n_whole = torch.floor((_positions(m).double() + t.offset) / t.length)
    return m[op.x] * (1 + t.scale * torch.log(1 + n_whole)).to(m[op.x].dtype)[:, None]


def _add_positions(m: Memory, op: Any) -> Rows:
    return m[op.x] + op.table.values().reshape(op.n_row, -1)[_positions(m).clamp(max=op.n_row - 1)]


def _by_token(m: Memory, x: Rows, *sizes: int) -> torch.Tensor:
    """Return [n_seq, n_tokens, *sizes]."""
    return x.reshape(*m.ids.shape, *sizes)


def _short_conv(m: Memory, op: Any) -> Rows:
    x = F.pad(_by_token(m, m[op.x], op.x.width), (0, 0, op.n_taps - 1, 0))
    taps, n = op.taps.values().reshape(-1, op.n_taps), m.ids.shape[1]
    made = sum(taps[:, j] * x[:, j : j + n] for j in range(op.n_taps))
    made = made if op.bias is None else made + op.bias.values()
    return _ACTIVATIONS[op.activation](made).reshape(-1, op.x.width)


def _delta_rule(m: Memory, op: Any) -> Rows:
    n_k, n_v, device = op.n_head_k, op.n_head_v, m.ids.device
    order = torch.arange(n_v, device=device)
    order = order % n_k if op.is_tiled else order // (n_v // n_k)
    q, k = (_by_token(m, m[x], n_k, op.q.width // n_k)[:, :, order] for x in (op.q, op.k))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + op.eps) for x in (q, k))
    v = _by_token(m, m[op.v], n_v, op.v.width // n_v)
    decay = _by_token(m, torch.exp(op.a.values() * F.softplus(m[op.alpha] + op.dt.values())), n_v)
    beta = _by_token(m, torch.sigmoid(m[op.beta]), n_v)
    s, parts = k.new_zeros(len(k), n_v, k.shape[-1], v.shape[-1]), []
    for t in range(m.ids.shape[1]):
        s = s * decay[:, t, :, None, None]
        change = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", s, k[:, t]))
        s = s + k[:, t, :, :, None] * change[:, :, None]
        parts.append(torch.einsum("bhkv,bhk->bhv", s, q[:, t]) / math.sqrt(k.shape[-1]))
    return torch.stack(parts, 1).reshape(-1, op.v.width)


def _scan(m: Memory, op: Any) -> Rows:
    x = _by_token(m, m[op.x], op.n_head, op.x.width // op.n_head)
    b, c = (_by_token(m, m[part], op.n_group, op.b.width // op.n_group) for part in (op.b, op.c))
    b, c = (part.repeat_interleave(op.n_head // op.n_group, 2) for part in (b, c))
    delta = F.softplus(_by_token(m, m[op.dt] + op.dt_bias.values(), op.n_head))[..., None]
    kept = torch.exp(delta * op.a.values()[:, None])
    s, parts = x.new_zeros(len(x), op.n_head, x.shape[-1], b.shape[-1]), []
    for t in range(m.ids.shape[1]):
        s = kept[:, t, :, :, None] * s + (delta * x)[:, t, :, :, None] * b[:, t, :, None]
        parts.append((s * c[:, t, :, None]).sum(-1))
    return (torch.stack(parts, 1) + op.d.values()[:, None] * x).reshape(-1, op.x.width)


def _route(mixture: Mixture, logits: Rows, bias: torch.Tensor | None) -> tuple[torch.Tensor, Rows]:
    """Return the experts of each row and their weights, [rows, n_used]. The choice itself has no gradient."""
    scores = torch.sigmoid(logits) if mixture.gating == "sigmoid" else logits.softmax(1)
    if mixture.gating == "sparsemixer":
        return _sparse_mixer(mixture, logits)
    left = scores if bias is None else scores + bias
    if mixture.n_group > 1:
        groups = left.reshape(len(left), mixture.n_group, -1)
        best = groups.topk(mixture.n_group_best, 2).values.sum(2)
        used = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(mixture.n_group_used, 1).indices, True)
        left = groups.masked_fill(~used[..., None], -math.inf).reshape(left.shape)
    chosen = left.detach().topk(mixture.n_used, 1).indices
    weights = scores.gather(1, chosen)
    total = weights.sum(1, keepdim=True).clamp(min=MIN_SUM) if mixture.norm else 1
    return chosen, weights * mixture.scale / total


def _sparse_mixer(mixture: Mixture, logits: Rows) -> tuple[torch.Tensor, Rows]:
    left, chosen, weights = logits, [], []
    for _ in range(mixture.n_used):
        top = left.max(1, keepdim=True)
        near = torch.isfinite(left) & (top.values - left <= NEAR * torch.maximum(left.abs(), top.values))
        among = left.masked_fill(~near, -math.inf).softmax(1)
        chosen.append(top.indices)
        weights.append(among.gather(1, top.indices))
        left = left.scatter(1, top.indices, -math.inf)
    found = torch.cat(weights, 1)
    return torch.cat(chosen, 1), found * mixture.scale / (found.sum(1, keepdim=True) if mixture.norm else 1)


def _moe(m: Memory, op: Any) -> Rows:
    mixture, experts, x = op.mixture, op.experts, m[op.x]
    chosen, weights = _route(mixture, m[op.logits], None if op.bias is None else op.bias.values())
    result = m[op.out] if op.accumulate else torch.zeros_like(x[:, :1]).expand(-1, op.out.width)
    for e, (into, down) in enumerate(zip(experts.into, experts.down, strict=True)):
        rows, place = torch.nonzero(chosen == e, as_tuple=True)
        weight = weights[rows, place][:, None]
        before, after = (weight, 1) if mixture.weighs_input else (1, weight * experts.factors[e])
        wide, narrow = experts.biases(e)
        made = (into.product(x[rows]) + wide) * before
        halves = made.chunk(2, 1) if made.shape[1] != down.n_in else (made, None)
        made = _gated(mixture.activation, *halves)
        result = result.index_add(0, rows, down.product(made) * after + narrow * after)
    return result


def _xielu(m: Memory, op: Any) -> Rows:
    x = m[op.x]
    low = op.alpha_n * (torch.expm1(x.clamp(max=op.eps)) - x)
    return op.beta * x + torch.where(x > 0, op.alpha_p * x.square(), low)


def _softcap(m: Memory, op: Any) -> Rows:
    x = m[op.x] * op.scale
    return op.cap * torch.tanh(x / op.cap) if op.cap else x


def _mix(m: Memory, op: Any) -> Rows:
    base, x = (m[buffer].reshape(len(m[buffer]), -1, op.width) for buffer in (op.base, op.x))
    coef = x.new_zeros(len(x), base.shape[1], x.shape[1]) if op.coef is None else m[op.coef]
    moved = x if op.minus is None else x - m[op.minus][:, None]
    coef = coef.reshape(len(x), base.shape[1], x.shape[1]) + op.shift
    return (base + torch.einsum("tij,tjk->tik", coef, moved)).reshape(len(x), -1)


def _match_rms(m: Memory, op: Any) -> Rows:
    parts, like = m[op.x].reshape(len(m[op.x]), -1, op.like.width), m[op.like][:, None]
    wanted, found = (x.square().mean(-1, keepdim=True) for x in (like, parts))
    return (parts * torch.sqrt(wanted / found.clamp(min=op.least))).reshape(len(parts), -1)


def _threshold(m: Memory, op: Any) -> Rows:
    x = m[op.x]
    return F.relu(x - x.mean(-1, keepdim=True) - op.factor * x.std(-1, keepdim=True, correction=0))


FUNCTIONS: Mapping[type, Callable[[Memory, Any], Rows]] = {
    ops.Embed: _embed,
    ops.RmsNorm: _rms_norm,
    rare_ops.LayerNorm: _layer_norm,
    ops.Matmul: _matmul,
    ops.MatmulGated: _matmul_gated,
    rare_ops.MatmulHeads: _matmul_heads,
    ops.Rope: _rope,
    ops.Attend: _attend,
    ops.Gated: lambda m, op: _gated(op.activation, m[op.gate], None if op.up is None else m[op.up]),
    ops.Outputs: lambda m, op: m[op.x],  # the results of all tokens are wanted
    rare_ops.Temper: _temper,
    rare_ops.AddPositions: _add_positions,
    rare_ops.ShortConv: _short_conv,
    rare_ops.DeltaRule: _delta_rule,
    rare_ops.Scan: _scan,
    rare_ops.Moe: _moe,
    rare_ops.GateRows: lambda m, op: m[op.x] * torch.sigmoid(m[op.gate]),
    rare_ops.Mix: _mix,
    rare_ops.MatchRms: _match_rms,
    rare_ops.Threshold: _threshold,
    rare_ops.Xielu: _xielu,
    rare_ops.Softcap: _softcap,
}
