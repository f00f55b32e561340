"""Reading GGUF files: versions 2 and 3, both byte orders, split or not. The header is checked when a file is opened.

part                type                      see
magic               "GGUF"
version             uint32
n_tensors           uint64
n_kv                uint64
metadata            n_kv pairs                metadata.py
tensor entries      n_tensors entries         tensors.py
padding             to the alignment
data                the blocks of each tensor, aligned

A model may be split into files named `<name>-00001-of-0000N.gguf`. The first file has the metadata, `split.count` too.
"""

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gguf_run.formats.errors import FormatError, GgufRunError, UnsupportedError
from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.mapped import Cursor, MappedFile, quoted
from gguf_run.formats.gguf.metadata import Metadata, read_metadata
from gguf_run.formats.gguf.tensors import Tensor, read_tensors

if TYPE_CHECKING:
    from gguf_run.formats.gguf.writer_metadata import MetaValue

__all__ = ["GGUFFile", "Tensor"]

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32


@frozen
class _Part:
    """One file of a model."""

    file: MappedFile
    version: int
    alignment: int
    metadata: Metadata
    tensors: dict[str, Tensor]


class GGUFFile:
    """A model's file, or all files of a split model. Use as a context manager, or call close()."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        first = parts[0]
        # Path, version, byte order, alignment and metadata are those of the first file.
        self.path: Path = first.file.path
        self.version: int = first.version
        self.byte_order: str = first.file.order  # "<" or ">"
        self.alignment: int = first.alignment
        self.metadata: Metadata = first.metadata
        self.tensors: Mapping[str, Tensor] = MappingProxyType(_all_tensors(parts))  # of all files, in file order
        self.paths: tuple[Path, ...] = tuple(part.file.path for part in parts)
        self.n_parts: int = len(parts)
        # The number of tensors in each file of a split model, () for a single file.
        self.split: tuple[int, ...] = tuple(len(part.tensors) for part in parts) if len(parts) > 1 else ()
        self.nbytes: int = sum(part.file.size for part in parts)
        self._parts = parts

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "GGUFFile":
        """Map a file and check its header. The data is read only when a tensor is used.

        path: of a split model the first file. All its files are opened. A folder with one model in it will do, too.
        GgufRunError if a file cannot be opened, FormatError if it is damaged or no GGUF file, UnsupportedError for an
        unknown version or tensor type.
        """
        path = Path(path)
        try:
            if path.is_dir():
                from gguf_run.formats.gguf.found import model_in

                path = model_in(path)
                warnings.warn(f"{path} is opened, the one model in the folder", stacklevel=2)
            return cls(_read_parts(path))
        except FormatError as error:
            from gguf_run.formats.gguf.found import not_whole

            raise not_whole(path, error) from None

    @classmethod
    def of(cls, path: Path, metadata: "Mapping[str, MetaValue]", tensors: Mapping[str, Tensor]) -> "GGUFFile":
        """Return the file that these metadata and tensors would make. path: the path that errors name."""
        from gguf_run.formats.gguf.memory_file import MemoryFile
        from gguf_run.formats.gguf.writer_metadata import encode_pair

        pairs = b"".join(encode_pair(key, value, "<") for key, value in metadata.items())
        file = MemoryFile(path, pairs)
        read = read_metadata(Cursor(file), len(metadata))
        return cls([_Part(file, VERSIONS[-1], DEFAULT_ALIGNMENT, read, dict(tensors))])

    def close(self) -> None:
        """Unmap the file. Arrays that were taken before stay valid. No new ones can be taken."""
        for part in self._parts:
            part.file.close()

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_part(path: Path) -> _Part:
    file = MappedFile(path)
    cursor = Cursor(file)
    version = _read_version(cursor)
    n_tensors = cursor.number("Q", "the number of tensors")
    n_kv = cursor.number("Q", "the number of metadata keys")
    metadata = read_metadata(cursor, n_kv)
    alignment = _integer(path, metadata, "general.alignment", DEFAULT_ALIGNMENT)
    if alignment < 1 or alignment & (alignment - 1):
        raise FormatError(f"{path}: general.alignment is {alignment}: it must be a power of two")
    return _Part(file, version, alignment, metadata, read_tensors(cursor, n_tensors, alignment))


def _read_version(cursor: Cursor) -> int:
    """Read magic and version. The byte order follows from the version."""
    file = cursor.file
    if file.map[:4] != b"GGUF":
        from gguf_run.formats.gguf.found import not_gguf

        raise not_gguf(file)
    cursor.skip(4, "the magic")
    version: int = cursor.number("I", "the version")
    if version & 0xFFFF == 0:  # a small number in the other byte order
        file.order = ">"
        cursor.at = 4
        version = cursor.number("I", "the version")
    if version not in VERSIONS:
        raise UnsupportedError(
            f"{file.path}: is GGUF version {version}: versions 2 and 3 are known, convert the model again"
        )
    return version


def _integer(path: Path, metadata: Mapping[str, Any], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise FormatError(f"{path}: {key} is not an integer")
    return value


def part_path(first: Path, prefix: str, no: int, count: int) -> Path:
    """Return the path of file `no` (from 0) of a split model of `count` files, beside `first`."""
    return first.with_name(f"{prefix}-{no + 1:05d}-of-{count:05d}.gguf")


def _read_parts(path: Path) -> list[_Part]:
    """Read a file. If it is the first of a split model, read the others. `no` counts from 0, names of files from 1."""
    first = _read_part(path)
    count = _integer(path, first.metadata, "split.count", 1)
    no = _integer(path, first.metadata, "split.no", 0)
    if count <= 1:
        return [first]
    name = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name, re.DOTALL)
    if name is None or int(name[3]) != count or int(name[2]) != no + 1:
        raise FormatError(
            f"{path}: holds part {no + 1} of {count} of a split model: its name must end in "
            f"-{no + 1:05d}-of-{count:05d}.gguf"
        )
    if no != 0:
        raise GgufRunError(f"{path}: is part {no + 1} of {count}: open {part_path(path, name[1], 0, count).name}")
    parts = [first]
    for no in range(1, count):
        part = part_path(path, name[1], no, count)
        if not os.path.isfile(part):  # unlike Path.is_file, never an error
            raise GgufRunError(f"{part}: is missing: {path.name} is the first of {count} files, get them all")
        parts.append(_read_part(part))
        found = tuple(_integer(part, parts[no].metadata, key, -1) for key in ("split.no", "split.count"))
        if found != (no, count):
            raise FormatError(f"{part}: has split.no and split.count {found}, not {(no, count)}: not of this model")
    n_tensors = sum(len(part.tensors) for part in parts)
    claimed = _integer(path, first.metadata, "split.tensors.count", n_tensors)
    if claimed != n_tensors:
        raise FormatError(f"{path}: split.tensors.count is {claimed}, but its {count} files hold {n_tensors} tensors")
    return parts


def _all_tensors(parts: Sequence[_Part]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part in parts:
        for name in part.tensors.keys() & tensors.keys():
            raise FormatError(f"{part.file.path}: tensor {quoted(name)} is also in {tensors[name].file.path}")
        tensors.update(part.tensors)
    return tensors
