"""gguf-eval from outside: tables, JSON, one line for each error, terminals, Ctrl-C."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tinymodel import Tiny, write_tiny

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.writer import GGUFWriter
from gguf_run.runtime.cli.evaluate import main
from gguf_run.runtime.cli.report import Figure
from gguf_run.runtime.evaluate import perplexity as eval_perplexity
from gguf_run.runtime.evaluate.text import Scorer
from gguf_run.runtime.terminal.progress import Progress

RUN = [sys.executable, "-c", "from gguf_run.runtime.cli.evaluate import main; main(prog_name='gguf-eval')"]
PATIENCE = 240  # seconds: a process that hangs is found, a busy machine is not
TEXT = "the order and another one, or the other end of the road and so on, and then there were none. " * 4
SMALL = ["-c", "32", "-t", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models: tiny, another with the same vocabulary, one with another vocabulary; texts and tasks."""
    folder = tmp_path_factory.mktemp("eval")
    write_tiny(folder / "tiny.gguf")
    write_tiny(folder / "other.gguf", Tiny(seed=1))
    write_tiny(folder / "spm.gguf", Tiny(vocab="spm"))
    write_tiny(folder / "bos.gguf", Tiny(pre="llama-bpe"))
    (folder / "renamed.gguf").write_bytes((folder / "tiny.gguf").read_bytes().replace(b"<unused0>", b"<unusedX>"))
    (folder / "text.txt").write_text(TEXT)
    (folder / "text2.txt").write_text(TEXT[1:])
    (folder / "short.txt").write_text("the")
    (folder / "latin1.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_text("")
    tasks = [{"prompt": f"the {i}", "choices": ["order and", "other"], "answer": i % 2} for i in range(5)]
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    (folder / "bad.jsonl").write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n{"prompt": 1}\n')
    (folder / "hella.txt").write_text("".join(f"the {i}\n{i % 4}\norder\nother\nroad\nend\n" for i in range(3)))
    long = ["the order of another " * (1 if i == 2 else 20) for i in range(7)]
    (folder / "hella7.txt").write_text("".join(f"{context}\n0\na\nb\nc\nd\n" for context in long))
    (folder / "hella5.txt").write_text("the\n0\norder\nother\nroad\n")
    os.mkfifo(folder / "pipe")
    for name, answer in (("large", "1" + "0" * 400), ("larger", "1" * 9000), ("true", "true")):
        (folder / f"{name}.jsonl").write_text('{"prompt": "a", "choices": ["b", "c"], "answer": ' + answer + "}\n")
    # Compiles what is not cached yet: no test is to see the line that says so.
    invoke(folder, "perplexity", "tiny.gguf", "-f", "text.txt", *SMALL)
    return folder


def invoke(folder: Path, *arguments: str) -> Result:
    """In this process, in the folder. An exception other than the exit is a failure."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(main, arguments)
    finally:
        os.chdir(before)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "internal error" not in result.stderr
    return result


def figures(folder: Path, *arguments: str) -> dict[str, Any]:
    result = invoke(folder, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    return values


# Results.


def test_perplexity(folder: Path) -> None:
    result = invoke(folder, "perplexity", "tiny.gguf", "-f", "text.txt", *SMALL)
    assert result.exit_code == 0, result.stderr
    head, *rows, last = result.stdout.splitlines()
    assert head.split() == ["chunk", "perplexity"]
    values = figures(folder, "perplexity", "tiny.gguf", "-f", "text.txt", *SMALL)
    assert [row.split() for row in rows] == [[f"{i}", f"{v:.4f}"] for i, v in enumerate(values["running"], 1)]
    assert last == f"perplexity              {values['perplexity']:.6g} ± {values['perplexity_error']:.6g}"
    n_chunk = len(rows)
    assert n_chunk > 4
    assert re.fullmatch(
        rf"{n_chunk} chunks, {32 * n_chunk} tokens in [\d.]+ s, \d+/s \| 2 layers on CPU, 2 .*\n", result.stderr
    )
    assert values["chunks"] == n_chunk
    assert values["running"][-1] == values["perplexity"]
    assert (values["interrupted"], values["n_ctx"], values["threads"]) == (False, 32, 2)
    assert values["tokens_per_second"] == pytest.approx(32 * n_chunk / values["seconds"])


def test_perplexity_options(folder: Path) -> None:
    whole = figures(folder, "perplexity", "tiny.gguf", "-f", "text.txt", *SMALL)
    some = figures(folder, "perplexity", "tiny.gguf", "-f", "text.txt", *SMALL, "--chunks", "2")
    assert (some["chunks"], some["running"]) == (2, whole["running"][:2])
    parts = [
        figures(folder, "perplexity", "tiny.gguf", "-f", "text.txt", *SMALL, *part)
        for part in (["--skip", "1", "--chunks", "1"], ["--skip", "2"])
    ]
    assert [(part["skip"], part["chunks"]) for part in parts] == [(1, 1), (2, whole["chunks"] - 2)]
    assert whole["running"][1] == pytest.approx((whole["running"][0] * parts[0]["perplexity"]) ** 0.5)
    sums = [n * np.log(p) for n, p in ((2, whole["running"][1]), (whole["chunks"] - 2, parts[1]["perplexity"]))]
    assert np.exp(sum(sums) / whole["chunks"]) == pytest.approx(whole["perplexity"])
    windows = figures(folder, "perplexity", "tiny.gguf", "-f", "text.txt", *SMALL, "--stride", "8")
    assert windows["chunks"] > 3 * whole["chunks"]
    assert windows["stride"] == 8


def test_kl_of_a_model_against_itself(folder: Path) -> None:
    for options in (["--base", "tiny.gguf"], ["--base-options", "-t 1"]):
        values = figures(folder, "kl", "tiny.gguf", "-f", "text.txt", *SMALL, *options)
        assert (values["kl_mean"], values["kl_max"], values["kl_99.9"], values["kl_median"]) == (0, 0, 0, 0)
        assert (values["same_top"], values["perplexity_ratio"], values["p_change_rms"]) == (1, 1, 0)


def test_kl_table(folder: Path) -> None:
    result = invoke(folder, "kl", "tiny.gguf", "-f", "text.txt", *SMALL, "--base", "other.gguf", "--chunks", "2")
    assert result.exit_code == 0, result.stderr
    values = figures(folder, "kl", "tiny.gguf", "-f", "text.txt", *SMALL, "--base", "other.gguf", "--chunks", "2")
    lines = result.stdout.splitlines()
    assert lines[2].split() == [
        "2",
        f"{values['perplexity']:.4f}",
        f"{values['perplexity_ratio']:.6f}",
        f"{values['kl_mean']:.6g}",
        f"{100 * values['same_top']:.3f}",
        "%",
    ]
    names = ["perplexity", "perplexity of the base", "ratio", "change of p, mean", "change of p, RMS", "same top token"]
    names += ["KL divergence, mean", "  median", "  90 %", "  95 %", "  99 %", "  99.9 %", "  maximum"]
    assert [line[:24].rstrip() for line in lines[3:]] == names
    assert f"{100 * values['same_top']:.3f} ± {100 * values['same_top_error']:.3f} %" in lines[8]
    keys = [f"kl_{name}" for name in ("median", "90", "95", "99", "99.9", "max")]
    assert sorted(values[key] for key in keys) == [values[key] for key in keys]
    assert values["kl_mean"] > 0.1


def test_compare(folder: Path, tmp_path: Path) -> None:
    """A table with the figures of kl for each text, in the files' order; the same as JSON; and a picture."""
    (folder / "longer.txt").write_text(TEXT[7:])
    texts = ["-f", "text.txt", "-f", "longer.txt", *SMALL, "--chunks", "3", "--skip", "1"]
    arguments = ["compare", "other.gguf", "tiny.gguf", "--base", "tiny.gguf", *texts]
    values = figures(folder, *arguments, "-o", str(tmp_path / "picture.svg"))
    assert (values["base"], values["n_skip"], values["threads"]) == ("tiny.gguf", 1, 2)
    assert [row["chunks"] for row in values["results"]] == [3] * 4
    for i, name in enumerate(("text.txt", "longer.txt")):
        other, tiny = values["results"][2 * i : 2 * i + 2]
        assert (other["text"], other["file"], other["bits_per_weight"]) == (name, "other.gguf", 32)
        assert other["bytes"] == (folder / "other.gguf").stat().st_size
        kl = figures(folder, "kl", "other.gguf", "--base", "tiny.gguf", "-f", name, *texts[4:])
        for key in ("kl_mean", "kl_99", "same_top", "perplexity_ratio"):
            assert other[key] == pytest.approx(kl[key], rel=1e-4), key
        assert (other["kl_ratio"], tiny["kl_mean"], tiny["kl_ratio"]) == (1, 0, 0)
    result = invoke(folder, *arguments)
    assert result.exit_code == 0, result.stderr
    _head, *rows = result.stdout.splitlines()
    assert [row.split()[:2] for row in rows] == [
        [text, file] for text in ("text.txt", "longer.txt") for file in ("other.gguf", "tiny.gguf")
    ]
    found = values["results"][0]
    assert f" {found['kl_mean']:.4g} ± {found['kl_mean_error']:.2g} " in rows[0]
    assert f" {100 * found['same_top']:.4g} ± {100 * found['same_top_error']:.2g} % " in rows[0]
    assert "other" in (tmp_path / "picture.svg").read_text()


def test_compare_by_layer(folder: Path, tmp_path: Path) -> None:
    """Each layer's row is the base with that layer's weights: written as a file, it has the same divergence."""
    arguments = ["--base", "tiny.gguf", "-f", "text.txt", *SMALL, "--chunks", "2"]
    picture = tmp_path / "picture.svg"
    values = figures(folder, "compare", "other.gguf", *arguments, "--by-layer", "-o", str(picture))
    with GGUFFile.open(folder / "tiny.gguf") as base, GGUFFile.open(folder / "other.gguf") as other:
        n_layer = base.metadata["llama.block_count"]
        assert [row["layer"] for row in values["results"]] == list(range(-1, n_layer))
        sources = [(other if name.startswith("blk.1.") else base).tensors[name] for name in base.tensors]
        metadata = {key: base.metadata.typed(key) for key in base.metadata}
        with GGUFWriter(tmp_path / "mixed.gguf", metadata, [*base.tensors.values()]) as writer:
            for tensor in sources:
                writer.write(tensor.name, tensor.blocks())
    mixed = figures(folder, "kl", str(tmp_path / "mixed.gguf"), *arguments)
    row = values["results"][2]
    assert row["kl_mean"] == pytest.approx(mixed["kl_mean"], rel=1e-4)
    assert row["bytes"] == sum(source.nbytes for source in sources if source.name.startswith("blk.1."))
    assert "other.gguf: 1 is the layer" in picture.read_text()
    result = invoke(folder, "compare", "tiny.gguf", *arguments, "--by-layer")
    assert result.stdout.count("tiny.gguf, layer ") == n_layer
    assert "tiny.gguf, other weights" in result.stdout


def test_base_options(folder: Path) -> None:
    """They change the base, and what they do not name is as for the model."""
    arguments = ["kl", "tiny.gguf", "-f", "text.txt", *SMALL, "--chunks", "2"]
    values = figures(folder, *arguments, "--base-options", "--cache-type f32")
    assert 0 < values["kl_mean"] < 1e-5
    expected = {
        "threads": 2,
        "cache_type": "f32",
        "device": "auto",
        "cache_type_k": None,
        "cache_rotation": None,
        "cpu_moe": False,
        "lora": [],
        "activations": "auto",
    }
    rest = ("cache_type_v", "cache_scales", "gpu_layers", "tensor_split", "n_cpu_moe")
    assert values["base_options"] == expected | dict.fromkeys(rest)
    same = figures(folder, *arguments, "--cache-type", "f32", "--base-options", "")
    assert (same["kl_mean"], same["base_options"]["cache_type"]) == (0, "f32")


def test_saved_logits(folder: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "tiny.logits")
    text = ["-f", "text.txt", *SMALL]
    saved = invoke(folder, "kl", "other.gguf", *text, "--save-logits", path)
    assert saved.exit_code == 0, saved.stderr
    assert saved.stderr.startswith(f"{path} holds the logits\n")
    exact = figures(folder, "perplexity", "other.gguf", *text)
    # The context size and the number of chunks are the file's.
    own = figures(folder, "kl", "other.gguf", "-f", "text.txt", "-t", "2", "--base-logits", path)
    assert (own["kl_max"], own["same_top"], own["perplexity_ratio"], own["p_change_rms"]) == (0, 1, 1, 0)
    assert (own["base"], own["n_ctx"], own["chunks"]) == ("other.gguf", 32, exact["chunks"])
    assert own["perplexity_base"] == pytest.approx(exact["perplexity"], rel=1e-12)
    # Nearly what two running models give.
    live = figures(folder, "kl", "tiny.gguf", *text, "--base", "other.gguf", "--chunks", "3")
    from_file = figures(
        folder, "kl", "tiny.gguf", *text, "--base-logits", path, "--chunks", "3", "--base", "other.gguf"
    )
    assert from_file["chunks"] == 3
    for name in ("kl_mean", "kl_max", "kl_median", "perplexity", "perplexity_base", "perplexity_ratio", "same_top"):
        assert from_file[name] == pytest.approx(live[name], rel=1e-4), name


def test_kl_skips_chunks(folder: Path, tmp_path: Path) -> None:
    """A live base, logits that were saved of the whole text, and logits that were saved with --skip say the same."""
    text = ["-f", "text.txt", *SMALL]
    paths = [str(tmp_path / name) for name in ("whole.logits", "skipped.logits")]
    for path, more in zip(paths, ([], ["--skip", "2"]), strict=True):
        assert invoke(folder, "kl", "other.gguf", *text, *more, "--save-logits", path).exit_code == 0
    some = ["--skip", "2", "--chunks", "2"]
    live = figures(folder, "kl", "tiny.gguf", *text, *some, "--base", "other.gguf")
    for path in paths:
        saved = figures(folder, "kl", "tiny.gguf", *text, *some, "--base-logits", path)
        assert (saved["chunks"], saved["skip"]) == (2, 2)
        for name in ("kl_mean", "perplexity", "perplexity_base"):
            assert saved[name] == pytest.approx(live[name], rel=1e-4), name
    result = invoke(folder, "kl", "tiny.gguf", *text, "--base-logits", paths[1])
    assert "was made from another text than text.txt, with another --skip" in result.stderr
    result = invoke(folder, "kl", "tiny.gguf", *text, "--skip", "50", "--base-logits", paths[0])
    assert "--chunks is all; " in result.stderr
    assert "holds 0 behind --skip 50" in result.stderr


def test_choices(folder: Path) -> None:
    values = figures(folder, "choices", "tiny.gguf", "-f", "tasks.jsonl", "-t", "2")
    result = invoke(folder, "choices", "tiny.gguf", "-f", "tasks.jsonl", "-t", "2")
    assert values["tasks"] == 5
    low, high = values["acc_norm_interval_95"]
    assert low < values["acc_norm"] < high
    *_, row, normalized, by_sum = result.stdout.splitlines()
    assert row.split()[:3] == ["5", f"{100 * values['acc_norm']:.3f}", "%"]
    assert normalized == (
        f"accuracy, normalized    {100 * values['acc_norm']:.3f}   95 % interval {100 * low:.3f} to {100 * high:.3f} %"
    )
    assert by_sum.startswith(f"accuracy by sum         {100 * values['acc']:.3f} ")
    assert result.stderr.startswith("5 tasks, ")


def test_hellaswag(folder: Path) -> None:
    assert figures(folder, "hellaswag", "tiny.gguf", "-f", "hella.txt")["tasks"] == 3
    assert figures(folder, "hellaswag", "tiny.gguf", "-f", "hella.txt", "--tasks", "2")["tasks"] == 2
    assert figures(folder, "hellaswag", "tiny.gguf", "-f", "hella.txt", "--tasks", "9")["tasks"] == 3
    assert figures(folder, "hellaswag", "tiny.gguf", "-f", "hella.txt", "--tasks", "2-3")["tasks"] == 2
    each = [figures(folder, "hellaswag", "tiny.gguf", "-f", "hella.txt", "--tasks", f"{i}-{i}") for i in (1, 2, 3)]
    assert [one["tasks"] for one in each] == [1, 1, 1]
    whole = figures(folder, "hellaswag", "tiny.gguf", "-f", "hella.txt")
    assert sum(one["acc_norm"] for one in each) == pytest.approx(3 * whole["acc_norm"])
    # Of seven tasks llama.cpp draws the third first: the only one that this context holds.
    assert figures(folder, "hellaswag", "tiny.gguf", "-f", "hella7.txt", "--tasks", "1", "-c", "40")["tasks"] == 1
    assert invoke(folder, "hellaswag", "tiny.gguf", "-f", "hella7.txt", "--tasks", "2", "-c", "40").exit_code == 1


def test_json_has_no_nan(folder: Path) -> None:
    """The error of a single value is not known."""
    values = figures(folder, "perplexity", "tiny.gguf", "-f", "text.txt", "-c", "4", "--chunks", "1")
    assert values["perplexity_error"] is None
    assert Figure("a", "a", 1.0, float("nan")).line().endswith("1 ± nan")


def test_help() -> None:
    for arguments in (["-h"], ["perplexity", "--help"], ["kl", "-h"], ["hellaswag", "-h"], ["choices", "-h"]):
        result = CliRunner().invoke(main, arguments)
        assert (result.exit_code, result.stderr) == (0, "")


# Bad input: one line.

KL = ["kl", "tiny.gguf", "-f", "text.txt"]
COMPARE = ["compare", "tiny.gguf", "--base", "other.gguf", "-f", "text.txt", *SMALL]
BAD = {
    "missing model": (["perplexity", "no.gguf", "-f", "text.txt"], 1, "no.gguf: "),
    "missing text": (["perplexity", "tiny.gguf", "-f", "no.txt"], 1, "no.txt: No such file"),
    "text is a folder": (["perplexity", "tiny.gguf", "-f", "."], 1, "directory"),
    "text is not UTF-8": (["perplexity", "tiny.gguf", "-f", "latin1.txt"], 1, "latin1.txt: byte 0xe9 at offset 3"),
    "short text": (["perplexity", "tiny.gguf", "-f", "short.txt", *SMALL], 1, "1 tokens, one chunk needs 32"),
    "empty text": (["perplexity", "tiny.gguf", "-f", "empty.txt", *SMALL], 1, "the text has 0 tokens"),
    "short text for kl": (["kl", "tiny.gguf", "-f", "short.txt", "--base", "other.gguf", *SMALL], 1, "the text has"),
    "context": (["perplexity", "tiny.gguf", "-f", "text.txt", "-c", "3"], 2, "--ctx-size is 3; allowed: at least 4"),
    "compare with others": ([*COMPARE, "spm.gguf"], 1, "spm.gguf: has another vocabulary"),
    "chunks to compare": ([*COMPARE, "--chunks", "0"], 2, "--chunks is 0"),
    "place of a picture": ([*COMPARE, "-o", "no/a.svg"], 1, "--output no/a.svg: cannot"),
    "context for kl": ([*KL, "--base", "other.gguf", "-c", "0"], 2, "--ctx-size is 0"),
    "chunks": (["perplexity", "tiny.gguf", "-f", "text.txt", *SMALL, "--chunks", "0"], 2, "--chunks is 0"),
    "stride": (["perplexity", "tiny.gguf", "-f", "text.txt", *SMALL, "--stride", "33"], 2, "--stride is 33"),
    "threads": (["perplexity", "tiny.gguf", "-f", "text.txt", "-t", "0"], 2, "--threads"),
    "cache type": (["perplexity", "tiny.gguf", "-f", "text.txt", "--cache-type", "q1"], 2, "--cache-type is 'q1'"),
    "unknown device": (["perplexity", "tiny.gguf", "-f", "text.txt", "--device", "tpu"], 2, "--device 'tpu'"),
    "nothing to compare": (KL, 2, "nothing to compare with"),
    "save and compare": ([*KL, "--save-logits", "x", "--base", "other.gguf"], 2, "--save-logits saves the logits of"),
    "options of saved logits": ([*KL, "--base-logits", "x", "--base-options", "-t 1"], 2, "--base-options change"),
    "other vocabulary": ([*KL, "--base", "spm.gguf"], 1, "spm.gguf: has another vocabulary than tiny.gguf"),
    "one token's name": ([*KL, "--base", "renamed.gguf"], 1, "renamed.gguf: has another vocabulary than tiny.gguf"),
    "other tokens": ([*KL, "--base", "bos.gguf", *SMALL], 1, "bos.gguf: splits the text into other tokens"),
    "unknown base option": ([*KL, "--base-options", "--wrong 1"], 2, "--base-options '--wrong 1': No such option"),
    "base option's value": ([*KL, "--base-options", "-t two"], 2, "'two' is not a valid integer; allowed are"),
    "base option without value": ([*KL, "--base-options", "-t"], 2, "--base-options '-t': Option '-t' requires"),
    "stray word": ([*KL, "--base-options", "-t 1 f32"], 2, "unexpected extra argument"),
    "open quote": ([*KL, "--base-options", "'"], 2, "No closing quotation"),
    "base option not allowed": ([*KL, *SMALL, "--base-options", "--cache-type q1"], 2, "--cache-type is 'q1'"),
    "missing logits": ([*KL, "--base-logits", "no.logits"], 1, "no.logits: No such file"),
    "not logits": ([*KL, "--base-logits", "text.txt"], 1, "text.txt: is not a file of logits"),
    "logits in a folder": ([*KL, *SMALL, "--save-logits", "."], 1, "is a folder"),
    "bad task": (["choices", "tiny.gguf", "-f", "bad.jsonl"], 1, "bad.jsonl, line 2: has no choices and no answer"),
    "no JSON": (["choices", "tiny.gguf", "-f", "text.txt"], 1, "text.txt, line 1: is not valid JSON"),
    "no tasks": (["choices", "tiny.gguf", "-f", "empty.txt"], 1, "empty.txt: holds no tasks"),
    "number of tasks": (["choices", "tiny.gguf", "-f", "tasks.jsonl", "--tasks", "0"], 2, "--tasks is 0"),
    "range of tasks": (["choices", "tiny.gguf", "-f", "tasks.jsonl", "--tasks", "3-2"], 2, "--tasks is 3-2; allowed"),
    "tasks behind the last": (["choices", "tiny.gguf", "-f", "tasks.jsonl", "--tasks", "6-9"], 2, ".*there are 5 t"),
    "skip": (["perplexity", "tiny.gguf", "-f", "text.txt", *SMALL, "--skip", "99"], 2, "--skip is 99; the text has"),
    "pipe": (["perplexity", "tiny.gguf", "-f", "pipe"], 1, "pipe: is a device or pipe, not a file"),
    "pipe with logits": ([*KL, "--base-logits", "pipe"], 1, "pipe: is a device or pipe, not a file"),
    "device": (["choices", "tiny.gguf", "-f", "/dev/zero"], 1, "/dev/zero: is a device or pipe, not a file"),
    "large number": (["choices", "tiny.gguf", "-f", "large.jsonl"], 1, "large.jsonl, line 1: answer is 1000"),
    "larger number": (["choices", "tiny.gguf", "-f", "larger.jsonl"], 1, "larger.jsonl, line 1: is not valid JSON"),
    "true": (["choices", "tiny.gguf", "-f", "true.jsonl"], 1, "true.jsonl, line 1: answer is True; allowed"),
    "context of tasks": (["choices", "tiny.gguf", "-f", "tasks.jsonl", "-c", "3"], 1, "line 1: has .* holds 3"),
    "lines of HellaSwag": (["hellaswag", "tiny.gguf", "-f", "hella5.txt"], 1, "hella5.txt: has 5 lines"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(folder: Path, case: str) -> None:
    arguments, code, message = BAD[case]
    result = invoke(folder, *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert re.match(f"error: .*{message}", result.stderr), result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def logits(folder: Path) -> Path:
    result = invoke(
        folder, "kl", "tiny.gguf", "-f", "text.txt", *SMALL, "--chunks", "2", "--save-logits", "tiny.logits"
    )
    assert result.exit_code == 0, result.stderr
    return folder / "tiny.logits"


BAD_LOGITS = {
    "of another model": (
        ["--base", "other.gguf"],
        1,
        "holds the logits of another model, tiny.gguf, not of other.gguf",
    ),
    "of another text": (["-f", "text2.txt"], 1, "was made from another text than text2.txt"),
    "another context": (["-c", "64"], 2, "--ctx-size is 64; tiny.logits was made with 32"),
    "more chunks": (["--chunks", "3"], 2, "--chunks is 3; tiny.logits holds 2"),
}


@pytest.mark.parametrize("case", BAD_LOGITS)
def test_logits_that_do_not_fit(folder: Path, logits: Path, case: str) -> None:
    arguments, code, message = BAD_LOGITS[case]
    result = invoke(folder, "kl", "tiny.gguf", "-f", "text.txt", "--base-logits", logits.name, *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert re.fullmatch(f"error: .*{re.escape(message)}.*\n", result.stderr)


def test_logits_of_another_vocabulary(folder: Path, logits: Path) -> None:
    for model in ("spm.gguf", "renamed.gguf"):
        result = invoke(folder, "kl", model, "-f", "text.txt", "--base-logits", logits.name)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith(f"error: tiny.logits: has another vocabulary than {model}")


@pytest.mark.parametrize("at", [0, 100, 300, -1])
def test_damaged_logits(folder: Path, logits: Path, tmp_path: Path, at: int) -> None:
    damaged = bytearray(logits.read_bytes())
    damaged[at] ^= 1
    (tmp_path / "bad.logits").write_bytes(damaged)
    result = invoke(folder, "kl", "tiny.gguf", "-f", "text.txt", "--base-logits", str(tmp_path / "bad.logits"))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {tmp_path}/bad.logits: ")
    assert result.stderr.count("\n") == 1
    (tmp_path / "bad.logits").write_bytes(logits.read_bytes()[:-10])
    result = invoke(folder, "kl", "tiny.gguf", "-f", "text.txt", "--base-logits", str(tmp_path / "bad.logits"))
    assert "it is truncated" in result.stderr


# Ctrl-C.


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ctrl-C in the middle of a step after n steps, for perplexity, and so for whatever runs chunks."""

    def after(n: int) -> None:
        ran = 0
        original = Scorer.run

        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal ran
            ran += 1
            for block in original(*arguments, **options):
                yield block
                if ran > n:
                    raise KeyboardInterrupt

        monkeypatch.setattr(Scorer, "run", run)

    return after


def test_ctrl_c_shows_what_was_measured(folder: Path, interrupt: Callable[[int], None]) -> None:
    arguments = ["perplexity", "tiny.gguf", "-f", "text.txt", *SMALL]
    two = figures(folder, *arguments, "--chunks", "2")
    interrupt(2)
    result = invoke(folder, *arguments)
    assert result.exit_code == 130
    assert result.stdout.splitlines()[-1].startswith(f"perplexity              {two['perplexity']:.6g} ±")
    assert re.match(r"interrupted after 2 of \d+ chunks\n2 chunks, 64 tokens in ", result.stderr)


def test_ctrl_c_with_json(folder: Path, interrupt: Callable[[int], None]) -> None:
    interrupt(2)
    result = invoke(folder, "perplexity", "tiny.gguf", "-f", "text.txt", *SMALL, "--json")
    values = json.loads(result.stdout)
    assert (result.exit_code, values["chunks"], values["interrupted"], len(values["running"])) == (130, 2, True, 2)


def test_ctrl_c_before_the_first_result(folder: Path, interrupt: Callable[[int], None]) -> None:
    interrupt(0)
    result = invoke(folder, "perplexity", "tiny.gguf", "-f", "text.txt", *SMALL)
    assert (result.exit_code, result.stdout.split()) == (130, ["chunk", "perplexity"])
    interrupt(0)
    result = invoke(folder, "choices", "tiny.gguf", "-f", "tasks.jsonl", "--json")
    assert (result.exit_code, json.loads(result.stdout)["tasks"]) == (130, 0)


def test_ctrl_c_leaves_no_logits(folder: Path, tmp_path: Path, interrupt: Callable[[int], None]) -> None:
    interrupt(1)
    path = tmp_path / "a.logits"
    result = invoke(folder, "kl", "tiny.gguf", "-f", "text.txt", *SMALL, "--save-logits", str(path))
    assert result.exit_code == 130
    assert f"{path} is not written: it would be incomplete\n" in result.stderr
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_a_comparison(folder: Path, interrupt: Callable[[int], None]) -> None:
    """Each chunk is two runs."""
    interrupt(4)
    result = invoke(folder, "kl", "tiny.gguf", "-f", "text.txt", *SMALL, "--base", "other.gguf", "--json")
    values = json.loads(result.stdout)
    assert (result.exit_code, values["chunks"]) == (130, 2)
    assert values["kl_mean"] > 0


# In processes of their own.


@pytest.fixture(scope="module")
def long_text(folder: Path) -> Path:
    (folder / "long.txt").write_text(TEXT * 400)
    return folder / "long.txt"


def test_real_ctrl_c(folder: Path, long_text: Path) -> None:
    command = [*RUN, "perplexity", str(folder / "tiny.gguf"), "-f", str(long_text), *SMALL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith(b"    3"):
            pass
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert out.splitlines()[-1].startswith(b"perplexity ")
    assert b"interrupted after " in err


def test_reader_of_stdout_goes_away(folder: Path, long_text: Path) -> None:
    command = [*RUN, "perplexity", str(folder / "tiny.gguf"), "-f", str(long_text), *SMALL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE) == 141


def test_closed_stdout(folder: Path) -> None:
    command = [*RUN, "perplexity", str(folder / "tiny.gguf"), "-f", str(folder / "text.txt"), *SMALL]
    done = subprocess.run(command, stderr=subprocess.PIPE, timeout=PATIENCE, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (1, b"error: stdout is closed: there is nowhere to write to\n")


def test_terminal(folder: Path, long_text: Path) -> None:
    """A bar with an estimate, below a table that it leaves whole."""
    terminal, child = pty.openpty()
    command = [*RUN, "perplexity", str(folder / "tiny.gguf"), "-f", str(long_text), *SMALL]
    wide = os.environ | {"COLUMNS": "200"}
    with subprocess.Popen(command, stdout=child, stderr=child, stdin=child, env=wide) as process:
        os.close(child)
        shown = b""
        while select.select([terminal], [], [], PATIENCE)[0]:
            try:
                shown += os.read(terminal, 1 << 16)
            except OSError:  # the process has ended
                break
        assert process.wait(PATIENCE) == 0
    os.close(terminal)
    assert re.search(rb"\revaluating \[#* *\] +\d+ % of \d+ chunks, \d+:\d\d left", shown)
    # What is left on a line is what came after it was last wiped.
    head, *rows, last, speed, rest = (line.split(b"\r")[-1] for line in shown.split(b"\r\n"))
    assert (head.split(), rest) == ([b"chunk", b"perplexity"], b"")
    assert all(re.fullmatch(rb" *%d +[\d.]+" % i, row) for i, row in enumerate(rows, 1))
    assert last.startswith(b"perplexity  ")
    assert speed.startswith(b"%d chunks, " % len(rows))


def test_estimate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = Progress("evaluating", "chunks")
    progress.set(0, 8)
    now += 30
    progress.set(2, 8)
    assert capsys.readouterr().err.split("\r")[1:] == [
        "evaluating [                              ]   0 % of 8 chunks",
        "evaluating [#######                       ]  25 % of 8 chunks, 1:30 left",
    ]


def test_broken_model_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_perplexity, "check_finite", lambda values, what: original(np.full(1, np.nan), what))
    from gguf_run.runtime.evaluate.text import check_finite as original

    result = invoke(folder, "perplexity", "tiny.gguf", "-f", "text.txt", *SMALL)
    assert result.exit_code == 1
    assert result.stderr == "error: chunk 1: the model's logits are not finite numbers: is its file damaged?\n"
