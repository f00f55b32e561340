"""The writer: what it writes, our reader and the gguf package read back; nothing half-written is ever left."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import ggufbuild
import numpy as np
import pytest
import real
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gguf_run.formats.blocks.types import TENSOR_TYPES, type_by_name
from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.writer import GGUFWriter, MetaValue, TensorInfo, Typed, split_counts


def info(name: str, ne: Sequence[int] = (32, 3), type: str = "F32") -> TensorInfo:
    return TensorInfo(name, tuple(ne), type_by_name(type))


def data_of(tensor: TensorInfo, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (tensor.n_rows, tensor.nbytes // tensor.n_rows), np.uint8)


def write(path: Path, metadata: Mapping[str, MetaValue], tensors: Sequence[TensorInfo], **options: Any) -> list[Path]:
    with GGUFWriter(path, metadata, tensors, **options) as writer:
        for i, tensor in enumerate(tensors):
            writer.write(tensor.name, data_of(tensor, i))
    assert sum(file.stat().st_size for file in writer.paths) == writer.nbytes
    return writer.paths


def typed(file: GGUFFile) -> dict[str, MetaValue]:
    return {key: file.metadata.typed(key) for key in file.metadata}


# Every type at its limits, as ggufbuild (written from the format's description) encodes it.
TYPED = {
    **{f"a.{t}.min": (t, np.iinfo(c).min) for t, (_, c) in ggufbuild.SCALARS.items() if t[0] in "ui"},
    **{f"a.{t}.max": (t, np.iinfo(c).max) for t, (_, c) in ggufbuild.SCALARS.items() if t[0] in "ui"},
    "f32": ("f32", 0.1), "f64": ("f64", 0.1), "inf": ("f32", float("inf")),
    "yes": ("bool", True), "no": ("bool", False),
    "text": ("string", "naïve\n"), "empty": ("string", ""), "bytes": ("string", b"\xff"),
    "[u8]": ("[u8]", [0, 255]), "[i64]": ("[i64]", [-(2**63), 2**63 - 1]), "[u64]": ("[u64]", [0, 2**64 - 1]),
    "[f32]": ("[f32]", [0.1, float("nan")]), "[f64]": ("[f64]", [0.1]), "[bool]": ("[bool]", [True, False]),
    "[string]": ("[string]", ["a", "", "é", b"\xfe"]), "[]": ("[i16]", []), "[s]": ("[string]", []),
    "[[i32]]": ("[[i32]]", [[1, 2], [], [-3]]),
    "[[[string]]]": ("[[[string]]]", [[["a"], []], []]), "[[]]": ("[[i8]]", []),
}  # fmt: skip


@pytest.mark.parametrize("order", ["<", ">"])
def test_metadata_bytes(tmp_path: Path, order: str) -> None:
    """Explicit types: the file is byte for byte what the format's description says; so is a copy of it."""
    expected = ggufbuild.build({k: ggufbuild.Typed(*v) for k, v in TYPED.items()}, order=order)
    expected += bytes(-len(expected) % 32)
    pairs = {key: Typed(type.replace("[", "array["), value) for key, (type, value) in TYPED.items()}
    (path,) = write(tmp_path / "a.gguf", pairs, [], byte_order=order)
    assert path.read_bytes() == expected
    del pairs["bytes"]
    (path,) = write(tmp_path / "a.gguf", pairs, [], byte_order=order)
    for other in ("<", ">"):
        with GGUFFile.open(path) as file:
            (copy,) = write(tmp_path / "b.gguf", typed(file), [], byte_order=other)
            with GGUFFile.open(copy) as again:
                (back,) = write(tmp_path / "c.gguf", typed(again), [], byte_order=order)
        assert back.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (1, ("u32", 1)), (-1, ("i32", -1)), (2**32, ("u64", 2**32)), (-(2**31) - 1, ("i64", -(2**31) - 1)),
        (True, ("bool", True)),
        (0.1, ("f32", 0.1)), ("x", ("string", "x")), (np.int8(-1), ("i8", -1)), (np.float64(0.1), ("f64", 0.1)),
        ([1, 2], ("[u32]", [1, 2])), ([1, -2], ("[i32]", [1, -2])), ([0, 2**63], ("[u64]", [0, 2**63])),
        (["a"], ("[string]", ["a"])), ([True], ("[bool]", [True])), ((0.5,), ("[f32]", [0.5])),
        (np.arange(3, dtype=">u2"), ("[u16]", [0, 1, 2])), (np.array(["a", "b"]), ("[string]", ["a", "b"])),
        (np.eye(2, dtype=np.int8), ("[[i8]]", [[1, 0], [0, 1]])), ([[1], [2, 3]], ("[[u32]]", [[1], [2, 3]])),
    ],
)  # fmt: skip
def test_inferred_types(tmp_path: Path, value: Any, stored: tuple[str, Any]) -> None:
    (path,) = write(tmp_path / "a.gguf", {"key": value}, [])
    expected = ggufbuild.build({"key": ggufbuild.Typed(*stored)})
    assert path.read_bytes() == expected + bytes(-len(expected) % 32)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2**64, "fit into no type of 64 bits"), ([], "needs a type"), ([1, "a"], "needs a type"),
        (None, "has a NoneType"),
        (np.float16(1), "has a float16"), (Typed("u8", 256), "256 does not fit type u8"),
        (Typed("i8", 1.5), "1.5 does not"),
        (Typed("u8", -1), "does not fit"), (Typed("f32", "x"), "does not fit"), (Typed("f32", 1e300), "does not fit"),
        (Typed("bool", 1), "1 does not fit type bool"), (Typed("array[u8]", [1, 2, 3, 4, 256]), "1, 2, 3, 4, ... does"),
        (Typed("array[u8]", 1), "is an array, not 1"), (Typed("array[u8]", "abc"), "is an array"),
        (Typed("string", 1), "1 is not a string"), (Typed("array[string]", ["\ud800"]), "is not a string of UTF-8"),
        (Typed("u128", 1), "unknown type"), (Typed("array", [1]), "unknown type"),
        (Typed("array[", []), "unknown type"),
        (Typed("u8[3]", []), "unknown type"), (Typed("array[f16]", []), "unknown type"),
        (Typed("array[array]", [1]), "1 does not fit type array"),
        (Typed("array[" * 8 + "u8" + "]" * 8, []), "unknown type"),
    ],
)  # fmt: skip
def test_bad_metadata(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(GgufRunError, match=message) as error:
        write(tmp_path / "a.gguf", {"some.key": value}, [])
    assert '"some.key"' in str(error.value)
    assert list(tmp_path.iterdir()) == []


SCALARS = st.one_of(
    st.booleans(), st.text(max_size=9), st.floats(width=32, allow_nan=False), st.integers(-(2**63), 2**64 - 1)
)
KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=9).filter(
    lambda key: not key.startswith(("split.", "general.alignment"))
)
TENSORS = st.lists(
    st.builds(
        lambda name, type, ne: TensorInfo(name, (ne[0] * type.block_size, *ne[1:]), type),
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=9),
        st.sampled_from(TENSOR_TYPES),
        st.lists(st.integers(1, 3), min_size=1, max_size=4),
    ),
    max_size=6,
    unique_by=lambda tensor: tensor.name,
)


@settings(max_examples=100, deadline=None)
@given(
    pairs=st.dictionaries(KEYS, SCALARS | st.lists(SCALARS.map(repr), min_size=1, max_size=3), max_size=6),
    tensors=TENSORS,
    order=st.sampled_from("<>"),
    alignment=st.sampled_from((None, 1, 8, 32, 4096)),
    limits=st.tuples(st.integers(0, 999), st.integers(0, 3)),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    pairs: dict[str, Any],
    tensors: list[TensorInfo],
    order: str,
    alignment: int | None,
    limits: tuple[int, int],
) -> None:
    folder = tmp_path_factory.mktemp("w")
    options = {"split_max_size": limits[0], "split_max_tensors": limits[1]}
    pairs = pairs | ({"general.alignment": alignment} if alignment else {})
    paths = write(folder / "m.gguf", pairs, tensors, byte_order=order, **options)
    assert sorted(folder.iterdir()) == paths
    with GGUFFile.open(paths[0]) as file:
        assert (file.version, file.byte_order, file.alignment) == (3, order, alignment or 32)
        assert list(file.metadata)[: len(pairs)] == list(pairs)
        for key, value in pairs.items():
            found = file.metadata[key]
            assert (found.tolist() if isinstance(value, list) else found) == value
        assert [info(t.name, t.ne, t.type.name) for t in file.tensors.values()] == tensors
        for i, tensor in enumerate(file.tensors.values()):
            np.testing.assert_array_equal(tensor.blocks(), data_of(tensor, i))
        assert file.nbytes == sum(path.stat().st_size for path in paths)
    for path in paths:
        path.unlink()
    folder.rmdir()


@pytest.mark.parametrize("order", ["<", ">"])
def test_gguf_package_reads_it(tmp_path: Path, order: str) -> None:
    pairs = {
        "general.architecture": "llama", "a.u8": Typed("u8", 200), "a.i64": Typed("i64", -5),
        "a.f64": Typed("f64", 0.1),
        "a.bool": True, "a.f32s": [0.5, 1.5],
        "a.strings": ["x", "", "é"], "a.i16s": np.arange(-2, 3, dtype=np.int16), "general.alignment": 64,
    }  # fmt: skip
    # Of big-endian blocks the package gives the file's bytes: compare floats only.
    types = (
        [t.name for t in TENSOR_TYPES if t.name not in ("Q8_1", "NVFP4", "Q1_0", "Q2_0")] if order == "<" else ["F32"]
    )
    tensors = [info(name.lower(), (256, 2, 3), name) for name in types]
    (path,) = write(tmp_path / "m.gguf", pairs, tensors, byte_order=order)
    reader = gguf.GGUFReader(path)
    for key, value in pairs.items():
        value = value.value if isinstance(value, Typed) else value
        assert reader.fields[key].contents() == (value.tolist() if isinstance(value, np.ndarray) else value)
    assert reader.alignment == 64
    assert [(t.name, t.tensor_type.name, t.shape.tolist()) for t in reader.tensors] == [
        (t.name, t.type.name, list(t.ne)) for t in tensors
    ]
    for i, (tensor, found) in enumerate(zip(tensors, reader.tensors, strict=True)):
        little = found.data.astype(found.data.dtype.newbyteorder("<"))
        assert little.tobytes() == data_of(tensor, i).tobytes(), tensor.name


@pytest.mark.parametrize("model", [real.smollm2, real.gemma3])
def test_copy_of_a_real_model_is_the_same_file(tmp_path: Path, model: Any) -> None:
    path = model()
    with GGUFFile.open(path) as file:
        tensors = list(file.tensors.values())
        with GGUFWriter(tmp_path / "copy.gguf", typed(file), tensors, inputs=[path]) as writer:
            for tensor in tensors:
                writer.copy(tensor)
    assert (tmp_path / "copy.gguf").read_bytes() == path.read_bytes()


def test_split_and_merge(tmp_path: Path) -> None:
    """As gguf-split does it: metadata in the first file only, then three keys; sizes are those of padded tensors."""
    tensors = [info(f"t{i}", (32, n)) for i, n in enumerate((1, 1, 1, 5, 1))]  # 128 bytes a row
    pairs = {"general.name": "x", "split.count": 7, "a": 1}
    paths = write(tmp_path / "m.gguf", pairs, tensors, split_max_size=384)
    assert [path.name for path in paths] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for no, (path, names) in enumerate(zip(paths, (["t0", "t1", "t2"], ["t3"], ["t4"]), strict=True)):
        reader = gguf.GGUFReader(path)
        keys = [key for key in reader.fields if not key.startswith("GGUF.")]
        split = {"split.no": ("UINT16", no), "split.count": ("UINT16", 3), "split.tensors.count": ("INT32", 5)}
        assert keys == [*(["general.name", "a"] if no == 0 else []), *split]
        assert {k: (reader.fields[k].types[0].name, reader.fields[k].contents()) for k in split} == split
        assert [tensor.name for tensor in reader.tensors] == names
    whole = write(tmp_path / "whole.gguf", pairs, tensors)[0]
    with GGUFFile.open(paths[0]) as file:
        assert file.split == (3, 1, 1)
        tensors_of_file = list(file.tensors.values())
        for name, split in (("merged.gguf", ()), ("kept-00001-of-00009.gguf", file.split)):
            with GGUFWriter(tmp_path / name, typed(file), tensors_of_file, split=split) as writer:
                for tensor in tensors_of_file:
                    writer.copy(tensor)
    assert (tmp_path / "merged.gguf").read_bytes() == whole.read_bytes()
    for no in (1, 2, 3):
        kept = tmp_path / f"kept-0000{no}-of-00003.gguf"
        assert kept.read_bytes() == paths[no - 1].read_bytes()


def test_split_counts() -> None:
    tensors = [info(f"t{i}", (1,)) for i in range(5)]  # 4 bytes, 32 with padding
    assert split_counts(tensors, 0, 2, 32) == [2, 2, 1]
    assert split_counts(tensors, 64, 0, 32) == [2, 2, 1]
    assert split_counts(tensors, 63, 0, 32) == [1] * 5
    assert split_counts(tensors, 63, 0, 8) == [5]
    assert split_counts(tensors, 96, 2, 32) == [2, 2, 1]
    assert split_counts(tensors, 10**9, 0, 32) == [5]
    assert split_counts([], 1, 1, 32) == [0]


def test_a_tensor_may_come_in_parts(tmp_path: Path) -> None:
    tensor = info("t", (64, 5), "Q8_0")
    data = data_of(tensor)
    with GGUFWriter(tmp_path / "a.gguf", {}, [tensor], byte_order=">") as writer:
        for part in (data[:2], data[2:2], data[2:, ::-1][:, ::-1]):
            writer.write("t", part)
    with GGUFFile.open(tmp_path / "a.gguf") as file:
        np.testing.assert_array_equal(file.tensors["t"].blocks(), data)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([info("a"), info("a")], 'two tensors called "a"'),
        ([info("x" * 64)], "has 64 bytes: at most 63"),
        ([info("a", (33,), "Q8_0")], "rows of 33 weights: Q8_0 needs a multiple of 32"),
        ([info("a", (1,) * 5)], "shape"),
        ([info("a", ())], "shape"),
    ],
)
def test_bad_tensors(tmp_path: Path, tensors: list[TensorInfo], message: str) -> None:
    with pytest.raises(GgufRunError, match=message):
        GGUFWriter(tmp_path / "a.gguf", {}, tensors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alignment", [0, -32, 33, True, 1.0])
def test_bad_alignment(tmp_path: Path, alignment: Any) -> None:
    with pytest.raises(GgufRunError, match="power of two"):
        GGUFWriter(tmp_path / "a.gguf", {"general.alignment": alignment}, [])


def test_misuse_leaves_nothing(tmp_path: Path) -> None:
    """Wrong order, wrong sizes, missing tensors: ValueError, and an older file of that name stays as it was."""
    tensors = [info("a"), info("b")]
    (tmp_path / "m.gguf").write_text("old")

    def run(calls: Sequence[tuple[str, Any]], limit: int) -> None:
        with GGUFWriter(tmp_path / "m.gguf", {}, tensors, split_max_tensors=limit) as writer:
            for name, blocks in calls:
                writer.write(name, blocks)

    a, b = (("a", data_of(tensors[0])), ("b", data_of(tensors[0])))
    wrong = [("a", a[1].view(np.float32)), ("a", np.zeros(385, np.uint8)), ("a", np.zeros(3, np.uint8))]
    for calls in ([b], *([call] for call in wrong), [a, a], [a, b, b], [a], []):
        for limit in (0, 1):
            with pytest.raises(ValueError, match="tensor"):
                run(calls, limit)
            assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_text() == "old"


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def run() -> None:
        with GGUFWriter(tmp_path / "m.gguf", {}, [info("a"), info("b")], split_max_tensors=1) as writer:
            writer.write("a", data_of(info("a")))
            assert len(list(tmp_path.iterdir())) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert list(tmp_path.iterdir()) == []


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails half-way (here at a limit on the size of files), and a disk that is known to be too small."""
    resource = pytest.importorskip("resource")
    tensor = info("a", (1024, 1024))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(GgufRunError, match=r"m\.gguf: cannot be written: File too large: nothing was kept"):
            write(tmp_path / "m.gguf", {}, [tensor])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(GgufRunError, match="but the disk has"):
        GGUFWriter(tmp_path / "m.gguf", {}, [info("a", (1 << 40, 1 << 10))])
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    """An input under any name; what is not a file; a folder that is not there. The input is not touched."""
    tensors = [info("a"), info("b")]
    (source,) = write(tmp_path / "in.gguf", {}, tensors)
    before = source.read_bytes()
    os.link(source, tmp_path / "hard.gguf")
    os.link(source, tmp_path / "s-00002-of-00002.gguf")
    (tmp_path / "link.gguf").symlink_to(source)
    os.mkfifo(tmp_path / "pipe")
    for name, message, options in (
        ("in.gguf", "is the file that is read", {}),
        ("hard.gguf", "is the file that is read", {}),
        ("link.gguf", "is the file that is read", {}),
        ("s.gguf", "s-00002-of-00002.gguf: is the file that is read", {"split_max_tensors": 1}),
        ("", "is a folder: name a file", {}),
        ("pipe", "is a device or pipe: name a file", {}),
        ("none/a.gguf", "there is no folder", {}),
    ):
        names = sorted(tmp_path.iterdir())
        with pytest.raises(GgufRunError, match=message):
            GGUFWriter(tmp_path / name, {}, tensors, inputs=[source], **options)
        assert sorted(tmp_path.iterdir()) == names
    assert source.read_bytes() == before


def test_link_keeps_pointing_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to("real.gguf")
    write(tmp_path / "link.gguf", {"a": 1}, [])
    assert (tmp_path / "link.gguf").is_symlink()
    assert (tmp_path / "real.gguf").is_file()
