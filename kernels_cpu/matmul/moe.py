"""The matmuls of a mixture of experts, grouped by expert: gate and up with the activation between them, then down.

moe_route.py has the plan: which experts each token goes to, and the pairs of a token and an expert. The weight of a
pair scales its row between the two matmuls.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.compiler.jit import carray, njit
from gguf_run.kernels_cpu.matmul.matmul import BATCH_AHEAD, MOST, TUNED, cut, tile_for
from gguf_run.kernels_cpu.matmul.moe_route import plan_parts
from gguf_run.kernels_cpu.matmul.tile import prefetch, tile_at
from gguf_run.kernels_cpu.panels.panels import BLOCK, ROWS, TOKENS, Panel, panel_sizes
from gguf_run.kernels_cpu.replay.op import TapeOp, n_shrinking, op, shrinking
from gguf_run.kernels_cpu.rows.activation import gated_row
from gguf_run.kernels_cpu.rows.quantize import quantize_row
from gguf_run.kernels_cpu.vector.native import f32_at, i64_at
from gguf_run.models.ops import ACTIVATIONS

EXPERT_ROWS = BLOCK  # the rows of an expert are filled up to a multiple of this
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
    every: int = 1  # 2: every second matrix belongs to another ExpertMatrix

    @property
    def expert_bytes(self) -> int:
        return -(-self.n_out // EXPERT_ROWS) * (EXPERT_ROWS // ROWS) * self.panel.group_bytes(self.n_in)

    def fields(self) -> dict[str, Any]:
        """Return the fields of a kernel that describe its matrix."""
        sizes = {"n_out": self.n_out, "expert_bytes": self.every * self.expert_bytes}
        return {"w": self.data, "bias": self.bias, **sizes, **panel_sizes(self.panel, self.n_in)}


@dataclass(frozen=True, eq=False)
class CpuExperts:
    """The experts of a layer. gate and up have the same panels. Without a gate, `gate` is `up`, and `up` is None."""

    n_expert: int
    gate: ExpertMatrix
    up: ExpertMatrix | None
    down: ExpertMatrix
    factors: NDArray[np.float32] | None  # f32[n_expert], of the experts' results


@njit(inline="always")
def _start(row, bias, i, n):
    """row = what 16 sums begin with: columns i to i + 15 of the n columns of a bias; 0 beyond n or without a bias."""
    for r in range(ROWS):
        row[r] = f32_at(bias, n)[i + r] if bias and i + r < n else np.float32(0)


PLACES = 16 * TOKENS  # bytes of the addresses that tile_at reads
GATE_UP_SCRATCH = PLACES + TOKENS * (2 * _PAIR + 4 * BLOCK)


@functools.cache
def _gated_columns(panel: int, activation: str, n_part: int, weighs_input: bool) -> Any:
    """Return the kernel to[k] = weights[k] * activation(gate @ x[k]) * (up @ x[k]) for 16 columns of n <= MOST pairs.

    n_part: 1: there is no up.
    weighs_input: the weight is a factor on gate @ x[k] and on up @ x[k] instead.

    e: the expert.
    w: address of the panel of gate.
    column: the first column.
    weights: address of the weights of the pairs.
    places: the thread's scratch.
    to: address of the first result. Each pair has BLOCK numbers there.
    fresh: whether the panels are not in the cache yet.
    begin: whether a piece of work begins here.
    """
    activation_id = ACTIVATIONS.index(activation)

    @njit(inline="always")
    def columns(a, e, w, column, weights, n, places, to, fresh, begin):
        pair = places + PLACES
        bias = a.bias + 4 * e * a.n_out if a.bias else 0
        bias_up = a.bias_up + 4 * e * a.n_out if a.bias_up else 0
        for k in range(n):
            row = pair + k * 2 * _PAIR
            _start(f32_at(row, ROWS), bias, column, a.n_out)
            if n_part == 2:
                _start(f32_at(row + _PAIR, ROWS), bias_up, column, a.n_out)
            else:
                f32_at(row + _PAIR, ROWS)[:] = 1
        ahead = -1 if not fresh else a.ahead if n == 1 else BATCH_AHEAD
        for h in range(n_part):
            if begin:
                prefetch(w + h * a.to_up, ahead)
            tile_at(panel, tile_for(n, n), w + h * a.to_up, a.n_steps, places, h * _PAIR, ahead)
        for k in range(n):
            row = pair + k * 2 * _PAIR
            made, out, weight = f32_at(row, 2 * ROWS), f32_at(to + k * BLOCK * 4, ROWS), f32_at(weights, n)[k]
            if weighs_input:
                for r in range(n_part * ROWS):
                    made[r] *= weight
            gated_row(activation_id, row, row + _PAIR, row, 1)
            for r in range(ROWS):
                out[r] = made[r] if weighs_input else made[r] * weight

    return columns


@functools.cache
def gate_up(panel: int, activation: str, n_part: int = 2, weighs_input: bool = False) -> TapeOp:
    """out[p] = weights[p] * activation(gate[e] @ x[t]) * (up[e] @ x[t]) for each pair p of expert e and token t.

    Return the op. A unit of work is 32 columns of an expert's pairs. For n_part and weighs_input see _gated_columns.
    Fields are as in matmul, and

    plan, weights: see route.
    n_out: columns of out. Rows of out have memory for whole units.
    expert_bytes: bytes of the panels of an expert.
    w: panels of the gates.
    to_up: bytes from a panel of a gate to the panel of `up`.
    out, q8: rows of the pairs as f32 and as int8, or 0.
    bias, bias_up: f32[n_expert, n_out], or 0.
    scratch: GATE_UP_SCRATCH bytes for each thread.
    """
    columns = _gated_columns(panel, activation, n_part, weighs_input)

    @op(
        "rows n_expert n_used plan weights n_out n_steps group_bytes expert_bytes w to_up x x_stride "
        "out out_stride q8 q8_stride bias bias_up scratch scratch_stride" + TUNED
    )
    def moe_gate_up(args, piece, ith, nth):
        a = carray(args, 1)[0]
        n_pairs = i64_at(a.rows, 1)[0] * a.n_used
        n_unit = (a.n_out + BLOCK - 1) // BLOCK
        n_items = i64_at(a.plan, 1)[0] * n_unit
        n_piece = n_shrinking(n_items, max(1, a.piece_bytes // (2 * n_part * a.group_bytes)), nth)
        if piece < 0:
            return n_piece
        experts, firsts, token_of = plan_parts(a.plan, a.n_expert, n_pairs)
        places = a.scratch + ith * a.scratch_stride
        pair = places + PLACES
        spare = pair + TOKENS * 2 * _PAIR
        at = i64_at(places, 2 * TOKENS)
        item, end = shrinking(piece, n_items, n_piece)
        while item < end:
            i, u0 = item // n_unit, item % n_unit
            u1 = min(n_unit, u0 + min(end - item, _UNITS))
            item += u1 - u0
            e = experts[i]
            w0 = a.w + e * a.expert_bytes
            for p0 in range(firsts[i], firsts[i + 1], MOST):
                n = min(MOST, firsts[i + 1] - p0)
                for k in range(MOST):  # if fewer pairs are left, the last one is repeated
                    at[k] = a.x + token_of[p0 + min(k, n - 1)] * a.x_stride
                    at[TOKENS + k] = pair + k * 2 * _PAIR
                for unit in range(u0, u1):
                    for half in range(BLOCK // ROWS):
                        w = w0 + (unit * (BLOCK // ROWS) + half) * a.group_bytes
                        column, weights, to = unit * BLOCK + half * ROWS, a.weights + 4 * p0, spare + half * _PAIR
                        begin = unit == u0 and half == 0
                        columns(a, e, w, column, weights, n, places, to, p0 == firsts[i], begin)
                    for k in range(n):
                        block = spare + k * BLOCK * 4
                        if a.q8:
                            quantize_row(block, 1, a.q8 + (p0 + k) * a.q8_stride + unit * 2 * BLOCK)
                        if a.out:
                            made, at_out = f32_at(block, BLOCK), a.out + (p0 + k) * a.out_stride + unit * BLOCK * 4
                            out = f32_at(at_out, BLOCK)
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

    @op(
        "rows n_expert n_used plan weights n_out n_steps group_bytes expert_bytes w x x_stride "
        "out out_stride bias scratch scratch_stride" + TUNED
    )
    def moe_down(args, piece, ith, nth):
        a = carray(args, 1)[0]
        n_tokens, n_active = i64_at(a.rows, 1)[0], i64_at(a.plan, 1)[0]
        n_group = (a.n_out + ROWS - 1) // ROWS
        n_rows, unit_bytes = min(n_tokens, MOST), n_active * a.group_bytes
        n_piece, g0, g1, _, _ = cut(piece, n_rows, n_group, unit_bytes, a.piece_bytes, _GROUPS, nth)
        if piece < 0:
            return n_piece
        n_pairs = n_tokens * a.n_used
        experts, firsts, token_of = plan_parts(a.plan, a.n_expert, n_pairs)
        weights = f32_at(a.weights, n_pairs)
        places = a.scratch + ith * a.scratch_stride
        at = i64_at(places, 2 * TOKENS)
        for i in range(n_active):
            w = a.w + experts[i] * a.expert_bytes
            for p0 in range(firsts[i], firsts[i + 1], MOST):
                n = min(MOST, firsts[i + 1] - p0)
                for k in range(MOST):
                    at[k] = a.x + (p0 + min(k, n - 1)) * a.x_stride
                    at[TOKENS + k] = a.out + token_of[p0 + k] * a.out_stride if k < n else places + PLACES
                ahead = -1 if p0 > firsts[i] else a.ahead if n == 1 else BATCH_AHEAD
                prefetch(w + g0 * a.group_bytes, ahead)
                for g in range(g0, g1):
                    here, move = w + g * a.group_bytes, g * ROWS * 4
                    tile_at(panel, tile_for(n, n), here, a.n_steps, places, move, ahead)
                if a.bias:
                    bias = f32_at(a.bias + 4 * experts[i] * a.n_out, a.n_out)
                    for p in range(p0, p0 + n):
                        out = f32_at(a.out + token_of[p] * a.out_stride, a.n_out)
                        for o in range(g0 * ROWS, min(g1 * ROWS, a.n_out)):
                            out[o] += weights[p] * bias[o]
        return 0

    return moe_down
