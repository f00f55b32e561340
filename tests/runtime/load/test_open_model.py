"""Which files and folders are opened as a model, and what is said of others."""

from pathlib import Path

import hf_tiny
import numpy as np
import pytest
from ggufbuild import T, write
from tinymodel import Tiny, write_tiny

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime import LoadOptions, Model
from gguf_run.runtime.load.open_model import open_model


def test_a_gguf_file_beside_a_config(tmp_path: Path) -> None:
    """As repositories with GGUF files have it: the folder is no checkpoint, it has no other weights."""
    write(tmp_path / "m.gguf", {"general.architecture": "llama"}, [T("t", (4,))])
    (tmp_path / "config.json").write_text("{}")
    with pytest.warns(UserWarning, match="m.gguf is opened, the one model in the folder"):
        assert list(open_model(tmp_path).tensors) == ["t"]


def test_a_checkpoint_beside_a_gguf_file(tmp_path: Path) -> None:
    hf_tiny.plain_llama(tmp_path)
    write(tmp_path / "m.gguf", {"general.architecture": "llama"}, [T("t", (4,))])
    assert "token_embd.weight" in open_model(tmp_path).tensors


def test_other_folders(tmp_path: Path) -> None:
    with pytest.raises(GgufRunError, match=r"is an empty folder: there is no config\.json: name the folder"):
        open_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(GgufRunError, match=r"is an adapter \(LoRA\) for its base model, not a model"):
        open_model(tmp_path)


@pytest.mark.parametrize("quantize", [None, "Q4_0"])
def test_files_that_hold_no_model(quantize: str | None, tmp_path: Path) -> None:
    for kind, words in (("adapter", "an adapter"), ("imatrix", "an importance matrix")):
        path = write(tmp_path / f"{kind}.gguf", {"general.type": kind}, [T("t", (4,))])
        with pytest.raises(GgufRunError, match=f"{kind}.gguf: is not a model but {words}"):
            open_model(path, quantize)


@pytest.mark.parametrize(
    ("kind", "type_name", "output"),
    [("fp8", "FP8_E4M3", "Q8_0"), ("INT8", "INT8", "Q8_0"), ("nf4", "NF4", "Q6_K"), ("mxfp4", "MXFP4", "Q6_K")],
)
def test_types_that_no_file_has(kind: str, type_name: str, output: str, tmp_path: Path) -> None:
    """A GGUF file and a checkpoint alike, quantized while they are loaded. They run, and nothing is written."""
    write_tiny(tmp_path / "m.gguf", Tiny(n_embd=256, n_ff=256, head_dim=64, type="F16", tied=False))
    hf_tiny.make("qwen3", tmp_path / "folder", hidden_size=256, intermediate_size=256, head_dim=64)
    for path in (tmp_path / "m.gguf", tmp_path / "folder"):
        tensors = open_model(path, kind).tensors
        types = {name: tensor.type.name for name, tensor in tensors.items() if len(tensor.ne) > 1}
        assert types.pop("output.weight") in (output, "Q8_0")
        assert set(types.values()) == {type_name}
        with Model.load(path, quantize=kind, n_ctx=32, n_threads=1, device="cpu") as model:
            assert np.isfinite(model.logits([1, 2, 3])).all()


def test_types_that_nothing_has(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf")
    with pytest.raises(OptionError, match=r'"fp9": .*allowed are FP8, INT8, NF4, MXFP4, F32, F16, .* or the number'):
        open_model(tmp_path / "m.gguf", "fp9")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activations": "int4"}, "--activations int4: allowed are auto, float, dynamic, static"),
        ({"activations": "float", "device": "cuda"}, "--activations float runs on the CPU only: give --device cpu"),
    ],
)
def test_activations(values: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LoadOptions(**values)  # type: ignore[arg-type]
