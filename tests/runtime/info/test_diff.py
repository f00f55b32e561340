"""gguf-info --stats and --diff: numbers against plain NumPy in float64, and what is said of files that differ."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from ggufbuild import T, write
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.cli.info import main
from gguf_run.runtime.info.tensors import Difference, difference, tensor_statistics

INF, NAN = float("inf"), float("nan")
rng = np.random.default_rng(4)


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def file_of(path: Path, values: NDArray[Any], type: str = "F32", **metadata: Any) -> Path:
    return write(path, metadata, [T("t", values.shape[::-1], type, values)])


def weights(path: Path) -> NDArray[np.float64]:
    with GGUFFile.open(path) as file:
        tensor = file.tensors["t"]
        return dequantize(tensor.blocks(), tensor.type).astype(np.float64).ravel()


def q8_0(n_rows: int) -> NDArray[np.uint8]:
    """Random blocks of 32 weights, rows of 1024."""
    blocks = rng.integers(0, 256, (n_rows, 32, 34), np.uint8)
    blocks[..., :2] = rng.normal(0, 0.02, (n_rows, 32, 1)).astype("<f2").view(np.uint8)
    return blocks.reshape(n_rows, -1)


@pytest.mark.parametrize(
    "values",
    [
        rng.normal(3, 0.1, (300, 1000)).astype("<f4"),  # several chunks, the last one not full
        rng.normal(0, 1, 70_001).astype("<f4") ** 5,
        (1e4 + rng.normal(0, 1e-2, 1000)).astype("<f4"),
        rng.integers(-1, 2, (7, 64)).astype("<f4"),
        np.array([3e38, -3e38, 1.0], "<f4"),
        np.array([1e-45, 0, -0.0], "<f4"),
    ],
)
def test_statistics(tmp_path: Path, values: NDArray[np.float32]) -> None:
    path = file_of(tmp_path / "m.gguf", values)
    x = weights(path)
    with GGUFFile.open(path) as file:
        s = tensor_statistics(file.tensors["t"])
    d = x - x.mean()
    assert (s.min, s.max, s.zeros, s.n_not_finite) == (x.min(), x.max(), (x == 0).mean(), 0)
    expected = (x.mean(), x.std(), np.sqrt((x * x).mean()))
    np.testing.assert_allclose((s.mean, s.std, s.rms), expected, rtol=1e-9, atol=1e-15 * np.abs(x).max())
    assert s.kurtosis == pytest.approx((d**4).mean() / (d * d).mean() ** 2, rel=1e-9)


def test_statistics_of_odd_tensors(tmp_path: Path) -> None:
    with GGUFFile.open(file_of(tmp_path / "m.gguf", np.full(100_000, 0.1, "<f4"))) as file:
        s = tensor_statistics(file.tensors["t"])
    value = float(np.float32(0.1))
    assert (s.min, s.max, s.mean, s.std, s.kurtosis, s.zeros) == (value, value, value, 0.0, None, 0.0)
    values = np.tile(np.array([NAN, 1, INF, -INF, -1, 0], "<f4"), 20_000)
    with GGUFFile.open(file_of(tmp_path / "m.gguf", values)) as file:
        s = tensor_statistics(file.tensors["t"])
    assert (s.min, s.max, s.mean, s.zeros, s.n_not_finite) == (-1, 1, 0, 1 / 3, 60_000)
    with GGUFFile.open(file_of(tmp_path / "m.gguf", np.full(3, NAN, "<f4"))) as file:
        s = tensor_statistics(file.tensors["t"])
    assert (s.min, s.mean, s.rms, s.n_not_finite) == (None, None, None, 3)


@pytest.mark.parametrize("order", ["<", ">"])
def test_difference(tmp_path: Path, order: str) -> None:
    """Different types and sizes of blocks, byte orders too."""
    n_rows = 80  # two chunks
    values = rng.normal(0, 0.02, (n_rows, 1024)).astype("<f4")
    a = file_of(tmp_path / "a.gguf", values)
    b = write(tmp_path / "b.gguf", {}, [T("t", (1024, n_rows), "Q8_0", q8_0(n_rows))])
    if order == ">":
        b = write(tmp_path / "b.gguf", {}, [T("t", (1024, n_rows), "F16", values.astype(">f2"))], order=order)
    x, y = weights(a), weights(b)
    with GGUFFile.open(a) as one, GGUFFile.open(b) as other:
        found = difference(one.tensors["t"], other.tensors["t"])
        assert difference(one.tensors["t"], one.tensors["t"]) is None
    assert found is not None
    d = x - y
    assert (found.max_abs, found.n_different, found.n_not_finite) == (np.abs(d).max(), (d != 0).sum(), 0)
    rms = np.sqrt((d * d).mean())
    np.testing.assert_allclose((found.rmse, found.relative_rmse), (rms, rms / np.sqrt((x * x).mean())), rtol=1e-12)


def test_difference_with_infinities(tmp_path: Path) -> None:
    a = file_of(tmp_path / "a.gguf", np.array([1, INF, NAN, INF, 0, 3], "<f4"))
    b = file_of(tmp_path / "b.gguf", np.array([1, INF, 1, -INF, NAN, 1], "<f4"))
    with GGUFFile.open(a) as one, GGUFFile.open(b) as other:
        found = difference(one.tensors["t"], other.tensors["t"])
    assert found == Difference(np.sqrt(4 / 6), np.sqrt(4 / 10), 2.0, 4, 3)
    zero = file_of(tmp_path / "a.gguf", np.zeros(4, "<f4"))
    one_off = file_of(tmp_path / "b.gguf", np.array([0, -0.0, 0, 1], "<f4"))
    with GGUFFile.open(zero) as one, GGUFFile.open(one_off) as other:
        assert difference(one.tensors["t"], other.tensors["t"]) == Difference(0.5, None, 1.0, 1, 0)


def test_stats_option(tmp_path: Path) -> None:
    tensors = [T("a.weight", (4,), data=np.array([1, -1, 0, 2], "<f4")), T("b", (2,), data=np.array([1, NAN], "<f4"))]
    path = write(tmp_path / "m.gguf", {}, tensors)
    rows = {line.split()[0]: line.split() for line in run(path, "--stats").stdout.splitlines() if line}
    assert rows["tensor"][-9:] == ["min", "max", "mean", "std", "rms", "zeros", "kurtosis", "not", "finite"]
    assert rows["a.weight"][5:] == ["-1", "2", "0.5", "1.118", "1.225", "0.25", "1.64", "0"]
    assert rows["b"][5:] == ["1", "1", "1", "0", "1", "0", "-", "1"]
    facts = json.loads(run(path, "--stats", "--match", r"weight$", "--json").stdout)
    assert [t["name"] for t in facts["tensors"]] == ["a.weight"]
    assert facts["tensors"][0]["rms"] == pytest.approx(1.5**0.5)
    assert facts["total"]["n_tensors"] == 2
    assert [t["name"] for t in json.loads(run(path, "--tensors", "--match", "^b", "--json").stdout)["tensors"]] == ["b"]


def pair(folder: Path) -> tuple[Path, Path]:
    f4, f2 = np.arange(64, dtype="<f4"), np.arange(64, dtype="<f2")
    a = write(
        folder / "a.gguf",
        {"same": 1, "name": "old", "type": 1, "gone": 2.5, "words": [f"w{i}" for i in range(50)], "short": [1, 2, 3]},
        [T("t.same", (64,), data=f4), T("t.type", (64,), data=f4), T("t.shape", (64,)), T("gone", (8, 2)),
         T("t.off", (64,), data=f4)],
    )  # fmt: skip
    b = write(
        folder / "b.gguf",
        {"name": "new", "same": 1, "type": -1, "words": [f"w{i}" for i in range(40)] + ["x"] * 10, "short": [1, 2],
         "new": True},
        [T("t.off", (64,), data=f4 + 1), T("t.same", (64,), data=f4), T("t.type", (64,), "F16", f2),
         T("t.shape", (32, 2)), T("new", (3,))],
    )  # fmt: skip
    return a, b


def test_diff_text(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    result = run(a, "--diff", b)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        f"- {a}\n+ {b}\n\nmetadata: 6 keys differ\n"
        "- name  string  old\n+ name  string  new\n- type  u32  1\n+ type  i32  -1\n- gone  f32  2.5\n"
        '- words  array[string]  [50] from 40: "w40", "w41", "w42", "w43", "w44", "w45", "w46", "w47", ...\n'
        '+ words  array[string]  [50] from 40: "x", "x", "x", "x", "x", "x", "x", "x", ...\n'
        "- short  array[u32]  [3] from 2: 3\n+ short  array[u32]  [2] from 2:\n+ new  bool  true\n"
        "\ntensors: 1 are identical, 3 differ, 1 only in A, 1 only in B\n- gone  F32  8 x 2\n+ new  F32  3\n\n"
        "tensor   A    B    RMSE  relative  max  different\n"
        "t.type   F32  F16     0   0.0000%    0          0\n"
        "t.shape  F32  F32     -         -    -          -  shape 64 and 32 x 2\n"
        "t.off    F32  F32     1   2.7384%    1         64\n"
    )


def test_diff_json(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    facts = json.loads(run(a, "--diff", b, "--json", "--match", "t\\.|gone").stdout, parse_constant=pytest.fail)
    assert [entry["key"] for entry in facts["metadata"]] == ["name", "type", "gone", "words", "short", "new"]
    assert facts["metadata"][2] == {"key": "gone", "a": {"type": "f32", "value": 2.5}, "b": None}
    assert facts["metadata"][4]["b"] == {"type": "array[u32]", "length": 2, "from": 2, "value": []}
    tensors = facts["tensors"]
    assert tensors["only_a"] == [{"name": "gone", "type": "F32", "ne": [8, 2]}]
    assert (tensors["n_identical"], tensors["only_b"]) == (1, [])
    assert [t["name"] for t in tensors["different"]] == ["t.type", "t.shape", "t.off"]
    assert tensors["different"][1].keys() == {"name", "a", "b"}
    assert (tensors["different"][2]["max_abs"], tensors["different"][2]["n_different"]) == (1.0, 64)


def test_diff_of_the_same_file(tmp_path: Path) -> None:
    a, _ = pair(tmp_path)
    lines = run(a, "--diff", a).stdout.splitlines()
    assert lines[3:] == ["metadata: 0 keys differ", "", "tensors: 5 are identical, 0 differ, 0 only in A, 0 only in B"]


def test_errors(tmp_path: Path) -> None:
    a, _ = pair(tmp_path)
    (tmp_path / "bad.gguf").write_bytes(a.read_bytes()[:-200])
    for args, code, message in (
        (("--diff", tmp_path / "none.gguf"), 1, "No such file"),
        (("--diff", tmp_path / "bad.gguf"), 1, "truncated or damaged"),
        (("--tensors", "--match", "("), 2, "--match (: is not a regular expression"),
    ):
        result = run(a, *args)
        assert (result.exit_code, result.stdout) == (code, "")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
