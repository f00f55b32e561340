"""Recurrent ops on a backend against the float64 twin: runs of any length, several sequences, slots of the state.

A function with the name of an op adds the op to a step and returns its `out`. Its inputs are columns of one buffer, as
in a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from cpu_ops import Step, error
from numpy_backend import NumpyBackend

from gguf_run.models.backend import Run
from gguf_run.models.operands import Buffer
from gguf_run.models.rare_ops import DeltaRule, Scan, ShortConv

N_IDS = 97  # rows of random input; a token's id is its row
N_SLOTS = 6  # of the state: two for each of three sequences
# Numbers of tokens by sequence. The first and the last token of a run may be the same; a run may be shorter than a
# convolution's taps, and longer than any tile. A sequence may pause.
BATCHES: Sequence[Mapping[int, int]] = ({0: 1}, {0: 2}, {0: 3, 2: 1}, {1: 65, 0: 2}, {0: 1, 1: 1, 2: 1}, {2: 40, 1: 1})


def _columns(step: Step, rng: np.random.Generator, *widths: int, scale: Sequence[float] = ()) -> list[Buffer]:
    """Random numbers in columns of one buffer, behind 5 others."""
    parts = [rng.standard_normal((N_IDS, n)) * s for n, s in zip(widths, scale or [1.0] * len(widths), strict=True)]
    both = step.input(np.concatenate([np.full((N_IDS, 5), np.nan), *parts], axis=1))
    starts = 5 + np.cumsum([0, *widths])
    return [both.columns(int(start), n) for start, n in zip(starts, widths, strict=False)]


def short_conv(
    step: Step, rng: np.random.Generator, n: int, n_taps: int, activation: str, has_bias: bool, in_place: bool
) -> Buffer:
    (x,) = _columns(step, rng, n)
    out = x if in_place else step.buffer(n)
    taps, bias = step.vector(rng.standard_normal(n * n_taps)), step.vector(rng.standard_normal(n)) if has_bias else None
    step.add(ShortConv(x, taps, bias, step.backend.state((n_taps - 1) * n, N_SLOTS), out, n_taps, activation))
    return out


def delta_rule(
    step: Step, rng: np.random.Generator, heads: tuple[int, int], d_k: int, d_v: int, is_tiled: bool, in_place: bool
) -> Buffer:
    n_k, n_v = heads
    q, k, v, alpha, beta = _columns(step, rng, n_k * d_k, n_k * d_k, n_v * d_v, n_v, n_v)
    out = v if in_place else step.buffer(n_v * d_v)
    a, dt = step.vector(-np.exp(rng.uniform(-4, 1, n_v))), step.vector(rng.uniform(-5, 1, n_v))
    state = step.backend.state(n_v * d_k * d_v, N_SLOTS)
    step.add(DeltaRule(q, k, v, alpha, beta, a, dt, state, out, n_k, n_v, is_tiled, 1e-6))
    return out


def scan(
    step: Step, rng: np.random.Generator, n_head: int, head_dim: int, n_group: int, n_state: int, in_place: bool
) -> Buffer:
    widths = n_head * head_dim, n_group * n_state, n_group * n_state, n_head
    x, b, c, dt = _columns(step, rng, *widths, scale=(1, 1, 1, 2))
    out = x if in_place else step.buffer(x.width)
    bias = rng.uniform(-7, 1, n_head)
    bias[0] = 22  # beyond where softplus(y) is y
    dt_bias, a, d = (
        step.vector(bias),
        step.vector(-np.exp(rng.uniform(-4, 3, n_head))),
        step.vector(1 + rng.random(n_head)),
    )
    state = step.backend.state(n_head * head_dim * n_state, N_SLOTS)
    step.add(Scan(x, b, c, dt, dt_bias, a, d, state, out, n_head, n_group))
    return out


def check(
    backend: Any,
    op: Callable[..., Buffer],
    *sizes: Any,
    bound: float = 1e-5,
    batches: Sequence[Mapping[int, int]] = BATCHES,
) -> None:
    """Run batches, {sequence: number of tokens}, and compare all rows with the twin's, relative to the largest."""
    n_batch, programs = max(sum(batch.values()) for batch in batches), []
    for each in (backend, NumpyBackend(np.float64)):
        step = Step(each, n_batch)
        programs.append(step.finish(op(step, np.random.default_rng(1), *sizes)).program)
    n_past, slots, rng = dict.fromkeys(range(3), 0), {seq: 2 * seq for seq in range(3)}, np.random.default_rng(2)
    for batch in batches:
        runs = [Run(seq, n_past[seq], n, False, slots[seq], slots[seq] ^ 1) for seq, n in batch.items()]
        ids = rng.integers(0, N_IDS, sum(batch.values()), np.int32)
        actual, expected = (program.run(ids, runs, range(len(ids))).values for program in programs)
        assert error(actual, expected) < bound, (batch, error(actual, expected))
        for seq, n in batch.items():
            n_past[seq] += n
            slots[seq] ^= 1
