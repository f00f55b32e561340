"""gguf-info: what it shows of real and built files, as text and as JSON, and how it ends."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real
from adapter_files import random_pairs, write_adapter
from click.testing import CliRunner, Result
from ggufbuild import T, Typed, write, write_split
from tinymodel import Tiny, tiny_moe, write_tiny

from gguf_run.runtime.cli.info import main


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def small(folder: Path, **changes: Any) -> Path:
    pairs: dict[str, Any] = {
        "general.architecture": "unheard-of",
        "general.name": "a\nb\x1b[31m" + "x" * 200,
        "a.eps": 1e-5,
        "a.odd": [1.5, float("inf"), float("nan")],
        "a.long": np.arange(100, dtype=np.int32),
        "a.words": [f"w{i}" for i in range(9)],
        "a.nested": Typed("[[i32]]", [[1, 2], [3]]),
        "a.yes": True,
        "a.none": Typed("[f32]", []),
    }
    tensors = [T("small", (64,)), T("large", (64, 32), "Q8_0"), T("other", (64, 2))]
    return write(folder / "m.gguf", pairs | changes, tensors)


def test_text(tmp_path: Path) -> None:
    result = run(small(tmp_path), "--tensors")
    assert (result.exit_code, result.stderr) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line}
    assert rows["a.eps"] == ["f32", "1e-05"]
    assert rows["a.odd"] == ["array[f32]", "[3]", "1.5,", '"inf",', '"nan"']
    assert rows["a.long"] == ["array[i32]", "[100]", "0,", "1,", "2,", "3,", "4,", "5,", "6,", "7,", "..."]
    assert rows["a.words"][-2:] == ['"w7",', "..."]
    assert rows["a.nested"] == ["array[array]", "[2]", '"array', "of", '2",', '"array', "of", '1"']
    assert rows["a.yes"] == ["bool", "true"]
    assert rows["a.none"] == ["array[f32]", "[0]"]
    assert rows["general.name"][:2] == ["string", "a"]
    assert rows["Q8_0"] == ["1", "2,048", "2.18", "kB", "8.50"]
    assert rows["F32"] == ["2", "192", "768", "B", "32.00"]
    assert rows["all"] == ["3", "2,240", "2.94", "kB", "10.51"]
    assert rows["large"] == ["Q8_0", "64", "x", "32", "2.18", "kB"]
    assert "memory needed: unknown (general.architecture is 'unheard-of'" in result.stdout
    assert "\x1b" not in result.stdout
    values = (line for line in result.stdout.splitlines() if not line.startswith("memory needed"))
    assert max(map(len, values)) < 250


def test_json(tmp_path: Path) -> None:
    result = run(small(tmp_path), "--json", "--tensors")
    assert result.exit_code == 0
    facts = json.loads(result.stdout, parse_constant=pytest.fail)
    assert (facts["version"], facts["byte_order"], facts["alignment"]) == (3, "little", 32)
    assert facts["nbytes"] == (tmp_path / "m.gguf").stat().st_size
    assert facts["metadata"]["general.name"]["value"] == "a\nb\x1b[31m" + "x" * 200
    assert facts["metadata"]["a.long"] == {"type": "array[i32]", "length": 100, "value": list(range(8))}
    assert facts["metadata"]["a.odd"]["value"] == [1.5, "inf", "nan"]
    assert facts["metadata"]["a.eps"] == {"type": "f32", "value": float(np.float32(1e-5))}
    assert facts["total"] == {"n_tensors": 3, "n_parameters": 2240, "nbytes": 2944, "bits_per_weight": 10.514}
    assert [row["type"] for row in facts["types"]] == ["Q8_0", "F32"]
    assert facts["tensors"][1] == {"name": "large", "type": "Q8_0", "ne": [64, 32], "nbytes": 2176}
    assert "unheard-of" in facts["memory"]["unknown"]
    assert "tensors" not in json.loads(run(tmp_path / "m.gguf", "--json").stdout)


def test_empty_file_has_no_bits_per_weight(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    assert "all                0           0   0 B            -" in run(path).stdout
    assert json.loads(run(path, "--json").stdout)["total"]["bits_per_weight"] is None


def test_split_model(tmp_path: Path) -> None:
    path = write_split(tmp_path)
    assert "in 3 files" in run(path).stdout
    assert json.loads(run(path, "--json").stdout)["n_parts"] == 3


@pytest.mark.parametrize("n_ctx", [None, 1, 8192])
def test_smollm2(n_ctx: int | None) -> None:
    facts = json.loads(run(real.smollm2(), "--json", *(["-c", n_ctx] if n_ctx else [])).stdout)
    assert {row["type"]: row["n_tensors"] for row in facts["types"]} == {"Q4_1": 210, "Q8_0": 1, "F32": 61}
    assert facts["total"]["n_parameters"] == 134_515_008
    assert facts["metadata"]["tokenizer.ggml.tokens"]["length"] == 49152
    memory = facts["memory"]
    assert memory["n_ctx"] == (n_ctx or 4096)
    assert memory["weights"] == facts["total"]["nbytes"]
    # K and V of 3 heads of 64, 2 bytes each, in 30 layers; positions are stored in groups of 32.
    assert memory["cache"] == max(memory["n_ctx"], 64) * 2 * 3 * 64 * 2 * 30
    assert memory["total"] == memory["weights"] + memory["cache"] + memory["buffers"]


def test_smollm2_text() -> None:
    text = run(real.smollm2()).stdout
    assert "general.architecture                    string         llama\n" in text
    assert "llama.attention.layer_norm_rms_epsilon  f32            1e-05\n" in text
    assert "Q4_1             210  106,168,320   66.36 MB         5.00\n" in text
    assert "context of 4096 tokens: weights 96.58 MB, KV cache (f16) 94.37 MB" in text


def test_gpu_plan() -> None:
    """What would go where; the parts are the whole, and embeddings that are the output too are on both."""
    lines = run(real.smollm2(), "--gpu-memory", "700M").stdout.splitlines()[-2:]
    assert lines[0].startswith("cpu: embeddings, layers 0 to 19: ")
    assert lines[1].startswith("cuda:0: layers 20 to 29, output: ")
    assert lines[1].endswith(" of 700.00 MB free (500.00 MB to spare)")
    weights, caches = (re.findall(f"{name} ([0-9.]+) MB", " ".join(lines)) for name in ("weights", "KV cache"))
    assert sum(map(float, weights)) == pytest.approx(96.58, abs=0.02)
    assert sum(map(float, caches)) == pytest.approx(94.37, abs=0.02)
    two = json.loads(run(real.smollm2(), "--json", "--gpu-memory", "1G,3G", "-ngl", "8", "-ts", "1,1").stdout)
    assert [line.partition(":")[0] for line in two["memory"]["placement"]] == ["cpu", "cuda", "cuda"]
    for options, code, words in (
        (["-ngl", "3"], 2, "need --gpu-memory"),
        (["--cpu-moe"], 2, "need --gpu-memory"),
        (["--gpu-memory", "8 GB"], 2, "--gpu-memory 8 GB: must be a number of bytes, as 500M or 2G"),
        (["--gpu-memory", "8G", "-ngl", "31"], 2, "--gpu-layers 31: allowed are 0 to 30"),
        (["--gpu-memory", "600M", "-ngl", "all"], 1, "--gpu-layers 30: out of memory on cuda:0"),
    ):
        result = run(real.smollm2(), *options)
        assert (result.exit_code, result.stdout) == (code, "")
        assert words in result.stderr


@pytest.mark.parametrize(
    ("option", "experts"), [(["--cpu-moe"], "experts of layers 0 to 2"), (["-ncmoe", "1"], "experts of layer 0")]
)
def test_experts_in_the_gpu_plan(option: list[str], experts: str, tmp_path: Path) -> None:
    write_tiny(tmp_path / "moe.gguf", tiny_moe(3))
    lines = run(tmp_path / "moe.gguf", "--gpu-memory", "8G", *option).stdout.splitlines()[-2:]
    told = [line.rsplit(":", 1)[0] for line in lines]
    assert told == ["cuda:0: embeddings, layers 0 to 2, output", f"cpu: {experts}"]


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello, world")
    whole = small(tmp_path)
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:-100])
    for path, message in (
        (tmp_path / "none.gguf", "No such file"),
        (tmp_path, "is a directory"),
        (tmp_path / "text.gguf", "not a GGUF file"),
        (tmp_path / "cut.gguf", "truncated or damaged"),
    ):
        for option in ((), ("--json",)):
            result = run(path, *option)
            assert result.exit_code == 1
            assert result.stdout == ""
            assert result.stderr.startswith(f"error: {path}: ")
            assert message in result.stderr
            assert result.stderr.count("\n") == 1


def test_odd_files(tmp_path: Path) -> None:
    """Strings that are not UTF-8, tensors without elements, no tensors at all: what the reference reads is shown."""
    tensors = [T("t", (32, 0)), T("u", (0, 2), "Q4_0")]
    odd = write(tmp_path / "odd.gguf", {"general.architecture": "llama", "a": b"\xff", "b": [b"\xfe", b"x"]}, tensors)
    for options in ((), ("--tensors", "--stats"), ("--diff", odd), ("--json",)):
        result = run(odd, *options)
        assert result.exit_code == 0, result.output
        assert result.stderr.count("not valid UTF-8") == result.stderr.count("\n") == (2 if "--diff" in options else 1)
    assert run(odd, "--set", "c=1", "-o", tmp_path / "new.gguf").exit_code == 0
    assert b"\xff" in (tmp_path / "new.gguf").read_bytes()
    for metadata in ({"general.architecture": "llama"}, {}):
        nothing = write(tmp_path / "nothing.gguf", metadata)
        assert run(nothing).exit_code == 0
        fit = run(nothing, "--fit")
        assert (fit.exit_code, fit.stderr[:7]) == (1, "error: ")
        assert "internal error" not in fit.stderr


@pytest.mark.parametrize("args", [(), ("a", "b"), ("a", "--what"), ("a", "-c", "x"), ("a", "-c", "1e3")])
def test_wrong_usage(args: tuple[str, ...]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr


def test_context_without_positions() -> None:
    result = run("a", "-c", "0")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "(--ctx-size) is 0; allowed: a whole number from 1" in result.stderr


def test_help_and_version() -> None:
    assert "--ctx-size" in run("-h").stdout
    assert run("--version").stdout.startswith("gguf-info, version ")


@pytest.mark.skipif(os.name == "nt", reason="needs pipes that close")
def test_closed_stdout(tmp_path: Path) -> None:
    """A reader that goes away: nothing on stderr, the exit code of a filter that was cut off."""
    path = write(tmp_path / "m.gguf", {f"key.{i}": i for i in range(20_000)})
    code = "from gguf_run.runtime.cli.info import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(str(path).encode())
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


def test_torch_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from gguf_run.runtime.cli.info import main\n"
        f"main([{str(small(tmp_path))!r}], standalone_mode=False)\n"
        "assert not {'torch', 'triton', 'gguf'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")


def test_adapter(tmp_path: Path) -> None:
    model = Tiny(n_layer=2)
    pairs = random_pairs(model, {"attn_q": 4, "ffn_down": 3})
    result = run(write_adapter(tmp_path / "a.gguf", pairs), "--tensors")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "adapter (LoRA) for 4 tensors of a model: rank 3, 4\n" in result.stdout
    assert "blk.0.attn_q.weight.lora_a" in result.stdout
    facts = json.loads(run(tmp_path / "a.gguf", "--json").stdout)["adapter"]
    assert facts["ranks"] == [3, 4]
    assert facts["n_adapted"] == 4
