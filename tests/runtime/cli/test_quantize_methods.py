"""gguf-quantize --method gptq: from a text to the file, with awq, and one clear line for all that it refuses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from ggufbuild import T, Typed, write
from tinymodel import WIDE_LLAMA, write_tiny

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.gguf.moments import Moments, n_packed
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime import quantize_model
from gguf_run.runtime.cli.imatrix import main as imatrix
from gguf_run.runtime.cli.quantize import main as quantize

Model = tuple[Path, Path]


def run(main: Any, *args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def refused(*args: Any) -> str:
    """Return the last line of a run that fails without an output file."""
    result = run(quantize, *args)
    assert result.exit_code, result.output
    assert not Path(args[1]).exists()
    return result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model and its second moments, on a text of a few words."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny(folder / "model.gguf", replace(WIDE_LLAMA, n_layer=2))
    words = np.random.default_rng(0).choice(["the", "inner", "and", "thought", "on", "a", "round"], 900)
    (folder / "text").write_text(" ".join(words))
    args = ("-f", folder / "text", "-o", folder / "full.gguf", "--full", "-c", 64, "--chunks", 8, "-t", 2)
    result = run(imatrix, folder / "model.gguf", *args)
    assert result.exit_code == 0, result.output
    return folder / "model.gguf", folder / "full.gguf"


def loss(model: Path, out: Path, moments: Moments) -> float:
    """Return tr(E H ET) of all layers, each as a part of what its matrix does."""
    total = 0.0
    with GGUFFile.open(model) as source, GGUFFile.open(out) as file:
        for name in moments.imatrix.inputs:
            x, found = (dequantize(f.tensors[name].blocks(), f.tensors[name].type) for f in (source, file))
            h = moments.mean(name)
            power, error = (np.einsum("ri,ij,rj->", v, h, v, optimize=True) for v in (x, found - x))
            total += float(error / power)
    return total


@pytest.mark.parametrize("type", ["Q4_0", "Q3_K_S"])
def test_less_is_lost(type: str, model: Model, tmp_path: Path) -> None:
    """The file is as large as without the method, and says which method made it."""
    losses, sizes = {}, set()
    for name in ("", "gptq", "gptq:rho=0.1,sweeps=0", "awq gptq"):
        out = tmp_path / f"{name}.gguf"
        methods = [word for method in name.split() for word in ("--method", method)]
        result = run(quantize, model[0], out, type, "--imatrix", model[1], "--pure", *methods)
        assert result.exit_code == 0, result.output
        assert ("without gptq, for lack of second moments: token_embd.weight" in result.stderr) == ("gptq" in name)
        with GGUFFile.open(out) as file:
            assert file.metadata.get("quantize.method", "") == name
            sizes.add(sum(tensor.nbytes for tensor in file.tensors.values()))
        if "awq" not in name:  # which changes the matrices and their inputs
            with Moments.open(model[1]) as moments:
                losses[name] = loss(model[0], out, moments)
    assert losses["gptq"] < 0.8 * losses[""], losses
    assert losses["gptq:rho=0.1,sweeps=0"] < 0.9 * losses[""], losses
    assert len(sizes) == 1
    quantize_model(model[0], tmp_path / "py.gguf", type, imatrix=model[1], method="gptq", pure=True)
    assert (tmp_path / "py.gguf").read_bytes() == (tmp_path / "gptq.gguf").read_bytes()


def moments_file(folder: Path, model: Path, values: Callable[[int], Any]) -> Path:
    """Write second moments of the model's first ffn_up alone. values: of a triangle of so many numbers."""
    name = "blk.0.ffn_up.weight"
    with GGUFFile.open(model) as file:
        n = file.tensors[name].ne[0]
    tensors = [
        T(f"{name}.in_sum2", (n, 1), data=np.ones((1, n), np.float32)),
        T(f"{name}.counts", (1, 1), data=np.ones((1, 1), np.float32)),
        T(f"{name}.in_moments", (n_packed(n), 1), data=values(n_packed(n)).astype(np.float32)[None]),
    ]
    meta = {"imatrix.chunk_count": 1, "imatrix.inputs": Typed("[string]", [name])}
    return write(folder / "other.gguf", meta, tensors)


def test_refusals(model: Model, tmp_path: Path) -> None:
    start = (model[0], tmp_path / "out.gguf", "Q4_0")
    needs = "--method gptq: needs --imatrix FILE with second moments, from gguf-imatrix --full"
    assert needs in refused(*start, "--method", "gptq")
    diagonal = [T("blk.0.ffn_up.weight.in_sum2", (256, 1), data=np.ones((1, 256), np.float32))]
    diagonal.append(T("blk.0.ffn_up.weight.counts", (1, 1), data=np.ones((1, 1), np.float32)))
    path = write(tmp_path / "diagonal.gguf", {"imatrix.chunk_count": 1}, diagonal)
    assert needs in refused(*start, "--imatrix", path, "--method", "gptq")
    path = moments_file(tmp_path, model[0], lambda n: np.full(n, np.nan))
    line = refused(*start, "--imatrix", path, "--method", "gptq")
    assert f'{path}: the second moments of "blk.0.ffn_up.weight" are not finite: make it again' in line
    write_tiny(tmp_path / "other-model.gguf", replace(WIDE_LLAMA, n_layer=1, n_embd=512, head_dim=128))
    line = refused(tmp_path / "other-model.gguf", *start[1:], "--imatrix", model[1], "--method", "gptq")
    assert "it is of another model" in line
    line = refused(model[0], start[1], "F16", "--imatrix", model[1], "--method", "gptq")
    assert "--method gptq: no matrix becomes quantized and has second moments: choose another type" in line


BAD = "rho rho=x rho=nan rho=1.5 rho=-0.1 sweeps=-1 sweeps=2.5 mu=1"


@pytest.mark.parametrize("text", ["awq:rho=1", "gptq2", *(f"gptq:{word}" for word in BAD.split())])
def test_options_that_are_not_allowed(text: str, model: Model, tmp_path: Path) -> None:
    line = refused(model[0], tmp_path / "out.gguf", "Q4_0", "--imatrix", model[1], "--method", text)
    assert f"--method {text}: allowed are awq, gptq and gptq:NAME=NUMBER,... of rho" in line
