"""gguf-run --list: what the caches hold, and the names that take it from there."""

from pathlib import Path

import pytest
import real
from click.testing import CliRunner

from gguf_run.runtime.cli.run import main
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.hub.listing import cached_models


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = real.smollm2()  # before the cache is another one
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    shared = tmp_path / "hf/hub/models--org--two/snapshots/abcd"
    ours = tmp_path / "cache/gguf-run/models"
    for folder in (shared, ours / "hub/own/one", tmp_path / "hf/hub/models--org--two/refs"):
        folder.mkdir(parents=True)
    (shared.parents[1] / "refs/main").write_text("abcd")
    for path in (
        ours / model.name, ours / "hub/own/one/m-Q8_0.gguf", ours / "hub/own/one/mmproj.gguf",
        shared / "a-Q4_1.gguf", shared / "b-Q4_1.gguf", shared / "plain.gguf",
    ):  # fmt: skip
        path.symlink_to(model)
    (ours / "hub/own/one/m-Q4_0.gguf").write_text("no GGUF")
    (ours / "hub/own/one/m-Q5_0.gguf.0123.part").write_text("not yet")
    return tmp_path


def test_names_find_their_files(caches: Path) -> None:
    """Without network, and whatever else is there."""
    names = ["", "hf:org/two/a-Q4_1.gguf", "hf:org/two/b-Q4_1.gguf", "hf:org/two/plain.gguf"]
    names += ["hf:own/one:Q4_0", "hf:own/one:Q8_0"]
    models = cached_models()
    assert [model.name for model in models] == names
    assert [find_model(model.name or None) for model in models] == [model.paths[0] for model in models]


def test_checkpoint_and_split_model(caches: Path) -> None:
    folder = caches / "cache/gguf-run/models/hub/own/two"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "model.safetensors").write_bytes(bytes(1000))
    for i in (1, 2):
        (folder.parent / "one" / f"s-F16-0000{i}-of-00002.gguf").write_bytes(bytes(70))
    found = {model.name: (model.type, model.nbytes, model.kind()) for model in cached_models()}
    assert found["hf:own/two"] == ("checkpoint", 1000, "qwen3")
    assert found["hf:own/one:F16"] == ("F16", 140, "damaged")


def test_list(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = CliRunner().invoke(main, ["--list"]).output.splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["model", "type", "size", "architecture"], ["(the", "default)", "Q4_1", "98.36", "MB", "llama", "135M"],
    ]  # fmt: skip
    assert "damaged" in next(line for line in lines if line.startswith("hf:own/one:Q4_0"))
    verbose = CliRunner().invoke(main, ["--list", "-v"]).output
    assert str(caches / "hf/hub/models--org--two/snapshots/abcd/plain.gguf") in verbose
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches / "none"))
    monkeypatch.setenv("HF_HOME", str(caches / "none"))
    assert str(caches / "none") in CliRunner().invoke(main, ["--list"]).output


def test_damaged_caches(caches: Path) -> None:
    """Each is a line, whatever it holds; names that hold line breaks or escape codes too."""
    hub = caches / "hf/hub"
    for name, commit in (("org--odd", b"dead"), ("org--bytes", b"\xff")):
        (hub / f"models--{name}/refs").mkdir(parents=True)
        (hub / f"models--{name}/refs/main").write_bytes(commit)
    folder = hub / "models--org--odd/snapshots/dead"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("[" * 100_000)
    (folder / "model.safetensors").write_text("x")
    (caches / "cache/gguf-run/models/hub/own/one/a\x1b[31m\nb.gguf").write_text("x")
    lines = CliRunner().invoke(main, ["--list", "-v"]).output.splitlines()
    assert len(lines) == 1 + 6 + 2
    assert any(line.startswith("hf:org/odd ") and " damaged " in line for line in lines)
    assert any(line.startswith(r"hf:own/one/a\x1b[31m b.gguf") for line in lines)
    assert "\x1b" not in "".join(lines)
