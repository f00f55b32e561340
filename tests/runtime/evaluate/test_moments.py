"""gguf-imatrix --full: sums of products against NumPy in float64; files, merging, interruptions, what is refused."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from cpu_ops import Step, cpu, error
from numpy_backend import NumpyBackend
from tinymodel import Tiny, write_tiny

from gguf_run.formats.gguf.imatrix import Imatrix
from gguf_run.formats.gguf.moments import Moments, n_packed, unpacked
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.models.ops import Observe
from gguf_run.runtime import Model
from gguf_run.runtime.cli.imatrix import main
from gguf_run.runtime.evaluate import moments as module
from gguf_run.runtime.evaluate.moments import Products, add_product, unbroken

TEXT = "the order and another one, or the other end of the road and so on, and then there were none. " * 3
FULL = ("-c", "32", "--full", "--no-ppl", "-ct", "f32")


@pytest.mark.parametrize(("n_rows", "n"), [(1, 1), (3, 255), (40, 257), (70, 600)])
def test_products_of_awkward_widths(n_rows: int, n: int) -> None:
    x = np.random.default_rng(n).standard_normal((n_rows, n)).astype(np.float32)
    packed = np.ones(n_packed(n), np.float32)
    add_product(packed, x)
    exact = x.astype(np.float64)
    assert error(unpacked(packed, n), exact.T @ exact + 1) < 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moments")
    write_tiny(folder / "tiny.gguf", Tiny(vocab="spm"))
    rng = np.random.default_rng(0)
    shapes = {"gate_inp": (4, 96), "gate_exps": (4, 160, 96), "up_exps": (4, 160, 96), "down_exps": (4, 96, 160)}
    weights: dict[str, np.ndarray | None] = {f"blk.0.ffn_{name}.weight": None for name in ("gate", "up", "down")}
    for name, shape in shapes.items():
        weights[f"blk.0.ffn_{name}.weight"] = (rng.standard_normal(shape) / 10).astype(np.float32)
    experts = Tiny(n_layer=1, metadata={"expert_count": 4, "expert_used_count": 2}, tensors=weights, vocab="spm")
    write_tiny(folder / "moe.gguf", experts)
    (folder / "text.txt").write_text(TEXT)
    for name in ("tiny", "moe"):
        result = invoke(folder, *FULL, "-o", f"{name}.moments", model=f"{name}.gguf")
        assert result.exit_code == 0, result.stderr
        assert ("366.46 kB of memory" in result.stderr) == (name == "tiny")
    return folder


def invoke(folder: Path, *arguments: str, model: str = "tiny.gguf") -> Result:
    """In this process, in the folder, with 2 threads. model: "" reads no text."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        given = [model, "-f", "text.txt", "-t", "2", "-ngl", "0"] if model else []
        result = CliRunner().invoke(main, [*given, *arguments])
    finally:
        os.chdir(before)
    assert "internal error" not in result.stderr
    return result


def rows_read(path: Path, n_chunk: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What matrices of layers read in float64, with the expert of each row, by their first name."""
    with Model.load(path) as model:
        ids, bos = model.tokenize(TEXT), model.tokenizer.bos
    with GGUFFile.open(path) as file:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        backends: Any = [NumpyBackend(np.float64)] * config.n_layer
        decoder = Decoder(config, file.tensors, backends, 64, observe=True, cache_types=[CacheType("f32", "f32")] * 2)
        assert decoder.observed is not None
        takes = {item.names[0]: item.squares.keep(0) for item in decoder.observed if item.names[0].startswith("blk.")}
        for start in range(0, 32 * n_chunk, 32):
            decoder.rewind(0)
            assert list(decoder.forward([bos, *ids[start + 1 : start + 32]], 0)) == []
    return {first: take() for first, take in takes.items()}


@pytest.mark.parametrize("name", ["tiny", "moe"])
def test_moments_are_those_of_a_plain_implementation(name: str, folder: Path) -> None:
    """Every input once; of experts the rows that each reads, before the router's weight."""
    with Moments.open(folder / f"{name}.moments") as moments:
        n_chunk = moments.imatrix.chunk_count
        assert n_chunk >= 3
        exact = rows_read(folder / f"{name}.gguf", n_chunk)
        assert {*moments.imatrix.inputs.values()} == exact.keys()
        assert moments.group("blk.0.attn_v.weight") == "blk.0.attn_q.weight"
        for first, (rows, experts) in exact.items():
            n = rows.shape[1]
            for expert, packed in enumerate(moments.sums(first)):
                x = rows[experts == expert]
                assert moments.n_tokens(first, expert) == len(x)
                assert error(unpacked(packed, n), x.T @ x) < 1e-4, first


def test_the_importance_matrix_is_the_same(folder: Path) -> None:
    assert invoke(folder, "-c", "32", "-ct", "f32", "-o", "plain.gguf", model="moe.gguf").exit_code == 0
    plain, full = (Imatrix.open(folder / name) for name in ("plain.gguf", "moe.moments"))
    assert (plain.sums.keys(), plain.inputs) == (full.sums.keys(), {})
    for name, entry in plain.sums.items():
        assert np.array_equal(entry.sums, full.sums[name].sums)


def test_a_chunk_of_several_steps(folder: Path) -> None:
    """The diagonal is what the importance matrix has."""
    (folder / "long.txt").write_text(TEXT * 10)
    result = invoke(folder, *FULL, "-f", "long.txt", "-c", "600", "-o", "long.gguf", model="moe.gguf")
    assert result.exit_code == 0, result.stderr
    with Moments.open(folder / "long.gguf") as moments:
        for name, entry in moments.imatrix.sums.items():
            for packed, squares in zip(moments.sums(name), entry.sums, strict=True):
                assert error(np.diag(unpacked(packed, squares.size)), squares) < 1e-5


@pytest.mark.parametrize("name", ["tiny", "moe"])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes while the second chunk is added, which ends first. To go on, --full need not be said again."""
    add_chunk, calls = Products.add_chunk, iter(range(100))

    def interrupted(self: Products) -> None:
        if next(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        add_chunk(self)

    with monkeypatch.context() as patch:
        patch.setattr(Products, "add_chunk", interrupted)
        result = invoke(folder, *FULL, "-o", "part.gguf", model=f"{name}.gguf")
    assert result.exit_code == 130
    assert "to go on: --in-file part.gguf --from-chunk 2" in result.stderr
    assert Imatrix.open(folder / "part.gguf").chunk_count == 2
    arguments = ("--in-file", "part.gguf", "--from-chunk", "2", "-ct", "f32", "-o", "part.gguf")
    assert invoke(folder, *arguments, model=f"{name}.gguf").exit_code == 0
    assert (folder / "part.gguf").read_bytes() == (folder / f"{name}.moments").read_bytes()


def test_ctrl_c_waits_for_the_end_of_a_block() -> None:
    """In another thread than the main one, nothing is held up: no handler can be set there."""
    before, done = signal.getsignal(signal.SIGINT), []

    def block(name: str, *, interrupt: bool) -> None:
        with unbroken():
            if interrupt:
                signal.raise_signal(signal.SIGINT)
            done.append(name)

    with pytest.raises(KeyboardInterrupt):
        block("main", interrupt=True)
    thread = threading.Thread(target=block, args=["other"], kwargs={"interrupt": False})
    thread.start()
    thread.join()
    assert done == ["main", "other"]
    assert signal.getsignal(signal.SIGINT) == before


def test_files_are_added_up(folder: Path) -> None:
    parts = (("a.gguf", "--chunks", "1"), ("b.gguf", "--from-chunk", "1"))
    for name, *arguments in parts:
        assert invoke(folder, *FULL, *arguments, "-o", name).exit_code == 0
    result = invoke(folder, "--in-file", "a.gguf", "--in-file", "b.gguf", "-o", "both.gguf", model="")
    assert result.exit_code == 0, result.stderr
    with Moments.open(folder / "both.gguf") as both, Moments.open(folder / "tiny.moments") as whole:
        assert both.imatrix.inputs == whole.imatrix.inputs
        for name in whole.imatrix.inputs:
            assert error(both.mean(name), whole.mean(name)) < 1e-6


def test_what_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke(folder, "-c", "32", "--no-ppl", "-o", "plain.gguf").exit_code == 0
    files = ("--in-file", "tiny.moments", "--in-file", "plain.gguf")
    message = "plain.gguf: has no second moments, so it cannot be added: make it again with --full"
    for arguments, model in ((files, ""), ((*FULL, *files[2:]), "tiny.gguf"), (files, "tiny.gguf")):
        result = invoke(folder, *arguments, "-o", "out.gguf", model=model)
        assert (result.exit_code, result.stderr) == (1, f"error: {message}\n")
    monkeypatch.setattr(module, "available_memory", lambda: 100_000)
    result = invoke(folder, *FULL, "-o", "out.gguf")
    assert result.exit_code == 1
    assert "second moments need 366.46 kB" in result.stderr
    assert "100.00 kB are available" in result.stderr
    assert not (folder / "out.gguf").exists()


def test_kept_rows_never_exceed_their_room() -> None:
    """A step that has more rows than were asked for overwrites nothing."""
    values = np.random.default_rng(0).standard_normal((9, 130)).astype(np.float32)
    step = Step(cpu(2), 9)
    x = step.input(values)
    squares = step.backend.squares(130)
    step.add(Observe(x, squares))
    step.finish(x)
    take = squares.keep(5)
    step.run(9)
    rows, experts = take()
    assert np.array_equal(rows, values[:5])
    assert experts.tolist() == [0] * 5
    step.run(2)
    assert np.array_equal(take()[0], values[:2])
