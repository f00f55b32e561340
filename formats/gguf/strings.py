"""Arrays of strings in a mapped file. Compiled code finds the strings; they are decoded when they are read.

Each string is a uint64 length and its bytes. So the start of a string is known only after a walk over those before it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.compiler.jit import njit
from gguf_run.formats.gguf.mapped import Cursor


@njit
def _walk(data: Any, place: Any, n: Any, big_endian: Any, starts: Any) -> Any:
    """Walk over n strings of uint8[:] data from offset place[0] on. Return how many of them fit.

    place: int64[1]. It gets the offset where these strings end. (A kernel that returns two numbers would need numba.)
    starts: intp[n + 1], filled with the offset of each string's length and of the end; intp[0]: not wanted.
    """
    end, at = np.int64(len(data)), place[0]
    for i in range(n):
        place[0] = at
        if len(starts) > 0:
            starts[i] = at
        if end - at < 8:
            return i
        length = np.uint64(0)
        for j in range(8):
            byte = data[at + j] if big_endian else data[at + 7 - j]
            length = (length << np.uint64(8)) | np.uint64(byte)
        if length > np.uint64(end - at - 8):
            return i
        at += 8 + np.int64(length)
    if len(starts) > 0:
        starts[n] = at
    place[0] = at
    return n


@njit
def _join(data: Any, starts: Any, separator: Any, out: Any) -> None:
    """Write the bytes of every string, and of `separator` after each, to out: uint8[total]."""
    k = 0
    for i in range(len(starts) - 1):
        for at in range(starts[i] + 8, starts[i + 1]):
            out[k] = data[at]
            k += 1
        for byte in separator:
            out[k] = byte
            k += 1


# U+FFFF is no character, so texts hardly ever hold it. Its UTF-8 bytes cannot complete a broken string before them.
_SEPARATOR = "\uffff"
_NO_STARTS = np.empty(0, np.intp)


def skip_strings(cursor: Cursor, n: int, what: str, starts: NDArray[np.intp] = _NO_STARTS) -> None:
    """Move the cursor over an array of n strings; FormatError if they do not fit into the file. starts: see _walk."""
    file = cursor.file
    place = np.array([cursor.at], np.int64)
    done = _walk(file.bytes_at(0, file.size), place, n, file.order == ">", starts)
    cursor.at = int(place[0])
    if done < n:
        raise cursor.error(f"string {done} of {n} of {what} does not fit into the file: it is truncated or damaged")


class StringArray(Sequence[str]):
    """A lazy sequence of strings. An item or a slice decodes only its own strings, `tolist` decodes all at once."""

    def __init__(self, cursor: Cursor, n: int, what: str) -> None:
        """n strings begin at the cursor. The caller has checked that the file has 8 * n bytes from there on."""
        self._cursor, self._file, self._what = cursor, cursor.file, what
        self._starts = np.empty(n + 1, np.intp)
        skip_strings(cursor, n, what, self._starts)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(len(self)))]
        return self._item(range(len(self))[index])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def __repr__(self) -> str:
        return f"StringArray({len(self)} strings)"

    def _item(self, i: int) -> str:
        return self._cursor.text(int(self._starts[i]) + 8, int(self._starts[i + 1]), f"string {i} of {self._what}")

    def stored(self, order: str) -> bytes:
        """Return lengths and bytes as a file of byte order "<" or ">" holds them, even where they are not UTF-8."""
        starts = self._starts
        data = self._file.bytes_at(int(starts[0]), int(starts[-1] - starts[0]))
        if order != self._file.order:
            data = data.copy()
            lengths = (starts[:-1] - starts[0])[:, None] + np.arange(8)
            data[lengths] = data[lengths[:, ::-1]]
        return data.tobytes()

    def tolist(self) -> list[str]:
        """Return all strings, with U+FFFD for bytes that are not UTF-8.

        The bytes of all strings are joined by a separator, decoded at once, and split again.
        """
        n = len(self)
        separator = np.frombuffer(_SEPARATOR.encode(), np.uint8)
        nbytes = int(self._starts[n] - self._starts[0])
        joined = np.empty(nbytes + n * (len(separator) - 8), np.uint8)
        _join(self._file.bytes_at(0, self._file.size), self._starts, separator, joined)
        try:
            strings = joined.tobytes().decode().split(_SEPARATOR)
        except UnicodeDecodeError:
            strings = []
        # Else a string holds the separator or is not UTF-8: each is decoded alone.
        return strings[:-1] if len(strings) == n + 1 else self[:]
