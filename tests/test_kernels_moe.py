"""The CPU backend's mixture of experts against its NumPy twin in float64, one token and one expert at a time."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from cpu_ops import MemoryTensor, Q8Backend, Step, cpu, error, f32_tensor, random_tensor, weights_of

from gguf_run.formats.errors import UnsupportedError
from gguf_run.models.backend import Moe

N_TOKENS = 40


@dataclass(frozen=True)
class Case:
    """types: of gate and up, and of down."""

    types: tuple[str, str]
    n_embd: int
    n_ff: int
    n_expert: int
    moe: Moe
    biases: bool = False
    n_threads: int = 2


CASES = {
    "floats": Case(("F32", "F16"), 48, 24, 5, Moe(2, True, 1.0, "silu")),
    "odd widths": Case(("F32", "F32"), 50, 45, 7, Moe(3, False, 2.5, "swiglu_oai"), biases=True, n_threads=3),
    "one expert": Case(("F16", "F32"), 32, 40, 1, Moe(1, False, 1.0, "gelu")),
    "Q4_K_M": Case(("Q4_K", "Q6_K"), 256, 256, 9, Moe(4, True, 1.0, "silu"), n_threads=3),
    "Q8_0": Case(("Q8_0", "Q8_0"), 64, 352, 70, Moe(8, False, 1.0, "silu"), n_threads=1),
    "float down": Case(("Q8_0", "F16"), 64, 50, 4, Moe(2, True, 1.0, "silu")),
    "gpt-oss": Case(("MXFP4", "MXFP4"), 64, 96, 4, Moe(4, True, 1.0, "swiglu_oai"), biases=True),
}


def experts(type_name: str, n_expert: int, n_out: int, n_in: int, seed: int) -> MemoryTensor:
    return replace(random_tensor(type_name, n_expert * n_out, n_in, seed), ne=(n_in, n_out, n_expert))


def program(case: Case, backend: Any, *, observe: bool = False) -> tuple[Step, Any]:
    """out += moe(x), with products of about 1; and what was observed."""
    rng = np.random.default_rng(1)
    shapes = (case.types[0], case.n_ff, case.n_embd), (case.types[0], case.n_ff, case.n_embd)
    tensors = [
        experts(type_name, case.n_expert, n_out, n_in, seed)
        for seed, (type_name, n_out, n_in) in enumerate([*shapes, (case.types[1], case.n_embd, case.n_ff)])
    ]
    scale = 2 / np.sqrt((weights_of(tensors[:1]) ** 2).mean() * case.n_embd)
    if case.biases:
        tensors += [f32_tensor(rng.standard_normal((case.n_expert, t.ne[1])).astype(np.float32)) for t in tensors[:3]]
    step = Step(backend, N_TOKENS)
    x, logits, out = (
        step.input((rng.standard_normal((N_TOKENS, width)) * factor).astype(np.float32))
        for width, factor in ((case.n_embd, scale), (case.n_expert, 2), (case.n_embd, 1))
    )
    squares = step.rec.moe(x, logits, backend.experts(tensors), case.moe, out, observe=observe)
    return step.finish(out), squares


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
    step.rec.moe(x, logits, step.backend.experts(tensors), Moe(2, True, 1.0, "silu"), out)
    step.finish(out).run(4)
    assert np.isfinite(step.run(1)).all()


def test_gate_and_up_of_two_types_are_refused() -> None:
    tensors = [experts(name, 2, 32, 32, 0) for name in ("F32", "F16", "F32")]
    with pytest.raises(UnsupportedError, match="test and test have the types F32 and F16; this version needs one"):
        cpu(2).experts(tensors)
