"""A session in a file: the ids of a context and their keys and values, so that a chat goes on without a prefill.

    header   HEADER, with the CRC-32 of its own bytes and of what follows up to the parts
    ids      int32[n_past]
    text     UTF-8 JSON: what made it (SessionHeader's texts and messages)
    part     PART, then nbytes bytes of one layer's K or V, as its cache type stores them    } n_part times

All little-endian. The positions that a part covers follow from n_past and the layer: nothing depends on the size of
the context, so a session can go on in a larger one.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.engine.context import Part

MAGIC, VERSION = b"GGRSESSN", 1
HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("n_past", "<u4"),
        ("n_text", "<u4"),  # bytes of the text
        ("n_part", "<u4"),
        ("model_hash", "V32"),
        ("crc", "<u4"),  # of the bytes above, the ids and the text
    ]
)
PART = np.dtype([("layer", "<u4"), ("kind", "S4"), ("nbytes", "<u8"), ("crc", "<u4")])  # crc: of these and the bytes
assert (HEADER.itemsize, PART.itemsize) == (60, 20)
_MOST_IDS, _MOST_TEXT, _MOST_PARTS = 2**31 - 1, 1 << 28, 1 << 16
_SAMPLE = 4096  # bytes of each tensor that the hash of a model covers, at most
_AGAIN = "start a new session: delete the file or name another"


@dataclass(frozen=True)
class SessionHeader:
    """What a session is of. model: the file's name; cache: how the cache stores numbers, in one line that differs
    whenever the bytes mean something else; messages: the conversation, if it is one."""

    model_hash: bytes
    model: str
    cache: str
    ids: Sequence[int]
    messages: Sequence[dict[str, str]] = field(default=())


def hash_model(file: GGUFFile) -> bytes:
    """A SHA-256 that tells models apart in milliseconds: of all metadata but the elements of arrays, of all tensors'
    names, shapes and types, and of the middle row of each. (Where the vocabulary differs, so do the ids of a text.)"""
    digest = hashlib.sha256()
    for key, value in file.metadata.items():
        shown = value if isinstance(value, str | int | float) else len(value)
        digest.update(f"{key}\0{shown!r}\0".encode())
    for tensor in file.tensors.values():
        digest.update(f"{tensor.name}\0{tensor.ne}{tensor.type.name}\0".encode())
        middle = tensor.n_rows // 2
        digest.update(tensor.blocks(middle, middle + 1)[:, :_SAMPLE].tobytes())
    return digest.digest()


def save(path: Path, header: SessionHeader, parts: Iterable[Part]) -> None:
    """Write a session under a temporary name, then replace `path`. GgufRunError if that fails: the old file stays."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            _write(file, header, parts)
        os.replace(temporary, path)
    except OSError as error:
        raise GgufRunError(
            f"{path}: cannot save the session: {error.strerror or error}; what was there stays"
        ) from None
    finally:
        if os.path.lexists(temporary):
            os.unlink(temporary)


def _write(file: BinaryIO, header: SessionHeader, parts: Iterable[Part]) -> None:
    ids = np.asarray(header.ids, "<i4").tobytes()
    facts = {"model": header.model, "cache": header.cache, "messages": list(header.messages)}
    text = json.dumps(facts).encode()
    n_part = 0
    file.seek(HEADER.itemsize)
    file.write(ids + text)
    for layer, kind, data in parts:
        view = memoryview(data).cast("B")
        head = np.zeros(1, PART)
        head["layer"], head["kind"], head["nbytes"] = layer, kind.encode(), len(view)
        head["crc"] = zlib.crc32(view, zlib.crc32(head.tobytes()[:-4]))
        file.write(head.tobytes())
        file.write(view)
        n_part += 1
    record = np.zeros(1, HEADER)
    record["magic"], record["version"], record["model_hash"] = MAGIC, VERSION, header.model_hash
    record["n_past"], record["n_text"], record["n_part"] = len(header.ids), len(text), n_part
    record["crc"] = _crc(record.tobytes(), ids, text)
    file.seek(0)
    file.write(record.tobytes())


def _crc(record: bytes, ids: bytes, text: bytes) -> int:
    return zlib.crc32(text, zlib.crc32(ids, zlib.crc32(record[:-4])))


@contextmanager
def open_session(path: Path) -> Iterator[tuple[SessionHeader, Iterator[Part]]]:
    """Read a session's header; the parts come one by one as uint8 arrays that are valid until the next.

    FormatError for a file that is no session, is of another version or damaged: also out of the iterator, so believe
    the parts only when it has ended.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, n_part = _read_header(path, file, size)
        yield header, _parts(path, file, size, n_part)


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[SessionHeader, int]:
    data = file.read(HEADER.itemsize)
    if not data.startswith(MAGIC):
        raise FormatError(f"{path}: is not a session: `gguf-run MODEL --chat --session FILE` makes one")
    if len(data) < HEADER.itemsize:
        raise _damaged(path, "it is cut off in its header")
    record = np.frombuffer(data, HEADER)[0]
    if record["version"] != VERSION:
        raise FormatError(
            f"{path}: is a session of version {record['version']}, this program reads {VERSION}: {_AGAIN}"
        )
    n_past, n_text, n_part = (int(record[name]) for name in ("n_past", "n_text", "n_part"))
    if n_past > _MOST_IDS or n_text > _MOST_TEXT or n_part > _MOST_PARTS:
        raise _damaged(path, f"its header has impossible sizes {n_past}, {n_text}, {n_part}")
    if HEADER.itemsize + 4 * n_past + n_text > size:
        raise _damaged(path, f"it has {size} bytes, fewer than its header says")
    ids, text = file.read(4 * n_past), file.read(n_text)
    if record["crc"] != _crc(data, ids, text):
        raise _damaged(path, "its header's checksum differs")
    # the checksum is no signature: what was written wrongly has a right one too
    try:
        facts = json.loads(text)
        messages = [{name: str(message[name]) for name in ("role", "content")} for message in facts["messages"]]
        model, cache = str(facts["model"]), str(facts["cache"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _damaged(path, "its text is not what this program writes") from None
    return SessionHeader(
        record["model_hash"].tobytes(), model, cache, np.frombuffer(ids, "<i4").tolist(), messages
    ), n_part


def _parts(path: Path, file: BinaryIO, size: int, n_part: int) -> Iterator[Part]:
    buffer = np.zeros(0, np.uint8)  # one for all: its pages are there already
    for _ in range(n_part):
        data = file.read(PART.itemsize)
        if len(data) < PART.itemsize:
            raise _damaged(path, "it is cut off")
        head = np.frombuffer(data, PART)[0]
        layer, kind, nbytes = int(head["layer"]), bytes(head["kind"]).decode("latin1"), int(head["nbytes"])
        if nbytes > size - file.tell():
            raise _damaged(path, "it is cut off")
        if nbytes > len(buffer):
            buffer = np.empty(nbytes, np.uint8)
        part = buffer[:nbytes]
        n_read = file.readinto(part)  # type: ignore[attr-defined]
        if n_read != nbytes or zlib.crc32(part.data, zlib.crc32(data[:-4])) != head["crc"]:
            raise _damaged(path, f"the checksum of layer {layer}'s {kind!r} differs")
        yield layer, kind, part
    if file.tell() != size:
        raise _damaged(path, f"{size - file.tell()} bytes stand behind its end")


def _damaged(path: Path, what: str) -> FormatError:
    return FormatError(f"{path}: the session is damaged: {what}; {_AGAIN}")


def check_session(path: Path, found: SessionHeader, wanted: SessionHeader, n_ctx: int, n_vocab: int) -> None:
    """GgufRunError unless a session that was found can go on here. wanted: of this model and cache; its ids do not
    count."""
    if found.model_hash != wanted.model_hash:
        raise GgufRunError(f"{path}: is a session with another model, {found.model}, not with {wanted.model}: {_AGAIN}")
    if found.cache != wanted.cache:
        raise GgufRunError(
            f"{path}: its KV cache is {found.cache}, here it is {wanted.cache}: give the cache options that it was "
            "saved with, or name another file"
        )
    if len(found.ids) > n_ctx:
        raise GgufRunError(
            f"{path}: the session holds {len(found.ids)} tokens, the context {n_ctx}: choose --ctx-size "
            f"{len(found.ids)} or more"
        )
    if any(not 0 <= id < n_vocab for id in found.ids):
        raise _damaged(path, f"it has ids outside the vocabulary of {n_vocab}")
