"""A program: a tape that is ready to run, and the tokens that it runs on."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gguf_run.kernels_cpu.replay.team import Team
from gguf_run.kernels_cpu.tape import Tape
from gguf_run.models.backend import Program, Results, Run
from gguf_run.models.operands import Buffer


class CpuProgram:
    """models.backend.Program."""

    def __init__(self, team: Team, tape: Tape, ends: Sequence[int], result: Buffer) -> None:
        """ends: the number of kernels on the tape at the end of each part. The kernels behind them are `after`."""
        self.n_batch, self.n_outputs = tape.n_batch, tape.n_outputs
        code = tape.finish()
        *starts, end = ends
        self._parts, self._after = np.split(code[:end], starts), code[end:]
        self._last = code[starts[-1] if starts else 0 :]  # the last part with `after`
        self._team, self._tape, self._result = team, tape, tape.buffer(result)
        self._closed = False

    def run(
        self, ids: NDArray[np.int32], runs: Sequence[Run], rows: Sequence[int], part: int = 0, n_top: int = 0
    ) -> Results:
        """models.backend.Program.run. All columns are in memory anyway, whatever n_top is."""
        if part == 0:
            self._tape.table.set_tokens(ids, runs)
        return Results(self._run(self._last if len(rows) else self._parts[part], rows))

    def more(self, rows: Sequence[int]) -> NDArray[np.float32]:
        return self._run(self._after, rows)

    def _run(self, code: NDArray[np.int64], rows: Sequence[int]) -> NDArray[np.float32]:
        if self._closed:
            raise ValueError("the program is closed")
        self._tape.table.set_rows(rows)
        self._team.run(code)
        return self._result[: len(rows)]

    def to_host(self, buffer: Buffer, n_tokens: int) -> NDArray[np.float32]:
        return self._tape.buffer(buffer)[:n_tokens]

    def copy_from(self, other: Program, source: Buffer, n_tokens: int, target: Buffer) -> None:
        self.to_host(target, n_tokens)[:] = other.to_host(source, n_tokens)

    def close(self) -> None:
        self._closed = True
