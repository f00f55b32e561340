"""Writing GGUF files of version 3, tensor by tensor. All sizes are known beforehand, so the header is written first.

The files of a split model are named `<name>-00001-of-0000N.gguf`. Each holds `split.no`, `split.count` and
`split.tensors.count`. All other metadata is in the first file, as llama.cpp's gguf-split has it.
"""

import math
import os
import re
import shutil
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.atomic import replacing
from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.metadata import MAX_KEYS, Typed
from gguf_run.formats.gguf.reader import DEFAULT_ALIGNMENT, part_path
from gguf_run.formats.gguf.tensors import MAX_DIMS, MAX_NAME_BYTES, MAX_TENSORS, Tensor, TensorInfo
from gguf_run.formats.gguf.writer_metadata import MetaValue, as_typed, encode_pair

__all__ = ["GGUFWriter", "MetaValue", "TensorInfo", "Typed", "split_counts"]

ALIGNMENT = "general.alignment"
_COPY_BYTES = 64 << 20


class GGUFWriter:
    """Writes one model. Use as a context manager: the files get their names at its end; after an error none is left."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, MetaValue],
        tensors: Sequence[TensorInfo],
        *,
        byte_order: str = "<",
        split_max_size: int = 0,
        split_max_tensors: int = 0,
        split: Sequence[int] = (),
        inputs: Iterable[str | os.PathLike[str]] = (),
    ) -> None:
        """Check everything and write the headers of all files.

        metadata: in the order of the file. Keys `split.*` are left out. GGUFFile.metadata.typed(key) copies a value
            with its exact type from another file.
        tensors: in the order in which their data will come.
        split_max_size: bytes of the tensors of each file at most, with padding; 0: no limit. A larger tensor has a
            file of its own.
        split_max_tensors: tensors of each file at most; 0: no limit.
        split: the number of tensors in each file, instead of the two limits.
        inputs: files that are being read and must not be written.
        GgufRunError for metadata or tensors that a reader would refuse, an output that is an input or no file, a full
        disk, or a file that cannot be made.
        """
        _check_tensors(tensors)
        pairs = {key: value for key, value in metadata.items() if not key.startswith("split.")}
        self.alignment = alignment_of(pairs)
        if split_max_size or split_max_tensors:
            split = split_counts(tensors, split_max_size, split_max_tensors, self.alignment)
        if split and sum(split) != len(tensors):
            raise ValueError(f"a split of {sum(split)} tensors, but there are {len(tensors)}")
        following = iter(tensors)
        shards = [list(islice(following, n)) for n in split or [len(tensors)]]  # the tensors of each file
        headers = _headers(pairs, shards, bool(split), byte_order)
        self.paths = _output_paths(Path(path), len(split))  # the files that there will be
        # of all files together
        self.nbytes = sum(map(len, headers)) + sum(padded(tensor.nbytes, self.alignment) for tensor in tensors)
        self._order = byte_order
        self._todo = deque((no, tensor) for no, shard in enumerate(shards) for tensor in shard)  # with their files
        self._left = 0  # bytes that the next tensor still takes
        self._no = 0  # the file that is being written
        self._file: BinaryIO | None = None
        self._check_outputs([Path(path) for path in inputs])
        self._replacing = ExitStack()
        self._temporary: list[Path] = []
        try:
            with self._errors():
                for self._no, header in enumerate(headers):
                    self._temporary.append(self._replacing.enter_context(replacing(self.paths[self._no])))
                    self._temporary[self._no].write_bytes(header)
                self._begin_tensor()
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, blocks: NDArray[np.uint8]) -> None:
        """Write blocks of the next tensor: uint8 of any shape, little-endian, as Tensor.blocks() returns them.

        A tensor may come in several calls, each with whole blocks; one without elements comes in none. ValueError if
        another tensor is next or if these are too many bytes, GgufRunError if the disk is full.
        """
        tensor = self._todo[0][1] if self._todo else None
        if tensor is None or name != tensor.name:
            raise ValueError(f"tensor {name}: the next one is {tensor and tensor.name}")
        if blocks.dtype != np.uint8 or blocks.nbytes > self._left or blocks.nbytes % tensor.type.type_size:
            raise ValueError(f"tensor {name}: {blocks.nbytes} bytes of {blocks.dtype}, {self._left} are left to write")
        blocks = np.ascontiguousarray(blocks).reshape(-1)
        if self._order == ">":
            blocks = blocks.view(tensor.type.dtype).astype(tensor.type.dtype.newbyteorder(">")).view(np.uint8)
        assert self._file is not None
        with self._errors():
            self._file.write(blocks.data)
            self._left -= blocks.nbytes
            if self._left == 0:
                self._file.write(bytes(-self._file.tell() % self.alignment))
                self._todo.popleft()
                self._begin_tensor()

    def copy(self, tensor: Tensor) -> None:
        """Write the next tensor with the blocks of a tensor in another file, a part at a time."""
        if not tensor.nbytes:
            return
        blocks = tensor.blocks()
        step = max(1, _COPY_BYTES // blocks.shape[1])
        for first in range(0, len(blocks), step):
            self.write(tensor.name, blocks[first : first + step])
            tensor.release(first, min(first + step, len(blocks)))

    def close(self) -> None:
        """Give the files their names. ValueError if tensors are missing."""
        if self._todo:
            raise ValueError(f"{self.paths[self._no]}: tensors are missing")
        with self._errors():
            if self._file is not None:
                self._file.close()
            self._replacing.close()  # the last file first: readers find the others by the first

    def abort(self) -> None:
        """Remove the files that are being written. Does nothing after close()."""
        self._todo.clear()
        if self._file is not None:
            with suppress(OSError):  # a full disk shows here once more
                self._file.close()
        with suppress(OSError), self._replacing:
            raise OSError("abandoned: the files do not get their names")

    def __enter__(self) -> "GGUFWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()

    def _check_outputs(self, inputs: Sequence[Path]) -> None:
        for path in self.paths:
            if path.exists() and not path.is_file():
                raise GgufRunError(f"{path}: is a {'folder' if path.is_dir() else 'device or pipe'}: name a file")
            for other in inputs:
                if path.exists() and other.exists() and path.samefile(other):
                    raise GgufRunError(f"{path}: is the file that is read: name another output")
        folder = self.paths[0].absolute().parent
        if not folder.is_dir():
            raise GgufRunError(f"{self.paths[0]}: there is no folder {folder}: make it first")
        free = shutil.disk_usage(folder).free
        if free < self.nbytes:
            raise GgufRunError(
                f"{self.paths[0]}: takes {self.nbytes / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB left: "
                "make room, or name an output on another disk"
            )

    def _begin_tensor(self) -> None:
        while self._todo and not self._todo[0][1].nbytes:
            self._todo.popleft()
        if self._todo:
            no, tensor = self._todo[0]
            self._left = tensor.nbytes
            if self._file is None or no != self._no:
                if self._file is not None:
                    self._file.close()
                self._no, self._file = no, open(self._temporary[no], "ab")  # noqa: SIM115

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = self.paths[self._no]
            raise GgufRunError(f"{path}: cannot be written: {error.strerror or error}: nothing was kept") from error


def _headers(
    pairs: Mapping[str, MetaValue], shards: Sequence[Sequence[TensorInfo]], is_split: bool, byte_order: str
) -> list[bytes]:
    alignment, headers = alignment_of(pairs), []
    for no, shard in enumerate(shards):
        own = dict(pairs) if no == 0 else {}
        if alignment != DEFAULT_ALIGNMENT:
            own[ALIGNMENT] = pairs[ALIGNMENT]
        if is_split:
            own["split.no"], own["split.count"] = Typed("u16", no), Typed("u16", len(shards))
            own["split.tensors.count"] = Typed("i32", sum(map(len, shards)))
        headers.append(encode_header(own, shard, byte_order, alignment))
    return headers


def encode_header(
    metadata: Mapping[str, MetaValue], tensors: Sequence[TensorInfo], byte_order: str, alignment: int
) -> bytes:
    """Return all bytes before the data of the tensors. Their number is a multiple of the alignment."""
    if len(metadata) > MAX_KEYS:
        raise GgufRunError(f"there are {len(metadata)} metadata keys: at most {MAX_KEYS} are allowed")
    parts = [b"GGUF", struct.pack(byte_order + "IQQ", 3, len(tensors), len(metadata))]
    parts += [encode_pair(key, value, byte_order) for key, value in metadata.items()]
    offset = 0
    for tensor in tensors:
        name, n_dims = tensor.name.encode(), len(tensor.ne)
        parts.append(struct.pack(byte_order + "Q", len(name)) + name)
        parts.append(struct.pack(f"{byte_order}I{n_dims}QIQ", n_dims, *tensor.ne, tensor.type.id, offset))
        offset += padded(tensor.nbytes, alignment)
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def split_counts(tensors: Sequence[TensorInfo], max_size: int, max_tensors: int, alignment: int) -> list[int]:
    """Return how many tensors each file of a split model gets. For the limits see GGUFWriter."""
    counts, size = [0], 0
    for tensor in tensors:
        nbytes = padded(tensor.nbytes, alignment)
        if counts[-1] and (0 < max_size < size + nbytes or counts[-1] == max_tensors):
            counts.append(0)
            size = 0
        counts[-1] += 1
        size += nbytes
    return counts


def padded(nbytes: int, alignment: int) -> int:
    """Return the bytes that a tensor of nbytes bytes takes in a file."""
    return nbytes + -nbytes % alignment


def alignment_of(pairs: Mapping[str, MetaValue]) -> int:
    """Return general.alignment, the alignment of the tensors' data in bytes."""
    alignment = as_typed(pairs[ALIGNMENT]).value if ALIGNMENT in pairs else DEFAULT_ALIGNMENT
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise GgufRunError(f"general.alignment is {alignment!r}: it must be an int, a power of two")
    return alignment


def _check_tensors(tensors: Sequence[TensorInfo]) -> None:
    """Raise GgufRunError for tensors that a reader would refuse."""
    if len(tensors) > MAX_TENSORS:
        raise GgufRunError(f"there are {len(tensors)} tensors: at most {MAX_TENSORS} are allowed")
    names: set[str] = set()
    for tensor in tensors:
        what = f"tensor {quoted(tensor.name)}"
        n_bytes = len(tensor.name.encode())
        if n_bytes > MAX_NAME_BYTES:
            raise GgufRunError(f"{what}: the name has {n_bytes} bytes: at most {MAX_NAME_BYTES} are allowed")
        if tensor.name in names:
            raise GgufRunError(f"there are two tensors called {quoted(tensor.name)}")
        if not 1 <= len(tensor.ne) <= MAX_DIMS or min(tensor.ne) < 0 or math.prod(tensor.ne) >= 1 << 63:
            raise GgufRunError(f"{what} has the shape {tensor.ne}: 1 to {MAX_DIMS} sizes of at least 0 are allowed")
        if tensor.ne[0] % tensor.type.block_size:
            raise GgufRunError(
                f"{what} has rows of {tensor.ne[0]} weights: {tensor.type.name} needs a multiple of "
                f"{tensor.type.block_size}"
            )
        names.add(tensor.name)


def _output_paths(path: Path, n_files: int) -> list[Path]:
    """Return the path itself with links followed, or the paths of the n_files files of a split model."""
    if not n_files:
        return [path.resolve()]
    prefix = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", path.name)
    return [part_path(path, prefix, no, n_files) for no in range(n_files)]
