"""Files that lie: each is refused with one line that names the file, in little time and memory.

Among them every cause of a known security hole in GGUF readers: a tensor behind the end of the file (CVE-2026-7482),
counts whose products overflow (CVE-2025-53630, CVE-2026-27940), tensor sizes that overflow (CVE-2026-33298), dimensions
that do not fit into 32 bits (CVE-2026-53923), dimensions that wrap at 2^64 (gguf-py), arrays nested without end
(gguf-py's RecursionError).
"""

import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from ggufbuild import VALUES, Raw, T, Typed, build, encode_pair, string, write, write_split

from gguf_run.formats.errors import FormatError, GgufRunError, UnsupportedError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.strings import StringArray

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


def use(path: Path) -> None:
    """Open a file and look at everything in it."""
    with GGUFFile.open(path) as file:
        for key, value in file.metadata.items():
            file.metadata.type_name(key)
            if isinstance(value, StringArray):
                value.tolist()
        for tensor in file.tensors.values():
            tensor.blocks()[-1:, -1:].tobytes()
            tensor.release()


def array(item_type: int, n: int, data: bytes = b"") -> Raw:
    """An array value whose header says what it likes."""
    return Raw(9, U32.pack(item_type) + U64.pack(n) + data)


def nested(depth: int) -> Raw:
    """Arrays of one array each, `depth` of them."""
    return Raw(9, (U32.pack(9) + U64.pack(1)) * (depth - 1) + U32.pack(0) + U64.pack(0))


def one_tensor(**changes: Any) -> bytes:
    return build({}, [T(**{"name": "t", "ne": (32, 2), "data": bytes(256)} | changes)])


PATIENCE = 30  # seconds: finds a loop over what a file claims to hold, not a busy machine

# name -> (bytes of the file, part of the message)
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "magic": (b"GGUX" + bytes(60), r"""not a GGUF file: it begins with b'GGUX', not "GGUF\""""),
    "short magic": (b"GG", "not a GGUF file"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "web page": (b"<!DOCTYPE html>", "a web page"),
    "zip": (b"PK\x03\x04" + bytes(40), "zip archive"),
    "ggjt": (b"tjgg" + bytes(40), "GGJT file from before GGUF"),
    "no version": (b"GGUF\x03", "the version needs 4 bytes, but the file ends after 1"),
    "no counts": (b"GGUF" + U32.pack(3) + bytes(7), "the number of tensors needs 8 bytes"),
    # counts
    "2^63 keys": (build(n_kv=1 << 63), "claims 9223372036854775808 metadata keys: at most 65536"),
    "2^64-1 tensors": (build(n_tensors=(1 << 64) - 1), "claims 18446744073709551615 tensors: at most 262144"),
    # n * 64 bytes and n * 8 bytes wrap to 0 in 64 bits
    "2^58 tensors": (build(n_tensors=1 << 58), "claims 288230376151711744 tensors"),
    "keys missing": (build({"a": 1}, n_kv=2), "metadata key 1 of 2 needs 8 bytes|the length of metadata key 1 of 2"),
    "tensors missing": (build({"a": 1}, n_tensors=1), "name of tensor 0 of 1"),
    # keys
    "key of 2^64-1": (build([], n_kv=1) + b"\xff" * 8, "metadata key 0 of 1 has 18446744073709551615 bytes"),
    "key of 65536": (build({"k" * 65536: 1}), "metadata key 0 of 1 has 65536 bytes: at most 65535"),
    "key not UTF-8": (build([(b"a\xff", 1)]), r"key 0 of 1 is not valid UTF-8 \(byte 0xff\)"),
    "key twice": (build([("a", 1), ("b", 2), ("a", 1)]), 'the metadata key "a" occurs twice'),
    "value type": (build({"a": Raw(13, bytes(8))}), '"a" has the unknown value type 13: 0 to 12'),
    "value type 2^31": (build({"a": Raw(1 << 31, bytes(8))}), "unknown value type 2147483648"),
    "value cut": (build({"a": Raw(12, bytes(3))}, n_tensors=0)[: 24 + 9 + 4 + 3], 'value of "a" needs 8 bytes'),
    # strings and arrays
    "string length": (build({"a": Raw(8, U64.pack(1 << 20))}), 'the value of "a" needs 1048576 bytes, but the file'),
    "string of 2^63": (build({"a": Raw(8, U64.pack(1 << 63))}), '"a" has 9223372036854775808 bytes: at most'),
    "array type": (build({"a": array(77, 0)}), 'an item of the value of "a" has the unknown value type 77'),
    "array of 2^64-1": (build({"a": array(4, (1 << 64) - 1)}), "18446744073709551615 items: at most 1073741824"),
    # 2^62 * 4 bytes = 2^64: wraps to 0
    "array of 2^62": (build({"a": array(4, 1 << 62)}), "4611686018427387904 items"),
    "array of 2^30": (build({"a": array(12, 1 << 30)}), 'the value of "a" needs 8589934592 bytes'),
    "strings of 2^30": (build({"a": array(8, 1 << 30)}), 'the value of "a" needs 8589934592 bytes'),
    "strings cut": (build({"a": array(8, 3, string("x") * 2 + U64.pack(99))}), 'string 2 of 3 of the value of "a"'),
    "length cut": (build({"a": array(8, 2, string("x" * 20) + bytes(7))}), 'string 1 of 2 of the value of "a"'),
    "string of 2^64-1 in array": (build({"a": array(8, 1, b"\xff" * 8)}), "string 0 of 1 of"),
    "string of 2^63-1 in array": (build({"a": array(8, 1, b"\xff" * 7 + b"\x7f")}), "string 0 of 1 of"),
    # nesting
    "nested 9": (build({"a": nested(9)}), "nests arrays more than 8 deep"),
    "nested 50000": (build({"a": nested(50_000)}), "nests arrays more than 8 deep"),
    "nested 2^30 wide": (build({"a": array(9, 1 << 30)}), 'the value of "a" needs 12884901888 bytes'),
    "nested 70000 wide": (build({"a": array(9, 70_000, bytes(12 * 70_000))}), "holds more than 65536 arrays"),
    # tensor entries
    "name of 64": (one_tensor(name="n" * 64), "the name of tensor 0 of 1 has 64 bytes: at most 63"),
    "name of 2^63": (build(n_tensors=1) + U64.pack(1 << 63), "the name of tensor 0 of 1 has 9223372036854775808 bytes"),
    "name not UTF-8": (one_tensor(name=b"\x80"), "the name of tensor 0 of 1 is not valid UTF-8"),
    "name twice": (build({}, [T("t", (4,)), T("u", (4,)), T("t", (4,))]), 'there are two tensors called "t"'),
    "5 dimensions": (one_tensor(ne=(1,) * 5, n_dims=5), "has 5 dimensions: at most 4"),
    "2^32-1 dimensions": (one_tensor(n_dims=(1 << 32) - 1), "has 4294967295 dimensions"),
    "0 beside 2^63": (one_tensor(ne=(1 << 32, 0, 1 << 31)), r"has the shape \(4294967296, 0, 2147483648\): sizes are"),
    # As signed numbers: negative.
    "dimension 2^64-1": (one_tensor(ne=((1 << 64) - 1,)), r"shape \(18446744073709551615,\)"),
    "dimension 2^63": (one_tensor(ne=(1 << 63,)), r"shape \(9223372036854775808,\)"),
    # Products that wrap to a small number in 64 bits, or in 32.
    "2^32 * 2^32": (one_tensor(ne=(1 << 32, 1 << 32)), "their product below 2\\^63"),
    "2^16 four times": (one_tensor(ne=(1 << 16,) * 4), "their product below 2\\^63"),
    "wraps to 32": (one_tensor(ne=(32, (1 << 59) + 1)), "their product below 2\\^63"),
    "bytes wrap": (one_tensor(ne=(1 << 61,)), 'tensor "t" ends at byte 9223372036854775'),
    "2^32 + 32": (one_tensor(ne=((1 << 32) + 32, 1)), 'tensor "t" ends at byte 17179869'),
    "unknown type": (one_tensor(type=43), 'tensor "t": unknown tensor type 43'),
    "type 2^31": (one_tensor(type=1 << 31), "unknown tensor type 2147483648"),
    "removed type": (one_tensor(type=4), r"tensor type 4 \(Q4_2\) was removed"),
    "half a block": (one_tensor(ne=(48, 2), type="Q4_0"), "rows of 48 weights: Q4_0 needs a multiple of its block"),
    # ne[0] alone counts: 16 rows of 16 weights are 8 whole blocks, but no row is.
    "block over rows": (one_tensor(ne=(16, 16), type="Q8_0"), "rows of 16 weights"),
    # offsets
    "unaligned": (one_tensor(offset=8), 'tensor "t" lies at 8, not at a multiple of the alignment 32'),
    "offset past the end": (one_tensor(offset=1 << 20), 'tensor "t" ends at byte'),
    "offset 2^64-32": (one_tensor(offset=(1 << 64) - 32), 'tensor "t" ends at byte 18446744073709'),
    "data too long": (one_tensor(ne=(32, 3)), 'tensor "t" ends at byte .*, but the file has only'),
    "overlap": (build({}, [T("a", (32,)), T("b", (32,), offset=96)]), 'tensor "a" ends at byte .*, inside tensor "b"'),
    "same place": (build({}, [T("a", (32,)), T("b", (32,), offset=0)]), "inside tensor"),
    "one in another": (build({}, [T("a", (99,)), T("b", (8,), offset=64)]), 'tensor "a" .* inside tensor "b"'),
    # alignment
    **{
        f"alignment {n}": (build({"general.alignment": Typed("u32", n)}), f"general.alignment is {n}: it must be")
        for n in (0, 3, 48, (1 << 32) - 1)
    },
    "alignment -32": (build({"general.alignment": Typed("i32", -32)}), "general.alignment is -32"),
    "alignment is text": (build({"general.alignment": "32"}), "general.alignment is not an integer"),
    "alignment is true": (build({"general.alignment": True}), "general.alignment is not an integer"),
    "alignment 2^31": (build(n_kv=1, n_tensors=1)
                       + encode_pair("general.alignment", Typed("u32", 1 << 31))
                       + string("t") + U32.pack(1) + U64.pack(4) + U32.pack(0) + U64.pack(0) + bytes(64),
                       'tensor "t" ends at byte 2147483664'),
    "line breaks in names": (one_tensor(name="a\nb\x1b[2J", offset=1), r'tensor "a\\nb\\x1b\[2J" lies at 1,'),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_file(tmp_path: Path, name: str) -> None:
    data, message = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    use_good_first(tmp_path)
    start = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(GgufRunError, match=message) as caught:
        use(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert isinstance(caught.value, FormatError | UnsupportedError)
    assert peak < 5_000_000 + 4 * len(data)
    assert time.perf_counter() - start < PATIENCE


def use_good_first(tmp_path: Path) -> None:
    """What is compiled on first use must not count as memory of the file under test."""
    use(write(tmp_path / "good.gguf", {"a": ["b"]}, [T("t", (4,))]))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [0, 1, 4, 65536, 0x01010101])
def test_unknown_version(tmp_path: Path, order: str, version: int) -> None:
    path = write(tmp_path / "m.gguf", version=version, order=order)
    with pytest.raises(UnsupportedError, match=r"is GGUF version \d+: versions 2 and 3 are known"):
        use(path)


@pytest.mark.parametrize("order", ["<", ">"])
def test_truncated_at_every_byte(tmp_path: Path, order: str) -> None:
    """No prefix of a file is a file, unless only padding behind the last tensor is missing."""
    kinds = ("a.u16", "a.f64", "a.yes", "a.text", "b.i32", "b.bool", "c.text", "d.words")
    data = build({key: Typed(*VALUES[key]) for key in kinds}, [T("a", (32,), "Q8_0"), T("b", (5,))], order=order)
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with GGUFFile.open(path) as file:
        end = file.tensors["b"].offset + file.tensors["b"].nbytes
    for n in range(len(data)):
        path.write_bytes(data[:n])
        if n >= end:
            use(path)
            continue
        with pytest.raises(FormatError, match=r"truncated|is empty|not a GGUF file"):
            use(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(GgufRunError, match=r"none\.gguf: cannot open the file: No such file"):
        GGUFFile.open(tmp_path / "none.gguf")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(GgufRunError, match="is a directory without GGUF files"):
        GGUFFile.open(tmp_path)


def test_nul_in_path() -> None:
    with pytest.raises(GgufRunError, match="cannot open the file: embedded null byte"):
        GGUFFile.open("a\0b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GgufRunError, match="is a device or pipe"):
        GGUFFile.open(tmp_path / "pipe")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user who is refused something")
def test_no_permission(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    path.chmod(0)
    with pytest.raises(GgufRunError, match="cannot open the file: Permission denied"):
        GGUFFile.open(path)


def test_a_large_hole_is_walked_quickly(tmp_path: Path) -> None:
    """160 MB of zeros that claim to be 20 million empty strings: no memory until they are asked for."""
    path = tmp_path / "m.gguf"
    n = 20_000_000
    head = build([], n_kv=1)[:24] + string("a") + U32.pack(9) + U32.pack(8) + U64.pack(n)
    path.write_bytes(head)
    os.truncate(path, len(head) + 8 * n + 64)
    use_good_first(tmp_path)
    start = time.perf_counter()
    tracemalloc.start()
    with GGUFFile.open(path) as file:
        assert list(file.metadata) == ["a"]
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert time.perf_counter() - start < PATIENCE


def test_text_from_the_file_stays_short(tmp_path: Path) -> None:
    """A key of 60,000 characters does not flood the terminal."""
    path = write(tmp_path / "m.gguf", {"k" * 60_000: Raw(99, b"")})
    with pytest.raises(FormatError) as caught:
        use(path)
    assert len(str(caught.value)) < 500


# ---- split files ----


def test_other_part_opened(tmp_path: Path) -> None:
    write_split(tmp_path)
    with pytest.raises(GgufRunError, match=r"is part 2 of 3: open m-00001-of-00003\.gguf"):
        GGUFFile.open(tmp_path / "m-00002-of-00003.gguf")


def test_part_missing(tmp_path: Path) -> None:
    path = write_split(tmp_path)
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(GgufRunError, match=r"m-00003-of-00003\.gguf: is missing: .* first of 3 files, get them all"):
        GGUFFile.open(path)


def test_part_renamed(tmp_path: Path) -> None:
    path = write_split(tmp_path)
    with pytest.raises(FormatError, match=r"part 1 of 3 of a split model: its name must end in -00001-of-00003\.gguf"):
        GGUFFile.open(path.rename(tmp_path / "model.gguf"))


def test_parts_swapped(tmp_path: Path) -> None:
    path = write_split(tmp_path)
    two, three = tmp_path / "m-00002-of-00003.gguf", tmp_path / "m-00003-of-00003.gguf"
    two.rename(tmp_path / "x")
    three.rename(two)
    (tmp_path / "x").rename(three)
    with pytest.raises(FormatError, match=r"m-00002-.* has split\.no and split\.count \(2, 3\), not \(1, 3\)"):
        GGUFFile.open(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split.count": Typed("u16", 4)}, "part 1 of 4 of a split model"),
        ({"split.count": Typed("u16", 65535)}, "part 1 of 65535"),
        ({"split.count": Typed("u64", 1 << 62)}, "part 1 of 4611686018427387904"),
        ({"split.count": "3"}, "split.count is not an integer"),
        ({"split.no": Typed("i32", -1)}, "part 0 of 3"),
        ({"split.no": Typed("u16", 2)}, "part 3 of 3"),
        ({"split.no": Typed("f32", 0.0)}, "split.no is not an integer"),
        ({"split.tensors.count": Typed("i32", 7)}, "split.tensors.count is 7, but its 3 files hold 3 tensors"),
    ],
)
def test_split_lies(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GgufRunError, match=message):
        GGUFFile.open(write_split(tmp_path, **changes))


def test_tensor_in_two_parts(tmp_path: Path) -> None:
    path = write_split(tmp_path, count=2)
    pairs = {"split.no": Typed("u16", 1), "split.count": Typed("u16", 2)}
    write(tmp_path / "m-00002-of-00002.gguf", pairs, [T("t0", (4,))])
    with pytest.raises(FormatError, match=r'm-00002-of-00002\.gguf: tensor "t0" is also in .*m-00001-of-00002'):
        GGUFFile.open(path)


def test_later_part_is_checked_too(tmp_path: Path) -> None:
    path = write_split(tmp_path, count=2)
    second = tmp_path / "m-00002-of-00002.gguf"
    second.write_bytes(second.read_bytes()[:-20])
    with pytest.raises(FormatError, match=r'm-00002-of-00002\.gguf: .*tensor "t1" ends at byte'):
        GGUFFile.open(path)
