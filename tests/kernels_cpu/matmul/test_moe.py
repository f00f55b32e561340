"""The CPU backend's mixture of experts against its NumPy twin in float64, one token and one expert at a time."""

import numpy as np
import pytest
from cpu_ops import Q8Backend, Step, cpu, error
from moe_ops import Case, experts, program

from gguf_run.formats.errors import UnsupportedError
from gguf_run.models.operands import Mixture
from gguf_run.models.ops import Moe

CASES = {
    "floats": Case(("F32", "F16"), 48, 24, 5, Mixture(2, True, 1.0, "silu")),
    "odd widths": Case(("F32", "F32"), 50, 45, 7, Mixture(3, False, 2.5, "swiglu_oai"), biases=True, n_threads=3),
    "one expert": Case(("F16", "F32"), 32, 40, 1, Mixture(1, False, 1.0, "gelu")),
    "Q4_K_M": Case(("Q4_K", "Q6_K"), 256, 256, 9, Mixture(4, True, 1.0, "silu"), n_threads=3),
    "Q8_0": Case(("Q8_0", "Q8_0"), 64, 352, 70, Mixture(8, False, 1.0, "silu"), n_threads=1),
    "float down": Case(("Q8_0", "F16"), 64, 50, 4, Mixture(2, True, 1.0, "silu")),
    "gpt-oss": Case(("MXFP4", "MXFP4"), 64, 96, 4, Mixture(4, True, 1.0, "swiglu_oai"), biases=True),
    "softmax, bias": Case(("F32", "F32"), 32, 32, 6, Mixture(2, True, 1.0, "silu"), bias=0.3, accumulate=False),
    "sigmoid, groups": Case(("Q4_K", "Q8_0"), 256, 96, 12, Mixture(3, True, 2.5, "silu", "sigmoid", 4, 2), bias=0.4),
    "one group of three": Case(("F32", "F32"), 40, 24, 9, Mixture(2, False, 16.0, "silu", "softmax", 3, 1, 1)),
    "llama4": Case(
        ("F32", "F32"), 48, 40, 5, Mixture(1, False, 1.0, "silu", "sigmoid", weighs_input=True), form="fused"
    ),
    "phimoe": Case(("F32", "F32"), 48, 40, 60, Mixture(2, False, 1.0, "silu", "sparsemixer")),
    "gemma4": Case(
        ("Q8_0", "Q8_0"), 64, 96, 6, Mixture(3, True, 1.0, "silu"), form="fused", factors=True, accumulate=False
    ),
    "fused, biases": Case(("MXFP4", "F32"), 64, 40, 6, Mixture(3, True, 1.0, "swiglu_oai"), biases=True, form="fused"),
    "nemotron": Case(("Q8_0", "Q8_0"), 64, 96, 6, Mixture(2, True, 2.5, "relu2", "sigmoid"), form="up", bias=0.2),
    "up, biases": Case(("Q8_0", "F32"), 64, 45, 4, Mixture(2, True, 1.0, "relu2"), biases=True, form="up"),
}


@pytest.mark.parametrize("name", CASES)
def test_moe(name: str) -> None:
    case = CASES[name]
    (oracle, _), (step, _) = program(case, Q8Backend(np.float64)), program(case, cpu(case.n_threads))
    for n in (1, 2, 3, 5, 33):  # alone, and in tiles that are not full
        # An activation next to the middle of two integers may be rounded the other way, now and then.
        errors = [error(row, expected) for row, expected in zip(step.run(n), oracle.run(n), strict=True)]
        assert np.quantile(errors, 0.75) < 1e-6
        assert max(errors) < 1e-3


@pytest.mark.parametrize("name", ["odd widths", "Q4_K_M"])
def test_what_experts_read_is_observed(name: str) -> None:
    """Of each expert by itself, and before the router's weight."""
    case = CASES[name]
    (oracle, exact), (step, squares) = (
        program(case, backend, observe=True) for backend in (Q8Backend(np.float64), cpu(case.n_threads))
    )
    for n in (33, 1):
        assert error(step.run(n), oracle.run(n)) < 1e-3
    for actual, expected in zip(squares, exact, strict=True):
        (sums, counts), (exact_sums, exact_counts) = actual.take(), expected.take()
        np.testing.assert_array_equal(counts, exact_counts)
        assert counts.sum() == 34 * case.moe.n_used
        assert error(sums, exact_sums) < 1e-5
        assert not actual.take()[0].any()


def test_equal_logits_and_nan_choose_experts_that_exist() -> None:
    """Whatever comes in, nothing outside the weights is read."""
    step = Step(cpu(2), 4)
    tensors = [experts("F32", 3, 32, 32, seed) for seed in range(3)]
    values = np.array([[0, 0, 0], [np.nan, 1, 2], [np.nan] * 3, [np.inf, -np.inf, 0]], np.float32)
    x, logits, out = step.input(np.ones((4, 32), np.float32)), step.input(values), step.input(np.zeros((4, 32)))
    step.add(Moe(x, logits, step.backend.experts(tensors), Mixture(2, True, 1.0, "silu"), out))
    step.finish(out).run(4)
    assert np.isfinite(step.run(1)).all()


def test_gate_and_up_of_two_types_are_refused() -> None:
    tensors = [experts(name, 2, 32, 32, 0) for name in ("F32", "F16", "F32")]
    with pytest.raises(UnsupportedError, match="test and test have the types F32 and F16; this version needs one"):
        cpu(2).experts(tensors)
