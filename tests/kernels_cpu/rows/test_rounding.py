"""Activations as vLLM rounds them for W8A8: its definitions in NumPy and torch, bit for bit."""

import dataclasses

import numpy as np
import pytest
from cpu_ops import Step, cpu, error, random_tensor, tensor_of, weights_of

from gguf_run.formats.blocks.types import type_by_name
from gguf_run.models.ops import Matmul

torch = pytest.importorskip("torch")


def fp8(x: np.ndarray) -> np.ndarray:
    clipped = torch.tensor(np.clip(x, np.float32(-448), np.float32(448)))
    return clipped.to(torch.float8_e4m3fn).float().numpy()


def scaled_int8_quant(x: np.ndarray, scale: float = 0) -> np.ndarray:
    if scale:
        return np.clip(np.rint(x / np.float32(scale)), -128, 127) * np.float32(scale)
    largest = np.abs(x).max(1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest == 0, np.float32(0), np.float32(127) / largest)
    return np.rint(x * inverse) * (largest / np.float32(127))


def scaled_fp8_quant(x: np.ndarray, scale: float = 0) -> np.ndarray:
    if scale:
        return fp8(x * (np.float32(1) / np.float32(scale))) * np.float32(scale)
    d = np.maximum(np.abs(x).max(1, keepdims=True) / np.float32(448), np.float32(1 / (448 * 512)))
    return fp8(x / d) * d


def per_token_group_quant_fp8(x: np.ndarray, scale: float = 0) -> np.ndarray:
    groups = x.reshape(len(x), -1, 128)
    d = np.maximum(np.abs(groups).max(2, keepdims=True), np.float32(1e-10)) * np.float32(1 / 448)
    return (fp8(groups / d) * d).reshape(x.shape)


KINDS = {
    "dynamic int8": (scaled_int8_quant, ("int8", 0, 0.0)),
    "static int8": (scaled_int8_quant, ("int8", 0, 0.03)),
    "dynamic fp8": (scaled_fp8_quant, ("fp8", 0, 0.0)),
    "static fp8": (scaled_fp8_quant, ("fp8", 0, 0.007)),
    "fp8 in groups": (per_token_group_quant_fp8, ("fp8", 128, 0.0)),
}


def activations() -> np.ndarray:
    """Rows of several sizes, one with an outlier, one of zeros, one with halves between codes."""
    x = np.random.default_rng(0).standard_normal((9, 256)) * np.geomspace(300, 1e-6, 9)[:, None]
    x[2, 17] = 80
    x[5] = 0
    x[6] = np.arange(-128, 128) / 2
    x[6, 0] = 127
    return x.astype(np.float32)


def identity() -> np.ndarray:
    """256 x 256, as FP8: 0x38 is 1."""
    blocks = np.zeros((256, 8), type_by_name("FP8_E4M3").dtype)
    blocks["d"] = 1
    blocks["qs"] = (np.eye(256) * 0x38).reshape(256, 8, 32)
    return blocks.view(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_vllm(kind: str) -> None:
    define, rounding = KINDS[kind]
    x = activations()
    expected = define(x, rounding[2])
    exact = dataclasses.replace(tensor_of(identity(), "FP8_E4M3"), rounding=rounding)
    weights = dataclasses.replace(random_tensor("FP8_E4M3_128", 48, 256), rounding=rounding)
    step = Step(cpu(2), 9)
    read, wide = step.input(x), step.buffer(304)
    step.add(Matmul(read, step.backend.weight([exact]), wide.columns(0, 256)))
    step.add(Matmul(read, step.backend.weight([weights]), wide.columns(256, 48)))
    step.finish(wide)
    for n in (9, 3, 1):
        found = step.run(n)
        np.testing.assert_array_equal(found[:, :256], expected[:n])
        assert error(found[:, 256:], expected[:n].astype(np.float64) @ weights_of([weights]).T) < 1e-5


def test_matrices_with_other_scales_stand_apart() -> None:
    tensors = [
        dataclasses.replace(random_tensor("FP8_E4M3", 16, 256, seed=i), rounding=("fp8", 0, scale))
        for i, scale in enumerate((0.01, 0.01, 0.02))
    ]
    step, x = Step(cpu(2), 9), activations()
    out = step.buffer(48)
    weight = step.backend.weight(tensors)
    assert [part.n_out for part in weight.parts] == [32, 16]
    step.add(Matmul(step.input(x), weight, out))
    expected = [scaled_fp8_quant(x, t.rounding[2]).astype(np.float64) @ weights_of([t]).T for t in tensors]
    assert error(step.finish(out).run(9), np.concatenate(expected, 1)) < 1e-5
