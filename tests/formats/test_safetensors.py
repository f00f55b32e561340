"""Safetensors files: damaged ones are refused in one line, and the format's own library reads what is written."""

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.safetensors import DTYPES, read_safetensors, writing_safetensors

X = np.arange(12, dtype=np.float32).reshape(3, 4)


def raw(path: Path, header: Any, data: bytes = b"", n: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if n is None else n) + text + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48], **changes}


@pytest.mark.parametrize(
    ("header", "data", "error"),
    [
        (b"", b"", "not JSON"),
        (b"[]", b"", "not a JSON object"),
        (b'{"a": 1, "a": 1}', b"", "a key occurs twice"),
        (b"[" * 100000, b"", "not JSON"),
        ({"__metadata__": {"a": 3}}, b"", "__metadata__ is not an object of texts"),
        ({"a": 3}, b"", "has the dtype"),
        ({"a": entry(dtype="F128")}, bytes(48), '"a" has the dtype "F128": known are F64'),
        ({"a": entry(shape=[3, -4])}, bytes(48), "no valid shape"),
        ({"a": entry(shape=[1] * 9)}, bytes(48), "no valid shape"),
        ({"a": entry(shape=[3, 4.0])}, bytes(48), "no valid shape"),
        ({"a": entry(data_offsets=[0])}, bytes(48), "no valid shape and data_offsets"),
        ({"a": entry(data_offsets=[0, True])}, bytes(48), "no valid shape and data_offsets"),
        ({"a": entry(shape=[3, 5])}, bytes(48), "takes 60 bytes, not 48"),
        ({"a": entry(shape=[2**40, 2**40])}, bytes(48), "not 48"),
        ({"a": entry()}, bytes(47), "the file has only"),
        ({"a": entry(), "b": entry(data_offsets=[44, 92])}, bytes(92), '"a" and "b" overlap'),
        ({"a\x1b[31m\n": entry(shape=[])}, bytes(48), r'"a\\x1b\[31m\\n"'),
    ],
)
def test_broken_safetensors(tmp_path: Path, header: Any, data: bytes, error: str) -> None:
    with pytest.raises(GgufRunError, match=error) as caught:
        read_safetensors(raw(tmp_path / "x.safetensors", header, data))
    assert str(caught.value).startswith(str(tmp_path / "x.safetensors"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("n", "error"), [(3, "ends"), (2**63, "at most"), (1 << 26, "ends")])
def test_header_longer_than_the_file(tmp_path: Path, n: int, error: str) -> None:
    with pytest.raises(GgufRunError, match=error):
        read_safetensors(raw(tmp_path / "x", b"{}" if n > 3 else b"{", n=n))


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 150), byte=st.integers(0, 255), cut=st.integers(0, 250))
def test_any_damage_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    with writing_safetensors(path, {"a": ("F32", X.shape), "b": ("BF16", (2, 3))}, {"format": "pt"}) as append:
        append("a", X)
        append("b", bytes(12))
    data = bytearray(path.read_bytes())
    data[at % len(data)] = byte
    path.write_bytes(data[: len(data) - cut // 2])
    with suppress(GgufRunError):
        for tensor in read_safetensors(path).arrays.values():
            tensor.array().sum()


def test_arrays_are_written_in_turns_and_read_again(tmp_path: Path) -> None:
    path, metadata = tmp_path / "x.safetensors", {"text": "ä\n"}
    arrays = {"a": ("F32", X.shape), "none": ("U8", (0, 3)), "b": ("I64", (2,)), "one": ("U8", ())}
    with writing_safetensors(path, arrays, metadata) as append:
        append("b", np.array([1], np.int64))
        append("a", X[:1])
        append("none", np.zeros((0, 3), np.uint8))
        append("b", np.array([2], np.int64))
        append("one", b"\x07")
        append("a", X[1:])
    found = read_safetensors(path)
    assert (list(found.arrays), found.metadata) == (list(arrays), metadata)
    assert [array.shape for array in found.arrays.values()] == [shape for _, shape in arrays.values()]
    np.testing.assert_array_equal(found.arrays["a"].array(), X)
    assert (found.arrays["b"].array().tolist(), found.arrays["one"].array().tolist()) == ([1, 2], 7)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_formats_own_library_reads_every_dtype(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    torch = pytest.importorskip("torch")
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
             "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}  # fmt: skip
    path = tmp_path / "x.safetensors"
    with writing_safetensors(path, {name: (name, X.shape) for name in names}, {"format": "pt"}) as append:
        for name in names:
            append(name, np.arange(12 * DTYPES[name].itemsize, dtype=np.uint8))
    with safetensors.safe_open(path, "pt") as file:
        assert (file.metadata(), set(file.keys())) == ({"format": "pt"}, set(names))
        for name, dtype in names.items():
            tensor = file.get_tensor(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, X.shape)
            octets = tensor.contiguous().view(torch.uint8).flatten().numpy()
            np.testing.assert_array_equal(octets, np.arange(len(octets)))


@pytest.mark.parametrize("error", [KeyError, AssertionError])
def test_a_file_that_is_not_finished_leaves_the_old_one(tmp_path: Path, error: type[Exception]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(error), writing_safetensors(path, {"a": ("F32", (3, 4))}) as append:  # noqa: PT012
        append("a", X[:2])
        if error is KeyError:
            raise KeyError
    assert (path.read_bytes(), [file.name for file in tmp_path.iterdir()]) == (b"old", ["x.safetensors"])
