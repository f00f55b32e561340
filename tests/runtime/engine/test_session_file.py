"""Session files: what is in them byte by byte, that no damaged one is believed, that a failed save loses nothing."""

import errno
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tinymodel import Tiny, write_tiny

from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.safetensors import writing_safetensors
from gguf_run.runtime.engine.session_file import (
    KIND,
    Part,
    SessionHeader,
    check_session,
    hash_model,
    open_session,
    save,
)
from gguf_run.runtime.load.open_model import open_model

HEADER = SessionHeader("ab" * 32, "modèle.gguf", "k q8_0, v q4_0", [5, 0, 7], [{"role": "user", "content": "é\n"}])
PARTS = [(0, "k", np.arange(50, dtype=np.uint8)), (0, "v", np.arange(6.0)), (3, "k", np.zeros(0, np.uint8))]


def export(parts: Sequence[Part] = PARTS) -> Callable[[], Iterator[Part]]:
    return lambda: iter(parts)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save(tmp_path / "chat.session", HEADER, export())
    return tmp_path / "chat.session"


def read(path: Path) -> tuple[SessionHeader, list[tuple[int, str, bytes]]]:
    header, parts = open_session(path)
    return header, [(layer, kind, bytes(data)) for layer, kind, data in parts]


def test_round_trip(path: Path) -> None:
    header, parts = read(path)
    assert header == HEADER
    assert parts == [(layer, kind, data.tobytes()) for layer, kind, data in PARTS]
    assert [file.name for file in path.parent.iterdir()] == ["chat.session"]


def test_messages_with_all_their_parts(tmp_path: Path) -> None:
    """Nothing of a conversation with tools is lost, in whichever form it comes."""
    call = {"type": "function", "id": "1", "function": {"name": "w", "arguments": '{"c": "é"}'}}
    result = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "20"}]}
    given = [{"role": "assistant", "content": None, "tool_calls": [call]}, result]
    save(tmp_path / "s", replace(HEADER, messages=given), export())
    call = call | {"function": {"name": "w", "arguments": {"c": "é"}}}
    expected = [{"role": "assistant", "content": "", "tool_calls": [call]}, result | {"content": "20"}]
    assert read(tmp_path / "s")[0].messages == expected


def test_messages_that_are_not_as_they_must_be(path: Path) -> None:
    with pytest.raises(GgufRunError, match=r"^messages\[0\]\.role is missing"):
        save(path, replace(HEADER, messages=[{"content": "a"}]), export())
    assert read(path)[0] == HEADER


def test_an_empty_session(tmp_path: Path) -> None:
    save(tmp_path / "s", replace(HEADER, ids=[], messages=[]), export([]))
    assert read(tmp_path / "s") == (replace(HEADER, ids=[], messages=[]), [])


def test_layout(path: Path) -> None:
    """As the module's docstring says, read without our reader."""
    safe_open = pytest.importorskip("safetensors").safe_open
    with safe_open(path, "np") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert json.loads(metadata["messages"]) == HEADER.messages
    assert (metadata["model"], metadata["cache"], metadata["model_hash"]) == ("modèle.gguf", HEADER.cache, "ab" * 32)
    assert arrays["ids"].tolist() == HEADER.ids
    assert arrays["0.v"].tobytes() == np.arange(6.0).tobytes()
    crc = 0
    for name in ("ids", "0.k", "0.v", "3.k"):
        crc = zlib.crc32(name.encode() + arrays[name].tobytes(), crc)
    assert arrays["crc32"].tolist() == [crc]


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
        with pytest.raises(FormatError, match=r"chat\.session: is not a session, or it is damaged"):
            read(path)


def test_other_files_are_refused(path: Path) -> None:
    for data, message in (
        (b"GGRSESSN" + bytes(100), r"is a session of an earlier version of this program: name another file"),
        (b"GGUF" + bytes(100), "is not a session, or it is damaged"),
        (path.read_bytes().replace(b'"session"', b'"picture"'), r"chat\.session: is not a session: name another file"),
        (
            path.read_bytes().replace(b'"version":"2"', b'"version":"3"'),
            "is a session of version 3, this program reads 2",
        ),
    ):
        path.write_bytes(data)
        with pytest.raises(FormatError, match=message):
            read(path)


ARRAYS = {"ids": np.array([5], np.int32), "0.k": np.zeros(3, np.uint8)}
METADATA = {"model": "m", "cache": "c", "model_hash": "00", "messages": "[]"}


@pytest.mark.parametrize(
    ("arrays", "metadata"),
    [
        ({"ids": np.array([5.0], np.float32)}, {}),
        ({"ids": np.array([[5]], np.int32)}, {}),
        ({"0.k": np.zeros(3, np.float32)}, {}),
        ({"0.x": np.zeros(3, np.uint8)}, {}),
        ({"a.k": np.zeros(3, np.uint8)}, {}),
        ({"k": np.zeros(3, np.uint8)}, {}),
        ({}, {"messages": "\xff"}),
        ({}, {"messages": "[" * 100_000}),
        ({}, {"messages": '[{"role": "user"}]'}),
        ({}, {"messages": '[{"role": "user", "content": 5}]'}),
        ({}, {"messages": '[{"role": "user", "content": "a", "tool_calls": [{}]}]'}),
        ({}, {"messages": "3"}),
    ],
)
def test_right_checksums_are_not_trusted(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    crc, all_arrays = 0, ARRAYS | arrays
    for name, array in all_arrays.items():
        crc = zlib.crc32(array.tobytes(), zlib.crc32(name.encode(), crc))
    all_arrays["crc32"] = np.array([crc], np.uint32)
    names = {"float32": "F32", "int32": "I32", "uint32": "U32", "uint8": "U8"}
    entries = {name: (names[array.dtype.name], array.shape) for name, array in all_arrays.items()}
    with writing_safetensors(path, entries, KIND.seal(METADATA | metadata)) as append:
        for name, array in all_arrays.items():
            append(name, array)
    with pytest.raises(FormatError, match="the session is damaged: its header is not what"):
        read(path)


def test_a_failed_save_leaves_the_old_file(path: Path) -> None:
    def failing(error: BaseException) -> Callable[[], Iterator[Part]]:
        calls = []

        def parts() -> Iterator[Part]:
            calls.append(1)
            yield PARTS[0]
            if len(calls) == 2:  # the first time, the sizes are asked
                raise error

        return parts

    before = path.read_bytes()
    with pytest.raises(GgufRunError, match=r"chat\.session: cannot save the session: No space left"):
        save(path, replace(HEADER, ids=[1]), failing(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(KeyboardInterrupt):
        save(path, replace(HEADER, ids=[1]), failing(KeyboardInterrupt()))
    assert [file.name for file in path.parent.iterdir()] == ["chat.session"]
    assert path.read_bytes() == before
    with pytest.raises(GgufRunError, match="cannot save the session: No such file or directory"):
        save(path.parent / "missing" / "s", HEADER, export())


CHECKS = {
    "model": ({"model_hash": "00" * 32}, "a session with another model, modèle.gguf, not with here.gguf"),
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
    def hashed(name: str) -> str:
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
