"""A recorded step: the tape of its ops, and the tokens that it runs on."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.kernels_cpu.panels.memory import CpuBuffer
from gguf_run.kernels_cpu.replay.runs import RunTable
from gguf_run.kernels_cpu.replay.team import Team


class CpuProgram:
    """models.backend.Program."""

    def __init__(
        self,
        team: Team,
        tape: NDArray[np.int64],
        body: int,
        cuts: Sequence[int],
        table: RunTable,
        result: CpuBuffer,
        keep: list[Any],
    ) -> None:
        """body: number of ops before the choice of output rows. cuts: where parts begin, but for the first. keep: what
        the tape's addresses point into."""
        self.n_batch, self.n_outputs = len(table.ids), len(table.rows)
        self._team, self._table, self._keep = team, table, keep
        self._parts, self._after = np.split(tape[:body], cuts), tape[body:]
        self._last = tape[cuts[-1] if cuts else 0 :]
        self._result = result.memory[:, result.start : result.start + result.width]

    def run(
        self, ids: NDArray[np.int32], runs: Iterable[tuple[int, int, int]], rows: Sequence[int], part: int = 0
    ) -> NDArray[np.float32]:
        if part == 0:
            self._table.set_tokens(ids, runs)
        return self._replay(self._last if len(rows) else self._parts[part], rows)

    @property
    def n_top(self) -> int:
        return 0

    def run_top(self, *_: Any) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        raise NotImplementedError("the host has all results")

    def more(self, rows: Sequence[int]) -> NDArray[np.float32]:
        return self._replay(self._after, rows)

    def _replay(self, tape: NDArray[np.int64], rows: Sequence[int]) -> NDArray[np.float32]:
        if not self._keep:  # its memory may be gone
            raise ValueError("the program is closed")
        self._table.set_rows(rows)
        self._team.run(tape)
        return self._result[: len(rows)]

    def close(self) -> None:
        self._keep.clear()
