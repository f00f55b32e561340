"""Adapters merged into models, and as PEFT adapters: against the engine with --lora, and there and back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import random_pairs, write_adapter
from click.testing import CliRunner
from tinymodel import TINY_GEMMA3, WIDE_LLAMA, Tiny, write_tiny

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.cli.train import main
from gguf_run.runtime.convert.adapter import open_adapter
from gguf_run.runtime.model import Model

RANKS = {"attn_q": 3, "attn_k": 2, "attn_v": 4, "ffn_down": 3}
IDS = [5, 9, 30, 44, 200, 7, 81]


def run(*args: Any) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    return result.exit_code, result.output.strip()


def logits(path: Path, **options: Any) -> np.ndarray:
    with Model.load(path, cache_type="f32", device="cpu", **options) as model:
        return model.logits(IDS)


def test_merged_weights_have_the_logits_of_the_adapter(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", TINY_GEMMA3)
    a = write_adapter(tmp_path / "a.gguf", random_pairs(TINY_GEMMA3, RANKS), "gemma3")
    assert run("merge", tmp_path / "m.gguf", a, "-o", tmp_path / "n.gguf", "--scale", 0.5)[0] == 0
    expected = logits(tmp_path / "m.gguf", lora=[f"{a}:0.5"])
    np.testing.assert_allclose(logits(tmp_path / "n.gguf"), expected, atol=1e-4)
    assert np.abs(logits(tmp_path / "m.gguf") - expected).max() > 0.1


def test_what_rounding_loses_is_said(tmp_path: Path) -> None:
    tiny = replace(WIDE_LLAMA, type="Q4_0", n_ctx=1024)
    write_tiny(tmp_path / "m.gguf", tiny)
    small = {name: (a, b * 1e-3) for name, (a, b) in random_pairs(tiny, {"attn_q": 4, "ffn_up": 4}).items()}
    a = write_adapter(tmp_path / "a.gguf", small)
    (tmp_path / "text.txt").write_text("the cat and the dog " * 300)
    args = ("merge", tmp_path / "m.gguf", a, "-o", tmp_path / "n.gguf", "-f", tmp_path / "text.txt", "--chunks", 1)
    code, text = run(*args)
    assert code == 0
    assert "in 4 of 4 tensors rounding changes more than the adapter: blk." in text
    assert "KL divergence from the model with --lora, merged: " in text
    with GGUFFile.open(tmp_path / "m.gguf") as before, GGUFFile.open(tmp_path / "n.gguf") as after:
        blocks = {name: (tensor.blocks(), after.tensors[name].blocks()) for name, tensor in before.tensors.items()}
        changed = {name for name, (a, b) in blocks.items() if (a != b).any()}
        assert {tensor.type.name for tensor in after.tensors.values()} == {"Q4_0", "F32"}
        assert changed <= set(small)
    code, text = run(*args, "--type", "F16", "--scale", 30)  # the engine rounds activations of Q4_0 alone
    assert code == 0
    assert "rounding changes" not in text
    before_, merged = (float(line.split(": ")[1].split()[0]) for line in text.splitlines() if line.startswith("KL"))
    assert merged < 0.1 * before_


@pytest.mark.parametrize("tiny", [Tiny(), TINY_GEMMA3], ids=["llama", "gemma3"])
def test_peft_and_back(tiny: Tiny, tmp_path: Path) -> None:
    """The pairs of a file have two ranks. Rows of llama's q and k are in another order in a checkpoint."""
    from gguf_run.runtime.convert.back.checkpoint import export_hf

    write_tiny(tmp_path / "m.gguf", tiny)
    a = write_adapter(tmp_path / "a.gguf", random_pairs(tiny, RANKS), tiny.arch)
    args = ("export", a, "--base", tmp_path / "m.gguf", "--peft", "-o", tmp_path / "peft")
    assert run(*args) == (0, f"{tmp_path}/peft is written")
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        export_hf(file, tmp_path / "hf")
    expected, found = (GGUFFile.open(a), open_adapter(tmp_path / "peft", tmp_path / "hf"))
    assert {*expected.tensors} == {*found.tensors}
    alphas = expected.metadata["adapter.lora.alpha"], found.metadata["adapter.lora.alpha"]
    for name, tensor in expected.tensors.items():
        ours, theirs = (one.blocks().view(np.float32) for one in (tensor, found.tensors[name]))
        factor = alphas[0] / alphas[1] if name.endswith("_b") else 1
        np.testing.assert_allclose(ours * np.float32(factor), theirs, rtol=1e-6)
    code, text = run(*args)
    assert code == 1
    assert text.endswith("peft: is there already: name a new folder, or an empty one")


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", Tiny())
    write_tiny(tmp_path / "g.gguf", TINY_GEMMA3)
    a = write_adapter(tmp_path / "a.gguf", random_pairs(TINY_GEMMA3, RANKS), "gemma3")
    code, text = run("merge", tmp_path / "m.gguf", a, "-o", tmp_path / "n.gguf")
    assert (code, "an adapter (LoRA) for this model has" in text) == (1, True)
    code, text = run("merge", tmp_path / "g.gguf", a, "-o", tmp_path / "n.gguf", "--type", "Q9")
    assert (code, 'TYPE is "Q9"' in text) == (2, True)
    code, text = run("merge", tmp_path / "g.gguf", a, "-o", a)
    assert (code, "is the file that is read: name another output" in text) == (1, True)
    assert not (tmp_path / "n.gguf").exists()
