"""A file of logits: what a model expected at every scored token of a text, to compare other models with later.

    header   HEADER, with its own checksum
    chunk    n_scored rows, then the CRC-32 of their bytes          } n_chunk times
    row      nll      -log of the right token's probability
             top      the most likely token
             step     logit[i] = (q[i] - 65535) * step, relative to the row's largest logit
             q        one uint16 for each token of the vocabulary

All little-endian. A step is the row's range of logits, at most 64, divided by 65535: below 0.001, so the divergence of
a row from its rounded self is some 1e-8. Rounded logits are compared with logits that are rounded in the same way.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.evaluate.text import Block

MAGIC, VERSION = b"GGRLOGIT", 1
HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("n_vocab", "<u4"),
        ("n_ctx", "<u4"),
        ("n_chunk", "<u4"),
        ("n_scored", "<u4"),  # rows of a chunk
        ("model_hash", "V32"),  # SHA-256 of the model's file, or of all its parts
        ("vocab_hash", "V32"),  # SHA-256 of the vocabulary
        ("text_hash", "V32"),  # SHA-256 of the text's token ids
        ("model", "S128"),  # name of the model's file, UTF-8
        ("crc", "<u4"),  # of the bytes above
    ]
)
assert HEADER.itemsize == 256
MAX_RANGE = 64.0
_TOP = 65535
_ROWS_AT_ONCE = 64
_LARGEST = 1 << 24  # of the sizes in a header


@dataclass(frozen=True)
class LogitsHeader:
    """What a file of logits is of; the fields of HEADER."""

    n_vocab: int
    n_ctx: int
    n_chunk: int
    n_scored: int
    model_hash: bytes
    vocab_hash: bytes
    text_hash: bytes
    model: str

    @property
    def row(self) -> np.dtype:
        return np.dtype([("nll", "<f8"), ("top", "<u4"), ("step", "<f4"), ("q", "<u2", (self.n_vocab,))])

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return HEADER.itemsize + self.n_chunk * (self.n_scored * self.row.itemsize + 4)


def hash_file(path: Path) -> bytes:
    """SHA-256 of a model's file, or of all files of a split model."""
    with GGUFFile.open(path) as file:
        paths = dict.fromkeys([file.path, *(tensor.file.path for tensor in file.tensors.values())])
    digest = hashlib.sha256()
    for part in paths:
        with open(part, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.digest()


def hash_vocabulary(path: Path) -> bytes:
    """SHA-256 of the tokens of a model."""
    with GGUFFile.open(path) as file:
        tokens = file.metadata.get("tokenizer.ggml.tokens", ())
        return hashlib.sha256(json.dumps(list(tokens)).encode()).digest()


def hash_ids(ids: list[int]) -> bytes:
    """SHA-256 of token ids."""
    return hashlib.sha256(np.asarray(ids, "<i4").tobytes()).digest()


def round_logits(logits: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Return q uint16[n, n_vocab] and step f32[n] of logits f32[n, n_vocab]."""
    relative = np.maximum(logits - logits.max(axis=1, keepdims=True), np.float32(-MAX_RANGE))
    step = relative.min(axis=1) / np.float32(-_TOP)
    relative *= 1 / np.where(step > 0, step, np.float32(1))[:, None]
    np.rint(relative, out=relative)
    relative += _TOP
    return relative.astype(np.uint16), step


def unround_logits(q: NDArray[np.uint16], step: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return logits f32[n, n_vocab], of which the largest of each row is 0."""
    logits = q.astype(np.float32)
    logits -= _TOP
    logits *= step[:, None]
    return logits


class LogitsWriter:
    """Writes a file under a temporary name, which close() makes the real one. As a context manager: closed if all went
    well and all chunks are there, else nothing is left behind."""

    def __init__(self, path: Path, header: LogitsHeader) -> None:
        """GgufRunError if the disk has no room for it; OSError if it cannot be made."""
        if path.is_dir():
            raise GgufRunError(f"{path} is a folder: name a file")
        free = shutil.disk_usage(path.absolute().parent).free
        if free < header.nbytes:
            raise GgufRunError(
                f"{path}: the logits take {header.nbytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left: "
                "use fewer --chunks"
            )
        self.path, self._header = path, header
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._file: BinaryIO = open(self._partial, "wb")  # noqa: SIM115
        self._file.write(_pack(header))
        self._crc = self._n_row = 0

    def add(self, block: Block) -> None:
        """Append rows of one chunk."""
        rows = np.empty(len(block.nll), self._header.row)
        rows["nll"], rows["top"] = block.nll, block.top
        rows["q"], rows["step"] = round_logits(block.logits)
        data = rows.tobytes()
        self._crc = zlib.crc32(data, self._crc)
        self._file.write(data)
        self._n_row += len(rows)
        if self._n_row % self._header.n_scored == 0:
            self._file.write(self._crc.to_bytes(4, "little"))
            self._crc = 0

    @property
    def is_complete(self) -> bool:
        """Are all rows there?"""
        return self._n_row == self._header.n_chunk * self._header.n_scored

    def close(self) -> None:
        self._file.close()
        os.replace(self._partial, self.path)

    def __enter__(self) -> "LogitsWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self.is_complete:
                self.close()
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)


class LogitsFile:
    """An open file of logits."""

    def __init__(self, path: Path) -> None:
        """FormatError if it is not a whole file of logits."""
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115
        try:
            self.header = _unpack(path, self._file.read(HEADER.itemsize))
            size = os.fstat(self._file.fileno()).st_size
            if size != self.header.nbytes:
                raise FormatError(
                    f"{path}: has {size} bytes, its header says {self.header.nbytes}: it is cut off or damaged, "
                    "save the logits again"
                )
        except BaseException:
            self._file.close()
            raise

    def chunk(self, i: int) -> Iterator[Block]:
        """Yield the rows of chunk i in blocks; logits are relative to the largest of their row.

        FormatError at the end if the rows are damaged: believe them only then.
        """
        header, row = self.header, self.header.row
        self._file.seek(HEADER.itemsize + i * (header.n_scored * row.itemsize + 4))
        crc = 0
        for start in range(0, header.n_scored, _ROWS_AT_ONCE):
            n_bytes = min(_ROWS_AT_ONCE, header.n_scored - start) * row.itemsize
            data = self._file.read(n_bytes)
            if len(data) != n_bytes:
                raise FormatError(f"{self.path}: became shorter while it was read")
            crc = zlib.crc32(data, crc)
            rows = np.frombuffer(data, row)
            yield Block(unround_logits(rows["q"], rows["step"]), rows["nll"].copy(), rows["top"].astype(np.int64))
        if self._file.read(4) != crc.to_bytes(4, "little"):
            raise FormatError(f"{self.path}: chunk {i + 1} is damaged (its checksum differs): save the logits again")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "LogitsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pack(header: LogitsHeader) -> bytes:
    record = np.zeros(1, HEADER)
    record["magic"], record["version"] = MAGIC, VERSION
    for name, value in asdict(header).items():
        record[name] = value.encode()[:128] if isinstance(value, str) else value
    record["crc"] = zlib.crc32(record.tobytes()[:-4])
    return record.tobytes()


def _unpack(path: Path, data: bytes) -> LogitsHeader:
    if not data.startswith(MAGIC):
        raise FormatError(f"{path}: is not a file of logits: `gguf-eval kl MODEL --save-logits FILE` makes one")
    if len(data) < HEADER.itemsize:
        raise FormatError(f"{path}: is cut off in its header: save the logits again")
    record = np.frombuffer(data, HEADER)[0]
    if record["version"] != VERSION:
        raise FormatError(f"{path}: is of version {record['version']}, this program reads {VERSION}: save it again")
    if record["crc"] != zlib.crc32(data[:-4]):
        raise FormatError(f"{path}: its header is damaged (its checksum differs): save the logits again")
    sizes = {name: int(record[name]) for name in ("n_vocab", "n_ctx", "n_chunk", "n_scored")}
    n_ctx = sizes["n_ctx"]
    if not all(1 <= size <= _LARGEST for size in sizes.values()) or sizes["n_scored"] != n_ctx - 1 - n_ctx // 2:
        raise FormatError(f"{path}: its header has impossible sizes {sizes}: save the logits again")
    return LogitsHeader(
        **sizes,
        model_hash=record["model_hash"].tobytes(),
        vocab_hash=record["vocab_hash"].tobytes(),
        text_hash=record["text_hash"].tobytes(),
        model=record["model"].decode(errors="replace"),
    )
