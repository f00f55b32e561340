"""A file of logits: what a model expected at every scored token of a text, to compare other models with later.

A safetensors file (formats/sealed.py) with these arrays:

    nll      F64[n_chunk, n_scored]             -log of the probability of the right token
    top      U32[n_chunk, n_scored]             the most likely token
    step     F32[n_chunk, n_scored]             logit[i] = (q[i] - 65535) * step, relative to the row's largest logit
    q        U16[n_chunk, n_scored, n_vocab]
    crc32    U32[n_chunk, 4]                    of the bytes of a chunk in each array above

A step is the row's range of logits, at most 64, divided by 65535. It is below 0.001, so the divergence of a row from
its rounded self is about 1e-8. Rounded logits are compared with logits that are rounded in the same way.
"""

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.safetensors import DTYPES, writing_safetensors
from gguf_run.formats.sealed import FileKind
from gguf_run.runtime.evaluate.text import Block
from gguf_run.runtime.terminal.text import size_text

KIND = FileKind("file of logits", b"GGRLOGIT", "make it again with `gguf-eval kl MODEL --save-logits FILE`")
MAX_RANGE = 64.0
_TOP = 65535
_ROWS_AT_ONCE = 64
_LARGEST = 1 << 24  # of the sizes in a header
_SIZES, _TEXTS = ("n_vocab", "n_ctx", "n_chunk", "n_scored"), ("model_hash", "vocab_hash", "text_hash", "model")
_ROWS = ("nll", "top", "step", "q")  # arrays with a row for each scored token


@dataclass(frozen=True)
class LogitsHeader:
    """What the logits in a file belong to."""

    n_vocab: int
    n_ctx: int
    n_chunk: int
    n_scored: int  # rows of a chunk
    model_hash: str  # see hash_file
    vocab_hash: str  # see hash_vocabulary
    text_hash: str  # see hash_ids
    model: str  # name of the model's file

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of each array in the file."""
        rows = (self.n_chunk, self.n_scored)
        return {
            "nll": ("F64", rows),
            "top": ("U32", rows),
            "step": ("F32", rows),
            "q": ("U16", (*rows, self.n_vocab)),
            "crc32": ("U32", (self.n_chunk, len(_ROWS))),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(DTYPES[dtype].itemsize * prod(shape) for dtype, shape in self.arrays.values())


def hash_file(path: Path) -> str:
    """Return the SHA-256 of the SHA-256 of a model's file, or of those of all files of a split model."""
    with GGUFFile.open(path) as file:
        paths = dict.fromkeys([file.path, *(tensor.file.path for tensor in file.tensors.values())])
    digest = hashlib.sha256()
    for part in paths:
        with open(part, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def hash_vocabulary(path: Path) -> str:
    """Return the SHA-256 of the texts of a model's tokens."""
    with GGUFFile.open(path) as file:
        tokens = file.metadata.get("tokenizer.ggml.tokens", ())
        return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()


def hash_ids(ids: list[int]) -> str:
    """Return the SHA-256 of token ids."""
    return hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()


def round_logits(logits: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Return q uint16[n, n_vocab] and step f32[n] of logits f32[n, n_vocab]."""
    relative = np.maximum(logits - logits.max(axis=1, keepdims=True), np.float32(-MAX_RANGE))
    step = relative.min(axis=1) / np.float32(-_TOP)
    relative *= 1 / np.where(step > 0, step, np.float32(1))[:, None]
    np.rint(relative, out=relative)
    relative += _TOP
    return relative.astype(np.uint16), step


def unround_logits(q: NDArray[np.uint16], step: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return logits f32[n, n_vocab] of q uint16[n, n_vocab] and step f32[n]; the largest of each row is 0."""
    logits = q.astype(np.float32)
    logits -= _TOP
    logits *= step[:, None]
    return logits


class _Incomplete(Exception):
    """Chunks are missing: the file is not kept."""


class LogitsWriter:
    """Writes the rows of a file, see writing_logits."""

    def __init__(self, header: LogitsHeader, append: Callable[[str, Any], None]) -> None:
        """append: of writing_safetensors."""
        self._header, self._append, self._n_row = header, append, 0
        self._crc = np.zeros(len(_ROWS), "<u4")

    def add(self, block: Block) -> None:
        """Append rows of one chunk."""
        q, step = round_logits(block.logits)
        rows: tuple[NDArray[Any], ...] = (block.nll, block.top.astype("<u4"), step, q)
        for i, (name, values) in enumerate(zip(_ROWS, rows, strict=True)):
            self._append(name, values)
            self._crc[i] = zlib.crc32(values.data, int(self._crc[i]))
        self._n_row += len(q)
        if self._n_row % self._header.n_scored == 0:
            self._append("crc32", self._crc)
            self._crc[:] = 0

    @property
    def is_complete(self) -> bool:
        """Tell whether all rows came."""
        return self._n_row == self._header.n_chunk * self._header.n_scored


@contextmanager
def writing_logits(path: Path, header: LogitsHeader) -> Iterator[LogitsWriter]:
    """Return a context that gives a LogitsWriter. The file is kept if all rows came and the block raised nothing.

    GgufRunError if the disk has no room for it; OSError if it cannot be made.
    """
    if path.is_dir():
        raise GgufRunError(f"{path} is a folder: name a file")
    free = shutil.disk_usage(path.absolute().parent).free
    if free < header.nbytes:
        needed, left = size_text(header.nbytes, 1), size_text(free, 1)
        raise GgufRunError(f"{path}: the logits take {needed}, the disk has {left} left: use fewer --chunks")
    metadata = {name: str(value) for name, value in asdict(header).items()}
    with suppress(_Incomplete), writing_safetensors(path, header.arrays, KIND.seal(metadata)) as append:
        writer = LogitsWriter(header, append)
        yield writer
        if not writer.is_complete:
            raise _Incomplete


class LogitsFile:
    """An open file of logits."""

    def __init__(self, path: Path) -> None:
        """FormatError if it is not a whole file of logits."""
        self.path, file = path, KIND.open(path)
        self.header = _header(path, file.metadata)
        self._arrays = file.arrays
        if {name: (array.dtype, array.shape) for name, array in file.arrays.items()} != self.header.arrays:
            raise KIND.damaged(path, "its arrays are not those that its header tells of")

    def chunk(self, i: int) -> Iterator[Block]:
        """Yield the rows of chunk i in blocks; logits are relative to the largest of their row.

        FormatError at the end if the rows are damaged: use no block before that.
        """
        chunk = {name: array.array()[i] for name, array in self._arrays.items()}
        crc = [0] * len(_ROWS)
        for start in range(0, self.header.n_scored, _ROWS_AT_ONCE):
            if self.path.stat().st_size < self._arrays["q"].file.size:  # reading on would end the process
                raise FormatError(f"{self.path}: became shorter while it was read")
            nll, top, step, q = rows = [chunk[name][start : start + _ROWS_AT_ONCE] for name in _ROWS]
            crc = [zlib.crc32(values.data, before) for values, before in zip(rows, crc, strict=True)]
            yield Block(unround_logits(q, step), nll.copy(), top.astype(np.int64))
        if crc != chunk["crc32"].tolist():
            raise KIND.damaged(self.path, f"the checksum of chunk {i + 1} differs")
        self._arrays["q"].release(i * self.header.n_scored, (i + 1) * self.header.n_scored)

    def __enter__(self) -> "LogitsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._arrays["q"].file.close()


def _header(path: Path, metadata: Mapping[str, str]) -> LogitsHeader:
    try:
        n_vocab, n_ctx, n_chunk, n_scored = sizes = [int(metadata[name]) for name in _SIZES]
        model_hash, vocab_hash, text_hash, model = (metadata[name] for name in _TEXTS)
    except (KeyError, ValueError):
        raise KIND.damaged(path, "its header is not what this program writes") from None
    if not all(1 <= size <= _LARGEST for size in sizes) or n_scored != n_ctx - 1 - n_ctx // 2:
        raise KIND.damaged(path, f"its header has impossible sizes {sizes}")
    return LogitsHeader(n_vocab, n_ctx, n_chunk, n_scored, model_hash, vocab_hash, text_hash, model)
