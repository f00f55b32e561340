"""Which files and folders are opened as a model, and what is said of others."""

from pathlib import Path

import hf_tiny
import pytest
from ggufbuild import T, write

from gguf_run.formats.errors import GgufRunError
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
