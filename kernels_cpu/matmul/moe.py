"""A mixture of experts: the choice of experts for each token, and their matmuls, grouped by expert.

A pair is a token and one of its experts. Pairs are sorted by expert: the weights of an expert are read once for all its
tokens, and the weights of an expert without tokens are not read. `route` writes a plan, int64:

    [1]             number of experts in use
    [n_expert]      their numbers, ascending
    [n_expert + 1]  the first pair of each, and the end
    [n_pairs]       the token of each pair
    [n_pairs]       work space

The weight of a pair scales the pair's row between the two matmuls.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.compiler.jit import carray, njit
from gguf_run.kernels_cpu.matmul.matmul import cut, tile_panels
from gguf_run.kernels_cpu.matmul.tile import prefetch, tile_at
from gguf_run.kernels_cpu.panels.panels import BLOCK, ROWS, TOKENS, Panel
from gguf_run.kernels_cpu.replay.op import TapeOp, n_shrinking, op, shrinking
from gguf_run.kernels_cpu.rows.activation import ACTIVATIONS, gated_row
from gguf_run.kernels_cpu.rows.quantize import quantize_row
from gguf_run.kernels_cpu.vector.native import f32_at, i64_at

EXPERT_ROWS = BLOCK  # the rows of an expert are filled up to a multiple of this
_PIECE_BYTES = 16384  # bytes of weights that a thread takes at a time, or more
_UNITS, _GROUPS = 4, 8  # of gate_up: units of 2 * 32 rows in a piece; of down: panels in a piece
_PAIR = 4 * ROWS  # bytes of 16 gates of a token; 16 numbers of `up` follow


@dataclass(frozen=True, eq=False)
class ExpertMatrix:
    """Panels of n_expert matrices, one after the other."""

    panel: Panel
    data: NDArray[np.uint8]
    n_in: int
    n_out: int  # rows of one matrix
    bias: NDArray[np.float32] | None  # [n_expert, n_out]

    @property
    def expert_bytes(self) -> int:
        return -(-self.n_out // EXPERT_ROWS) * (EXPERT_ROWS // ROWS) * self.panel.group_bytes(self.n_in)

    @property
    def bias_at(self) -> int:
        """Address of the bias, or 0."""
        return 0 if self.bias is None else self.bias.ctypes.data

    def fields(self) -> dict[str, int]:
        """Return the fields of an op that describe its matrix."""
        panel = self.panel
        sizes = {"n_out": self.n_out, "n_steps": self.n_in // panel.columns, "step_bytes": panel.step_bytes}
        sizes |= {"group_bytes": panel.group_bytes(self.n_in), "expert_bytes": self.expert_bytes}
        return sizes | {"w": self.data.ctypes.data, "bias": self.bias_at}


@dataclass(frozen=True, eq=False)
class CpuExperts:
    """The experts of a layer. gate and up have the same panels."""

    n_expert: int
    gate: ExpertMatrix
    up: ExpertMatrix
    down: ExpertMatrix


def plan_words(n_expert: int, n_pairs: int) -> int:
    """Return the int64 words of a plan."""
    return 2 * n_expert + 2 + 2 * n_pairs


@njit(inline="always")
def plan_parts(plan, n_expert, n_pairs):
    """Return three parts of a plan: the experts in use, the first pair of each, and the tokens of the pairs."""
    firsts = plan + 8 * (n_expert + 1)
    return i64_at(plan + 8, n_expert), i64_at(firsts, n_expert + 1), i64_at(firsts + 8 * (n_expert + 1), n_pairs)


@op("rows n_expert n_used norm logits logits_stride plan weights", "scale")
def route(args, piece, ith, nth):
    """Choose the n_used experts of the greatest logits for each token, and write the plan. One thread does this.

    norm: the weights are the softmax over the chosen experts, not over all experts.
    scale: factor of all weights.
    weights: f32[2 * n_pairs]: the weights of the pairs, then work space.
    """
    a = carray(args, 1)[0]
    if piece < 0:
        return 1
    n_tokens = i64_at(a.rows, 1)[0]
    n_pairs = n_tokens * a.n_used
    experts, first, tokens = plan_parts(a.plan, a.n_expert, n_pairs)
    chosen = i64_at(a.plan + 8 * (2 * a.n_expert + 2 + n_pairs), n_pairs)
    weights, unsorted = f32_at(a.weights, n_pairs), f32_at(a.weights + 4 * n_pairs, n_pairs)
    for e in range(a.n_expert + 1):
        first[e] = 0
    for t in range(n_tokens):
        logits = f32_at(a.logits + t * a.logits_stride, a.n_expert)
        largest, total = logits[0], 0.0
        for e in range(1, a.n_expert):
            largest = max(largest, logits[e])
        if not a.norm:
            for e in range(a.n_expert):
                total += math.exp(logits[e] - largest)
        for k in range(t * a.n_used, (t + 1) * a.n_used):
            best = 0
            for e in range(1, a.n_expert):
                if logits[e] > logits[best]:
                    best = e
            value = math.exp(logits[best] - largest)
            total += value if a.norm else 0.0
            chosen[k], unsorted[k] = best, value
            first[best + 1] += 1
            logits[best] = -np.inf
        for k in range(t * a.n_used, (t + 1) * a.n_used):
            unsorted[k] *= a.scale / total
    for e in range(a.n_expert):
        first[e + 1] += first[e]
    for k in range(n_pairs):  # after this loop, first[e] is the end of expert e
        p = first[chosen[k]]
        first[chosen[k]] += 1
        tokens[p], weights[p] = k // a.n_used, unsorted[k]
    n_active = start = 0
    for e in range(a.n_expert):  # n_active <= e: first[n_active] has been read before it is overwritten
        end = first[e]
        if end > start:
            experts[n_active], first[n_active] = e, start
            n_active += 1
        start = end
    first[n_active] = n_pairs
    i64_at(a.plan, 1)[0] = n_active
    return 0


@njit(inline="always")
def _start(row, bias, i, n):
    """row = what 16 sums begin with: columns i to i + 15 of the n columns of a bias; 0 beyond n or without a bias."""
    for r in range(ROWS):
        row[r] = f32_at(bias, n)[i + r] if bias and i + r < n else np.float32(0)


PLACES = 16 * TOKENS  # bytes of the addresses that tile_at reads
GATE_UP_SCRATCH = PLACES + TOKENS * (2 * _PAIR + 4 * BLOCK)


@functools.cache
def gate_up(panel: int, activation: str) -> TapeOp:
    """out[p] = weights[p] * activation(gate[e] @ x[t]) * (up[e] @ x[t]) for each pair p of expert e and token t.

    Return the op. A unit of work is 32 columns of an expert's pairs. Fields are as in matmul, and

    plan, weights: see route.
    n_out: columns of out. Rows of out have memory for whole units.
    expert_bytes: bytes of the panels of an expert.
    w: panels of the gates.
    to_up: bytes from a panel of a gate to the panel of `up`.
    out, q8: rows of the pairs as f32 and as int8, or 0.
    bias, bias_up: f32[n_expert, n_out], or 0.
    scratch: GATE_UP_SCRATCH bytes for each thread.
    """
    tokens, panels, activation_id = TOKENS, tile_panels(panel), ACTIVATIONS.index(activation)

    @op(
        "rows n_expert n_used plan weights n_out n_steps step_bytes group_bytes expert_bytes w to_up x x_stride "
        "out out_stride q8 q8_stride bias bias_up scratch scratch_stride"
    )
    def moe_gate_up(args, piece, ith, nth):
        a = carray(args, 1)[0]
        n_pairs = i64_at(a.rows, 1)[0] * a.n_used
        n_unit = (a.n_out + BLOCK - 1) // BLOCK
        n_items = i64_at(a.plan, 1)[0] * n_unit
        n_piece = n_shrinking(n_items, max(1, _PIECE_BYTES // (4 * a.group_bytes)), nth)
        if piece < 0:
            return n_piece
        experts, firsts, token_of = plan_parts(a.plan, a.n_expert, n_pairs)
        weights = f32_at(a.weights, n_pairs)
        places = a.scratch + ith * a.scratch_stride
        pair = places + PLACES
        spare = pair + tokens * 2 * _PAIR
        at = i64_at(places, 2 * tokens)
        item, end = shrinking(piece, n_items, n_piece)
        while item < end:
            i, u0 = item // n_unit, item % n_unit
            u1 = min(n_unit, u0 + min(end - item, _UNITS))
            item += u1 - u0
            e = experts[i]
            w0 = a.w + e * a.expert_bytes
            bias = a.bias + 4 * e * a.n_out if a.bias else 0
            bias_up = a.bias_up + 4 * e * a.n_out if a.bias else 0
            for p0 in range(firsts[i], firsts[i + 1], tokens):
                n = min(tokens, firsts[i + 1] - p0)
                for k in range(tokens):  # if fewer pairs are left, the last one is repeated
                    at[k] = a.x + token_of[p0 + min(k, n - 1)] * a.x_stride
                    at[tokens + k] = pair + k * 2 * _PAIR
                if n == 1:
                    at[1] = pair
                for unit in range(u0, u1):
                    for half in range(BLOCK // ROWS):
                        w = w0 + (unit * (BLOCK // ROWS) + half) * a.group_bytes
                        for k in range(n):
                            row, column = pair + k * 2 * _PAIR, unit * BLOCK + half * ROWS
                            _start(f32_at(row, ROWS), bias, column, a.n_out)
                            _start(f32_at(row + _PAIR, ROWS), bias_up, column, a.n_out)
                        if n == 1:
                            for h in range(2):
                                if unit == u0 and half == 0:
                                    prefetch(w + h * a.to_up)
                                tile_at(panel, 1, 1, w + h * a.to_up, 0, a.step_bytes, a.n_steps, places, h * _PAIR)
                        else:
                            for h in range(0, 2, panels):
                                tile_at(
                                    panel, panels, tokens, w + h * a.to_up, a.to_up, a.step_bytes, a.n_steps,
                                    places, h * _PAIR,
                                )  # fmt: skip
                        for k in range(n):
                            row = pair + k * 2 * _PAIR
                            gated_row(activation_id, row, row + _PAIR, row, 1)
                            made, to = f32_at(row, ROWS), f32_at(spare + k * BLOCK * 4 + half * _PAIR, ROWS)
                            for r in range(ROWS):
                                to[r] = made[r] * weights[p0 + k]
                    for k in range(n):
                        block = spare + k * BLOCK * 4
                        if a.q8:
                            quantize_row(block, 1, a.q8 + (p0 + k) * a.q8_stride + unit * 2 * BLOCK)
                        if a.out:
                            out, made = (
                                f32_at(a.out + (p0 + k) * a.out_stride + unit * BLOCK * 4, BLOCK),
                                f32_at(block, BLOCK),
                            )
                            for c in range(BLOCK):
                                out[c] = made[c]
        return 0

    return moe_gate_up


@functools.cache
def down(panel: int) -> TapeOp:
    """out[t] += down[e] @ x[p] (+ weights[p] * bias[e]) for each pair p of expert e and token t.

    Return the op. A piece of work is some columns of all pairs: no two threads add to the same number. Fields are as in
    gate_up, and

    x: rows of the pairs, already weighted.
    n_out: columns of out. Rows of out have memory for whole panels.
    scratch: PLACES bytes and a row for each thread. Nobody reads the row.
    """
    tokens, panels = TOKENS, tile_panels(panel)

    @op(
        "rows n_expert n_used plan weights n_out n_steps step_bytes group_bytes expert_bytes w x x_stride "
        "out out_stride bias scratch scratch_stride"
    )
    def moe_down(args, piece, ith, nth):
        a = carray(args, 1)[0]
        n_tokens, n_active = i64_at(a.rows, 1)[0], i64_at(a.plan, 1)[0]
        n_group = (a.n_out + ROWS - 1) // ROWS
        n_piece, g0, g1, _, _ = cut(piece, n_tokens, 1, n_group, n_active * a.group_bytes, _GROUPS, panels, nth)
        if piece < 0:
            return n_piece
        n_pairs = n_tokens * a.n_used
        experts, firsts, token_of = plan_parts(a.plan, a.n_expert, n_pairs)
        weights = f32_at(a.weights, n_pairs)
        places = a.scratch + ith * a.scratch_stride
        at = i64_at(places, 2 * tokens)
        for i in range(n_active):
            w = a.w + experts[i] * a.expert_bytes
            for p0 in range(firsts[i], firsts[i + 1], tokens):
                n = min(tokens, firsts[i + 1] - p0)
                for k in range(tokens):
                    at[k] = a.x + (p0 + min(k, n - 1)) * a.x_stride
                    at[tokens + k] = a.out + token_of[p0 + k] * a.out_stride if k < n else places + PLACES
                if n == 1:
                    at[1] = at[tokens]
                    prefetch(w + g0 * a.group_bytes)
                g = g0
                while g < g1:
                    here = w + g * a.group_bytes
                    if n == 1:
                        tile_at(panel, 1, 1, here, 0, a.step_bytes, a.n_steps, places, g * ROWS * 4)
                        g += 1
                    elif g + panels <= g1:
                        tile_at(
                            panel, panels, tokens, here, a.group_bytes, a.step_bytes, a.n_steps, places, g * ROWS * 4
                        )
                        g += panels
                    else:
                        tile_at(panel, 1, tokens, here, 0, a.step_bytes, a.n_steps, places, g * ROWS * 4)
                        g += 1
                if a.bias:
                    bias = f32_at(a.bias + 4 * experts[i] * a.n_out, a.n_out)
                    for p in range(p0, p0 + n):
                        out = f32_at(a.out + token_of[p] * a.out_stride, a.n_out)
                        for o in range(g0 * ROWS, min(g1 * ROWS, a.n_out)):
                            out[o] += weights[p] * bias[o]
        return 0

    return moe_down
