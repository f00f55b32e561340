"""What evaluation computes from rows of logits: log(sum(exp)), and the divergence of two distributions.

A sum runs in f32 lanes for a few thousand values, and in f64 beyond. Each thread has a share of the rows.
"""

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.compiler.jit import njit
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.native import f32_at
from gguf_run.kernels_cpu.vector.simd import F32, Simd, Val

_LANES = 64
_VECTOR_BYTES = 4 * _LANES
_RUN = 64  # vectors that are summed in f32, a run
_LOWEST = np.finfo(np.float32).min


def _load(s: Simd, row: Val, i: Val) -> Val:
    return s.load(row + i * _VECTOR_BYTES, F32, _LANES)


@simd_kernel
def _maximum(s: Simd, x: Val, n_vectors: Val) -> Val:
    lowest = s.const(F32, -math.inf, _LANES)
    best = s.loop(n_vectors, [lowest], lambda i, best: [s.maximum(_load(s, x, i), best[0])])
    return s.fold(best[0], s.maximum)


@simd_kernel(floats="shift")
def _sum_exp(s: Simd, x: Val, n_vectors: Val, shift: Val) -> Val:
    """Sum of exp(x - shift)."""
    shifts, zeros = s.splat(shift, _LANES), s.const(F32, 0.0, _LANES)
    return s.sum(s.loop(n_vectors, [zeros], lambda i, total: [total[0] + s.exp(_load(s, x, i) - shifts)])[0])


# KL(p || q) = sum p log(p / q). With t = log p - log q and sum p = sum q = 1 it is also the sum of p t - p + q. No term
# of this sum is negative: it is exactly 0 for equal rows, and small results are not lost between large terms.
# p t - p + q = p (exp(-t) - 1 + t); a series gives it for small t.
_SMALL = 0.25
_SERIES = (1 / 40320, -1 / 5040, 1 / 720, -1 / 120, 1 / 24, -1 / 6, 1 / 2)


@simd_kernel(floats="max_p log_p shift")
def _sum_divergence(s: Simd, p: Val, q: Val, n_vectors: Val, max_p: Val, log_p: Val, shift: Val) -> Val:
    """Sum of p (exp(-t) - 1 + t).

    p, q: addresses of logits. max_p + log_p: log(sum(exp)) of p's logits. shift: log(sum(exp)) of q's less that of p's.
    """
    max_ps, log_ps, shifts = (s.splat(value, _LANES) for value in (max_p, log_p, shift))

    def body(i: Val, total: list[Val]) -> list[Val]:
        a, b = _load(s, p, i), _load(s, q, i)
        log_prob = a - max_ps - log_ps
        t = a - b + shifts
        series = s.const(F32, _SERIES[0], _LANES)
        for c in _SERIES[1:]:
            series = s.fma(series, t, s.const(F32, c, _LANES))
        prob = s.exp(log_prob)
        near = prob * (t * t * series)
        far = prob * (t - 1.0) + s.exp(log_prob - t)
        return [total[0] + s.select(s.absolute(t).compare("<", _SMALL), near, far)]

    return s.sum(s.loop(n_vectors, [s.const(F32, 0.0, _LANES)], body)[0])


@njit
def _max_and_log_sum(x, n):
    """The largest of n values at address x, and log(sum(exp(x - largest))).

    A row may be larger than the caches: each run is read once. A run with a new largest value scales the sum down.
    """
    n_vectors, rest = n // _LANES, f32_at(x, n)[n // _LANES * _LANES :]
    highest = _LOWEST
    for value in rest:
        highest = max(highest, value)
    total = 0.0
    for value in rest:
        total += math.exp(value - highest)
    for start in range(0, n_vectors, _RUN):
        run, count = x + start * _VECTOR_BYTES, min(_RUN, n_vectors - start)
        largest = _maximum(run, count)
        if largest > highest:
            total *= math.exp(highest - largest)
            highest = largest
        total += _sum_exp(run, count, highest)
    return highest, math.log(total)


@njit
def _log_sum_exp(n, first, end, out, x, x_stride):
    for row in range(first, end):
        highest, log_sum = _max_and_log_sum(x + row * x_stride, n)
        out[row] = highest + log_sum


@njit
def _divergence(n, first, end, out, p, p_stride, q, q_stride):
    n_vectors = n // _LANES
    for row in range(first, end):
        a, b = p + row * p_stride, q + row * q_stride
        max_a, log_a = _max_and_log_sum(a, n)
        max_b, log_b = _max_and_log_sum(b, n)
        shift = np.float64(max_b) - max_a + (log_b - log_a)
        total = 0.0
        for start in range(0, n_vectors, _RUN):
            at, count = start * _VECTOR_BYTES, min(_RUN, n_vectors - start)
            total += _sum_divergence(a + at, b + at, count, max_a, np.float32(log_a), np.float32(shift))
        values_a, values_b = f32_at(a, n), f32_at(b, n)
        for i in range(n_vectors * _LANES, n):
            t = np.float64(values_a[i]) - values_b[i] + shift
            total += math.exp(np.float64(values_a[i]) - max_a - log_a) * (math.expm1(-t) + t)
        out[row] = total


class LogSoftmax:
    """Runs on n_threads threads; close() ends them. Logits are float32[n_rows, n_vocab] with contiguous rows."""

    def __init__(self, n_threads: int) -> None:
        self._n_threads = n_threads
        self._threads = ThreadPoolExecutor(n_threads, "log_softmax")

    def log_sum_exp(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return log(sum(exp(logits))) of each row, float64[n_rows]."""
        return self._each_row(_log_sum_exp, logits)

    def divergence(self, p: NDArray[np.float32], q: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the Kullback-Leibler divergence KL(softmax(p) || softmax(q)) of each row, in nats, float64[n_rows].

        It is never negative, and 0 for equal rows.
        """
        return self._each_row(_divergence, p, q)

    def close(self) -> None:
        self._threads.shutdown()

    def _each_row(self, function: Callable[..., None], *rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """Call function(n_vocab, first, end, out, address, stride, ...) for a share of the rows on each thread."""
        n_rows, n_vocab = rows[0].shape
        if any(x.shape != rows[0].shape or x.dtype != np.float32 or x.strides[1] != 4 for x in rows):
            raise ValueError("logits must be float32, of one shape, with values that follow one another in a row")
        out = np.empty(n_rows)
        places = [word for x in rows for word in (x.ctypes.data, x.strides[0])]
        cuts = [n_rows * i // self._n_threads for i in range(self._n_threads + 1)]
        own, *others = itertools.pairwise(cuts)
        shares = [self._threads.submit(function, n_vocab, *share, out, *places) for share in others]
        function(n_vocab, *own, out, *places)
        for share in shares:
            share.result()
        return out
