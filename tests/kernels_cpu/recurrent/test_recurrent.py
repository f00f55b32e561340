"""Ops with a state: ragged batches, several sequences in one step, and ten thousand tokens, against float64."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from cpu_ops import Step, cpu, error
from numpy_backend import NumpyBackend

from gguf_run.models.backend import Run
from gguf_run.models.rare_ops import DeltaRule, ShortConv

PIECES = (1, 2, 3, 65, 1, 7)  # tokens of the batches of a text
ROWS = 400  # inputs; then they begin again


def program(backend: Any, add: Callable[[Step, np.random.Generator], Any], n_batch: int = 128) -> Step:
    step = Step(backend, n_batch)
    return step.finish(add(step, np.random.default_rng(5)))


def outputs(step: Step, batches: Sequence[dict[int, int]]) -> np.ndarray:
    """All result rows of steps of {seq: number of tokens}, whose ids count up. A sequence has two slots."""
    n_past, ids, rows = dict[int, int](), 0, []
    for number, batch in enumerate(batches):
        runs = [
            Run(s, n_past.get(s, 0), n, False, 2 * s + number % 2, 2 * s + 1 - number % 2) for s, n in batch.items()
        ]
        n = sum(batch.values())
        values = step.program.run(np.arange(ids, ids + n, dtype=np.int32) % ROWS, runs, range(n)).values
        rows.append(values.astype(np.float64))
        n_past |= {run.seq: run.n_past + run.n_tokens for run in runs}
        ids += n
    return np.concatenate(rows)


def conv(n: int, n_taps: int, activation: str, bias: bool, in_place: bool) -> Callable[..., Any]:
    def add(step: Step, rng: np.random.Generator) -> Any:
        x = step.input(rng.standard_normal((ROWS, n)).astype(np.float32))
        taps, shift = (step.vector(rng.standard_normal(m).astype(np.float32)) for m in (n * n_taps, n))
        out, state = x if in_place else step.buffer(n), step.backend.state((n_taps - 1) * n, 8)
        step.add(ShortConv(x, taps, shift if bias else None, state, out, n_taps, activation))
        return out

    return add


def rule(n_k: int, n_v: int, d_k: int, d_v: int, tiled: bool, in_place: bool = True) -> Callable[..., Any]:
    def add(step: Step, rng: np.random.Generator) -> Any:
        widths = n_k * d_k, n_k * d_k, n_v * d_v, n_v, n_v
        rows = step.input(rng.standard_normal((ROWS, sum(widths))).astype(np.float32))
        q, k, v, alpha, beta = (rows.columns(sum(widths[:i]), n) for i, n in enumerate(widths))
        a = step.vector(-np.exp(np.linspace(-8, 2, n_v)).astype(np.float32))
        dt, state = step.vector(rng.standard_normal(n_v).astype(np.float32)), step.backend.state(n_v * d_k * d_v, 8)
        out = v if in_place else step.buffer(v.width)
        step.add(DeltaRule(q, k, v, alpha, beta, a, dt, state, out, n_k, n_v, tiled, 1e-6))
        return out

    return add


CASES = {
    "conv 4": (conv(8 * 50 + 5, 4, "silu", False, True), 1e-6),
    "conv 3, bias": (conv(700, 3, "identity", True, False), 1e-6),
    "rule 128": (rule(1, 2, 128, 128, True), 1e-5),
    "rule, tiled": (rule(2, 6, 20, 37, True), 1e-5),
    "rule, grouped": (rule(2, 6, 16, 32, False, False), 1e-5),
}


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_batches_of_any_length_and_several_sequences(name: str, n_threads: int) -> None:
    add, bound = CASES[name]
    batches = [{3: 5}, *({0: n, 1: 4 + n % 3} if n > 1 else {1: 1, 0: n} for n in PIECES)]
    actual = outputs(program(cpu(n_threads), add), batches)
    expected = outputs(program(NumpyBackend(np.float64), add), batches)
    assert error(actual, expected) < bound


@pytest.mark.parametrize("name", CASES)
def test_pieces_of_a_text_are_as_the_whole(name: str) -> None:
    add, bound = CASES[name]
    step, n = program(cpu(2), add), sum(PIECES)
    assert error(outputs(step, [{0: size} for size in PIECES]), outputs(step, [{1: n}])) < bound


def test_a_state_is_exact_over_ten_thousand_tokens() -> None:
    add = rule(1, 2, 32, 33, True)
    batches = [{0: 100}, {0: 1}, {0: 99}] * 50
    actual, expected = (outputs(program(backend, add), batches) for backend in (cpu(2), NumpyBackend(np.float64)))
    assert error(actual[-100:], expected[-100:]) < 1e-4
