"""Session files: what is in them byte by byte, that no damaged one is believed, that a failed save loses nothing."""

import errno
import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tinymodel import Tiny, write_tiny

from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.engine.context import Part
from gguf_run.runtime.engine.session_file import SessionHeader, check_session, hash_model, open_session, save
from gguf_run.runtime.load.open_model import open_model

HEADER = SessionHeader(
    b"h" * 31 + b"\0", "modèle.gguf", "k q8_0, v q4_0", [5, 0, 7], [{"role": "user", "content": "é\n"}]
)
PARTS = [(0, "k", np.arange(50, dtype=np.uint8)), (0, "v", np.arange(6.0)), (3, "k", np.zeros(0, np.uint8))]
FIRST_PART = 60 + 4 * 3 + len(json.dumps({"model": "modèle.gguf", "cache": HEADER.cache, "messages": HEADER.messages}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save(tmp_path / "chat.session", HEADER, PARTS)
    return tmp_path / "chat.session"


def read(path: Path) -> tuple[SessionHeader, list[tuple[int, str, bytes]]]:
    with open_session(path) as (header, parts):
        return header, [(layer, kind, bytes(data)) for layer, kind, data in parts]


def test_round_trip(path: Path) -> None:
    header, parts = read(path)
    assert header == HEADER
    assert parts == [(layer, kind, data.tobytes()) for layer, kind, data in PARTS]
    assert [file.name for file in path.parent.iterdir()] == ["chat.session"]


def test_an_empty_session(tmp_path: Path) -> None:
    save(tmp_path / "s", replace(HEADER, ids=[], messages=[]), [])
    assert read(tmp_path / "s") == (replace(HEADER, ids=[], messages=[]), [])


def test_layout(path: Path) -> None:
    """As the module's docstring says, read without numpy."""
    data = path.read_bytes()
    magic, version, n_past, n_text, n_part, model_hash, crc = struct.unpack_from("<8s4I32sI", data)
    assert (magic, version, n_past, n_part, model_hash) == (b"GGRSESSN", 1, 3, 3, HEADER.model_hash)
    assert struct.unpack_from("<3i", data, 60) == (5, 0, 7)
    assert 72 + n_text == FIRST_PART
    assert crc == zlib.crc32(data[60:FIRST_PART], zlib.crc32(data[:56]))
    layer, kind, n_bytes, crc = struct.unpack_from("<I4sQI", data, FIRST_PART)
    assert (layer, kind, n_bytes) == (0, b"k\0\0\0", 50)
    assert data[FIRST_PART + 20 : FIRST_PART + 70] == bytes(range(50))
    assert crc == zlib.crc32(bytes(range(50)), zlib.crc32(data[FIRST_PART : FIRST_PART + 16]))


def test_every_changed_byte_is_noticed(path: Path) -> None:
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x81]) + data[at + 1 :])
        with pytest.raises(FormatError, match=r"chat\.session: "):
            read(path)


def test_every_truncation_is_noticed(path: Path) -> None:
    data = path.read_bytes()
    for n in range(len(data)):
        path.write_bytes(data[:n])
        with pytest.raises(FormatError, match=r"is not a session|is cut off|fewer than its header says"):
            read(path)
    path.write_bytes(data + b"x")
    with pytest.raises(FormatError, match="1 bytes stand behind its end"):
        read(path)


def resealed(data: bytes, text: bytes | None = None, **fields: int) -> bytes:
    """The file with other sizes or text in its header and the right checksum."""
    names = ("magic", "version", "n_past", "n_text", "n_part", "model_hash")
    values = dict(zip(names, struct.unpack_from("<8s4I32s", data), strict=True))
    body = data[60:72] + (data[72:FIRST_PART] if text is None else text)
    values |= {"n_text": len(body) - 12} | fields
    head = struct.pack("<8s4I32s", *values.values())
    return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body + data[FIRST_PART:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"is a session of version 2, this program reads 1: start a new session"),
        ({"n_past": 2**32 - 1}, "impossible sizes 4294967295"),
        ({"n_past": 2**31 - 1}, "fewer than its header says"),
        ({"n_text": 2**32 - 1}, "impossible sizes"),
        ({"n_part": 2**32 - 1}, "impossible sizes"),
        ({"n_part": 4}, "it is cut off"),
        ({"n_part": 2}, "bytes stand behind its end"),
        ({"text": b"[]"}, "its text is not"),
        ({"text": b"\xff"}, "its text is not"),
        ({"text": b"[" * 100_000}, "its text is not"),
        ({"text": b'{"model": 1, "cache": "", "messages": [{"role": "user"}]}'}, "its text is not"),
        ({"text": b'{"model": 1, "cache": "", "messages": 3}'}, "its text is not"),
    ],
)
def test_right_checksums_are_not_trusted(path: Path, change: dict[str, int], message: str) -> None:
    path.write_bytes(resealed(path.read_bytes(), **change))  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=message):
        read(path)


def test_resealed_reseals(path: Path) -> None:
    path.write_bytes(resealed(path.read_bytes()))
    assert read(path)[0] == HEADER


def test_a_failed_save_leaves_the_old_file(path: Path) -> None:
    def failing(error: BaseException) -> Iterator[Part]:
        yield PARTS[0]
        raise error

    before = path.read_bytes()
    with pytest.raises(GgufRunError, match=r"chat\.session: cannot save the session: No space left"):
        save(path, replace(HEADER, ids=[1]), failing(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(KeyboardInterrupt):
        save(path, replace(HEADER, ids=[1]), failing(KeyboardInterrupt()))
    assert [file.name for file in path.parent.iterdir()] == ["chat.session"]
    assert path.read_bytes() == before
    with pytest.raises(GgufRunError, match="cannot save the session: No such file or directory"):
        save(path.parent / "missing" / "s", HEADER, PARTS)


CHECKS = {
    "model": ({"model_hash": b"x" * 32}, "a session with another model, modèle.gguf, not with here.gguf"),
    "cache": ({"cache": "k f16, v f16"}, "its KV cache is k f16, v f16, here it is k q8_0, v q4_0"),
    "context": ({"ids": [1] * 11}, "the session holds 11 tokens, the context 10: choose --ctx-size 11 or more"),
    "vocabulary": ({"ids": [1, 20]}, "ids outside the vocabulary of 20"),
    "negative id": ({"ids": [-1]}, "ids outside the vocabulary"),
}


@pytest.mark.parametrize(("change", "message"), CHECKS.values(), ids=CHECKS)
def test_a_session_must_fit(change: dict[str, object], message: str) -> None:
    here = replace(HEADER, model="here.gguf", ids=[], messages=[])
    check_session(Path("s"), HEADER, here, n_ctx=3, n_vocab=8)
    with pytest.raises(GgufRunError, match=message):
        check_session(Path("s"), replace(HEADER, **change), here, n_ctx=10, n_vocab=20)  # type: ignore[arg-type]


def test_the_hash_tells_models_apart(tmp_path: Path) -> None:
    def hashed(name: str) -> bytes:
        with GGUFFile.open(tmp_path / name) as file:
            return hash_model(file)

    write_tiny(tmp_path / "a")
    write_tiny(tmp_path / "weights", Tiny(seed=1))
    write_tiny(tmp_path / "type", Tiny(types={"ffn_down": "Q8_0"}))
    write_tiny(tmp_path / "key", Tiny(rope_freq_base=1e5))
    shutil.copy(tmp_path / "a", tmp_path / "copy")
    assert hashed("a") == hashed("copy")
    assert len({hashed(name) for name in ("a", "weights", "type", "key")}) == 4


def test_the_hash_of_weights_that_are_quantized_while_they_load(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a")
    hashes = []
    for kind in (None, "Q8_0", "Q4_0", "Q8_0"):
        with open_model(tmp_path / "a", kind) as file:
            hashes.append(hash_model(file))
    assert hashes[1] == hashes[3]
    assert len(set(hashes)) == 3
