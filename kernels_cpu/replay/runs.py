"""The tokens of a step: which sequence each belongs to, and its position. The table has fixed addresses.

    ids, positions, run_of   one for each token
    runs                     one RUN for each sequence of the step, whose tokens are neighbours
    rows                     the tokens whose results are wanted; `wanted` is a table of these tokens alone

Attention cuts the work of all runs at once: `plan` fills the last fields of RUN.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import carray, njit
from gguf_run.models.backend import Run

if COMPILING:
    from gguf_run.kernels_cpu.vector.native import pointer

# first: number of the first token in the step. attention/plan.py explains first_piece to n_per_piece. The others are
# those of backend.Run.
_FIELDS = "first n_tokens n_past seq first_piece n_split first_part n_per_piece is_long reads writes"
RUN = np.dtype([(name, "i8") for name in _FIELDS.split()])
_N_TOKENS, _N_OUT, _N_RUNS = range(0, 24, 8)  # words; each has a cache line of its own


class RunTable:
    """The buffers of one program."""

    def __init__(self, n_batch: int, n_outputs: int) -> None:
        self._n_outputs, self._counts = n_outputs, np.zeros(32, np.int64)
        self._wanted: RunTable | None = None
        self.ids = np.zeros(n_batch, np.int32)
        self.positions = np.zeros(n_batch, np.int64)
        self.run_of = np.zeros(n_batch, np.int64)
        self.runs = np.zeros(n_batch, RUN)
        self.rows = np.zeros(n_outputs, np.int64)
        self.n_tokens, self.n_out, self.n_runs = (
            self._counts.ctypes.data + 8 * word for word in (_N_TOKENS, _N_OUT, _N_RUNS)
        )

    def set_tokens(self, ids: NDArray[np.int32], runs: Iterable[Run]) -> None:
        first = n_runs = 0
        for n_runs, (seq, n_past, n_tokens, *others) in enumerate(runs, 1):
            end = first + n_tokens
            self.positions[first:end] = np.arange(n_past, n_past + n_tokens)
            self.run_of[first:end] = n_runs - 1
            self.runs[n_runs - 1] = (first, n_tokens, n_past, seq, 0, 0, 0, 0, *others)
            first = end
        if first != len(ids):
            raise ValueError(f"the runs have {first} tokens, there are {len(ids)} ids")
        self.ids[:first] = ids
        self._counts[_N_TOKENS], self._counts[_N_RUNS] = first, n_runs

    @property
    def wanted(self) -> "RunTable":
        """The table of the tokens whose results are wanted. Only programs that ask for it have one."""
        self._wanted = self._wanted or RunTable(self._n_outputs, 0)
        return self._wanted

    def set_rows(self, rows: Sequence[int]) -> None:
        self.rows[: len(rows)] = rows
        self._counts[_N_OUT] = len(rows)
        if self._wanted is not None:
            self._wanted.set_tokens(self.ids[self.rows[: len(rows)]], self._runs_of(rows))

    def _runs_of(self, rows: Sequence[int]) -> list[Run]:
        """Return some tokens as runs. Tokens that are neighbours in their sequence are one run."""
        runs: list[Run] = []
        for row in rows:
            run, n_past = self.runs[self.run_of[row]], int(self.positions[row])
            if runs and (runs[-1].seq, runs[-1].n_past + runs[-1].n_tokens) == (run["seq"], n_past):
                runs[-1] = runs[-1]._replace(n_tokens=runs[-1].n_tokens + 1)
            else:
                runs.append(Run(int(run["seq"]), n_past, 1, bool(run["is_long"])))
        return runs


@njit(inline="always")
def runs_at(address, n):
    """RUN[n] at an address."""
    return carray(pointer(address), n, RUN)
