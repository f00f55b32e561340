"""Names of models as people write them."""

from pathlib import Path

import pytest
from tinymodel import write_tiny

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.hub.names import hub_name


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("hf.co/owner/repo", "hf:owner/repo"),
        ("hf.co/owner/repo:Q4_K_M", "hf:owner/repo:Q4_K_M"),
        ("huggingface.co/owner/repo/", "hf:owner/repo"),
        ("https://huggingface.co/owner/repo", "hf:owner/repo"),
        ("https://HuggingFace.co/owner/repo?show_file_info=x.gguf", "hf:owner/repo"),
        ("https://huggingface.co/owner/repo/tree/main", "hf:owner/repo"),
        ("https://huggingface.co/owner/repo/tree/main/BF16", "hf:owner/repo"),
        ("https://www.huggingface.co/owner/repo/blob/main/x-Q8_0.gguf", "hf:owner/repo/x-Q8_0.gguf"),
        ("https://hf.co/owner/repo/resolve/main/a/x%20y.gguf?download=true", "hf:owner/repo/a/x y.gguf"),
        ("hf://owner/repo", "hf:owner/repo"),
        ("HF:owner/repo:Q4_0", "hf:owner/repo:Q4_0"),
        ("http://mirror.example/owner/repo", "hf:owner/repo"),
        ("hf:owner/repo", "hf:owner/repo"),
        ("models/hf.co/x.gguf", "models/hf.co/x.gguf"),
    ],
)
def test_addresses(address: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example")
    assert hub_name(address) == name


def test_another_branch() -> None:
    with pytest.raises(GgufRunError, match="the branch 'v2' cannot be fetched, only main"):
        hub_name("https://huggingface.co/owner/repo/blob/v2/x.gguf")


def test_a_name_that_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is here under a like name is told, from the caches and from the folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with pytest.raises(GgufRunError, match=r"x.gguf: No such file or folder; gguf-run --list shows .*hf:OWNER/REPO$"):
        find_model(str(tmp_path / "x.gguf"))
    repo = tmp_path / "hf/hub/models--owner--Llama-3.2-1B-GGUF"
    (repo / "snapshots/0123").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0123")
    for path in (repo / "snapshots/0123/Llama-3.2-1B-Q4_K_M.gguf", tmp_path / "my-model-Q8_0.gguf"):
        write_tiny(path)
    cached = "hf:owner/Llama-3.2-1B-GGUF:Q4_K_M"
    for name in ("llama3.2", "Llama-3.2-1B.gguf", "lama-3.2-1b", "owner/Llama-3.2-1B"):
        with pytest.raises(GgufRunError, match=f"here are: {cached};"):
            find_model(name)
    with pytest.raises(GgufRunError, match=f"here are: {tmp_path}/my-model-Q8_0.gguf;"):
        find_model(str(tmp_path / "my-modell.gguf"))
    with pytest.raises(GgufRunError, match=r"on the Hugging Face hub write hf:owner/repo:Q4_0$"):
        find_model("owner/repo:Q4_0")
    with pytest.raises(GgufRunError, match="to ask the default model: gguf-run --prompt TEXT"):
        find_model("What is a cat?")
    with pytest.raises(GgufRunError, match=r"^What is.* … .*: No such file or folder; .* gguf-run --prompt TEXT$"):
        find_model("What is a cat, and what is not? " * 100)  # longer than any name of a file
    with pytest.raises(GgufRunError, match=r"No such file or folder; gguf-run --list shows"):
        find_model("a" * 300)
    with pytest.raises(GgufRunError, match=r"^the name of the model is empty: give the path"):
        find_model("")
    with pytest.raises(GgufRunError, match=r"only addresses of the Hugging Face hub are fetched: get the file"):
        find_model("https://example.com/model.gguf")
    monkeypatch.chdir(tmp_path)
    assert find_model("my-model-Q8_0.gguf") == Path("my-model-Q8_0.gguf")
