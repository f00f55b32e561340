"""The CPU backend's ops that llama does not need, layer_norm, softcap, gate_rows and an activation without a gate,
against their NumPy twins in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cpu_ops import QUANTIZED, Step, as_quantized, cpu, error, random_tensor, weights_of
from numpy_backend import NumpyBackend

from gguf_run.models.ops import Gated, Matmul
from gguf_run.models.rare_ops import GateRows, LayerNorm, Softcap, Temper
from gguf_run.models.temperature import Temperature

N_TOKENS = 19


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def compare(record: Callable[[Step, Any], Any], values: np.ndarray, n_threads: int, bound: float = 2e-6) -> None:
    """record: adds ops that read a buffer with `values` and returns their result."""
    steps = [Step(backend, N_TOKENS) for backend in (NumpyBackend(np.float64), cpu(n_threads))]
    oracle, step = (step.finish(record(step, step.input(values))) for step in steps)
    for n in (1, 2, 5, N_TOKENS):
        assert error(step.run(n), oracle.run(n)) < bound


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "n_group"), [(7, 1), (33, 1), (4096, 1), (8, 3), (20, 5)])
def test_layer_norm(n: int, n_group: int, bias: bool) -> None:
    width = n * n_group
    weight, more = 1 + 0.3 * normal(width, seed=2), normal(width, seed=3)
    values = normal(N_TOKENS, width) * np.exp(normal(N_TOKENS, 1, seed=1)) + 2

    def record(step: Step, x: Any, in_place: bool) -> Any:
        out = x if in_place else step.buffer(width)
        step.add(LayerNorm(x, step.vector(weight), step.vector(more) if bias else None, out, 1e-5, n_group=n_group))
        return out

    for in_place in (False, True):
        compare(lambda step, x, in_place=in_place: record(step, x, in_place), values, 3)


@pytest.mark.parametrize(("scale", "cap"), [(0.25, 0.0), (1.0, 30.0), (0.5, 3.0)])
@pytest.mark.parametrize("n", [5, 512, 1300])
def test_softcap(n: int, scale: float, cap: float) -> None:
    values = normal(N_TOKENS, n) * 40
    values[0, :4] = [0, 1e-3, -1e30, 1e30]

    def record(step: Step, x: Any) -> Any:
        step.add(Softcap(x, scale, cap))
        return x

    compare(record, np.clip(values, -1e4, 1e4), 2)
    compare(record, values, 1)


@pytest.mark.parametrize("width", [16, 33, 1100])
def test_gate_rows_and_plain_activation(width: int) -> None:
    gates = normal(N_TOKENS, 1, seed=4) * 5

    def record(step: Step, x: Any) -> Any:
        step.add(Gated(x, None, x, "gelu"))
        step.add(GateRows(x, step.input(gates)))
        return x

    compare(record, normal(N_TOKENS, width) * 3, 3)


@pytest.mark.parametrize(("width", "length", "offset"), [(16, 8, 0), (33, 8, 1), (1100, 5, 3)])
def test_temper(width: int, length: int, offset: int) -> None:
    """Factors are 1 at first, and change between two tokens of a batch."""

    def record(step: Step, x: Any) -> Any:
        step.add(Temper(x, Temperature(0.3, length, offset)))
        return x

    compare(record, normal(N_TOKENS, width) * 3, 3)


def test_what_they_leave_is_quantized_anew() -> None:
    """The next matmul reads as int8 what stands in the buffer now, not what stood there when it was read last."""
    values, tensor = normal(N_TOKENS, 64), random_tensor("Q8_0", 16, 64)
    assert "Q8_0" in QUANTIZED
    step = Step(cpu(2), N_TOKENS)
    x, out, weight = step.input(values), step.buffer(64), step.backend.weight([tensor])
    for i, change in enumerate(
        (
            lambda: step.add(LayerNorm(x, step.vector(np.ones(64)), None, x, 1e-5)),
            lambda: step.add(Gated(x, None, x, "silu")),
            lambda: step.add(GateRows(x, step.input(np.zeros((N_TOKENS, 1), np.float32)))),
        )
    ):
        change()
        step.add(Matmul(x, weight, out.columns(16 * i, 16)))
    result = step.finish(out).run(N_TOKENS)
    normed = values - values.mean(1, keepdims=True, dtype=np.float64)
    normed /= np.sqrt((normed**2).mean(1, keepdims=True) + 1e-5)
    activated = normed / (1 + np.exp(-normed))
    expected = [as_quantized(rows) @ weights_of([tensor]).T for rows in (normed, activated, activated / 2)]
    assert error(result[:, :48], np.concatenate(expected, 1)) < 2e-3  # a value may fall on the other side of a half
