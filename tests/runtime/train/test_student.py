"""gguf-train qat and distill: bits of the file are those of training, the divergence falls, what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from click.testing import CliRunner
from cpu_ops import f32_tensor, tensor_of
from tinymodel import WIDE_LLAMA, Tiny, quantize, tiny_moe, write_tiny

from gguf_run.formats.blocks.codes import unpack
from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.errors import FormatError, GgufRunError, OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.cli.train import main
from gguf_run.runtime.train.grids import Rounded, Scaled
from gguf_run.runtime.train.loop import TrainOptions
from gguf_run.runtime.train.student import distill, qat

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ2_0",
         "MXFP4")  # fmt: skip
WORDS = ("the", "cat", "and", "dog", "in", "our", "other", "house", "ate", "nine", "round", "onions", "there", "on")
OPTIONS = TrainOptions(
    iters=12, batch_size=4, learning_rate=2e-4, max_seq_length=32, steps_per_report=1, lr_schedule="cosine"
)

FASTER = replace(OPTIONS, learning_rate=5e-3)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def by_libgguf(path: Path) -> dict[str, np.ndarray]:
    """All weights, dequantized by another program."""
    return {
        tensor.name: libgguf.dequantize_rows(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
        if tensor.tensor_type > 1
    }


@pytest.mark.parametrize("name", TYPES)
def test_weights_are_those_of_the_blocks(name: str) -> None:
    """At the start those of the quantizer, and after a change too, bit for bit."""
    x = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    x[0, :256] = 0
    tensor: Any = tensor_of(quantize(x, name), name)
    rounded = Rounded(tensor, x, "cpu")
    grids: list[Rounded | Scaled] = [rounded, Scaled(tensor, "cpu")] if Scaled.fits(tensor) else [rounded]
    for grid in grids:
        first = grid.values().detach().numpy()
        np.testing.assert_array_equal(first.view(np.uint32), dequantize(tensor.blocks(), name).view(np.uint32))
        (grid.values() * torch.from_numpy(x)).sum().backward()
        numbers = [grid.latent] if isinstance(grid, Rounded) else [*grid.numbers.values()]
        assert all(torch.isfinite(one.grad).all() and one.grad.abs().max() > 0 for one in numbers)
        with torch.no_grad():
            for one in numbers:
                one.add_(0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(1)))
        if isinstance(grid, Rounded):
            grid.round()
        changed = grid.values().detach().numpy()
        assert (changed != first).any()
        found = libgguf.dequantize_rows(grid.blocks(), gguf.GGMLQuantizationType[name])
        np.testing.assert_array_equal(changed.view(np.uint32), found.astype(np.float32).view(np.uint32))
    rounded.search()
    new = quantize(rounded.latent.detach().numpy(), name)
    scale = np.abs(rounded.values().detach().numpy() - rounded.latent.detach().numpy()).mean()
    assert scale <= np.abs(dequantize(new, name) - rounded.latent.detach().numpy()).mean() * 1.01


@pytest.mark.parametrize("name", ["Q4_1", "Q2_K", "Q3_K", "IQ4_XS"])
def test_gradients_of_scales(name: str) -> None:
    """Against the sum over each group, written plainly in float64."""
    x = np.random.default_rng(0).standard_normal((2, 512)).astype(np.float32)
    tensor: Any = tensor_of(quantize(x, name), name)
    grid = Scaled(tensor, "cpu")
    up = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    (grid.values() * torch.from_numpy(up)).sum().backward()
    codes = grid._codes
    n = codes.scale.shape[1]
    factor = np.repeat(codes.factor, n // codes.factor.shape[1], 1)
    value, g = (part.reshape(2, n, -1).astype(np.float64) for part in (codes.value(), up))
    expected = (g * value).sum(2) * factor[..., 0] * codes.scale
    np.testing.assert_allclose(grid.numbers["scale"].grad, expected, rtol=1e-4, atol=1e-4)
    if codes.minimum.size:
        expected = g.sum(2) * factor[..., 1] * codes.minimum
        np.testing.assert_allclose(grid.numbers["minimum"].grad, expected, rtol=1e-4, atol=1e-4)


def test_codes_of_a_better_method_stay_at_the_start() -> None:
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    tensor: Any = tensor_of(quantize(x, "Q4_0"), "Q4_0")
    other = x + 0.4 * np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    grid = Rounded(tensor, other, "cpu")
    np.testing.assert_array_equal(grid.values().detach(), dequantize(tensor.blocks(), "Q4_0"))
    kept = (grid.latent.detach().numpy() == other).mean()
    assert 0.1 < kept < 0.9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "f32.gguf", WIDE_LLAMA)
    rng = np.random.default_rng(0)
    (tmp_path / "text.txt").write_text(" ".join(rng.choice(WORDS, 3000)))
    return tmp_path


@pytest.mark.parametrize("kind", ["Q4_0", "Q2_K", "IQ4_XS"])
def test_qat(kind: str, folder: Path) -> None:
    losses = qat(folder / "f32.gguf", kind, folder / "text.txt", folder / "q.gguf", OPTIONS)
    assert losses.valid[-1][1] < 0.85 * losses.valid[0][1]
    with GGUFFile.open(folder / "q.gguf") as file:
        assert kind in {tensor.type.name for tensor in file.tensors.values()}
        for name, values in by_libgguf(folder / "q.gguf").items():
            tensor = file.tensors[name]
            np.testing.assert_array_equal(dequantize(tensor.blocks(), tensor.type).reshape(values.shape), values)


@pytest.mark.parametrize("refresh", [0, 2])
def test_qat_goes_on(refresh: int, folder: Path) -> None:
    """The same bits, with the scales that were searched before the last step too."""
    args, steps = (folder / "f32.gguf", "Q4_0", folder / "text.txt"), replace(OPTIONS, lr_schedule="constant")
    whole = qat(*args, folder / "whole.gguf", replace(steps, iters=5), refresh=refresh)
    qat(*args, folder / "q.gguf", replace(steps, iters=3), refresh=refresh)
    parts = qat(*args, folder / "q.gguf", replace(steps, iters=5, resume=True), refresh=refresh)
    assert parts.train == whole.train
    assert (folder / "q.gguf").read_bytes() == (folder / "whole.gguf").read_bytes()
    write_tiny(folder / "q.gguf", replace(WIDE_LLAMA, type="Q8_0"))
    with pytest.raises(FormatError, match=r"q.gguf: is not what its .state belongs to: leave out --resume"):
        qat(*args, folder / "q.gguf", replace(steps, iters=6, resume=True))


def test_qat_begins_with_a_file_and_searches_scales(folder: Path) -> None:
    write_tiny(folder / "start.gguf", replace(WIDE_LLAMA, type="Q3_K"))
    args = folder / "f32.gguf", "", folder / "text.txt", folder / "q.gguf"
    first = qat(*args, replace(OPTIONS, iters=1), start=folder / "start.gguf")
    later = qat(*args, OPTIONS, start=folder / "start.gguf", refresh=4, activations="int8")
    assert first.valid[0][1] == pytest.approx(later.valid[0][1], rel=0.1)
    assert first.valid[0][1] != later.valid[0][1]
    assert later.valid[-1][1] < 0.85 * later.valid[0][1]


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_0", "Q4_1"])
def test_distill(kind: str, folder: Path) -> None:
    """The codes stay as they are."""
    write_tiny(folder / "q.gguf", replace(WIDE_LLAMA, type=kind))
    losses = distill(folder / "q.gguf", folder / "f32.gguf", folder / "text.txt", folder / "better.gguf", FASTER)
    assert losses.valid[-1][1] < 0.85 * losses.valid[0][1]
    with GGUFFile.open(folder / "q.gguf") as before, GGUFFile.open(folder / "better.gguf") as after:
        changed = 0
        for name, tensor in before.tensors.items():
            other = after.tensors[name]
            assert (other.type, other.ne) == (tensor.type, tensor.ne)
            if tensor.type.is_quantized:
                old, new = (unpack(one.blocks(), one.type) for one in (tensor, other))
                np.testing.assert_array_equal(old.code, new.code)
                changed += (tensor.blocks() != other.blocks()).any()
            elif name.endswith("norm.weight"):
                assert (tensor.blocks() != other.blocks()).any()
        assert changed == 14


def test_experts_stay_as_they_were_quantized(tmp_path: Path) -> None:
    write_tiny(tmp_path / "f32.gguf", tiny_moe(1))
    (tmp_path / "text.txt").write_text("the cat and the dog " * 100)
    qat(tmp_path / "f32.gguf", "Q8_0", tmp_path / "text.txt", tmp_path / "q.gguf", replace(OPTIONS, iters=2))
    with GGUFFile.open(tmp_path / "q.gguf") as file, GGUFFile.open(tmp_path / "f32.gguf") as first:
        name = "blk.0.ffn_up_exps.weight"
        x = first.tensors[name].blocks().view(np.float32)
        np.testing.assert_array_equal(file.tensors[name].blocks(), quantize(x, "Q8_0"))


def test_what_is_refused(folder: Path) -> None:
    write_tiny(folder / "other.gguf", Tiny(n_embd=256, n_ff=256))
    text, output = folder / "text.txt", folder / "q.gguf"
    with pytest.raises(
        FormatError, match=r"other.gguf: has blk.0.attn_q.weight \[256, 128\], .*f32.gguf has one of the"
    ):
        distill(folder / "other.gguf", folder / "f32.gguf", text, output)
    with pytest.raises(GgufRunError, match=r"f32.gguf: no matrix of its layers is quantized"):
        distill(folder / "f32.gguf", folder / "f32.gguf", text, output, OPTIONS)
    with pytest.raises(OptionError, match=r"--activations int4 --refresh 0: allowed are float and int8"):
        qat(folder / "f32.gguf", "Q4_0", text, output, activations="int4")
    write_tiny(folder / "q4.gguf", replace(WIDE_LLAMA, type="Q4_0"))
    with pytest.raises(GgufRunError, match=r"quantized already"):
        qat(folder / "q4.gguf", "Q3_K_M", text, output, OPTIONS)
    with pytest.raises(FormatError, match=r"IQ2_XS has no codes that can be written: allowed are Q4_0"):
        Scaled(tensor_of(np.zeros((1, 74), np.uint8), "IQ2_XS"), "cpu")  # type: ignore[arg-type]
    assert not output.exists()
    assert f32_tensor(np.zeros((1, 1))).type.name == "F32"


def run(*args: Any) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    return result.exit_code, result.output.strip().splitlines()[-1]


def test_the_commands(folder: Path) -> None:
    steps = ("--data", folder / "text.txt", "--iters", 2, "--max-seq-length", 32, "--val-batches", 1)
    q4, better = folder / "q4.gguf", folder / "better.gguf"
    code, line = run("qat", folder / "f32.gguf", "--type", "q4_0", "-o", q4, *steps, "--lr-schedule", "cosine")
    assert (code, line) == (0, f"{q4} is written; losses: {q4}.svg")
    code, line = run("distill", q4, "--teacher", folder / "f32.gguf", "-o", better, *steps)
    assert (code, line) == (0, f"{better} is written; losses: {better}.svg")
    code, line = run("distill", q4, "--teacher", folder / "f32.gguf", "-o", q4, *steps)
    assert (code, "is the file that is read" in line) == (1, True)
    code, line = run("qat", folder / "f32.gguf", "-o", q4, *steps)
    assert (code, line) == (2, "error: --type or --start says which types the file has: give one of them")
