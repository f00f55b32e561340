"""Reading valid GGUF files: every value type, both byte orders, splits, real models; the gguf package as oracle."""

import mmap
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import real
from ggufbuild import TYPES, VALUES, Raw, T, Typed, build, write, write_split

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import TENSOR_TYPES
from gguf_run.formats.gguf.mapped import MappedFile
from gguf_run.formats.gguf.metadata import Metadata
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.strings import StringArray
from gguf_run.formats.gguf.writer import GGUFWriter

ORDERS = pytest.mark.parametrize("order", ["<", ">"])


def plain(value: Any) -> Any:
    """Numpy arrays and lazy sequences as lists."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [plain(item) for item in value] if isinstance(value, list | StringArray) else value


@ORDERS
@pytest.mark.parametrize("version", [2, 3])
def test_every_value_type(tmp_path: Path, order: str, version: int) -> None:
    path = write(tmp_path / "m.gguf", {k: Typed(*v) for k, v in VALUES.items()}, order=order, version=version)
    with GGUFFile.open(path) as file:
        assert (file.version, file.byte_order, file.alignment, file.path) == (version, order, 32, path)
        assert list(file.metadata) == list(VALUES)
        assert len(file.metadata) == len(VALUES)
        for key, (_, value) in VALUES.items():
            found = file.metadata[key]
            assert plain(found) == value, key
            if isinstance(found, np.ndarray):
                assert found.dtype.isnative
                assert not found.flags.writeable
        assert type(file.metadata["a.yes"]) is bool
        assert type(file.metadata["a.u8"]) is int
        assert file.metadata["b.i16"].dtype == np.int16
        assert file.metadata["b.bool"].dtype == bool
        assert "a.u9" not in file.metadata
        assert file.metadata.get("a.u9", 5) == 5
        with pytest.raises(KeyError):
            file.metadata["a.u9"]


def test_type_names(tmp_path: Path) -> None:
    pairs = {"a": Typed("u8", 1), "b": Typed("string", ""), "c": Typed("[f32]", []), "d": Typed("[[u8]]", [])}
    with GGUFFile.open(write(tmp_path / "m.gguf", pairs)) as file:
        assert [file.metadata.type_name(key) for key in "abcd"] == ["u8", "string", "array[f32]", "array[array]"]


def test_bool_is_any_byte_but_zero(tmp_path: Path) -> None:
    data = bytes([7, 0, 0, 0]) + (3).to_bytes(8, "little") + bytes([0, 1, 2])
    with GGUFFile.open(write(tmp_path / "m.gguf", {"a": Raw(9, data), "b": Raw(7, b"\2")})) as file:
        assert file.metadata["a"].view(np.uint8).tolist() == [0, 1, 1]
        assert file.metadata["b"] is True


def test_string_array(tmp_path: Path) -> None:
    words = ["a", "", "漢", "d" * 300, "e"]
    with GGUFFile.open(write(tmp_path / "m.gguf", {"x": words})) as file:
        array = file.metadata["x"]
        assert isinstance(array, StringArray)
        assert array is file.metadata["x"]
        assert len(array) == 5
        assert array[2] == "漢"
        assert array[-1] == "e"
        assert array[1:4] == words[1:4]
        assert array[::-1] == words[::-1]
        assert list(array) == array.tolist() == words
        assert "d" * 300 in array
        assert array.index("e") == 4
        assert repr(array) == "StringArray(5 strings)"
        for bad in (5, -6):
            with pytest.raises(IndexError):
                array[bad]


@ORDERS
def test_tensors_of_every_type(tmp_path: Path, order: str) -> None:
    """Random blocks of every type; in a big-endian file every field is stored swapped, and comes back native."""
    rng = np.random.default_rng(1)
    tensors, expected = [], {}
    for type in TENSOR_TYPES:
        native = rng.integers(0, 256, (6, 2 * type.type_size), np.uint8)
        stored = native
        if order == ">":
            stored = swap_fields(native.reshape(-1, type.type_size), type.name).reshape(native.shape)
        tensors.append(T(f"t.{type.name}", (2 * type.block_size, 3, 2), type.name, stored))
        expected[f"t.{type.name}"] = native
    with GGUFFile.open(write(tmp_path / "m.gguf", {"a": 1}, tensors, order=order)) as file:
        assert list(file.tensors) == list(expected)
        for name, native in expected.items():
            tensor = file.tensors[name]
            assert tensor.name == name
            assert tensor.type.name == name[2:]
            assert tensor.ne == (2 * tensor.type.block_size, 3, 2)
            assert (tensor.n_rows, tensor.nbytes, tensor.n_elements) == (6, native.size, 12 * tensor.type.block_size)
            blocks = tensor.blocks()
            assert blocks.dtype == np.uint8
            assert not blocks.flags.writeable
            np.testing.assert_array_equal(blocks, native)


# Byte ranges of the fields wider than a byte, from ggml-common.h: (offset, width, count).
WIDE = {
    "F32": [(0, 4, 1)], "F16": [(0, 2, 1)], "BF16": [(0, 2, 1)], "F64": [(0, 8, 1)], "I16": [(0, 2, 1)],
    "I32": [(0, 4, 1)], "I64": [(0, 8, 1)], "Q4_0": [(0, 2, 1)], "Q4_1": [(0, 2, 2)], "Q5_0": [(0, 2, 1), (2, 4, 1)],
    "Q5_1": [(0, 2, 2), (4, 4, 1)], "Q8_0": [(0, 2, 1)], "Q8_1": [(0, 2, 2)], "Q2_K": [(80, 2, 2)],
    "Q3_K": [(108, 2, 1)], "Q4_K": [(0, 2, 2)], "Q5_K": [(0, 2, 2)], "Q6_K": [(208, 2, 1)],
    "Q8_K": [(0, 4, 1), (260, 2, 16)], "IQ2_XXS": [(0, 2, 33)], "IQ2_XS": [(0, 2, 33)],
    "IQ3_XXS": [(0, 2, 1), (66, 4, 8)], "IQ1_S": [(0, 2, 1), (34, 2, 8)], "IQ4_NL": [(0, 2, 1)], "IQ3_S": [(0, 2, 1)],
    "IQ2_S": [(0, 2, 1)], "IQ4_XS": [(0, 2, 2)], "IQ1_M": [(48, 2, 4)], "TQ1_0": [(52, 2, 1)], "TQ2_0": [(64, 2, 1)],
    "Q1_0": [(0, 2, 1)], "Q2_0": [(0, 2, 1)],
}  # fmt: skip


def swap_fields(blocks: np.ndarray, name: str) -> np.ndarray:
    """Reverse the bytes of every field wider than a byte; blocks: uint8[n, type_size]."""
    swapped = blocks.copy()
    for offset, width, count in WIDE.get(name, []):
        part = blocks[:, offset : offset + width * count].reshape(-1, count, width)[:, :, ::-1]
        swapped[:, offset : offset + width * count] = part.reshape(-1, width * count)
    return swapped


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    tensors = [T("a", (3,), data=b"AAAABBBBCCCC"), T("b", (1,), data=b"DDDD")]
    with GGUFFile.open(write(tmp_path / "m.gguf", {}, tensors, alignment=alignment)) as file:
        assert file.alignment == alignment
        assert [t.offset % alignment for t in file.tensors.values()] == [0, 0]
        assert [t.blocks().tobytes() for t in file.tensors.values()] == [b"AAAABBBBCCCC", b"DDDD"]


def test_shapes_as_in_ggml(tmp_path: Path) -> None:
    tensors = [T("scalar", (), data=b"1234"), T("vector", (8,)), T("four", (2, 3, 4, 5)), T("n" * 63, (1,))]
    with GGUFFile.open(write(tmp_path / "m.gguf", {}, tensors)) as file:
        assert [(t.ne, t.n_rows) for t in file.tensors.values()] == [
            ((1,), 1), ((8,), 1), ((2, 3, 4, 5), 60), ((1,), 1)
        ]  # fmt: skip
        assert file.tensors["scalar"].blocks().tobytes() == b"1234"


def test_tensors_out_of_order_and_with_gaps(tmp_path: Path) -> None:
    tensors = [T("b", (4,), offset=64), T("a", (4,), offset=0, data=bytes(96) + b"x" * 16)]
    with GGUFFile.open(write(tmp_path / "m.gguf", {}, tensors)) as file:
        assert list(file.tensors) == ["b", "a"]
        assert file.tensors["b"].offset == file.tensors["a"].offset + 64


def test_no_tensors_no_metadata(tmp_path: Path) -> None:
    with GGUFFile.open(str(write(tmp_path / "m.gguf"))) as file:
        assert (len(file.tensors), len(file.metadata)) == (0, 0)


def test_views_outlive_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"a": np.arange(5, dtype=np.int32)}, [T("t", (4,), data=b"0123456789abcdef")])
    file = GGUFFile.open(path)
    numbers, blocks = file.metadata["a"], file.tensors["t"].blocks()
    file.close()
    file.close()
    assert numbers.tolist() == [0, 1, 2, 3, 4]
    assert blocks.tobytes() == b"0123456789abcdef"


def test_release_keeps_the_data(tmp_path: Path) -> None:
    data = np.random.default_rng(2).integers(0, 256, 100_000, np.uint8)
    path = write(tmp_path / "m.gguf", {}, [T("a", (7,), "I8"), T("t", (1000, 100), "I8", data), T("z", (9,), "I8")])
    with GGUFFile.open(path) as file:
        blocks = file.tensors["t"].blocks()
        before = blocks.sum(dtype=np.int64)
        for tensor in file.tensors.values():
            tensor.release()
        assert blocks.sum(dtype=np.int64) == before
        np.testing.assert_array_equal(blocks.reshape(-1), data)


def test_release_keeps_to_whole_pages(tmp_path: Path) -> None:
    page = mmap.PAGESIZE
    (tmp_path / "m").write_bytes(bytes(5 * page))
    file = MappedFile(tmp_path / "m")
    calls = []

    class Recorder:
        def madvise(self, option: int, start: int, length: int) -> None:
            calls.append((option == mmap.MADV_DONTNEED, start // page, length // page, start % page, length % page))

    file.map = Recorder()  # type: ignore[assignment]
    for start, end in ((0, page), (1, 3 * page), (page, 3 * page - 1), (1, page), (1, 2 * page - 1), (9, 99)):
        file.release(start, end - start)
    assert calls == [(True, 0, 1, 0, 0), (True, 1, 2, 0, 0), (True, 1, 1, 0, 0)]


def test_release_drops_resident_pages(tmp_path: Path) -> None:
    data = np.ones(32 << 20, np.uint8)
    path = write(tmp_path / "m.gguf", {}, [T("t", (len(data),), "I8", data)])
    del data
    with GGUFFile.open(path) as file:
        blocks = file.tensors["t"].blocks()
        start = resident_kib()
        assert blocks.sum(dtype=np.int64) == 32 << 20
        used = resident_kib()
        file.tensors["t"].release()
        assert used - start > 30_000
        assert resident_kib() - start < 2_000


def resident_kib() -> int:
    """Resident memory that belongs to mapped files, from /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    lines = status.read_text().splitlines()  # a file in memory (tmpfs) counts as shared memory
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssFile", "RssShmem")))


# ---- what the reference reader accepts, though it is odd ----


def test_strings_that_are_not_utf8(tmp_path: Path) -> None:
    """U+FFFD stands for their bytes, one warning says so, and a copy has the same bytes."""
    pairs = {"a": b"ok\xc3\x28", "b": [b"ok", b"", b"\xe6\xbc", b"z"], "c": [b"\xe6", b"\xbc\xa2"], "d": "good"}
    path = write(tmp_path / "m.gguf", pairs)
    with GGUFFile.open(path) as file, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert file.metadata["a"] == "ok\ufffd("
        assert list(file.metadata["b"]) == ["ok", "", "\ufffd", "z"]
        # Joined without care, the two would be one character.
        assert list(file.metadata["c"]) == [file.metadata["c"][0], file.metadata["c"][1]] == ["\ufffd", "\ufffd\ufffd"]
        assert file.metadata["d"] == "good"
        with GGUFWriter(tmp_path / "copy.gguf", {key: file.metadata.typed(key) for key in file.metadata}, []):
            pass
    assert (tmp_path / "copy.gguf").read_bytes() == path.read_bytes() + bytes(-path.stat().st_size % 32)
    assert [str(w.message) for w in caught] == [
        f'{path}: offset 47: the value of "a" is not valid UTF-8 (byte 0xc3): U+FFFD is shown in its place'
    ]


@ORDERS
def test_tensors_without_elements(tmp_path: Path, order: str) -> None:
    tensors = [T("a", (32, 0)), T("b", (8,), data=bytes(range(32))), T("c", (0,)), T("d", (0, 5, 3), "Q4_0")]
    data = build({"x": 1}, [*tensors, T("e", (4, 0, 2), offset=1 << 40)], order=order)
    (tmp_path / "m.gguf").write_bytes(data)
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        assert [(t.ne, t.n_elements, t.nbytes, t.blocks().size) for t in file.tensors.values() if t.name != "b"] == [
            ((32, 0), 0, 0, 0), ((0,), 0, 0, 0), ((0, 5, 3), 0, 0, 0), ((4, 0, 2), 0, 0, 0)
        ]  # fmt: skip
        for tensor in file.tensors.values():
            tensor.release()
            assert dequantize(tensor.blocks(), tensor.type).size == tensor.n_elements
        pairs = {key: file.metadata.typed(key) for key in file.metadata}
        for split in ((), (1, 1, 3), (4, 1)):
            copy = tmp_path / f"copy{len(split)}.gguf"
            with GGUFWriter(copy, pairs, list(file.tensors.values()), byte_order=order, split=split) as writer:
                for tensor in file.tensors.values():
                    writer.copy(tensor)
            with GGUFFile.open(writer.paths[0]) as same:
                assert [(t.name, t.ne, t.type) for t in same.tensors.values()] == [
                    (t.name, t.ne, t.type) for t in file.tensors.values()
                ]
                np.testing.assert_array_equal(same.tensors["b"].blocks(), file.tensors["b"].blocks())


# ---- split files ----


def test_split(tmp_path: Path) -> None:
    with GGUFFile.open(write_split(tmp_path)) as file:
        assert file.n_parts == 3
        assert file.nbytes == sum(part.stat().st_size for part in tmp_path.iterdir())
        assert list(file.tensors) == ["t0", "t1", "t2"]
        assert [t.blocks()[0, 0] for t in file.tensors.values()] == [0, 1, 2]
        assert file.metadata["general.name"] == "split"


def test_a_single_file_may_have_any_name(tmp_path: Path) -> None:
    for name in ("m-00001-of-00003.gguf", "model.bin", "m-00001-of-00001.gguf"):
        with GGUFFile.open(write(tmp_path / name, {"split.count": Typed("u16", 1)}, [T("t", (4,))])) as file:
            assert file.n_parts == 1


# ---- against the gguf package ----


def assert_equal_to_package(path: Path) -> None:
    reader = gguf.GGUFReader(path)
    with GGUFFile.open(path) as file:
        assert file.version == reader.fields["GGUF.version"].contents()
        assert file.alignment == reader.alignment
        keys = [key for key in reader.fields if not key.startswith("GGUF.")]
        assert list(file.metadata) == keys
        for key in keys:
            np.testing.assert_equal(plain(file.metadata[key]), reader.fields[key].contents(), err_msg=key)
        assert list(file.tensors) == [t.name for t in reader.tensors]
        for theirs in reader.tensors:
            ours = file.tensors[theirs.name]
            assert (ours.type.id, ours.ne) == (int(theirs.tensor_type), tuple(theirs.shape.tolist()))
            assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
            if file.byte_order == "<":
                assert ours.blocks().tobytes() == theirs.data.tobytes()


@ORDERS
def test_built_files_equal_the_package(tmp_path: Path, order: str) -> None:
    pairs = {key: Typed(*value) for key, value in VALUES.items() if not key.startswith("d.")}  # it flattens nesting
    tensors = [T(f"t.{name}", (block_size * 2, 5), name) for name, (_, block_size, _) in TYPES.items()]
    tensors = [t for t in tensors if t.type not in ("Q2_0", "Q8_1")]  # the package does not know them (rightly)
    assert_equal_to_package(write(tmp_path / "m.gguf", pairs, tensors, order=order, alignment=64))


@pytest.mark.parametrize("order", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_a_file_by_the_packages_writer(tmp_path: Path, order: gguf.GGUFEndian) -> None:
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((6, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=order)
    writer.add_uint64("n", 2**40)
    writer.add_array("scores", [1.5, -2.0])
    writer.add_token_list(["a", "b", "漢"])
    # A copy each: the writer swaps in place. Of packed blocks it swaps nothing, so the caller must.
    writer.add_tensor("f32", weights.copy())
    writer.add_tensor("f16", weights.astype(np.float16))
    blocks = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q5_1)
    big = order == gguf.GGUFEndian.BIG
    stored = swap_fields(blocks.reshape(-1, 24), "Q5_1").reshape(blocks.shape) if big else blocks
    writer.add_tensor("q5_1", stored, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        assert file.byte_order == ("><"[not big])
        assert file.metadata["n"] == 2**40
        assert file.metadata["scores"].tolist() == [1.5, -2.0]
        assert list(file.metadata["tokenizer.ggml.tokens"]) == ["a", "b", "漢"]
        np.testing.assert_array_equal(file.tensors["f32"].blocks().view(np.float32), weights)
        np.testing.assert_array_equal(file.tensors["f16"].blocks().view(np.float16), weights.astype(np.float16))
        np.testing.assert_array_equal(file.tensors["q5_1"].blocks(), blocks)
        assert file.tensors["f32"].ne == (64, 6)


def test_smollm2_equals_the_package() -> None:
    assert_equal_to_package(real.smollm2())


def vocabulary(n: int = 262_144) -> dict[str, Any]:
    """Metadata with a vocabulary as large as Gemma's."""
    return {
        "tokenizer.ggml.tokens": [f"▁token{i}" for i in range(n)],
        "tokenizer.ggml.scores": np.arange(n, dtype=np.float32),
        "tokenizer.ggml.token_type": np.ones(n, np.int32),
    }


def test_large_vocabulary_is_read_when_asked_for(tmp_path: Path) -> None:
    with GGUFFile.open(write(tmp_path / "warm.gguf", {"x": ["a"]})) as file:  # compiles, once per machine
        file.metadata["x"].tolist()
    path = write(tmp_path / "m.gguf", vocabulary())
    tracemalloc.start()
    with GGUFFile.open(path) as file:
        assert tracemalloc.get_traced_memory()[1] < 4_000_000  # 262,144 strings take 17 MB
        tracemalloc.stop()
        metadata: Metadata = file.metadata
        assert metadata["tokenizer.ggml.tokens"][262_143] == "▁token262143"
        tokens = metadata["tokenizer.ggml.tokens"].tolist()
        assert tokens[777] == "▁token777"
        assert metadata["tokenizer.ggml.scores"][-1] == 262_143


def test_gemma_vocabulary() -> None:
    with GGUFFile.open(real.gemma3()) as file:
        tokens = file.metadata["tokenizer.ggml.tokens"].tolist()
        assert (len(tokens), tokens[0], tokens[262_143]) == (262_144, "<pad>", "<unused6241>")
        assert sum(t.n_elements for t in file.tensors.values()) == 268_098_176
