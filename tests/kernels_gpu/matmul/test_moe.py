"""The GPU backend's mixture of experts in Triton's interpreter, against NumPy in float64, one expert at a time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_ops import Q8Backend, cpu, error
from gpu_ops import fast_dots, gpu, pytestmark, use_tuning
from moe_ops import N_TOKENS, Case, experts, program
from numpy_backend import NumpyBackend
from tinymodel import tiny_moe, write_tiny

from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_gpu.device.tuning import FEW
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.models.routing import Mixture

__all__ = ["fast_dots", "pytestmark"]
ROUNDED, HALF = 2e-3, 2e-3  # int8 activations, of which a few may be rounded the other way; products of 11 bits
CASES = {
    "floats": (Case(("F32", "BF16"), 48, 24, 3, Mixture(2, True, 1.0, "silu")), (1, 33)),
    "odd widths": (Case(("F16", "F32"), 50, 45, 8, Mixture(3, False, 2.5, "swiglu_oai"), biases=True), (2, 9)),
    "float down": (Case(("Q8_0", "F16"), 64, 50, 4, Mixture(2, True, 1.0, "silu")), (7,)),
    "one expert": (Case(("Q8_0", "Q8_0"), 32, 32, 1, Mixture(1, False, 1.0, "gelu")), (3,)),
    "Q4_K": (Case(("Q4_K", "Q8_0"), 256, 32, 3, Mixture(1, True, 1.0, "silu")), (1,)),
    "biases": (Case(("Q8_0", "Q4_0"), 32, 64, 8, Mixture(2, True, 1.0, "swiglu_oai"), biases=True), (1,)),
    "gpt-oss": (Case(("MXFP4", "MXFP4"), 32, 32, 5, Mixture(1, True, 1.0, "swiglu_oai"), biases=True), (9,)),
    "groups": (
        Case(("F16", "F16"), 32, 32, 12, Mixture(3, True, 2.5, "silu", "sigmoid", 4, 2), bias=0.4, accumulate=False),
        (2, 9),
    ),
    "one group of three": (Case(("F16", "F16"), 32, 24, 9, Mixture(2, False, 16.0, "silu", "softmax", 3, 1, 1)), (2,)),
    "llama4": (
        Case(("Q8_0", "Q8_0"), 64, 32, 5, Mixture(1, False, 1.0, "silu", "sigmoid", weighs_input=True), form="fused"),
        (1, 9),
    ),
    "phimoe": (Case(("F16", "F16"), 32, 24, 50, Mixture(2, False, 1.0, "silu", "sparsemixer")), (2,)),
    "gemma4": (
        Case(("Q8_0", "F16"), 32, 24, 6, Mixture(3, True, 1.0, "gelu"), form="fused", factors=True, accumulate=False),
        (9,),
    ),
    "nemotron": (
        Case(("Q8_0", "Q8_0"), 64, 32, 6, Mixture(2, True, 2.5, "relu2", "sigmoid"), form="up", bias=0.2),
        (1, 9),
    ),
    "up, biases": (Case(("Q8_0", "Q8_0"), 32, 32, 4, Mixture(2, True, 1.0, "gelu"), biases=True, form="up"), (1,)),
    "many": (Case(("Q4_0", "Q4_0"), 32, 32, 60, Mixture(2, False, 0.7, "silu")), (9,)),
}


TUNING = {"tile": (256, 8), "rows": ((1, 16), (2, 16), (4, 16), (8, 16))}


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tuning(monkeypatch, **TUNING)


def check(case: Case, tokens: tuple[int, ...], **options: Any) -> None:
    step, _ = program(case, gpu(), **options)
    exact, q8 = (program(case, backend(np.float64), **options)[0] for backend in (NumpyBackend, Q8Backend))
    few = q8 if not {"F32", "F16", "BF16"} & {*case.types} else exact
    for n in tokens:
        result, expected = step.run(n), (few if n <= FEW else exact).run(n)
        errors = np.abs(result - expected).max(axis=1) / np.abs(expected).max()
        assert errors.max() < HALF, n
        if n <= FEW and few is q8:
            assert np.median(errors) < 1e-5, n


@pytest.mark.parametrize("name", CASES)
def test_moe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tokens, as many as a bucket has or less, and tiles: some full, most not. Up to 9 tokens are fragments."""
    use_tuning(monkeypatch, small=9, **TUNING)
    check(*CASES[name])


@pytest.mark.parametrize("n", [7, 34])
def test_who_is_chosen(n: int) -> None:
    """All tokens want one expert, with more pairs than a tile has; of equal experts the first."""
    scores = np.full((N_TOKENS, 5), -1, np.float32)
    scores[:, 3] = 2
    scores[1::2, 3] = -1
    for n_used in (1,) if n == 34 else (2, 5):
        check(Case(("F16", "F16"), 32, 32, 5, Mixture(n_used, True, 1.0, "silu")), (n,), scores=scores)


def test_whatever_the_router_says() -> None:
    """Nothing outside the weights is read, and good rows stay good."""
    scores = np.zeros((N_TOKENS, 3), np.float32)
    scores[1:5] = [[np.nan, 1, 2], [np.nan] * 3, [np.inf, -np.inf, 0], [-np.inf] * 3]
    step, _ = program(Case(("F16", "F16"), 32, 32, 3, Mixture(2, True, 1.0, "silu")), gpu(), scores=scores)
    for n in (6, 9):
        made = np.isfinite(step.run(n)).all(axis=1)
        assert made.tolist() == [True, True, False, False, False, *[True] * (n - 5)]


@pytest.mark.parametrize("name", ["odd widths", "Q4_K"])
def test_what_experts_read_is_observed(name: str) -> None:
    """Of each expert by itself, before the router's weight; not of rows that only fill up."""
    case, _ = CASES[name]
    (oracle, exact), (step, squares) = (
        program(case, backend, observe=True) for backend in (NumpyBackend(np.float64), gpu())
    )
    for n in (11, 3):
        assert error(step.run(n), oracle.run(n)) < HALF
    for actual, expected in zip(squares, exact, strict=True):
        (sums, counts), (exact_sums, exact_counts) = actual.take(), expected.take()
        np.testing.assert_array_equal(counts, exact_counts)
        assert counts.sum() == 14 * case.moe.n_used
        assert error(sums, exact_sums) < HALF
        assert not any(part.any() for part in actual.take())


def test_experts_on_the_cpu(tmp_path: Path) -> None:
    """All else on the GPU: what experts read and the router's logits cross over."""
    write_tiny(tmp_path / "model.gguf", tiny_moe(1))
    file = GGUFFile.open(tmp_path / "model.gguf")
    config = ModelConfig.from_metadata(file.metadata, file.tensors)
    results = []
    for backend in (gpu(), cpu(2)):
        decoder = Decoder(config, file.tensors, [backend], 32, 16, 16, experts=[cpu(2)])
        assert {*decoder.backends} == {backend, cpu(2)}  # gguf-bench asks what runs where
        results.append(np.concatenate([block.copy() for block in decoder.forward(range(9, 20), 4)]))
    assert error(*results) < 2e-3


def test_gate_and_up_of_two_types_are_refused() -> None:
    tensors = [replace(experts(name, 2, 32, 32, 0), name=name) for name in ("F32", "F16", "F32")]
    with pytest.raises(UnsupportedError, match="F32 and F16 have the types F32 and F16; this version needs one for"):
        gpu().experts(tensors)
