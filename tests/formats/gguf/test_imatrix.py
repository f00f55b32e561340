"""Reading importance matrices in both forms, and what is refused."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ggufbuild import T, Typed, write

from gguf_run.formats.errors import FormatError
from gguf_run.formats.gguf.imatrix import Imatrix

SUMS = np.array([[2.0, 4.0, 6.0], [1.0, 1.0, 1.0]], np.float32)
META = {
    "imatrix.datasets": Typed("[string]", ["wiki.txt", "code.txt"]),
    "imatrix.chunk_count": Typed("u32", 7),
    "imatrix.chunk_size": Typed("u32", 512),
}


def test_gguf(tmp_path: Path) -> None:
    path = write(
        tmp_path / "i.gguf",
        META,
        [
            T("blk.0.ffn_down_exps.weight.in_sum2", (3, 2), data=SUMS),
            T("blk.0.ffn_down_exps.weight.counts", (1, 2), data=np.array([2, 0], np.float32)),
            T("attn.weight.in_sum2", (3, 1), data=SUMS[:1]),
            T("attn.weight.counts", (1, 1), data=np.array([4], np.float32)),
        ],
    )
    imatrix = Imatrix.open(path)
    assert imatrix.entries["attn.weight"].tolist() == [0.5, 1.0, 1.5]
    assert imatrix.entries["blk.0.ffn_down_exps.weight"].tolist() == [[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]
    assert (imatrix.chunk_count, imatrix.chunk_size) == (7, 512)
    assert imatrix.datasets == ("wiki.txt", "code.txt")
    assert imatrix.sums["attn.weight"].counts.tolist() == [4]


def legacy(name: bytes = b"a.weight", calls: int = 2, values: Any = (2.0, 4.0), tail: bytes = b"") -> bytes:
    head = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", calls, len(values))
    return head + np.asarray(values, "<f4").tobytes() + tail


@pytest.mark.parametrize(
    ("data", "values", "facts"),
    [
        (legacy(), [1, 2], ((), 0)),
        (legacy(calls=0), [2, 4], ((), 0)),
        (legacy(tail=struct.pack("<i", 9)), [1, 2], ((), 9)),
        (legacy(tail=struct.pack("<ii", 9, 3) + b"abc"), [1, 2], (("abc",), 9)),
    ],
)
def test_legacy(tmp_path: Path, data: bytes, values: list[float], facts: tuple[tuple[str, ...], int]) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(data)
    imatrix = Imatrix.open(path)
    assert imatrix.entries["a.weight"].tolist() == values
    assert (imatrix.datasets, imatrix.chunk_count) == facts


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"hello, this is a text", "not an imatrix"),
        (legacy()[:-1], "truncated"),
        (legacy(name=b""), "length of the name of entry 1 of 1 is 0"),
        (legacy(values=()), "number of values of entry 1 of 1 is 0"),
        (legacy(values=(1.0, np.nan)), "not sums of squares"),
        (legacy(values=(1.0, -1.0)), "not sums of squares"),
    ],
)
def test_bad_legacy(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        Imatrix.open(path)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({}, [T("a.weight", (3,))], "is not an imatrix"),
        ({}, [T("a.in_sum2", (3,))], 'tensor "a.counts" is missing'),
        ({}, [T("a.in_sum2", (3,)), T("a.counts", (0, 1))], 'tensor "a.counts" has no elements'),
        ({}, [T("a.in_sum2", (0, 1)), T("a.counts", (1, 1))], 'tensor "a.in_sum2" has no elements'),
        ({}, [T("a.in_sum2", (3,)), T("a.counts", (1,), "F16")], "F16, must be F32"),
        ({}, [T("a.in_sum2", (3, 2)), T("a.counts", (1,))], "2 rows of sums, but 1 counts"),
        ({"imatrix.chunk_count": "x"}, [T("a.in_sum2", (3,)), T("a.counts", (1,))], "chunk_count is 'x'"),
        ({}, [T("a.in_sum2", (1,), data=np.float32([np.inf])), T("a.counts", (1,))], "not sums of squares"),
    ],
)
def test_bad_gguf(tmp_path: Path, metadata: Any, tensors: list[T], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Imatrix.open(write(tmp_path / "i.gguf", metadata, tensors))
