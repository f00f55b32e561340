"""matmul_gated of the CPU backend against the float64 product of the same numbers; fused, and where it cannot be."""

from collections.abc import Sequence

import numpy as np
import pytest
from cpu_ops import QUANTIZED, MemoryTensor, Step, as_quantized, cpu, error, kernel_names, random_tensor, weights_of
from numpy_backend import ACTIVATIONS

from gguf_run.models.ops import Matmul, MatmulGated

BOUND = 1e-5


def check(tensors: Sequence[MemoryTensor], n_threads: int, activation: str, *, bias: bool = False) -> list[str]:
    """Return the names of the ops that were recorded."""
    rng = np.random.default_rng(3)
    w = weights_of(tensors)
    n_ff, n_in = len(w) // 2, w.shape[1]
    x = (rng.standard_normal((70, n_in)) / np.abs(w).sum(1).mean() * 9).astype(np.float32)
    down = random_tensor("Q4_0", 32, n_ff) if n_ff % 32 == 0 else random_tensor("F32", 32, n_ff)
    expected = (as_quantized(x) if tensors[0].type.name in QUANTIZED else x.astype(np.float64)) @ w.T
    options = {}
    step = Step(cpu(n_threads), 70)
    if bias:
        values = rng.standard_normal(2 * n_ff).astype(np.float32)
        options["bias"], expected = step.vector(values), expected + values
    expected = ACTIVATIONS[activation](expected[:, :n_ff]) * expected[:, n_ff:]
    both = step.buffer(n_ff + 32)
    out = both.columns(0, n_ff)
    step.add(MatmulGated(step.input(x), step.backend.weight(tensors), out, activation, **options))
    step.add(Matmul(out, step.backend.weight([down]), both.columns(n_ff, 32)))
    names = kernel_names(step.finish(both))
    for n in (1, 2, 5, 66):
        result = step.run(n)
        made = result[:, :n_ff]
        assert error(made, expected[:n]) < BOUND
        # what the next matmul reads as int8 is what stands there
        read = as_quantized(made) if n_ff % 32 == 0 else made.astype(np.float64)
        assert error(result[:, n_ff:], read @ weights_of([down]).T) < BOUND
    return names


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_K", "Q6_K", "Q8_0", "F16"])
def test_fused(type_name: str) -> None:
    for n_ff, n_threads, activation in ((32, 1, "silu"), (352, 3, "silu"), (96, 2, "gelu")):
        tensors = [random_tensor(type_name, n_ff, 512, seed=seed) for seed in range(2)]
        names = check(tensors, n_threads, activation)
        assert "matmul_gated_panel" in names
        assert "gated_rows" not in names


def test_not_fused() -> None:
    """Two types of weights, a number of columns that is not in blocks, a bias."""
    mixed = [random_tensor(name, 64, 512) for name in ("Q4_K", "Q8_0")]
    odd = [random_tensor("Q4_K", 40, 512, seed=seed) for seed in range(2)]
    with_bias = [random_tensor("Q4_K", 64, 512, seed=seed) for seed in range(2)]
    for tensors, bias in ((mixed, False), (odd, False), (with_bias, True)):
        names = check(tensors, 2, "silu", bias=bias)
        assert "gated_rows" in names
        assert "matmul_gated_panel" not in names


def test_layers_that_are_not_fused_share_one_buffer() -> None:
    """It is as wide as gate and up together: one for each layer would take more memory than the weights."""
    step = Step(cpu(1), 8)
    x = step.input(np.ones((8, 512)))
    weight = step.backend.weight([random_tensor(name, 64, 512) for name in ("Q4_K", "Q8_0")])
    for _ in range(3):
        step.add(MatmulGated(x, weight, step.buffer(64), "silu"))
    memories = step.finish(x).program._tape._buffers.values()
    wide = [memory for memory in memories if memory.shape == (8, 128)]
    assert len(wide) == 1
