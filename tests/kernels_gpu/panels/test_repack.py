"""Repacking into the GPU's panels: the same numbers, bit for bit, for every tensor type."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from cpu_ops import random_tensor
from gpu_ops import DEVICE, gpu, unpack_part

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import CHECKPOINT_TYPES, TENSOR_TYPES, TensorType, type_by_name
from gguf_run.kernels_gpu.panels import repack
from gguf_run.kernels_gpu.panels.panels import PANELS, FloatPanel, matrix_bytes, panel_for
from gguf_run.kernels_gpu.panels.repack import Uploader

ACTIVATIONS_ONLY = ("Q8_1", "Q8_K")
WEIGHTS = [type.name for type in TENSOR_TYPES if type.name not in ACTIVATIONS_ONLY]


def same_bits(actual: np.ndarray, expected: np.ndarray) -> bool:
    return np.array_equal(actual.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_type_keeps_its_numbers(name: str) -> None:
    """Three tensors of one type, one after the other; every bit of the blocks is random."""
    n_in = 3 * type_by_name(name).block_size if name in PANELS and name not in ("F32", "F16", "BF16") else 768
    tensors = [random_tensor(name, n_row, n_in, seed=n_row) for n_row in (5, 1, 12)]
    part = Uploader(DEVICE).repack(tensors)
    expected = np.concatenate([dequantize(tensor.data, tensor.type) for tensor in tensors])
    assert same_bits(unpack_part(part), expected)
    assert part.nbytes == matrix_bytes(name, n_in, 18)


@pytest.mark.parametrize("type", CHECKPOINT_TYPES, ids=lambda type: type.name)
def test_types_of_checkpoints_are_rounded(type: TensorType) -> None:
    """INT8's scales to f16, as Q8_0; all weights of other types to f16."""
    tensors = [random_tensor(type.name, n_row, 256, seed=n_row) for n_row in (16, 5)]
    part = Uploader(DEVICE).repack(tensors)
    if type.name == "INT8":
        fields = [tensor.data.view(type.dtype) for tensor in tensors]
        parts = [f["qs"] * f["d"].astype(np.float16).astype(np.float32)[..., None] for f in fields]
        expected = np.concatenate([part.reshape(len(part), -1) for part in parts])
    else:
        weights = [dequantize(tensor.data, tensor.type) for tensor in tensors]
        expected = np.concatenate(weights).astype(np.float16).astype(np.float32)
    assert same_bits(unpack_part(part), expected)
    assert part.nbytes == matrix_bytes(type.name, 256, 21) == 21 * 256 * (34 / 32 if type.name == "INT8" else 2)


def test_factors_of_matrices() -> None:
    tensor = dataclasses.replace(random_tensor("NVFP4", 6, 128), scales=(0.5, 4.0, 0.125))
    expected = dequantize(tensor.data, tensor.type) * np.repeat(np.float32(tensor.scales), 2)[:, None]
    assert same_bits(unpack_part(Uploader(DEVICE).repack([tensor])), expected)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("n_in", [1, 7, 33])
def test_odd_rows_are_filled_up_with_zeros(name: str, n_in: int) -> None:
    tensor = random_tensor(name, 3, n_in)
    part = Uploader(DEVICE).repack([tensor])
    assert same_bits(unpack_part(part), dequantize(tensor.data, tensor.type))
    assert not part.qs[:, tensor.data.shape[1] :].any()


@pytest.mark.parametrize("name", ["Q6_K", "F16", "IQ2_S"])
def test_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors go through buffers of two or three rows, again and again."""
    monkeypatch.setattr(repack, "_PIECE", 3000)
    uploader = Uploader(DEVICE)
    for n_row in (11, 4):
        tensor = random_tensor(name, n_row, 512, seed=n_row)
        assert same_bits(unpack_part(uploader.repack([tensor])), dequantize(tensor.data, tensor.type))


def test_panels_are_nearly_as_narrow_as_the_file() -> None:
    for name, panel in PANELS.items():
        if isinstance(panel, FloatPanel):
            continue
        row = type_by_name(name).row_bytes(512)
        assert row <= panel.row_bytes(512) <= row * 1.04, name


def test_a_matrix_that_is_used_twice_is_held_once() -> None:
    backend, tensor = gpu(), random_tensor("Q4_0", 8, 64)
    assert backend.table(tensor) is backend.weight([tensor]).parts[0]
    assert backend.nbytes()["weights"] == 8 * 36
    assert panel_for("IQ1_S") is PANELS["F32"]
