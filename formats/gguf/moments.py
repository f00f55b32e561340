"""Second moments: for every distinct input of matrices E[x xT] over a text, in the file of an importance matrix.

Beside what imatrix.py says, once for each input (GPTQ, arXiv:2210.17323, calls E[x xT] the Hessian):
F32 tensor `<first name>.in_moments`   [n_in (n_in + 1) / 2, n_expert]   sums of x[i] x[j], j >= i, row after row
imatrix.inputs                         array of string                   which entries share an input
llama.cpp's tools read the importance matrix and pass over the rest.
"""

import os

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.imatrix import Imatrix, f32_rows
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.reader import GGUFFile

MOMENTS = ".in_moments"


def n_packed(n: int) -> int:
    """Return the number of values of the upper triangle of an n x n matrix."""
    return n * (n + 1) // 2


def unpacked(packed: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """Return the symmetric matrix f32[n, n] of an upper triangle f32[n (n + 1) / 2]."""
    full, at = np.empty((n, n), np.float32), 0
    for i in range(n):
        full[i, i:] = full[i:, i] = packed[at : at + n - i]
        at += n - i
    return full


class Moments:
    """The second moments of an open file. `mean` and `n_tokens` may be called by several threads."""

    def __init__(self, file: GGUFFile, imatrix: Imatrix) -> None:
        self.imatrix = imatrix  # the diagonals
        self._file = file
        self._sums = {first: f32_rows(file, first + MOMENTS) for first in {*imatrix.inputs.values()}}
        self._layer: tuple[str, NDArray[np.float32]] | None = None  # the last sums over experts
        for name, first in imatrix.inputs.items():
            entry = imatrix.sums[name]
            n_expert, n = entry.sums.shape
            if self._sums[first].shape != (n_expert, n_packed(n)):
                n_expert, found = self._sums[first].shape
                raise FormatError(
                    f"{file.path}: {quoted(first + MOMENTS)} has {n_expert} rows of {found} values, entry "
                    f"{quoted(name)} needs {len(entry.counts)} of {n_packed(n)}: make it again with gguf-imatrix --full"
                )

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Moments":
        """Open a file that gguf-imatrix --full has made. FormatError if it is damaged or has no second moments."""
        imatrix = Imatrix.open(path)
        if not imatrix.inputs:
            raise FormatError(f"{path}: has no second moments: make it with gguf-imatrix --full")
        file = GGUFFile.open(path)
        try:
            return cls(file, imatrix)
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Moments":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def group(self, name: str) -> str | None:
        """Return the first name of the matrices that read the same input as `name`, None if it is not in the file."""
        return self.imatrix.inputs.get(name)

    def n_tokens(self, name: str, expert: int = 0) -> int:
        """Return the number of tokens that an expert of `name` has read."""
        return int(self.imatrix.sums[name].counts[expert])

    def sums(self, name: str) -> NDArray[np.float32]:
        """Return the sums as they are stored, f32[n_expert, n (n + 1) / 2]. FormatError if they are not finite."""
        first = self.imatrix.inputs[name]
        if not np.isfinite(self._sums[first]).all():
            raise FormatError(f"{self._file.path}: the second moments of {quoted(first)} are not finite: make it again")
        return self._sums[first]

    def mean(self, name: str, expert: int = 0) -> NDArray[np.float32]:
        """Return E[x xT], f32[n, n].

        An expert of few tokens is shrunk to the mean of its layer: a H_expert + (1 - a) H_layer, a = t / (t + n) for
        t tokens. GgufRunError if no token was read, FormatError if the file has values that are not finite.
        """
        n, counts = self.imatrix.sums[name].sums.shape[1], self.imatrix.sums[name].counts
        total, t = np.float32(counts.sum()), counts[expert]
        if not total:
            raise GgufRunError(f"{self._file.path}: {name} has read no token: calibrate with a longer text")
        if len(counts) == 1:
            return unpacked(self.sums(name)[0] / total, n)
        layer, first = self._layer, self.imatrix.inputs[name]
        if layer is None or layer[0] != first:
            self._layer = layer = first, self.sums(name).sum(axis=0) / total
        # a H_expert = t / (t + n) * sums / t, also of an expert without tokens
        return unpacked((self._sums[first][expert] + np.float32(n) * layer[1]) / (t + np.float32(n)), n)
