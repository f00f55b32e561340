"""Probing: the divergence is that of a file with one tensor changed; the file of figures; the command from outside."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tinymodel import Tiny, tiny_moe, write_tiny

from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.cli.quantize import main
from gguf_run.runtime.evaluate.sensitivity import N_CTX, Sensitivity, probe
from gguf_run.runtime.model import Model
from gguf_run.runtime.quantize.allocate import name_of, places, probe_type, relative_errors, with_type
from gguf_run.runtime.quantize.file import quantize_file
from gguf_run.runtime.quantize.file_types import FILE_TYPES
from gguf_run.runtime.quantize.plan import Options, Plan, make_plan
from gguf_run.runtime.quantize.rules import Overrides

TEXT = "the order and another one, or the other end of the road and so on, and then there were none. " * 5
TINY = Tiny(n_layer=1, n_embd=64, n_head=2, n_head_kv=1, n_ff=256, n_ctx=N_CTX, type="F16")


def open_plan(path: Path) -> tuple[GGUFFile, Plan]:
    file = GGUFFile.open(path)
    return file, make_plan(file, Options(FILE_TYPES["Q8_0"], Overrides(pure=True)))


def log_p(path: Path) -> np.ndarray:
    with Model.load(path, n_ctx=N_CTX, device="cpu") as model:
        logits = model.logits(model.tokenize(TEXT)[: N_CTX - 1])[16:].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("tiny", [TINY, replace(tiny_moe(1, "F16"), n_ctx=N_CTX)], ids=["llama", "moe"])
def test_figures_are_those_of_files(tmp_path: Path, tiny: Tiny) -> None:
    write_tiny(tmp_path / "m.gguf", tiny)
    base = log_p(tmp_path / "m.gguf")
    file, plan = open_plan(tmp_path / "m.gguf")
    with file:
        parts = ("token_embd", "attn_k", "ffn_down", "ffn_gate_exps")
        todo = [place for place in places(plan) if any(part in name_of(place) for part in parts)]
        found = dict(probe(file, plan, todo, TEXT, 1))
        assert list(found) == list(map(name_of, todo))
        for place in todo:
            only = [with_type(own, probe_type(place) if own in place else own.source.type) for own in plan.items]
            quantize_file(replace(plan, items=only), tmp_path / "q.gguf", 1, lambda done, total: None)
            q = log_p(tmp_path / "q.gguf")
            kl = (np.exp(base) * (base - q)).sum(axis=1).mean()
            assert kl > 0
            assert found[name_of(place)] == pytest.approx(kl / relative_errors(place, [probe_type(place)])[0], rel=2e-3)
    if tiny.arch == "qwen2moe":
        assert [len(place) for place in places(plan) if "exps" in name_of(place)] == [1, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sensitivity")
    write_tiny(folder / "m.gguf", TINY)
    write_tiny(folder / "other.gguf", replace(TINY, seed=1))
    (folder / "t.txt").write_text(TEXT)
    (folder / "u.txt").write_text(TEXT + "!")
    return folder


def run(folder: Path, *args: object, target: str = "60K", code: int = 0) -> Result:
    words = ["m.gguf", "--target-size", target, "--sensitivity", "s.json", *args, "-t", 1]
    paths = [
        str(folder / str(word)) if str(word).rpartition(".")[2] in ("gguf", "json", "txt") else word for word in words
    ]
    result = CliRunner().invoke(main, [str(word) for word in paths])
    assert result.exit_code == code, result.output
    return result


def test_command(folder: Path) -> None:
    run(folder, "out.gguf", code=2)  # nothing is known
    run(folder, "out.gguf", "--probe", "t.txt", "--save-recipe", "r.txt")
    assert (folder / "out.gguf").stat().st_size <= 60_000
    facts = json.loads((folder / "s.json").read_text())
    with GGUFFile.open(folder / "out.gguf") as file:
        quantized = {t.name: t.type.name for t in file.tensors.values() if t.type.name not in ("F32", "F16")}
        assert facts["tensors"].keys() >= quantized.keys()
        assert file.metadata["general.file_type"] in (2, 3, 7, 8, 9, 25)

    made = CliRunner().invoke(
        main, [str(folder / "m.gguf"), str(folder / "again.gguf"), "Q8_0", "--recipe", str(folder / "r.txt"), "-t", "1"]
    )
    assert made.exit_code == 0, made.output
    with GGUFFile.open(folder / "again.gguf") as file:
        assert {t.name: t.type.name for t in file.tensors.values() if t.name in quantized} == quantized

    # it goes on where it was, and probes what is missing
    del facts["tensors"]["blk.0.ffn_up.weight"]
    (folder / "s.json").write_text(json.dumps(facts))
    assert "1 tensors cost" in run(folder, "--dry-run", code=2).stderr
    assert "was made with another text" in run(folder, "--dry-run", "--probe", "u.txt", code=1).stderr
    assert "should be about" in run(folder, "--dry-run", "--probe", "t.txt").stderr
    assert "should be about" in run(folder, "--dry-run").stderr  # without a text: all is known
    assert "the target is 1000 bytes" in run(folder, "out.gguf", target="1K", code=2).stderr


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tensors": {}}', '{"format": "x", "tensors": {"a": 1}}'])
def test_what_is_no_file_of_figures(folder: Path, text: str) -> None:
    (folder / "bad.json").write_text(text)
    file, plan = open_plan(folder / "m.gguf")
    with file, pytest.raises(FormatError, match=r"bad\.json: is no sensitivity file"):
        Sensitivity.of(file, plan, None).with_file(folder / "bad.json")


def test_another_model(folder: Path) -> None:
    known = []
    for name in ("m.gguf", "other.gguf"):
        file, plan = open_plan(folder / name)
        with file:
            known.append(Sensitivity.of(file, plan, TEXT))
    known[0].write(folder / "a.json")
    assert known[0].with_file(folder / "a.json") == known[0]
    with pytest.raises(GgufRunError, match=r"a\.json: is of another model"):
        known[1].with_file(folder / "a.json")
    replace(known[0], tensors={"a": -1.0}).write(folder / "a.json")
    with pytest.raises(FormatError):
        known[0].with_file(folder / "a.json")
