"""A matrix for each head, against the float64 product of the same numbers."""

from dataclasses import replace

import numpy as np
import pytest
from cpu_ops import QUANTIZED, Step, as_quantized, cpu, error, random_tensor, weights_of

from gguf_run.formats.errors import UnsupportedError
from gguf_run.models.rare_ops import MatmulHeads

# Tensor type, heads, columns in, columns out, columns that follow.
CASES = (
    ("F32", 4, 24, 32, 8),
    ("F16", 3, 32, 20, 0),
    ("Q8_0", 5, 64, 48, 32),
    ("Q8_0", 16, 128, 512, 64),
    ("Q4_K", 2, 512, 17, 0),
)


@pytest.mark.parametrize(("name", "n_head", "n_in", "n_out", "rest"), CASES)
def test_product_of_each_head(name: str, n_head: int, n_in: int, n_out: int, rest: int) -> None:
    tensor = replace(random_tensor(name, n_head * n_out, n_in), ne=(n_in, n_out, n_head))
    x = np.random.default_rng(1).standard_normal((20, n_head, n_in + rest)).astype(np.float32)
    step = Step(cpu(3), 20)
    out = step.buffer(n_head * (n_out + rest) + 16).columns(16, n_head * (n_out + rest))
    step.add(MatmulHeads(step.input(x.reshape(20, -1)), step.backend.weight([tensor]), out, n_head))
    step.finish(out)
    seen = as_quantized(x[..., :n_in]) if name in QUANTIZED else x[..., :n_in].astype(np.float64)
    expected = np.einsum("hoi,thi->tho", weights_of([tensor]).reshape(n_head, n_out, n_in), seen)
    expected = np.concatenate([expected, x[..., n_in:]], axis=2).reshape(20, -1)
    for n in (1, 2, 3, 9, 20):
        assert error(step.run(n), expected[:n]) < 1e-5


def test_heads_that_are_no_whole_blocks() -> None:
    step = Step(cpu(3), 1)
    tensor = replace(random_tensor("Q8_0", 64, 32), ne=(32, 32, 2))
    out = step.buffer(80)
    step.add(MatmulHeads(step.input(np.zeros((1, 80), np.float32)), step.backend.weight([tensor]), out, 2))
    with pytest.raises(UnsupportedError, match="heads of 40 columns"):
        step.finish(out)
