"""gguf-convert: what it writes, how it names it, and that nothing half-written is left when it cannot."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import hf_tiny
import numpy as np
import pytest
from click.testing import CliRunner, Result
from peft_files import write_peft
from quantpack import write_safetensors

from gguf_run.formats.gguf.imatrix import Imatrix, Sums
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.cli.convert import main
from gguf_run.runtime.evaluate.imatrix import write as write_imatrix
from gguf_run.runtime.model import Model

CARD = """---
license: apache-2.0
language:
- en
- no
base_model: [owner/Base-7B-v2, https://huggingface.co/other/thing]
pipeline_tag: text-generation
model_name: The Tiny One
---
# A card
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_tiny.plain_llama(tmp_path / "Tiny-0.9M-Instruct")
    return tmp_path / "Tiny-0.9M-Instruct"


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def done(output: Path, *args: Any) -> GGUFFile:
    result = run(*args, "-o", output, "-t", 1)
    assert result.exit_code == 0, result.output
    return GGUFFile.open(output)


def refused(folder: Path, *args: Any, code: int = 1) -> str:
    """The one line of a run that fails and leaves the folder as it was."""
    before = sorted(folder.iterdir())
    result = run(*args)
    assert result.exit_code == code, result.output
    assert sorted(folder.iterdir()) == before
    error = result.output.strip()
    assert "\n" not in error or code == 2
    return error


def test_auto_keeps_the_weights(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text(CARD)
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "do_sample": true}')
    with done(tmp_path / "out.gguf", folder) as file:
        meta = dict(file.metadata)
        types = {name: tensor.type.name for name, tensor in file.tensors.items()}
    assert {type for name, type in types.items() if "norm" not in name} == {"BF16"}
    assert {type for name, type in types.items() if "norm" in name} == {"F32"}
    expected = {
        "general.architecture": "llama", "general.type": "model", "general.file_type": 32,
        "general.name": "The Tiny One",
        "general.size_label": "1.3M",
        "general.license": "apache-2.0", "general.base_model.count": 2, "general.base_model.0.name": "Base-7B-v2",
        "general.base_model.0.organization": "owner",
        "general.base_model.0.repo_url": "https://huggingface.co/owner/Base-7B-v2",
        "general.base_model.1.repo_url": "https://huggingface.co/other/thing",
        "general.sampling.temp": pytest.approx(0.6), "general.sampling.top_k": 20,
        "llama.block_count": 2, "llama.context_length": 512, "llama.embedding_length": 256,
        "llama.feed_forward_length": 512, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0, "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.vocab_size": 300, "llama.rope.dimension_count": 64, "tokenizer.ggml.model": "gpt2",
    }  # fmt: skip
    assert {key: meta.get(key) for key in expected} == expected
    assert list(meta["general.languages"]) == ["en", "no"]
    assert list(meta["general.tags"]) == ["text-generation"]


def test_names_of_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(folder, "--type", "q8_0").exit_code == 0
    assert run(folder, "--type", "F16", "--name", "A Name/of mine", "-o", tmp_path).exit_code == 0
    assert run(folder, "--vocab-only").exit_code == 0
    assert run(folder, "--type", "F32", "--split-max-size", "1M", "-o", "split.gguf").exit_code == 0
    names = {path.name for path in tmp_path.glob("*.gguf")}
    assert {"Tiny-0.9M-Instruct-Q8_0.gguf", "A-Name-of-mine-F16.gguf", "Tiny-0.9M-Instruct-vocab.gguf"} < names
    with GGUFFile.open(tmp_path / "A-Name-of-mine-F16.gguf") as file:
        assert file.metadata["general.name"] == "A Name/of mine"
    with GGUFFile.open(tmp_path / "Tiny-0.9M-Instruct-vocab.gguf") as file:
        assert not file.tensors
        assert len(file.metadata["tokenizer.ggml.tokens"]) == 300
    (first,) = (name for name in names if name.startswith("split-00001-of-"))
    with GGUFFile.open(tmp_path / first) as file:
        assert file.n_parts > 2
        assert len(file.tensors) == 20
    assert not list(tmp_path.glob("*.partial"))


def test_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    result = run(folder, "--type", "Q4_K_M", "--dry-run", "-o", tmp_path)
    assert result.exit_code == 0
    assert "Tiny-0.9M-Instruct-Q4_K_M.gguf" in result.output
    assert "bits per weight" in result.output
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_quantized_checkpoint_keeps_its_blocks(folder: Path, tmp_path: Path) -> None:
    """FP8 would be read as floats: here INT8 of compressed-tensors, whose codes Q8_0 can hold."""
    tensors = hf_tiny.plain_llama(folder)
    rng = np.random.default_rng(3)
    for name in [name for name in tensors if "_proj" in name]:
        shape = tensors[name][1].shape
        tensors[name] = "I8", rng.integers(-127, 128, shape)
        tensors[f"{name}_scale"] = "F16", np.full((shape[0], 1), 0.01, np.float16)
    write_safetensors(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized",
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    with done(tmp_path / "auto.gguf", folder) as file:
        assert file.metadata["general.file_type"] == 7
        assert {t.type.name for n, t in file.tensors.items() if "attn_q.w" in n or "ffn_down" in n} == {"Q8_0"}
        assert file.tensors["token_embd.weight"].type.name == "BF16"
        codes = file.tensors["blk.1.ffn_down.weight"].blocks().view(file.tensors["blk.1.ffn_down.weight"].type.dtype)
        np.testing.assert_array_equal(codes["qs"].reshape(256, 512), tensors["model.layers.1.mlp.down_proj.weight"][1])
    with done(tmp_path / "f16.gguf", folder, "--type", "F16") as file:
        assert {tensor.type.name for tensor in file.tensors.values()} == {"F16", "F32"}


def test_imatrix_is_used(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sums = {
        f"blk.{il}.ffn_down.weight": Sums(rng.random((1, 512), np.float32), np.ones(1, np.float32)) for il in (0, 1)
    }
    write_imatrix(tmp_path / "i.gguf", Imatrix(sums, ("text",), 1, 512))
    with done(tmp_path / "a.gguf", folder, "--type", "Q4_K_S") as plain:
        without = plain.tensors["blk.0.ffn_down.weight"].blocks().tobytes()
    with done(tmp_path / "b.gguf", folder, "--type", "Q4_K_S", "--imatrix", tmp_path / "i.gguf") as file:
        assert file.metadata["quantize.imatrix.entries_count"] == 2
        assert file.tensors["blk.0.ffn_down.weight"].blocks().tobytes() != without


def test_refused_in_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.gguf"
    assert "TYPE is" in refused(tmp_path, folder, "--type", "Q9", "-o", out, code=2)
    assert "leave out" in refused(tmp_path, folder, "--vocab-only", "--split-max-size", "1M", code=2)
    assert "none: No such file or folder" in refused(tmp_path, tmp_path / "none", "-o", out)
    assert "there is no folder" in refused(tmp_path, folder, "-o", tmp_path / "none/out.gguf")
    weights = folder / "model.safetensors"
    assert "is the file that is read" in refused(folder, folder, "-o", weights)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", Mock(return_value=usage._replace(free=1000)))
    assert "the disk has 0.00 GB left" in refused(tmp_path, folder, "-o", out)
    monkeypatch.undo()
    tensors = hf_tiny.plain_llama(folder)
    tensors["model.layers.1.mlp.up_proj.weight"][1][7, 9] = 0x7FC0
    write_safetensors(weights, tensors)
    for type in ("auto", "F16", "Q8_0"):
        error = refused(tmp_path, folder, "--type", type, "-o", out)
        assert str(weights) in error
        assert '"blk.1.ffn_up.weight": 1 of 131072 weights are NaN or infinite, the first at index 1801' in error


def test_run_without_writing(folder: Path) -> None:
    """The folder itself is a model, quantized on the way if wanted: the same logits as of the written file."""
    ids = [1, 2, 3, 250, 17]
    written = folder.with_suffix(".gguf")
    with Model.load(folder, n_threads=1, n_ctx=32, quantize="Q8_0") as model:
        direct = model.logits(ids)
    done(written, folder, "--type", "Q8_0").close()
    with Model.load(written, n_threads=1, n_ctx=32) as model:
        np.testing.assert_array_equal(model.logits(ids), direct)


def test_adapter(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = "model.layers.0.self_attn.q_proj"
    pair = (np.ones((4, 256), np.float32), np.ones((256, 4), np.float32))
    write_peft(tmp_path / "tuned", {module: pair}, base_model_name_or_path=str(folder))
    result = run(tmp_path / "tuned", "--name", "sql")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith(f"{tmp_path / 'sql-F16.gguf'}: ")
    with GGUFFile.open(tmp_path / "sql-F16.gguf") as file:
        assert [*file.tensors] == ["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"]
    assert "to sql-BF16.gguf" in run(tmp_path / "tuned", "--name", "sql", "--type", "bf16", "--dry-run").stdout
    refusal = run(tmp_path / "tuned", "--vocab-only")
    assert (refusal.exit_code, "--vocab-only is for models" in refusal.output) == (2, True)
    refusal = run(folder, "--base", folder)
    assert (refusal.exit_code, "is for adapters" in refusal.output) == (2, True)
