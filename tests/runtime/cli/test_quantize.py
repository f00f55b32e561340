"""gguf-quantize: bytes against libgguf, metadata, options, and one clear line for everything that it refuses."""

import json
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from click.testing import CliRunner, Result
from ggufbuild import T, Typed, write
from numpy.typing import NDArray
from tinymodel import WIDE_LLAMA, Tiny, write_tiny

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.errors import OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.writer import GGUFWriter
from gguf_run.runtime import quantize_model
from gguf_run.runtime.cli.evaluate import main as evaluate
from gguf_run.runtime.cli.quantize import main
from gguf_run.runtime.quantize import file as quantize_file

libgguf: Any = pytest.importorskip("libgguf")

N_EMBD, N_FF, N_LAYER, N_EXPERT = 256, 512, 3, 2
META = {
    "general.architecture": "llama",
    "general.file_type": Typed("u32", 1),
    "llama.block_count": Typed("u32", N_LAYER),
    "llama.attention.head_count": Typed("u32", 8),
    "llama.attention.head_count_kv": Typed("[i32]", [8, 4, 2]),
    "llama.rope.sections": Typed("[i32]", [1, 2, 3]),
    "general.tags": Typed("[string]", ["a", "b"]),
}
SHAPES = {
    "token_embd.weight": (N_EMBD, 40),
    "output_norm.weight": (N_EMBD,),
    "output.weight": (N_EMBD, 40),
} | {
    f"blk.{il}.{name}.weight": ne
    for il in range(N_LAYER)
    for name, ne in {
        "attn_norm": (N_EMBD,), "attn_v": (N_EMBD, 64), "ffn_down": (N_FF, N_EMBD), "ffn_up": (N_EMBD, N_FF),
    }.items()
}  # fmt: skip


def weights_of(name: str, ne: tuple[int, ...]) -> NDArray[np.float16]:
    seed = sum(name.encode())
    return np.random.default_rng(seed).standard_normal(ne[::-1]).astype(np.float16)


def tensors(**changes: NDArray[Any]) -> list[T]:
    """All tensors in an order of no meaning; changes: data by name with _ for the dots."""
    all_of_them = []
    for name, ne in reversed(SHAPES.items()):
        data = changes.get(name.replace(".", "_"), weights_of(name, ne))
        type = "F32" if data.dtype == np.float32 or len(ne) == 1 else "F16"
        all_of_them.append(T(name, ne, type, data.astype(np.float32) if type == "F32" else data))
    return all_of_them


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model.gguf", META, tensors())


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def done(*args: Any) -> GGUFFile:
    """Run without an error and open the output, the second argument."""
    result = run(*args, "-t", 2)
    assert result.exit_code == 0, result.output
    return GGUFFile.open(args[1])


def refused(folder: Path, *args: Any, code: int = 1) -> str:
    """The one line of a run that fails and leaves the folder as it was."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = run(*args)
    assert result.exit_code == code, result.output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("compiling", "note"))]
    assert code == 2 or len(lines) == 1
    return lines[-1]


def reference(x: NDArray[Any], type: str, imatrix: NDArray[np.float32] | None = None) -> bytes:
    kind = libgguf.GGMLQuantizationType[type]
    data: bytes = libgguf.quantize_rows(np.ascontiguousarray(x, np.float32), kind, imatrix=imatrix).tobytes()
    return data


def test_mixture(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path / "out.gguf", "q4_k_m", "-t", 2)
    assert result.exit_code == 0, result.output
    with GGUFFile.open(tmp_path / "out.gguf") as file:
        layers = [name for il in range(N_LAYER) for name in sorted(SHAPES) if name.startswith(f"blk.{il}.")]
        assert list(file.tensors) == ["output.weight", "output_norm.weight", "token_embd.weight", *layers]
        for name, tensor in file.tensors.items():
            x = weights_of(name, SHAPES[name])
            six_bits = name == "output.weight" or ("blk.2" in name and ("attn_v" in name or "ffn_down" in name))
            expected = "F32" if "norm" in name else "Q6_K" if six_bits else "Q4_K"
            assert tensor.type.name == expected, name
            if expected != "F32":
                assert tensor.blocks().tobytes() == reference(x, expected), name
            else:
                assert tensor.blocks().view(np.float32).ravel().tolist() == x.tolist()
        changed = {"general.quantization_version": 2, "general.file_type": 15}
        assert list(file.metadata)[-2:] == list(changed)
        assert {key: file.metadata[key] for key in changed} == changed
        assert all(file.metadata.type_name(key) == "u32" for key in changed)
        assert list(file.metadata["general.tags"]) == ["a", "b"]
        total = sum(tensor.nbytes for tensor in file.tensors.values())
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["type", "tensors", "size", "bits/weight", "RMSE", "of", "RMS", "worst", "tensor"]
    assert [(row[0], row[1], row[4]) for row in rows[1:4] if row] == [
        ("Q6_K", "3", "6.56"), ("F32", "4", "32.00"), ("Q4_K", "8", "4.50")]  # fmt: skip
    assert f"-> {total / 1e3:.2f} kB, " in result.stdout.splitlines()[-1]


def test_the_loss_is_that_of_the_written_file(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path / "out.gguf", "Q8_0")
    x, y = [], []
    with GGUFFile.open(tmp_path / "out.gguf") as file:
        for name, tensor in file.tensors.items():
            if tensor.type.name == "Q8_0":
                x.append(weights_of(name, SHAPES[name]).astype(np.float64).reshape(-1))
                y.append(dequantize(tensor.blocks(), tensor.type).reshape(-1).astype(np.float64))
    a, b = np.concatenate(x), np.concatenate(y)
    row = next(line.split() for line in result.stdout.splitlines() if line.startswith("Q8_0"))
    assert float(row[5]) == pytest.approx(np.sqrt(np.mean((a - b) ** 2)), rel=0.01)
    assert float(row[6].rstrip("%")) / 100 == pytest.approx(np.sqrt(np.sum((a - b) ** 2) / np.sum(a**2)), rel=0.01)


def test_big_endian_input(model: Path, tmp_path: Path) -> None:
    swapped = [
        T(t.name, t.ne, t.type, t.data.astype(t.data.dtype.newbyteorder(">")))
        for t in tensors()
        if isinstance(t.data, np.ndarray)
    ]
    other = write(tmp_path / "big.gguf", META, swapped, order=">")
    for path, out in ((model, "a.gguf"), (other, "b.gguf")):
        done(path, tmp_path / out, "Q8_0").close()
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def imatrix(path: Path, sizes: dict[str, tuple[int, ...]]) -> tuple[Path, dict[str, NDArray[np.float32]]]:
    """Write an imatrix with entries [n_expert, n_in]; return it and the values that it stands for."""
    parts, values = [], {}
    for name, shape in sizes.items():
        values[name] = np.random.default_rng(5).uniform(0.1, 9, shape).astype(np.float32)
        parts.append(T(f"{name}.in_sum2", shape[::-1], data=values[name] * np.float32(4)))
        parts.append(T(f"{name}.counts", (1, shape[0]), data=np.full(shape[0], 4, np.float32)))
    keys = {"imatrix.datasets": Typed("[string]", ["wiki"]), "imatrix.chunk_count": 3, "imatrix.chunk_size": 512}
    return write(path, keys, parts), values


def test_imatrix(tmp_path: Path) -> None:
    """Each expert has weights of its own; a matrix without any is noted."""
    name, ne = "blk.0.ffn_down_exps.weight", (N_FF, 16, N_EXPERT)
    x = weights_of(name, ne)
    data = [T(name, ne, "F16", x), T("blk.0.ffn_up.weight", (N_EMBD, 4), "F16")]
    model = write(tmp_path / "moe.gguf", META | {"llama.expert_count": N_EXPERT}, data)
    path, values = imatrix(tmp_path / "imatrix.gguf", {name: (N_EXPERT, N_FF), "other.weight": (1, 7)})
    result = run(model, tmp_path / "out.gguf", "Q4_0", "--imatrix", path)
    assert result.exit_code == 0, result.output
    assert '1 tensor without importance weights: "blk.0.ffn_up.weight"\n' in result.stderr
    with GGUFFile.open(tmp_path / "out.gguf") as file:
        expected = b"".join(reference(x[i], "Q4_0", values[name][i]) for i in range(N_EXPERT))
        assert file.tensors[name].blocks().tobytes() == expected != reference(x, "Q4_0")
        assert {key: file.metadata[key] for key in list(file.metadata)[-4:]} == {
            "quantize.imatrix.file": str(path),
            "quantize.imatrix.dataset": "wiki",
            "quantize.imatrix.entries_count": 2,
            "quantize.imatrix.chunks_count": 3,
        }
    for option in (("--exclude-weights", "_exps"), ("--include-weights", "other")):
        with done(model, tmp_path / "out.gguf", "Q4_0", "--imatrix", path, *option) as file:
            assert file.tensors[name].blocks().tobytes() == reference(x, "Q4_0")
            assert file.metadata["quantize.imatrix.entries_count"] == 1


def test_channel_scales(tmp_path: Path) -> None:
    """Norms change and the types do not; --keep-lattice does not fit; a method that is not there is refused."""
    model, out = tmp_path / "tiny.gguf", tmp_path / "out.gguf"
    write_tiny(model, replace(WIDE_LLAMA, n_layer=1))
    line = refused(tmp_path, model, out, "Q4_0", "--method", "awq", code=2)
    assert "--method awq: finds no place for channel scales: give --imatrix FILE" in line
    with GGUFFile.open(model) as file:
        matrices = {name: (1, tensor.ne[0]) for name, tensor in file.tensors.items() if len(tensor.ne) > 1}
        norm = file.tensors["blk.0.attn_norm.weight"].blocks().tobytes()
    path, _ = imatrix(tmp_path / "imatrix.gguf", matrices)
    with done(model, out, "Q4_0", "--imatrix", path, "--method", "awq") as file:
        assert file.tensors["blk.0.attn_norm.weight"].blocks().tobytes() != norm
        assert file.tensors["blk.0.attn_norm.weight"].type.name == "F32"
        assert file.tensors["blk.0.attn_q.weight"].type.name == "Q4_0"
    out.unlink()
    line = refused(tmp_path, model, out, "Q4_0", "--imatrix", path, "--method", "awq", "--keep-lattice", code=2)
    assert "not both" in line
    line = refused(tmp_path, model, out, "Q4_0", "--imatrix", path, "--method", "qwa", code=2)
    assert "allowed are awq, gptq and gptq:NAME=NUMBER,... of rho, order" in line


def test_imatrix_of_another_model(model: Path, tmp_path: Path) -> None:
    path, _ = imatrix(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": (1, 128)})
    line = refused(tmp_path, model, tmp_path / "o.gguf", "Q4_0", "--imatrix", path)
    assert 'a.gguf: the entry of "blk.0.ffn_up.weight" has 128 values, the tensor needs 256: it is of another' in line
    path, _ = imatrix(tmp_path / "c.gguf", {f"blk.{il}.ffn_up.weight": (1, 128) for il in range(3)})
    line = refused(tmp_path, model, tmp_path / "o.gguf", "Q4_0", "--imatrix", path)
    assert 'of another model, also "blk.1.ffn_up.weight", "blk.2.ffn_up.weight"' in line
    path, _ = imatrix(tmp_path / "b.gguf", {"x.weight": (1, 128)})
    line = refused(tmp_path, model, tmp_path / "o.gguf", "Q4_0", "--imatrix", path)
    assert "none of its 1 entries is a tensor of" in line


def test_imatrix_of_zeros(tmp_path: Path) -> None:
    """The bytes are the reference's; a warning names the tensors before the work."""
    names = ["blk.0.ffn_down_exps.weight", "blk.0.ffn_up.weight", "blk.1.ffn_up.weight"]
    shapes = [(N_FF, 16, N_EXPERT), (N_EMBD, 4), (N_EMBD, 4)]
    values = [
        np.ones((N_EXPERT, N_FF), np.float32),
        np.zeros((1, N_EMBD), np.float32),
        np.ones((1, N_EMBD), np.float32),
    ]
    values[0][1] = 0  # one expert
    values[2][0, 32:64] = 0  # a block
    parts = []
    for name, value in zip(names, values, strict=True):
        parts.append(T(f"{name}.in_sum2", value.shape[::-1], data=value))
        parts.append(T(f"{name}.counts", (1, len(value)), data=np.ones(len(value), np.float32)))
    path = write(tmp_path / "zeros.gguf", {"imatrix.chunk_count": 1}, parts)
    data = [T(name, ne, "F16", weights_of(name, ne)) for name, ne in zip(names, shapes, strict=True)]
    model = write(tmp_path / "m.gguf", META | {"llama.expert_count": N_EXPERT}, data)
    for more in ((), ("--dry-run",)):
        result = run(model, tmp_path / "out.gguf", "Q4_0", "--imatrix", path, *more)
        assert result.exit_code == 0, result.output
        assert result.stderr.startswith(f"warning: {path}: importance weights of a matrix, or of 16 columns of it,")
        assert 'ffn_down_exps.weight", also "blk.0.ffn_up.weight", "blk.1.ffn_up.weight": make it' in result.stderr
    with GGUFFile.open(tmp_path / "out.gguf") as file:
        x = weights_of(names[1], shapes[1])
        assert file.tensors[names[1]].blocks().tobytes() == reference(x, "Q4_0", values[1][0])
    options = ("--exclude-weights", "exps", "--exclude-weights", "ffn_up")
    result = run(model, tmp_path / "out.gguf", "Q4_0", "--imatrix", path, *options)
    assert "warning" not in result.stderr
    assert '3 tensors without importance weights: "blk.0.ffn_down_exps.weight", also "blk.0.ffn_up.w' in result.stderr


@pytest.mark.parametrize("kind", ["Q4_K_S", "IQ4_NL"])
def test_importance_that_is_too_large(model: Path, kind: str, tmp_path: Path) -> None:
    sums = np.full((1, N_EMBD), 3e38, np.float32)
    parts = [T("blk.0.ffn_up.weight.in_sum2", (N_EMBD, 1), data=sums)]
    parts.append(T("blk.0.ffn_up.weight.counts", (1, 1), data=np.ones(1, np.float32)))
    path = write(tmp_path / "large.gguf", {"imatrix.chunk_count": 1}, parts)
    line = refused(tmp_path, model, tmp_path / "o.gguf", kind, "--imatrix", path)
    assert f'error: {path}: the importance weights of "blk.0.ffn_up.weight" go up to 3e+38, too large' in line


def test_type_that_needs_an_imatrix(model: Path, tmp_path: Path) -> None:
    line = refused(tmp_path, model, tmp_path / "o.gguf", "Q2_K_S")
    assert 'tensor "blk.0.attn_v.weight" would be Q2_K without importance weights' in line
    assert "--imatrix FILE" in line
    assert "this type needs --imatrix" in run(model, "Q2_K_S", "--dry-run").stdout


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "blk.1.attn_norm.weight"])
def test_weights_that_are_no_numbers(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_file, "_SLAB", 1 << 12)  # the two stand in different slabs
    x = weights_of(name, SHAPES[name]).astype(np.float32)
    x.reshape(-1)[[70, -1]] = np.nan, -np.inf
    path = write(tmp_path / "bad.gguf", META, tensors(**{name.replace(".", "_"): x}))
    for kind in ("Q8_0", "COPY"):
        line = refused(tmp_path, path, tmp_path / "o.gguf", kind)
        assert f'bad.gguf: tensor "{name}": 2 of {x.size} weights are NaN or infinite, the first at index 70:' in line


def test_weights_too_large_for_the_type(tmp_path: Path) -> None:
    x = np.full((N_FF, N_EMBD), 1e6, np.float32)
    path = write(tmp_path / "large.gguf", META, tensors(blk_1_ffn_up_weight=x))
    line = refused(tmp_path, path, tmp_path / "o.gguf", "F16")
    assert 'tensor "blk.1.ffn_up.weight" has weights up to 1e+06, too large for F16' in line


def test_quantized_input(model: Path, tmp_path: Path) -> None:
    eight = tmp_path / "eight.gguf"
    done(model, eight, "Q8_0").close()
    line = refused(tmp_path, eight, tmp_path / "o.gguf", "Q4_0", "--pure")
    assert 'eight.gguf: 11 tensors quantized already, "output.weight" is Q8_0' in line
    assert "--allow-requantize" in line
    assert run(eight, "Q4_0", "--dry-run").exit_code == 0
    with done(eight, tmp_path / "o.gguf", "Q4_0", "--allow-requantize", "--pure") as out, GGUFFile.open(eight) as file:
        source, target = (f.tensors["blk.0.ffn_up.weight"] for f in (file, out))
        assert target.blocks().tobytes() == reference(dequantize(source.blocks(), source.type), "Q4_0")
    # What has the right type already is copied, and COPY copies everything.
    for kind in ("Q8_0", "COPY"):
        with done(eight, tmp_path / "o.gguf", kind) as out, GGUFFile.open(eight) as file:
            assert out.metadata["general.file_type"] == 7
            assert [t.blocks().tobytes() for t in out.tensors.values()] == [
                t.blocks().tobytes() for t in file.tensors.values()
            ]


def test_rows_that_blocks_do_not_divide(tmp_path: Path) -> None:
    path = write(tmp_path / "odd.gguf", META, [T("a.weight", (64, 3), "F16"), T("b.weight", (20, 3), "F32")])
    result = run(path, tmp_path / "o.gguf", "Q4_K", "-t", 1)
    assert "note: 1 tensor with rows of 64 weights cannot be Q4_K, whose blocks hold 256: Q5_0 instead" in result.stderr
    assert "rows of 20 weights cannot be Q4_K, whose blocks hold 256: F16 instead" in result.stderr
    with GGUFFile.open(tmp_path / "o.gguf") as file:
        assert [tensor.type.name for tensor in file.tensors.values()] == ["Q5_0", "F16"]


@pytest.mark.parametrize("kind", ["Q4_K_M", "F32", "COPY"])
def test_tensors_without_elements(kind: str, tmp_path: Path) -> None:
    """They stay in the file, as they are in the reference's."""
    empty = [T("blk.0.none.weight", (256, 0), "F16"), T("blk.0.nothing.weight", (0, 3), "F16"), T("z", (0,))]
    for others, name in ((tensors(), "some"), ([], "only")):
        model = write(tmp_path / f"{name}.gguf", META, [*others, *empty])
        run_dry = run(model, kind, "--dry-run")
        assert (run_dry.exit_code, run_dry.stderr) == (0, "")
        with done(model, tmp_path / "out.gguf", kind) as file:
            assert {name: t.ne for name, t in file.tensors.items() if not t.nbytes} == {t.name: t.ne for t in empty}
            assert len(file.tensors) == len(others) + len(empty)


def test_output_is_input(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to(model)
    for out in (model, tmp_path / "link.gguf", tmp_path / "." / "model.gguf"):
        assert "is the file that is read: name another output" in refused(tmp_path, model, out, "Q8_0")
    path, _ = imatrix(tmp_path / "imatrix.gguf", {"blk.0.ffn_up.weight": (1, N_EMBD)})
    assert "is the file that is read" in refused(tmp_path, model, path, "Q8_0", "--imatrix", path)


def test_disk_full(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "o.gguf"
    out.write_bytes(b"old")

    def fail(self: GGUFWriter, name: str, blocks: Any) -> None:
        with self._errors():
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
        assert "but the disk has 0.00 GB left" in refused(tmp_path, model, out, "Q8_0")
    monkeypatch.setattr(GGUFWriter, "write", fail)
    assert "cannot be written: No space left on device" in refused(tmp_path, model, out, "Q8_0")
    monkeypatch.setattr(GGUFWriter, "write", Mock(side_effect=KeyboardInterrupt))
    refused(tmp_path, model, out, "Q8_0", code=130)


def test_prune_layers(model: Path, tmp_path: Path) -> None:
    with done(model, tmp_path / "o.gguf", "Q8_0", "--prune-layers", "1") as file:
        assert sorted({name.split(".")[1] for name in file.tensors if name.startswith("blk")}) == ["0", "1"]
        x = weights_of("blk.2.ffn_up.weight", SHAPES["blk.2.ffn_up.weight"])
        assert file.tensors["blk.1.ffn_up.weight"].blocks().tobytes() == reference(x, "Q8_0")
        assert file.metadata["llama.block_count"] == 2
        assert file.metadata["llama.attention.head_count_kv"].tolist() == [8, 2]
        assert file.metadata["llama.rope.sections"].tolist() == [1, 2, 3]
    assert "--prune-layers 7: the model has layers 0 to 2" in refused(
        tmp_path, model, tmp_path / "p.gguf", "Q8_0", "--prune-layers", "1,7", code=2
    )


def test_split(model: Path, tmp_path: Path) -> None:
    whole = done(model, tmp_path / "whole.gguf", "Q8_0")
    assert run(model, tmp_path / "s.gguf", "Q8_0", "--split-max-tensors", 6).exit_code == 0
    first = tmp_path / "s-00001-of-00003.gguf"
    assert run(first, tmp_path / "t.gguf", "Q4_0", "--allow-requantize", "--keep-split", "--pure").exit_code == 0
    with GGUFFile.open(first) as split, GGUFFile.open(tmp_path / "t-00001-of-00003.gguf") as kept, whole:
        assert split.n_parts == kept.n_parts == 3
        assert list(split.tensors) == list(kept.tensors) == list(whole.tensors)
        parts = [[t.file.path.name[1:] for t in file.tensors.values()] for file in (split, kept)]
        assert parts[0] == parts[1]
        assert all(t.blocks().tobytes() == whole.tensors[t.name].blocks().tobytes() for t in split.tensors.values())
    assert run(model, tmp_path / "b.gguf", "Q8_0", "--split-max-size", "300K").exit_code == 0
    assert all(path.stat().st_size < 302_000 for path in tmp_path.glob("b-*.gguf"))


def test_options_change_types_and_metadata(model: Path, tmp_path: Path) -> None:
    options = ("--tensor-type", "FFN_UP=q8_0", "--output-tensor-type", "f16", "--token-embedding-type", "q8_0",
               "--override-kv", "llama.x=int:7", "--override-kv", "general.name=str:a=b:c",
               "--override-kv", "y=bool:true", "--override-kv", "z=float:0.5")  # fmt: skip
    with done(model, tmp_path / "o.gguf", "Q4_0", *options) as file:
        types = {name: tensor.type.name for name, tensor in file.tensors.items()}
        assert [types[f"{n}.weight"] for n in ("blk.1.ffn_up", "blk.1.ffn_down", "output", "token_embd")] == [
            "Q8_0", "Q4_0", "F16", "Q8_0"]  # fmt: skip
        assert [file.metadata[key] for key in ("llama.x", "general.name", "y", "z")] == [7, "a=b:c", True, 0.5]
        assert file.metadata.type_name("llama.x") == "u32"
    with done(model, tmp_path / "o.gguf", "Q8_0", "--leave-output-tensor") as file:
        assert file.tensors["output.weight"].type.name == "F16"


def test_dry_run_tells_the_sizes_of_the_real_run(model: Path, tmp_path: Path) -> None:
    result = run(model, "Q4_K_M", "--dry-run")
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == [model]
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["blk.0.attn_v.weight", "256", "x", "64", "F16", "Q4_K", "32.77", "kB", "9.22", "kB", "4.50"] in rows
    assert ["output_norm.weight", "256", "F32", "1.02", "kB", "1.02", "kB", "32.00"] in rows
    real_run = run(model, tmp_path / "o.gguf", "Q4_K_M")
    assert result.stdout.splitlines()[-1] in real_run.stdout.splitlines()[-1]
    assert run(model, tmp_path / "unused.gguf", "Q4_K_M", "--dry-run").stdout == result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["o", "Q9"], 'TYPE is "Q9": allowed are F32'),
        (["Q8_0"], "give IN, OUT and TYPE"),
        (["o", "Q8_0", "--tensor-type", "a"], "--tensor-type a: must be REGEX=TYPE"),
        (["o", "Q8_0", "--tensor-type", "(=Q8_0"], "is not a regular expression"),
        (["o", "Q8_0", "--tensor-type", "a=Q8_K"], '"Q8_K" is not a type that can be written'),
        (["o", "Q8_0", "--output-tensor-type", "IQ2_S"], '--output-tensor-type: "IQ2_S" is not a type'),
        (["o", "Q8_0", "--override-kv", "a=int:x"], "must be KEY=TYPE:VALUE"),
        (["o", "Q8_0", "--override-kv", "a=u8:1"], "must be KEY=TYPE:VALUE"),
        (["o", "Q8_0", "--prune-layers", "1-2"], "must be numbers with commas"),
        (["o", "Q8_0", "--split-max-size", "0"], "must be a number of bytes"),
        (["o", "Q8_0", "--split-max-size", "1G", "--keep-split"], "not both"),
        (["o", "Q8_0", "--include-weights", "a"], "give one"),
    ],
)
def test_wrong_usage(model: Path, tmp_path: Path, args: list[str], message: str) -> None:
    assert message in refused(tmp_path, model, *args, code=2)


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_file, "_SLAB", 1 << 12)
    n_rows = 1 << 13
    path = write(tmp_path / "m.gguf", META, [T("a.weight", (N_EMBD, n_rows), "F32")])
    run(path, tmp_path / "o.gguf", "Q8_0", "-t", 2)  # compiles
    tracemalloc.start()
    try:
        done(path, tmp_path / "o.gguf", "Q8_0").close()
        assert tracemalloc.get_traced_memory()[1] < 4 * N_EMBD * n_rows / 8
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that runs, and text.txt beside it."""
    folder = tmp_path_factory.mktemp("whole")
    write_tiny(folder / "f32.gguf", Tiny(n_ctx=512))
    (folder / "text.txt").write_text("the order and another one, or the other end of the road and so on. " * 60)
    return folder / "f32.gguf"


def test_evaluate(whole: Path, tmp_path: Path) -> None:
    """The figures are those of gguf-eval kl, whose chunks are as large."""
    text = whole.with_name("text.txt")
    options = ("--split-max-tensors", "9", "--evaluate", text)
    result = run(whole, tmp_path / "q4.gguf", "Q4_0", "-t", "2", *options)
    assert result.exit_code == 0, result.output
    head, row = result.stdout.splitlines()[-2:]
    written = tmp_path / "q4-00001-of-00003.gguf"
    assert head.split()[:3] == ["text", "file", "size"]
    assert "of the first" not in head
    assert row.split()[:2] == [str(text), str(written)]
    arguments = ["kl", str(written), "--base", str(whole), "-f", str(text), "--chunks", "20", "-t", "2", "--json"]
    kl = json.loads(CliRunner().invoke(evaluate, arguments).stdout)
    assert kl["chunks"] > 1
    assert f" {kl['kl_mean']:.4g} ± " in row
    assert f" {100 * kl['same_top']:.4g} ± " in row
    assert "no.txt" in run(whole, tmp_path / "none.gguf", "Q4_0", "--evaluate", tmp_path / "no.txt").output
    assert not (tmp_path / "none.gguf").exists()


def test_quantize_model(model: Path, tmp_path: Path) -> None:
    """The command's options as keywords, its bytes, its lines, and its errors as exceptions."""
    lines: list[str] = []
    options: dict[str, Any] = {"tensor_type": ["ffn_up=Q8_0"], "threads": 1, "override_kv": "general.name=str:A"}
    quantize_model(model, tmp_path / "a.gguf", "Q4_0", report=lines.append, pure=True, **options)
    words = ("--pure", "--tensor-type", "ffn_up=Q8_0", "--override-kv", "general.name=str:A")
    result = run(model, tmp_path / "b.gguf", "Q4_0", *words)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert lines[:-1] == result.stdout.splitlines()[:-1]
    for kind, more, wanted in (
        ("Q4_0", {"imatri": "m.gguf"}, r"imatri is no option of gguf-quantize: did you mean imatrix\? see"),
        ("Q4_0", {"threads": 0}, r"'--threads' / '-t': 0 is not in the range"),
        ("Q4_0", {"keep_split": True, "split_max_size": "1G"}, "not both"),
        ("Q9", {}, 'TYPE is "Q9"'),
        (None, {}, "give IN, OUT and TYPE"),
    ):
        with pytest.raises(OptionError, match=wanted):
            quantize_model(model, tmp_path / "c.gguf", kind, **more)
    assert not (tmp_path / "c.gguf").exists()
