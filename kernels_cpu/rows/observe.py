"""sums += x^2, column by column: how strongly each input channel of a matrix is used."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.compiler.jit import carray, njit
from gguf_run.kernels_cpu.matmul.moe import plan_parts
from gguf_run.kernels_cpu.replay.op import items, n_pieces, op
from gguf_run.kernels_cpu.vector.native import f32_at, i64_at, pointer

_COLUMNS = 64  # a thread takes whole columns, so that sums do not depend on the number of threads


class CpuSquares:
    """Sums of squares of what one matrix reads, or n_expert matrices: models.operands.SquaresHandle."""

    def __init__(self, width: int, n_expert: int = 1) -> None:
        self.sums, self.counts = np.zeros((n_expert, width)), np.zeros(n_expert, np.int64)

    def take(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        taken = self.sums.copy(), self.counts.copy()
        self.sums[:] = 0
        self.counts[:] = 0
        return taken

    def fields(self) -> dict[str, Any]:
        """The fields of a kernel that adds to the sums."""
        return {"n": self.sums.shape[1], "sums": self.sums, "counts": self.counts}


@njit(inline="always")
def _add(sums, x, scale, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        value = np.float64(x[i]) * scale
        sums[i] += value * value


@op("rows n x x_stride sums counts")
def observe(args, piece, ith, nth):  # type: ignore[no-untyped-def]
    """sums[i] += sum over t of x[t, i]^2. Squares of float32 are exact in float64."""
    a = carray(args, 1)[0]
    if piece < 0:
        return n_pieces(a.n, _COLUMNS, nth)
    first, end = items(piece, a.n, _COLUMNS, nth)
    sums = carray(pointer(a.sums + 8 * first), end - first, np.float64)
    n_tokens = i64_at(a.rows, 1)[0]
    for t in range(n_tokens):
        _add(sums, f32_at(a.x + t * a.x_stride + 4 * first, end - first), 1.0, end - first)
    if piece == 0:
        i64_at(a.counts, 1)[0] += n_tokens
    return 0


@op("rows n_expert n_used plan weights n x x_stride by_pair sums counts")
def observe_experts(args, piece, ith, nth):  # type: ignore[no-untyped-def]
    """The same for each expert by itself, n of its tokens' columns. by_pair: x has rows by pair, weighted (see moe.py),
    which is undone; else by token."""
    a = carray(args, 1)[0]
    if piece < 0:
        return n_pieces(a.n, _COLUMNS, nth)
    first, end = items(piece, a.n, _COLUMNS, nth)
    n_pairs = i64_at(a.rows, 1)[0] * a.n_used
    experts, firsts, token_of = plan_parts(a.plan, a.n_expert, n_pairs)
    weights, counts = f32_at(a.weights, n_pairs), i64_at(a.counts, a.n_expert)
    for i in range(i64_at(a.plan, 1)[0]):
        sums = carray(pointer(a.sums + 8 * (experts[i] * a.n + first)), end - first, np.float64)
        for p in range(firsts[i], firsts[i + 1]):
            row = p if a.by_pair else token_of[p]
            scale = 1 / np.float64(weights[p]) if a.by_pair and weights[p] else 1.0
            _add(sums, f32_at(a.x + row * a.x_stride + 4 * first, end - first), scale, end - first)
        if piece == 0:
            counts[experts[i]] += firsts[i + 1] - firsts[i]
    return 0
