"""A session in a file: the ids of a context and their keys and values, so that a chat goes on without a prefill.

A safetensors file (formats/sealed.py) with these arrays:

    ids      I32[n_past]
    0.k      U8[nbytes]     the keys of layer 0, as its cache type stores them; then 0.v, 1.k ..., see KINDS
    crc32    U32[1]         of the names and bytes of all arrays above, in their order

Nothing depends on the size of the context: a session can go on in a larger one.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.safetensors import writing_safetensors
from gguf_run.formats.sealed import FileKind
from gguf_run.models.kv_moves import KINDS, export, restore
from gguf_run.runtime.chat.messages import uniform
from gguf_run.runtime.engine.engine import Engine

Part = tuple[int, str, Any]  # layer, one of KINDS, bytes: see kv_moves.export
KIND = FileKind("session", b"GGRSESSN", "name another file, and start a new session")
_SAMPLE = 4096  # bytes of a tensor that the hash of a model covers, at most


@dataclass(frozen=True)
class SessionHeader:
    """What a session belongs to, and what stands in it."""

    model_hash: str  # see hash_model
    model: str  # name of the model's file
    cache: str  # one line on how the cache stores numbers; it differs whenever the bytes mean something else
    ids: Sequence[int]  # the tokens
    messages: Sequence[dict[str, Any]] = field(default=())  # the conversation, if it is one


def hash_model(file: GGUFFile) -> str:
    """Return a SHA-256 that tells models apart, in milliseconds.

    It covers the metadata without the elements of arrays, the names, shapes and types of all tensors, and the middle
    row of each tensor.
    """
    digest = hashlib.sha256()
    for key, value in file.metadata.items():
        shown = value if isinstance(value, str | int | float) else len(value)
        digest.update(f"{key}\0{shown!r}\0".encode())
    for tensor in file.tensors.values():
        digest.update(f"{tensor.name}\0{tensor.ne}{tensor.type.name}\0".encode())
        middle = tensor.n_rows // 2
        if tensor.nbytes:
            digest.update(tensor.blocks(middle, middle + 1)[:, :_SAMPLE].tobytes())
    return digest.hexdigest()


def save(path: Path, header: SessionHeader, export: Callable[[], Iterator[Part]]) -> None:
    """Write a session, whole or not at all. GgufRunError if that fails: the file that was there stays.

    export: gives the parts of the cache. It is called twice: the sizes of all parts stand before the first part.
    """
    ids = np.asarray(header.ids, "<i4")
    arrays = {"ids": ("I32", ids.shape)}
    arrays |= {f"{layer}.{kind}": ("U8", (memoryview(data).nbytes,)) for layer, kind, data in export()}
    metadata = {
        "model_hash": header.model_hash,
        "model": header.model,
        "cache": header.cache,
        "messages": json.dumps(uniform(header.messages)),
    }
    try:
        with writing_safetensors(path, arrays | {"crc32": ("U32", (1,))}, KIND.seal(metadata)) as append:
            append("ids", ids)
            crc = _crc("ids", ids, 0)
            for layer, kind, data in export():
                append(f"{layer}.{kind}", data)
                crc = _crc(f"{layer}.{kind}", data, crc)
            append("crc32", np.array([crc], "<u4"))
    except OSError as error:
        reason = error.strerror or error
        raise GgufRunError(f"{path}: cannot save the session: {reason}; what was there stays") from None


def open_session(path: Path) -> tuple[SessionHeader, Iterator[Part]]:
    """Read and check a session; return its header and the parts of its cache, views of the file.

    FormatError for a file that is no session, is of another version or damaged.
    """
    file = KIND.open(path)
    arrays = {name: array.array() for name, array in file.arrays.items()}
    ids, checksum = arrays.get("ids", np.empty(0)), arrays.pop("crc32", np.empty(0))
    crc = 0
    for name, data in arrays.items():
        crc = _crc(name, data, crc)
    if checksum.tolist() != [crc]:
        raise KIND.damaged(path, "its checksum differs")
    # The checksum is no signature: a file that was written wrongly has a right one.
    try:
        parts = [_part(name, data) for name, data in arrays.items() if name != "ids"]
        model_hash, model, cache = (file.metadata[name] for name in ("model_hash", "model", "cache"))
        messages = json.loads(file.metadata["messages"])
        if ids.dtype != np.int32 or ids.ndim != 1 or uniform(messages) != messages:
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError, GgufRunError):
        raise KIND.damaged(path, "its header is not what this program writes") from None
    return SessionHeader(model_hash, model, cache, ids.tolist(), messages), iter(parts)


def check_session(path: Path, found: SessionHeader, wanted: SessionHeader, n_ctx: int, n_vocab: int) -> None:
    """GgufRunError unless a session can go on here. found: the file's header; wanted: one of this model and cache."""
    if found.model_hash != wanted.model_hash:
        raise GgufRunError(
            f"{path}: is a session with another model, {found.model}, not with {wanted.model}: {KIND.again}"
        )
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
        raise KIND.damaged(path, f"it has ids outside the vocabulary of {n_vocab}")


def _part(name: str, data: np.ndarray) -> Part:
    layer, kind = name.split(".")
    if data.dtype != np.uint8 or kind not in KINDS:
        raise ValueError
    return int(layer), kind, data.reshape(-1)


def _crc(name: str, data: Any, crc: int) -> int:
    return zlib.crc32(data, zlib.crc32(name.encode(), crc))


def save_row(path: Path, header: SessionHeader, engine: Engine) -> None:
    """Save the tokens of the row that was used last. See Model.save_session. header: without ids."""
    with engine.working():
        cache, row = engine.rows.cache, engine.rows.last
        ids = list(cache.slots[row].ids)
        save(path, replace(header, ids=ids), lambda: export(cache, row))


def load(path: Path, wanted: SessionHeader, engine: Engine) -> list[dict[str, Any]]:
    """Make the tokens of a session a row. See Model.load_session. wanted: the header of this model and cache."""
    found, parts = open_session(path)
    check_session(path, found, wanted, engine.n_ctx, engine.decoder.config.n_vocab)
    try:
        with engine.working():
            rows = engine.rows
            row = rows.vacant()
            rows.clear(row)
            restore(rows.cache, len(found.ids), parts, row.number, found.ids)
            row.left_at, rows.last = rows.n_steps, row.number
    except GgufRunError as error:
        raise FormatError(f"{path}: {error}") from None
    return list(found.messages)
