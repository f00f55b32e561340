"""The gated delta rule, token by token, in f32. Threads take heads, and parts of d_v where there are few heads.

The columns of a state S [d_k, d_v] do not touch each other. WIDE columns stay in the cache for _CHUNK tokens. They
are stored side by side, f32[d_k, WIDE], and columns that are left over one by one. One pass over them for each token
does two things: it writes what the token before has changed, and reads for this token:

    S = e' S + k' d'^T        e', k', d' of the token before
    u = S^T k,  w = S^T q     then d = beta (v - e u), and the result is e w + (k . q) d

k and q are not divided by their lengths: the numbers of TOKEN contain the divisors.

Products of whole chunks of tokens (the paper's form for GPUs) could save a quarter of the arithmetic. In a prompt of a
model of 1 B weights, all of the rule takes 5% of the time.
"""

import functools
import math
from typing import Any

import numpy as np

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import carray, njit
from gguf_run.kernels_cpu.replay.op import PER_THREAD, op
from gguf_run.kernels_cpu.replay.runs import runs_at
from gguf_run.kernels_cpu.rows.norms import FASTMATH
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.simd import F32, Simd, Val

if COMPILING:
    from gguf_run.kernels_cpu.vector.native import f32_at, i64_at

WIDE = 32  # columns of S that are taken at once
_CHUNK = 32  # tokens that are taken with some columns before the next columns
# Numbers of a token and a head: e, e / |k|, e / (|q| sqrt(d_k)), k . q / (|k| |q| sqrt(d_k)), beta, 1 / |k|
_E, _K, _Q, _KQ, _BETA, _D, TOKEN = range(7)


@simd_kernel
def _pass(
    s: Simd, n: int, updates: int, reads: int, source: Val, target: Val, d_k: Val, before: Val, k_before: Val, d: Val,
    now: Val, k: Val, q: Val, v: Val, out: Val,
) -> None:  # fmt: skip
    """One pass over n columns of S, from `source` to `target`.

    before, now: addresses of the TOKEN numbers of the token before and of this one.
    d: address of f32[n], of the token before, then of this one, divided by |k|.
    """
    lanes = min(n, 16)
    at = [4 * i for i in range(0, n, lanes)]

    def number(token: Val, i: int) -> Val:
        return s.load(token + 4 * i, F32, splat=lanes)

    change = [s.load(d + i, F32, lanes) for i in at] if updates else []
    e = number(before, _E) if updates else None

    def body(r: Val, sums: list[Val]) -> list[Val]:
        row = [s.load(source + r * (4 * n) + i, F32, lanes) for i in at]
        if e is not None:
            k_old = s.load(k_before + r * 4, F32, splat=lanes)
            row = [s.fma(k_old, c, x * e) for x, c in zip(row, change, strict=True)]
            for x, i in zip(row, at, strict=True):
                s.store(x, target + r * (4 * n) + i)
        if reads:
            k_now, q_now = (s.load(address + r * 4, F32, splat=lanes) for address in (k, q))
            sums = [s.fma(x, y, total) for x, y, total in zip(row * 2, [k_now] * m + [q_now] * m, sums, strict=True)]
        return sums

    m = len(at)
    sums = s.loop(d_k, [s.const(F32, 0.0, lanes)] * (2 * m) if reads else [], body)
    for i, u, w in zip(at, sums[:m], sums[m:], strict=False):
        change_now = (s.load(v + i, F32, lanes) - u * number(now, _K)) * number(now, _BETA)
        s.store(s.fma(change_now, number(now, _KQ), w * number(now, _Q)), out + i)
        s.store(change_now * number(now, _D), d + i)


@functools.cache
def _columns(n: int) -> Any:
    """Return the function that takes n columns of S, from column c on, through the tokens first .. end of a run.

    old, new: addresses of the head's state before and after the run. numbers: of the run's tokens. d: f32[d_v].
    """

    @njit(inline="always")
    def columns(a, run, first, end, c, old, new, numbers, d, q, k, v, out):
        old, new, d = old + c * a.d_k * 4, new + c * a.d_k * 4, d + c * 4
        for t in range(first, end):
            now, k_now, q_now = numbers + t * TOKEN * 4, k + t * a.k_stride, q + t * a.q_stride
            v_now, to = v + t * a.v_stride + c * 4, out + t * a.out_stride + c * 4
            if t == 0:
                _pass(n, 0, 1, old, new, a.d_k, now, k_now, d, now, k_now, q_now, v_now, to)
            else:
                source, before = old if t == 1 else new, now - TOKEN * 4
                _pass(n, 1, 1, source, new, a.d_k, before, k_now - a.k_stride, d, now, k_now, q_now, v_now, to)
        if end == run.n_tokens:
            t = end - 1
            now, k_now = numbers + t * TOKEN * 4, k + t * a.k_stride
            _pass(n, 1, 0, old if t == 0 else new, new, a.d_k, now, k_now, d, now, k_now, k_now, k_now, k_now)

    return columns


@njit(inline="always")
def _numbers(a, run, head, q, k, to):
    """Write the TOKEN numbers of a run's tokens and a head."""
    n, rate, dt = a.d_k, f32_at(a.a, a.n_head_v)[head], f32_at(a.dt, a.n_head_v)[head]
    for t in range(run.n_tokens):
        q_row, k_row = f32_at(q + t * a.q_stride, n), f32_at(k + t * a.k_stride, n)
        row = f32_at(to + t * TOKEN * 4, TOKEN)
        qq = kk = kq = np.float32(0)
        for i in range(n):
            qq += q_row[i] * q_row[i]
            kk += k_row[i] * k_row[i]
            kq += k_row[i] * q_row[i]
        x = f32_at(a.alpha + (run.first + t) * a.alpha_stride, a.n_head_v)[head] + dt
        beta = f32_at(a.beta + (run.first + t) * a.beta_stride, a.n_head_v)[head]
        e = math.exp(rate * (max(x, 0.0) + math.log1p(math.exp(-abs(x)))))
        by_q, by_k = 1 / math.sqrt((qq + a.eps) * n), 1 / math.sqrt(kk + a.eps)
        row[_E], row[_K], row[_Q], row[_KQ] = e, e * by_k, e * by_q, kq * by_k * by_q
        row[_BETA], row[_D] = 1 / (1 + math.exp(-beta)), by_k


_wide, _single = _columns(WIDE), _columns(1)


@op(
    "n_runs runs n_head_k n_head_v d_k d_v is_tiled q q_stride k k_stride v v_stride alpha alpha_stride "
    "beta beta_stride a dt state out out_stride scratch scratch_stride",
    "eps",
    fastmath=FASTMATH,
)
def delta_rule(args, piece, ith, nth):
    """state: f32[n_slots, n_head_v, d_k * d_v]."""
    a = carray(args, 1)[0]
    n_runs, n_head = i64_at(a.n_runs, 1)[0], a.n_head_v
    n_parts = max(1, min(a.d_v // WIDE, PER_THREAD * nth // (n_runs * n_head)))
    if piece < 0:
        return n_runs * n_head * n_parts
    run, head, part = runs_at(a.runs, n_runs)[piece // n_parts // n_head], piece // n_parts % n_head, piece % n_parts
    first = a.d_v * part // n_parts // WIDE * WIDE
    end = a.d_v if part == n_parts - 1 else a.d_v * (part + 1) // n_parts // WIDE * WIDE
    head_k = head % a.n_head_k if a.is_tiled else head // (n_head // a.n_head_k)
    q, k = a.q + run.first * a.q_stride + head_k * a.d_k * 4, a.k + run.first * a.k_stride + head_k * a.d_k * 4
    v, out = a.v + run.first * a.v_stride + head * a.d_v * 4, a.out + run.first * a.out_stride + head * a.d_v * 4
    numbers = a.scratch + ith * a.scratch_stride
    d = numbers + run.n_tokens * TOKEN * 4
    _numbers(a, run, head, q, k, numbers)
    size = a.d_k * a.d_v * 4
    old, new = a.state + (run.reads * n_head + head) * size, a.state + (run.writes * n_head + head) * size
    if run.n_past == 0:
        f32_at(new + first * a.d_k * 4, (end - first) * a.d_k)[:] = 0
        old = new
    for t in range(0, run.n_tokens, _CHUNK):
        stop = min(t + _CHUNK, run.n_tokens)
        for c in range(first, end - WIDE + 1, WIDE):
            _wide(a, run, t, stop, c, old, new, numbers, d, q, k, v, out)
        for c in range(end - (end - first) % WIDE, end):
            _single(a, run, t, stop, c, old, new, numbers, d, q, k, v, out)
    return 0


def scratch_bytes(n_batch: int, d_v: int) -> int:
    """Return the bytes of scratch memory that a thread needs."""
    return 4 * (n_batch * TOKEN + d_v)
