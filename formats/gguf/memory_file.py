"""Bytes in memory in a file's place: a model that is made of other files while it is read."""

import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.gguf.mapped import MappedFile


class MemoryFile(MappedFile):
    """Bytes in memory that stand in for a file."""

    def __init__(self, path: str | os.PathLike[str], data: bytes) -> None:
        """path: the path that errors name."""
        self.path, self.order, self.size, self.has_bad_text = Path(path), "<", len(data), False
        self.map = mmap.mmap(-1, max(1, len(data)))
        self.map.write(data)

    def bytes_at(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        view = super().bytes_at(offset, nbytes)
        view.flags.writeable = False  # as for a file: compiled functions are compiled for one kind of array
        return view

    def release(self, offset: int, nbytes: int) -> None:
        """Do nothing: there is no file to read the bytes from again."""
