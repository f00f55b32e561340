"""gguf-imatrix: the squares that matrices read, against a plain float64 model and llama.cpp; files, options, errors."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from cpu_ops import Step, cpu, error
from numpy_backend import NumpyBackend
from plain_model import reference
from real import smollm2, wiki_text
from tinymodel import AWKWARD_LLAMA, TINY_GEMMA3, WIDE_LLAMA, Tiny, write_tiny

from gguf_run.formats.gguf.imatrix import Imatrix, Sums
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_cpu.rows.observe import CpuSquares
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.models.ops import Observe
from gguf_run.runtime import Model
from gguf_run.runtime.cli.imatrix import main, show_uses
from gguf_run.runtime.evaluate.imatrix import Collector, mean_uses, tensor_uses, write
from gguf_run.runtime.evaluate.text import Scorer

F32 = CacheType("f32", "f32")
IDS = [(7 * i * i + 3 * i + 1) % 270 for i in range(14)]
TEXT = "the order and another one, or the other end of the road and so on, and then there were none. " * 4


# The op.


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize(("width", "start", "n"), [(1, 0, 1), (200, 64, 70), (1000, 0, 1000)])
def test_squares_are_added_bit_for_bit(n_threads: int, width: int, start: int, n: int) -> None:
    """Float32 squares are exact in float64 and tokens are added in their order, whatever the threads."""
    values = (np.random.default_rng(width).standard_normal((40, width)) * 1e3).astype(np.float32)
    step = Step(cpu(n_threads), 32)
    x = step.input(values)
    squares = step.backend.squares(n)
    step.add(Observe(x.columns(start, n), squares))
    step.finish(x)
    step.run(32)
    step.run(7, first_id=32)
    exact = values[:39, start : start + n].astype(np.float64) ** 2
    sums, counts = squares.take()
    assert np.array_equal(sums[0], exact.cumsum(axis=0)[-1])
    assert counts == [39]
    assert not any(values.any() for values in squares.take())


# A model's inputs.


def observed(path: Path, backend: Any, n_rows: int, ids: Sequence[int] = IDS, **options: Any) -> dict[str, np.ndarray]:
    """Sums by tensor over ids, with the logits of the last n_rows asked for."""
    with GGUFFile.open(path) as file:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        backends, kinds = [backend] * config.n_layer, [F32] * config.n_layer
        decoder = Decoder(config, file.tensors, backends, 64, observe=True, cache_types=kinds, **options)
        for _ in decoder.forward(ids, n_rows):
            pass
    assert decoder.observed is not None
    sums = [(item.names, item.squares.take()[0][0]) for item in decoder.observed]
    return {name: values for names, values in sums for name in names}


def test_experts_are_observed_each_by_itself(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"gate_inp": (4, 96), "gate_exps": (4, 160, 96), "up_exps": (4, 160, 96), "down_exps": (4, 96, 160)}
    weights: dict[str, np.ndarray | None] = {f"blk.0.ffn_{name}.weight": None for name in ("gate", "up", "down")}
    for name, shape in shapes.items():
        weights[f"blk.0.ffn_{name}.weight"] = (rng.standard_normal(shape) / 10).astype(np.float32)
    write_tiny(
        tmp_path / "moe.gguf", Tiny(n_layer=1, metadata={"expert_count": 4, "expert_used_count": 2}, tensors=weights)
    )
    seen = []
    with GGUFFile.open(tmp_path / "moe.gguf") as file:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        for backend in (NumpyBackend(np.float64), cpu(2)):
            decoder = Decoder(config, file.tensors, [backend], 64, observe=True, cache_types=[F32])
            assert list(decoder.forward(IDS, 0)) == []
            assert decoder.observed is not None
            seen.append({name: item.squares.take() for item in decoder.observed for name in item.names[:1]})
    assert {"blk.0.ffn_gate_inp.weight", "blk.0.ffn_gate_exps.weight", "blk.0.ffn_down_exps.weight"} < seen[0].keys()
    for name, (sums, counts) in seen[0].items():
        if name.startswith("blk."):  # of the output nothing is asked for
            assert error(seen[1][name][0], sums) < 1e-5
            np.testing.assert_array_equal(seen[1][name][1], counts)
            assert counts.sum() == len(IDS) * (2 if "exps" in name else 1)


@pytest.mark.parametrize("tiny", [Tiny(n_layer=1), AWKWARD_LLAMA, TINY_GEMMA3], ids=["tied", "awkward", "gemma3"])
def test_inputs_are_those_of_a_plain_implementation(tiny: Tiny, tmp_path: Path) -> None:
    """Every matrix of every layer, every token once, the last layer's too; and of the output only what is asked for."""
    weights = write_tiny(tmp_path / "tiny.gguf", tiny)
    half = tiny.head_dim // 2
    freqs = tiny.rope_freq_base ** -(np.arange(half) / half) / (tiny.rope_freqs or 1)
    inputs: dict[str, list[np.ndarray]] = {}
    reference(tiny, weights, IDS, freqs, inputs)
    output = "token_embd.weight" if tiny.tied else "output.weight"
    expected = {name: (np.array(rows[-3:] if name == output else rows) ** 2).sum(0) for name, rows in inputs.items()}
    exact = observed(tmp_path / "tiny.gguf", NumpyBackend(np.float64), 3)
    fast = observed(tmp_path / "tiny.gguf", cpu(2), 3, n_batch=5, n_outputs=2)
    assert exact.keys() == fast.keys() == expected.keys()
    for name, values in expected.items():
        assert exact[name] == pytest.approx(values, rel=1e-5), name
        assert fast[name] == pytest.approx(values, rel=1e-4, abs=1e-4 * values.max()), name


def test_what_is_observed_is_not_yet_quantized(tmp_path: Path) -> None:
    """The first matmul's input has no other rounding than that of float32; others inherit what int8 costs."""
    write_tiny(tmp_path / "tiny.gguf", replace(WIDE_LLAMA, type="Q8_0", n_layer=1))
    exact = observed(tmp_path / "tiny.gguf", NumpyBackend(np.float64), 0)
    fast = observed(tmp_path / "tiny.gguf", cpu(2), 0)
    assert fast["blk.0.attn_q.weight"] == pytest.approx(exact["blk.0.attn_q.weight"], rel=1e-6)
    for name, values in exact.items():
        assert np.linalg.norm(fast[name] - values) <= 0.03 * np.linalg.norm(values), name


# The command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imatrix")
    write_tiny(folder / "tiny.gguf", Tiny(type="Q8_0", tied=False, vocab="spm"))
    write_tiny(folder / "wide.gguf", replace(WIDE_LLAMA, n_layer=1))
    (folder / "text.txt").write_text(TEXT)
    invoke(folder, "-c", "32", "-o", "all.gguf")  # compiles what is not cached yet
    return folder


def invoke(folder: Path, *arguments: str, model: bool = True) -> Result:
    """In this process, in the folder, with 2 threads."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(main, ["tiny.gguf", "-f", "text.txt", "-t", "2"] * model + list(arguments))
    finally:
        os.chdir(before)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "internal error" not in result.stderr
    return result


def collected(folder: Path, *arguments: str, model: bool = True) -> Imatrix:
    result = invoke(folder, *arguments, "-o", "out.gguf", model=model)
    assert result.exit_code == 0, result.stderr
    return Imatrix.open(folder / "out.gguf")


def test_file_and_perplexity(folder: Path) -> None:
    """Figures are those of gguf-eval on the same chunks; every token of a chunk counts."""
    from gguf_run.runtime.cli.evaluate import main as eval_main

    result = invoke(folder, "-c", "32", "--chunks", "3", "-o", "out.gguf")
    text = ["perplexity", str(folder / "tiny.gguf"), "-f", str(folder / "text.txt"), "-c", "32", "--chunks", "3"]
    theirs = [line.split() for line in CliRunner().invoke(eval_main, text).stdout.splitlines()]
    for mine, other in zip(result.stdout.splitlines()[1:4], theirs[1:4], strict=True):
        assert float(mine.split()[1]) == pytest.approx(float(other[1]), rel=1e-3)
    assert "3 chunks, 96 tokens" in result.stderr
    imatrix = Imatrix.open(folder / "out.gguf")
    assert (imatrix.chunk_count, imatrix.chunk_size, imatrix.datasets) == (3, 32, ("text.txt",))
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert list(imatrix.sums) == sorted(f"blk.{il}.{name}.weight" for il in range(2) for name in names)
    for name, entry in imatrix.sums.items():
        assert entry.sums.shape == (1, 160 if "down" in name else 128 if "attn_output" in name else 96)
        assert entry.counts.tolist() == [96]
        assert (entry.sums > 0).all()
    with Model.load(folder / "tiny.gguf") as model:
        ids, bos = model.tokenize(TEXT), model.tokenizer.bos
    assert ids[0] == bos
    chunks = [[bos, *ids[start + 1 : start + 32]] for start in (0, 32, 64)]
    exact = [observed(folder / "tiny.gguf", NumpyBackend(np.float64), 0, ids) for ids in chunks]
    for name, rel in (("blk.0.attn_q.weight", 1e-5), ("blk.1.ffn_down.weight", 0.01)):
        assert imatrix.sums[name].sums.sum() == pytest.approx(sum(part[name].sum() for part in exact), rel=rel)


def test_resumed_is_uninterrupted_bit_for_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the middle of a chunk, after a periodic save or before one; then continued as the message says."""
    n_chunk = Imatrix.open(folder / "all.gguf").chunk_count
    assert n_chunk >= 6
    for stop, frequency in ((3, "2"), (5, "10")):
        with monkeypatch.context() as patch:
            run, calls = Scorer.run, iter(range(100))

            def interrupted(*arguments: Any, run: Any = run, calls: Any = calls, stop: int = stop) -> Iterator[Any]:
                blocks = run(*arguments)
                if next(calls) == stop:
                    next(blocks)
                    raise KeyboardInterrupt
                return blocks

            patch.setattr(Scorer, "run", interrupted)
            result = invoke(folder, "-c", "32", "-o", "part.gguf", "-ofreq", frequency)
        assert result.exit_code == 130
        assert f"to go on: --in-file part.gguf --from-chunk {stop}" in result.stderr
        assert Imatrix.open(folder / "part.gguf").chunk_count == stop
        rest = invoke(folder, "--in-file", "part.gguf", "--from-chunk", str(stop), "-o", "part.gguf", "--no-ppl")
        assert rest.exit_code == 0
        assert "perplexity" not in rest.stdout
        assert (folder / "part.gguf").read_bytes() == (folder / "all.gguf").read_bytes()
    assert not list(folder.glob("*.partial"))


def test_saved_from_time_to_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf_run.runtime.evaluate import imatrix as imatrix_module

    saved: list[int] = []
    monkeypatch.setattr(imatrix_module, "write", lambda path, imatrix, *_: saved.append(imatrix.chunk_count))
    invoke(folder, "-c", "32", "--chunks", "5", "--output-frequency", "2", "-o", "new.gguf")
    assert saved == [2, 4, 5]


def test_threads_do_not_matter(folder: Path) -> None:
    """Nor whether perplexity is computed."""
    whole = (folder / "all.gguf").read_bytes()
    for arguments in (["-t", "1"], ["-t", "3", "--no-ppl"]):
        collected(folder, "-c", "32", *arguments)
        assert (folder / "out.gguf").read_bytes() == whole


def test_output_matrix_sees_every_token(folder: Path) -> None:
    for arguments in ([], ["--no-ppl"]):
        imatrix = collected(folder, "-c", "32", "--chunks", "2", "--process-output", *arguments)
        assert imatrix.sums["output.weight"].counts.tolist() == [64]
        assert imatrix.sums["output.weight"].sums.shape == (1, 96)
    few = collected(folder, "-c", "32", "--chunks", "2").sums
    assert all(np.array_equal(entry.sums, imatrix.sums[name].sums) for name, entry in few.items())


def test_special_tokens_are_parsed_on_request(folder: Path) -> None:
    (folder / "special.txt").write_text("<|im_end|>" * 70)
    counts = []
    for arguments in ([], ["--parse-special"]):
        result = invoke(folder, "-f", "special.txt", "-c", "16", "-o", "out.gguf", *arguments)
        assert result.exit_code == 0, result.stderr
        counts.append(Imatrix.open(folder / "out.gguf").chunk_count)
    assert counts[1] == 71 // 16 < counts[0]


def test_files_are_added_up(folder: Path) -> None:
    first, rest = (collected(folder, "-c", "32", *a) for a in (["--chunks", "2"], ["--from-chunk", "2"]))
    for name, imatrix in (("a.gguf", first), ("b.gguf", replace(rest, datasets=("other.txt",)))):
        write(folder / name, imatrix)
    both = collected(folder, "--in-file", "a.gguf", "--in-file", "b.gguf", model=False)
    whole = Imatrix.open(folder / "all.gguf")
    assert both.datasets == ("text.txt", "other.txt")
    assert (both.chunk_count, both.chunk_size) == (whole.chunk_count, 32)
    for name, entry in whole.sums.items():
        assert both.sums[name].counts == entry.counts
        assert both.sums[name].sums == pytest.approx(entry.sums, rel=1e-6)


def test_legacy_files_and_experts_are_added_up(tmp_path: Path) -> None:
    """A legacy file holds means of chunks and one count for all experts (llama.cpp multiplies both by the chunk)."""
    values = np.array([1, 2, 3, 4], np.float32)
    entry = np.array([5], "<i4").tobytes() + b"blk.0" + np.array([3, 4], "<i4").tobytes() + values.tobytes()
    (tmp_path / "old.dat").write_bytes(np.array([1], "<i4").tobytes() + entry)
    experts = Sums(np.array([[10, 20], [0, 0]], np.float32), np.array([7, 0], np.float32))
    write(tmp_path / "new.gguf", Imatrix({"blk.0": experts}, ("t",), 0, 64))
    both = collected(tmp_path, "--in-file", "new.gguf", "--in-file", "old.dat", model=False)
    assert both.sums["blk.0"].sums.tolist() == [[10 + 64, 20 + 128], [192, 256]]
    assert both.sums["blk.0"].counts.tolist() == [7 + 192, 192]
    assert (both.chunk_count, both.chunk_size) == (3, 64)
    assert collected(tmp_path, "--in-file", "old.dat", "-c", "10", model=False).sums["blk.0"].counts.tolist() == [30]


def test_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    """Worked out by hand: means 1, 1, 2, 0 of 4 channels."""
    blk = [
        Sums(np.array([x], np.float32), np.array([4], np.float32)) for x in ([4, 4, 8, 0], [0, 4, 0, 0], [8, 8, 8, 8])
    ]
    names = ("blk.1.ffn_up.weight", "blk.0.ffn_up.weight", "blk.1.attn_q.weight", "blk.0.x.weight")
    unseen = Sums(np.zeros((1, 4), np.float32), np.zeros(1, np.float32))
    imatrix = Imatrix(dict(zip(names, [*blk, unseen], strict=True)), (), 1, 4)
    found = tensor_uses(imatrix)
    assert [(s.layer, s.tensor) for s in found] == [(1, "attn_q"), (1, "ffn_up"), (0, "ffn_up")]
    flat, up, one = found
    assert (up.n, up.total, up.low, up.high, up.mean) == (4, 4, 0, 2, 1)
    assert up.deviation == pytest.approx(math.sqrt(0.5))
    assert (up.active, up.entropy, up.normalized_entropy, up.z_density) == (0.75, 1.5, 0.75, 0.25)
    assert up.similarity == pytest.approx(16 / math.sqrt(96) / 4)
    assert (flat.entropy, flat.normalized_entropy, flat.z_density, flat.similarity) == (2, 1, 0, 0)
    assert (one.entropy, one.active, one.similarity) == (0, 0.25, 0)
    assert mean_uses(found) == [(0, 1, 0.25, 0), (1, 6, 0.125, pytest.approx(up.similarity / 2))]
    show_uses(imatrix)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:3] == ["1", "ffn_up", "4.00"]
    assert lines[-1].split() == ["1", "6.00", "12.5000%", f"{up.similarity / 2:.4f}"]


def test_statistics_of_several_experts_leave_out_the_unseen() -> None:
    entry = Sums(np.array([[2, 6], [0, 0]], np.float32), np.array([2, 0], np.float32))
    (found,) = tensor_uses(Imatrix({"blk.0.x.weight": entry}, (), 1, 4))
    assert (found.n, found.total, found.low, found.high) == (2, 4, 1, 3)


def test_statistics_are_printed(folder: Path) -> None:
    before = sorted(folder.iterdir())
    result = invoke(folder, "--in-file", "all.gguf", "--show-statistics", model=False)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1 + 14 + 2 + 2
    assert sorted(folder.iterdir()) == before
    assert "CosSim" in invoke(folder, "-c", "32", "--chunks", "1", "-o", "out.gguf", "--show-statistics").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-o", "text.txt"], 1, "text.txt: is the file that is read: name another output"),
        (["-o", "tiny.gguf"], 1, "tiny.gguf: is the file that is read"),
        (["-o", "nowhere/out.gguf"], 1, "there is no folder"),
        (["-c", "3"], 2, "--ctx-size is 3; allowed: at least 4"),
        (["--chunks", "0", "-c", "32"], 2, "--chunks is 0; allowed: at least 1"),
        (["--from-chunk", "99", "-c", "32"], 2, "--from-chunk is 99; the text has"),
        (["--in-file", "tiny.gguf"], 1, "tiny.gguf: is not an imatrix"),
        (["--in-file", "wide.imatrix"], 1, "entry blk.0.attn_q.weight of 256 input channels, the model has 96 there"),
        (["--in-file", "deep.imatrix"], 1, "entry blk.9.attn_q.weight of 96 input channels, the model has no such"),
        (
            ["--in-file", "all.gguf", "--in-file", "wide.imatrix"],
            1,
            "wide.imatrix: entry blk.0.attn_q.weight is of 256",
        ),
    ],
)
def test_errors(folder: Path, arguments: list[str], code: int, words: str) -> None:
    for name, entry, width in (("wide", "blk.0.attn_q.weight", 256), ("deep", "blk.9.attn_q.weight", 96)):
        sums = Sums(np.ones((1, width), np.float32), np.ones(1, np.float32))
        write(folder / f"{name}.imatrix", Imatrix({entry: sums}, (), 1, 32))
    result = invoke(folder, *arguments)
    assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1), result.stderr
    assert words in result.stderr
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to do: give MODEL and --file, or --in-file"),
        (["tiny.gguf"], "give both"),
        (["-f", "text.txt", "--in-file", "all.gguf"], "give both"),
    ],
)
def test_wrong_usage(folder: Path, arguments: list[str], words: str) -> None:
    result = invoke(folder, *arguments, model=False)
    assert result.exit_code == 2
    assert words in result.stderr


def test_numbers_that_break_down(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that float32 cannot hold are not written."""
    monkeypatch.setattr(Collector, "_score", lambda self, chunk: np.zeros(0))
    monkeypatch.setattr(CpuSquares, "take", lambda self: (self.sums + 1e39, self.counts))
    result = invoke(folder, "-c", "32", "-o", "broken.gguf")
    assert result.exit_code == 1
    assert "attn_q.weight: its sums are not finite numbers" in result.stderr
    assert not (folder / "broken.gguf").exists()


# llama.cpp v0.5.0 (zen4 library), 2 chunks of 128: sum, largest channel and its value, through its eval callback.
LLAMA_CPP = {
    "blk.0.attn_q.weight": (333.9229, 471, 84.6821),
    "blk.0.ffn_down.weight": (13467.34, 243, 858.876),
    "blk.14.attn_output.weight": (8581.92, 556, 285.610),
    "blk.15.ffn_up.weight": (3178.124, 247, 809.0415),
    "blk.29.attn_v.weight": (21781.07, 17, 10394.65),
    "blk.29.ffn_down.weight": (6674952, 999, 455134.2),
    "token_embd.weight": (524111.1, 17, 96766.5),
}


def test_real_model_against_llama_cpp(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text(wiki_text()[:4000])
    arguments = [str(smollm2()), "-f", "wiki.txt", "-c", "128", "--chunks", "2", "-t", "2", "--process-output"]
    imatrix = collected(tmp_path, *arguments, model=False)
    assert len(imatrix.sums) == 211
    for name, (total, largest, value) in LLAMA_CPP.items():
        sums = imatrix.sums[name].sums[0]
        assert sums.argmax() == largest
        # int8 activations: of ours and of theirs, 32 at a time
        assert sums.sum() == pytest.approx(total, rel=0.02)
        assert sums[largest] == pytest.approx(value, rel=0.02)
