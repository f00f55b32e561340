"""A file mapped into memory, and a cursor that reads numbers and strings from it and checks each of them."""

import mmap
import os
import stat
import struct
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import FormatError, GgufRunError, plain

_LFS_POINTER = b"version https://git-lfs"


def check_kind(path: str | os.PathLike[str], pipes: bool = False) -> None:
    """GgufRunError unless `path` is a regular file. Call it before a file is opened: a named pipe waits for a writer.

    pipes: allow pipes without a name, as in `-f <(command)`. OSError if there is nothing.
    """
    mode = os.stat(path).st_mode
    is_nameless = stat.S_ISFIFO(mode) and os.path.basename(os.path.realpath(path)).startswith("pipe:")
    if not stat.S_ISREG(mode) and not (pipes and is_nameless):
        kind = "directory" if stat.S_ISDIR(mode) else "device or pipe"
        raise GgufRunError(f"{path}: is a {kind}, not a file: give the path of a file")


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a whole file that a person names, of at most `limit` bytes.

    GgufRunError for a larger file, a device and a named pipe, OSError if it cannot be read.
    """
    check_kind(path, pipes=True)
    with open(path, "rb") as file:
        # read() sets aside as much memory as it may read. Pipes have no size.
        data = file.read(min(os.fstat(file.fileno()).st_size or limit, limit) + 1)
    if len(data) > limit:
        raise GgufRunError(f"{path}: is larger than {limit} bytes, the most that is read of such a file")
    check_content(path, data)
    return data


def check_content(path: str | os.PathLike[str], data: bytes) -> None:
    """FormatError if a file, which begins with `data`, is what a clone without Git LFS has in a large file's place."""
    if data.startswith(_LFS_POINTER):
        raise FormatError(f"{path}: is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")


class MappedFile:
    """A regular file, mapped read-only.

    The file must not shrink while it is mapped: the operating system would end the process on access.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Map the file. GgufRunError if it cannot be opened, FormatError if it is empty."""
        self.path = Path(path)
        self.order = "<"  # byte order, "<" or ">": set by the function that reads the header
        self.has_bad_text = False  # a string was decoded that is not UTF-8, and a warning said so
        try:
            check_kind(path)
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise FormatError(f"{path}: is empty, it holds nothing to read")
                self.map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
            check_content(path, self.map[: len(_LFS_POINTER)])
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            raise GgufRunError(f"{path}: cannot open the file: {reason}") from None

    def bytes_at(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Return a read-only view of nbytes bytes from `offset` on. The range must lie inside the file."""
        return np.frombuffer(self.map, np.uint8, nbytes, offset)

    def release(self, offset: int, nbytes: int) -> None:
        """Let the OS drop the pages that lie fully inside the range. A later access reads them from the file again."""
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if sys.platform != "win32" and end > start:
            self.map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Unmap the file. If views are still in use, the file is unmapped when the last of them goes."""
        with suppress(BufferError):
            self.map.close()


class BadText(str):
    """A string whose bytes are not UTF-8, with U+FFFD for those. Writers write the bytes."""

    stored: bytes


class Cursor:
    """An offset in a mapped file that moves forward as fields are read. Every error names the file and the offset."""

    def __init__(self, file: MappedFile, at: int = 0) -> None:
        self.file, self.at = file, at

    def error(self, text: str, at: int | None = None) -> FormatError:
        """Return an error to raise: `text` at offset `at` (default: the cursor's)."""
        return FormatError(f"{self.file.path}: offset {self.at if at is None else at}: {text}")

    def skip(self, nbytes: int, what: str) -> int:
        """Move over nbytes and return the offset where they begin. FormatError if the file has less left."""
        at = self.at
        if nbytes > self.file.size - at:
            end = f"the file ends after {self.file.size - at}: it is truncated or damaged, get it again"
            raise self.error(f"{what} needs {nbytes} bytes, but {end}")
        self.at = at + nbytes
        return at

    def number(self, code: str, what: str) -> Any:
        """Read one number. `code` is its letter in the struct module ("I": uint32, "Q": uint64 ...)."""
        code = self.file.order + code
        return struct.unpack_from(code, self.file.map, self.skip(struct.calcsize(code), what))[0]

    def span(self, what: str, limit: int) -> tuple[int, int]:
        """Move over a string: a uint64 length, at most `limit`, and its bytes. Return where they begin and end."""
        start = self.at
        length = self.number("Q", f"the length of {what}")
        if length > limit:
            raise self.error(f"{what} has {length} bytes: at most {limit} are allowed", start)
        begin = self.skip(length, what)
        return begin, self.at

    def string(self, what: str, limit: int) -> str:
        """Read a string of at most `limit` bytes of UTF-8."""
        return self.decode(*self.span(what, limit), what)

    def text(self, begin: int, end: int, what: str) -> str:
        """Return the text between two offsets: BadText if it is not UTF-8. Once for each file, a warning says so."""
        file = self.file
        try:
            return self.decode(begin, end, what)
        except FormatError as error:
            if not file.has_bad_text:
                file.has_bad_text = True
                warnings.warn(f"{error}: U+FFFD is shown in its place", stacklevel=2)
            text = BadText(file.map[begin:end].decode(errors="replace"))
            text.stored = file.map[begin:end]
            return text

    def decode(self, begin: int, end: int, what: str) -> str:
        """Return the text between two offsets. FormatError if it is not UTF-8."""
        data = self.file.map[begin:end]
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            at = error.start
            raise self.error(f"{what} is not valid UTF-8 (byte 0x{data[at]:02x})", begin + at) from None


def quoted(name: str) -> str:
    """Return a name from a file in a form that is safe to show: in quotes, on one line, at most 100 characters."""
    short = name if len(name) <= 100 else name[:99] + "…"
    return f'"{plain(short)}"'
