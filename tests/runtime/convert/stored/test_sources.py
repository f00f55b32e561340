"""Arrays of a checkpoint as tensors of floats."""

from pathlib import Path

import numpy as np
import pytest
from quantpack import write_safetensors

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.safetensors import read_safetensors
from gguf_run.runtime.convert.stored.sources import float8, floats

X = np.arange(12, dtype=np.float32).reshape(3, 4)


def test_every_float_is_read(tmp_path: Path) -> None:
    bits = (X.view(np.uint32) >> 16).astype(np.uint16)
    tensors = {"a": ("F32", X), "b": ("F16", X), "c": ("BF16", bits), "e": ("F8_E5M2", X.astype(np.uint8))}
    write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    found = read_safetensors(tmp_path / "x.safetensors").arrays
    assert list(found) == list("abce")
    for name in "abc":
        tensor = floats(found[name])
        assert (tensor.ne, tensor.type.name) == ((4, 3), tensors[name][0])
        np.testing.assert_array_equal(dequantize(tensor.blocks(1, 3), tensor.type), X[1:])
    np.testing.assert_array_equal(floats(found["e"]).blocks().view(np.float32), float8("F8_E5M2")[:12].reshape(3, 4))


def test_float8_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    codes = torch.arange(256, dtype=torch.uint8)
    for name, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        np.testing.assert_array_equal(float8(name), codes.view(dtype).float().numpy())
