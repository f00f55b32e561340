"""gguf-info --set and --remove: the changed file, in a copy or in place, and everything that is refused."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real
from click.testing import CliRunner, Result
from ggufbuild import T, Typed, build, write, write_split

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.cli.info import main

PAIRS: dict[str, Any] = {
    "general.architecture": "llama",
    "a.u8": Typed("u8", 7),
    "a.f32": 0.5,
    "a.yes": True,
    "a.text": "old",
    "a.ints": Typed("[i16]", [1, 2, 3]),
    "a.words": ["x", "y"],
    "a.nested": Typed("[[i32]]", [[1, 2], [3]]),
}
TENSORS = [
    T("one", (32, 3), "Q8_0", np.arange(102, dtype=np.uint8)),
    T("two", (5,), "F32", np.arange(5, dtype="<f4")),
]


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "m.gguf", PAIRS, TENSORS)


def built(changes: dict[str, Any], removed: tuple[str, ...] = ()) -> bytes:
    """What the file must be: keys keep their places, new ones come last."""
    pairs = {key: value for key, value in (PAIRS | changes).items() if key not in removed}
    return build(pairs, TENSORS)


# Assignment, and the pair that must stand in the file.
GOOD = (
    ("a.u8=200", {"a.u8": Typed("u8", 200)}),
    ("a.u8=0x10", {"a.u8": Typed("u8", 16)}),
    ("a.f32=1", {"a.f32": Typed("f32", 1)}),
    ("a.f32=inf", {"a.f32": Typed("f32", float("inf"))}),
    ("a.yes=False", {"a.yes": False}),
    ("a.yes=0", {"a.yes": False}),
    ("a.text=12", {"a.text": "12"}),
    ("a.text=", {"a.text": ""}),
    ("a.text=a=b:c", {"a.text": "a=b:c"}),
    ("a.ints=[-5]", {"a.ints": Typed("[i16]", [-5])}),
    ("a.ints=[]", {"a.ints": Typed("[i16]", [])}),
    ('a.words=["é", ""]', {"a.words": ["é", ""]}),
    ("a.nested=[[1], [2, 3]]", {"a.nested": Typed("[[u32]]", [[1], [2, 3]])}),
    ("a.u8:f64=0.1", {"a.u8": Typed("f64", 0.1)}),
    ("new=5", {"new": Typed("u32", 5)}),
    ("new=-5", {"new": Typed("i32", -5)}),
    ("new=0.5", {"new": 0.5}),
    ("new=true", {"new": True}),
    ("new=True", {"new": "True"}),
    ("new=NaN", {"new": "NaN"}),
    ('new="x"', {"new": '"x"'}),
    ("new={}", {"new": "{}"}),
    ("new=1, 2", {"new": "1, 2"}),
    ("new=[1, -2]", {"new": Typed("[i32]", [1, -2])}),
    ("new:string=5", {"new": "5"}),
    ("new:u64=5", {"new": Typed("u64", 5)}),
    ("new:array[f32]=[1, 0.5]", {"new": Typed("[f32]", [1, 0.5])}),
    ("new:array[array[i8]]=[[1], []]", {"new": Typed("[[i8]]", [[1], []])}),
    ("odd:key:u8=1", {"odd:key": Typed("u8", 1)}),
)


@pytest.mark.parametrize(("assignment", "expected"), GOOD)
def test_set(model: Path, tmp_path: Path, assignment: str, expected: dict[str, Any]) -> None:
    before = model.read_bytes()
    result = run(model, "--set", assignment, "-o", tmp_path / "out.gguf")
    assert (result.exit_code, result.stderr) == (0, "")
    assert (tmp_path / "out.gguf").read_bytes() == built(expected)
    assert model.read_bytes() == before


def test_set_and_remove_together(model: Path, tmp_path: Path) -> None:
    options = ["--set", "a.u8=8", "--remove", "a.f32", "--set", "new=x", "--remove", "a.nested", "-o", tmp_path / "out"]
    result = run(model, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    assert (tmp_path / "out").read_bytes() == built({"a.u8": Typed("u8", 8), "new": "x"}, ("a.f32", "a.nested"))
    assert result.stdout.splitlines() == [
        "- a.u8  u8  7", "+ a.u8  u8  8", "- a.f32  f32  0.5",
        '- a.nested  array[array]  [2] "array of 2", "array of 1"', "+ new  string  x",
    ]  # fmt: skip
    changes = json.loads(run(model, *options, "--json").stdout)["metadata"]
    assert changes[0] == {"key": "a.u8", "a": {"type": "u8", "value": 7}, "b": {"type": "u8", "value": 8}}
    assert (changes[1]["b"], changes[-1]["a"]) == (None, None)


def test_nothing_changes(model: Path, tmp_path: Path) -> None:
    result = run(model, "--set", "a.u8=7", "-o", tmp_path / "out.gguf")
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "out.gguf").read_bytes() == model.read_bytes()


def test_in_place(model: Path) -> None:
    """Values of the same size; or of another one that the padding before the data can take."""
    for option, expected in (
        (("--set", "a.u8=9"), {"a.u8": Typed("u8", 9)}),
        (("--set", "a.u8=9", "--set", "a.words=[\"xx\", \"\"]"), {"a.u8": Typed("u8", 9), "a.words": ["xx", ""]}),
        (("--set", "a.words=[\"x\", \"y\"]"), {"a.u8": Typed("u8", 9)}),
    ):  # fmt: skip
        result = run(model, *option, "--in-place")
        assert (result.exit_code, result.stderr) == (0, "")
        assert model.read_bytes() == built(expected)
    before, n_data = model.read_bytes(), 128 + 32
    longer = built({"a.text": "x" * 40})
    result = run(model, "--set", f"a.text={'x' * 40}", "--in-place")
    assert (result.exit_code, result.stdout) == (1, "")
    sizes = f"the new header takes {len(longer) - n_data} bytes, the old one {len(before) - n_data}: use -o OUT"
    assert sizes in result.stderr
    assert model.read_bytes() == before
    assert os.listdir(model.parent) == ["m.gguf"]


@pytest.mark.parametrize("lie", [{"alignment": 64}, {"version": 2}])
def test_in_place_refuses_other_layouts(tmp_path: Path, lie: dict[str, Any]) -> None:
    """A file that the writer would lay out otherwise, or whose alignment would change."""
    path = write(tmp_path / "m.gguf", {"a": 1}, TENSORS, **lie)
    before = path.read_bytes()
    option = "general.alignment=32" if "alignment" in lie else "a=2"
    result = run(path, "--set", option, "--in-place")
    assert (result.exit_code, "cannot be edited in place: use -o OUT" in result.stderr) == (1, True)
    assert path.read_bytes() == before
    assert run(path, "--set", option, "-o", tmp_path / "out.gguf").exit_code == 0
    with GGUFFile.open(tmp_path / "out.gguf") as file:
        assert (file.version, file.alignment) == (3, 32)
        assert file.tensors["two"].blocks().tobytes() == np.arange(5, dtype="<f4").tobytes()


def test_gap_before_a_tensor(tmp_path: Path) -> None:
    tensors = [TENSORS[0], T("two", (5,), "F32", bytes(84), offset=192)]
    path = write(tmp_path / "m.gguf", {"a": 1}, tensors)
    before = path.read_bytes()
    assert "use -o OUT" in run(path, "--set", "a=2", "--in-place").stderr
    assert path.read_bytes() == before


def test_big_endian(tmp_path: Path) -> None:
    tensors = [T("two", (5,), "F32", np.arange(5, dtype=">f4"))]
    path = write(tmp_path / "m.gguf", PAIRS, tensors, order=">")
    expected = build(PAIRS | {"a.u8": Typed("u8", 9), "a.ints": Typed("[i16]", [3, 2, 1])}, tensors, order=">")
    options = ["--set", "a.u8=9", "--set", "a.ints=[3, 2, 1]"]
    assert run(path, *options, "-o", tmp_path / "out.gguf").exit_code == 0
    assert run(path, *options, "--in-place").exit_code == 0
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes() == expected


def test_split_model(tmp_path: Path) -> None:
    """A copy is split as the model is; in place the first file changes. Tensors and split keys stay."""
    path = write_split(tmp_path)
    copy = tmp_path / "copy.gguf"
    assert run(path, "--set", "general.name=other", "-o", copy).exit_code == 0
    assert not copy.exists()
    out = tmp_path / "copy-00001-of-00003.gguf"
    with GGUFFile.open(path) as a, GGUFFile.open(out) as b:
        assert b.metadata["general.name"] == "other"
        assert b.split == a.split
        for name, tensor in a.tensors.items():
            np.testing.assert_array_equal(b.tensors[name].blocks(), tensor.blocks())
    assert run(out, "--set", "general.name=third", "--in-place").exit_code == 0
    with GGUFFile.open(out) as b:
        assert b.metadata["general.name"] == "third"
    result = run(path, "--set", "x=1", "-o", path)
    assert "is the file that is read" in result.stderr


def test_real_model_in_place(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data = real.smollm2().read_bytes()
    path.write_bytes(data)
    with GGUFFile.open(path) as file:
        eps = file.metadata["llama.rope.freq_base"]
    result = run(path, "--set", "llama.rope.freq_base=12345.5", "--in-place")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "+ llama.rope.freq_base  f32  12345.5")
    changed = np.flatnonzero(np.frombuffer(path.read_bytes(), np.uint8) != np.frombuffer(data, np.uint8))
    assert 1 <= len(changed) <= 4
    assert run(path, "--set", f"llama.rope.freq_base={eps}", "--in-place").exit_code == 0
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--set", "a.u8=256"), "256 does not fit type u8"),
        (("--set", "a.u8=x"), '"x" is not a value of type u8'),
        (("--set", "a.u8=1.5"), '"1.5" is not a value of type u8'),
        (("--set", "a.f32=one"), "is not a value of type f32"),
        (("--set", "a.f32=1e99"), "does not fit type f32"),
        (("--set", "a.yes=maybe"), "is not a value of type bool"),
        (("--set", "a.ints=1"), "is an array, not 1"),
        (("--set", "a.ints=1, 2"), "is not a value of type array[i16]"),
        (("--set", "a.ints=[40000]"), "does not fit type i16"),
        (("--set", "a.words=[1]"), "1 is not a string"),
        (("--set", "a.nested=[1]"), "1 does not fit type array"),
        (("--set", "new=[]"), "needs a type"),
        (("--set", "new=[1, \"x\"]"), "needs a type"),
        (("--set", "new=[null]"), "has a NoneType"),
        (("--set", "new:u9=1"), 'unknown type "u9"'),
        (("--set", "a.u8"), "expected key=value"),
        (("--set", "=1"), "expected key=value"),
        (("--set", "x" * 70_000 + "=1"), "1 to 65535 are"),
        (("--set", "a.u8=1", "--set", "a.u8=2"), "a.u8: is set or removed twice"),
        (("--set", "a.u8=1", "--remove", "a.u8"), "a.u8: is set or removed twice"),
        (("--set", "split.count=2"), "belongs to how the model is split"),
        (("--remove", "none"), "has no such key"),
    ],
)  # fmt: skip
def test_bad_values(model: Path, tmp_path: Path, option: tuple[str, ...], message: str) -> None:
    for target in (("-o", tmp_path / "out.gguf"), ("--in-place",)):
        result = run(model, *option, *target)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert result.stdout == ""
    assert os.listdir(tmp_path) == ["m.gguf"]
    assert model.read_bytes() == built({})


@pytest.mark.parametrize(
    "options",
    [
        ("--set", "a=1"), ("--remove", "a.u8"), ("-o", "x"), ("--in-place",), ("--set", "a=1", "-o", "x", "--in-place"),
        ("--set", "a=1", "--in-place", "--tensors"), ("--set", "a=1", "--in-place", "--stats"),
        ("--set", "a=1", "--in-place", "--diff", "b"),
    ],
)  # fmt: skip
def test_wrong_usage(model: Path, options: tuple[str, ...]) -> None:
    result = run(model, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr
    assert model.read_bytes() == built({})


def test_outputs_that_are_refused(model: Path, tmp_path: Path) -> None:
    """The file itself is written only where --in-place says so."""
    os.link(model, tmp_path / "link.gguf")
    for name, message in (("m.gguf", "is read"), ("link.gguf", "is read"), ("", "is a folder"), ("no/x", "no folder")):
        result = run(model, "--set", "a.u8=1", "-o", tmp_path / name)
        assert (result.exit_code, result.stdout) == (1, "")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert model.read_bytes() == built({})
    assert sorted(os.listdir(tmp_path)) == ["link.gguf", "m.gguf"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a file that cannot be written")
def test_read_only_file(model: Path) -> None:
    model.chmod(0o444)
    result = run(model, "--set", "a.u8=1", "--in-place")
    assert (result.exit_code, "Permission denied" in result.stderr) == (1, True)
