"""Finds the numbers of isa.Tuning on this machine, in a second, with the matmul kernel itself.

A prefetch distance that doubles the decode speed of one CPU halves that of another. So the numbers are measured where
they are used: on matrices that the caches do not hold, with all threads, once for each kind of panel.

The machine may be busy meanwhile. Therefore the time that the threads run is measured, and the candidates of a number
take turns, each against the default in the same round. A candidate is chosen if it is clearly faster in the median
round, and in most rounds. Else the default stays.

Not measured, as nothing was gained on any CPU: how far batches prefetch (3 to 12 kB are alike), the panels and tokens
of a batch's piece, and how long a thread spins (a machine that is idle now wants it, one that is busy does not).
"""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.atomic import replacing
from gguf_run.kernels_cpu.matmul.matmul import ONE_HEAD, matmul, tile_panels
from gguf_run.kernels_cpu.measure.limits import cache_bytes
from gguf_run.kernels_cpu.panels.memory import LANES, aligned
from gguf_run.kernels_cpu.panels.panels import PANELS, ROWS, IntPanel, panel_sizes, x_stride
from gguf_run.kernels_cpu.replay.team import Team
from gguf_run.kernels_cpu.vector.isa import Tuning, stored_tuning

_N_IN, _N_OUT = 2048, 2048  # of a matrix
_LEAST_BYTES, _MOST_BYTES = 64 << 20, 512 << 20  # of all matrices
_RUN_BYTES = 16 << 20  # of the matrices of a run, for each thread
_BATCH = 64  # tokens of a large batch
_ROUNDS, _LEAST_ROUNDS, _SECONDS = 24, 8, 0.3  # of a number: rounds, and when it has taken so long, fewer
_GAIN, _WINS = 0.95, 0.75  # the most of the default's time, in the median, and the part of rounds that must be won
_FEWER_THREADS_GAIN = 0.9  # fewer threads must gain more: they slow down long prompts
_STALE_SECONDS = 60  # a lock of this age is left over from a process that ended


# What other programs do meanwhile does not count: the time that all threads run, or that this thread runs where numbers
# of threads are compared. Windows counts both too coarsely.
_all_threads, _this_thread = (time.process_time, time.thread_time) if os.name != "nt" else (time.perf_counter,) * 2


@dataclass(frozen=True)
class Trial:
    """A candidate for one of the numbers."""

    number: str  # a field of Tuning
    value: int
    seconds: float  # of a run, median
    ratio: float  # of its time to the default's in the same round, median
    wins: float  # part of the rounds in which it was faster
    chosen: bool


def tune_once(path: Path, panel: int, n_threads: int, free_bytes: int | None) -> tuple[Tuning, str]:
    """Return the numbers in `path`; measure and store them first if they are missing. And a line for people.

    panel: place in PANELS, of most weights.
    n_threads: the cores that may be used.
    free_bytes: of memory, if known. Where there is little, or another process measures, the defaults are returned.
    """
    if free_bytes is not None and free_bytes < 4 * _LEAST_BYTES:
        return Tuning(), "defaults: too little memory is free to measure"
    with _lock(path.with_suffix(".lock")) as ours:
        found = stored_tuning(path)
        if found or not ours:
            return (found, "measured before") if found else (Tuning(), "defaults: another process measures")
        start = time.perf_counter()
        try:
            tuning, _ = measure(panel, n_threads, free_bytes)
        except MemoryError:
            return Tuning(), "defaults: too little memory is free to measure"
        line = f"measured in {time.perf_counter() - start:.1f} s"
        return tuning, f"{line}, {store(path, tuning)}"


def store(path: Path, tuning: Tuning) -> str:
    """Write a file of isa.tuning_path. Returns what was done, for people."""
    try:
        with replacing(path) as part:
            part.write_text(json.dumps(vars(tuning)))
    except OSError as error:
        return f"not kept: cannot write to {path} ({error.strerror})"
    return f"kept in {path}"


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Yield whether this process may measure: it has made the lock file, which no other process has."""
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            path.unlink()
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except OSError as error:
        yield not isinstance(error, FileExistsError)  # a folder that takes no files: measure for this process
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)


def measure(panel: int, n_threads: int, free_bytes: int | None = None) -> tuple[Tuning, list[Trial]]:
    """Measure with up to n_threads threads. Returns the numbers, and all candidates. It takes about a second.

    panel: place in PANELS. free_bytes: of memory, of which at most a quarter is used.
    """
    n_bytes = min(max(2 * cache_bytes(), _LEAST_BYTES), _MOST_BYTES, *([free_bytes // 4] if free_bytes else []))
    tuning, trials = Tuning(), []
    with ExitStack() as stack:
        teams = {n: Team(n) for n in thread_counts(n_threads)}
        for team in teams.values():
            stack.callback(team.close)
        stage = _Stage(panel, n_bytes, n_threads)

        def decode(number: str, value: int) -> float:
            return stage.seconds(teams[n_threads], replace(tuning, **{number: value}), 1, _all_threads)

        def batch(number: str, value: int) -> float:
            return stage.seconds(teams[n_threads], replace(tuning, **{number: value}), _BATCH, _all_threads)

        def threads(number: str, value: int) -> float:
            return stage.seconds(teams[value], tuning, 1, _this_thread)

        plan: list[tuple[str, Sequence[int], Callable[[str, int], float], float]] = [
            ("ahead", (tuning.ahead, -1, 6144, 16384), decode, _GAIN),
            ("piece_bytes", (tuning.piece_bytes, 65536)[:n_threads], decode, _GAIN),
            ("tile_tokens", (tuning.tile_tokens, 8)[: tile_panels(panel)], batch, _GAIN),
            ("n_threads", tuple(teams), threads, _FEWER_THREADS_GAIN),
        ]
        for number, values, run, gain in plan:
            found = compare(values, partial(run, number))
            trials += [Trial(number, *row) for row in choose(found, gain)]
            best = next(trial.value for trial in trials if trial.number == number and trial.chosen)
            if best != values[0]:
                tuning = replace(tuning, **{number: best})
    return tuning, trials


def thread_counts(n_threads: int) -> list[int]:
    """Return the numbers of threads that are tried: all first."""
    return list(dict.fromkeys([n_threads, *(n for n in (n_threads * 3 // 4, n_threads // 2) if n >= 1)]))


def compare(values: Sequence[int], run: Callable[[int], float]) -> dict[int, list[float]]:
    """Run all candidates in turns, in an order that is reversed each round. Returns the seconds of each round."""
    times: dict[int, list[float]] = {value: [] for value in values}
    start = time.perf_counter()
    for i in range(_ROUNDS if len(values) > 1 else 1):
        if i >= _LEAST_ROUNDS and time.perf_counter() - start > _SECONDS:
            break
        for value in values[:: -1 if i % 2 else 1]:
            times[value].append(run(value))
    return times


def choose(times: Mapping[int, Sequence[float]], gain: float) -> list[tuple[int, float, float, float, bool]]:
    """Return (value, median seconds, median ratio, part of rounds won, chosen) for each candidate; one is chosen.

    times: seconds of each round, by candidate; the default is first.
    """
    default, *others = times
    rows = []
    for value in times:
        ratios = [t / t_default for t, t_default in zip(times[value], times[default], strict=True)]
        rows.append((value, median(times[value]), median(ratios), sum(r < 1 for r in ratios) / len(ratios)))
    clear = [row for row in rows if row[0] in others and row[2] < gain and row[3] >= _WINS]
    best = min(clear, key=lambda row: row[2], default=rows[0])
    return [(*row, row == best) for row in rows]


class _Stage:
    """Matrices of one kind of panel, and a tape that multiplies each of them. All weights are 0."""

    def __init__(self, panel: int, n_bytes: int, n_threads: int) -> None:
        shape = PANELS[panel]
        matrix_bytes = _N_OUT // ROWS * shape.group_bytes(_N_IN)
        n = max(2, n_bytes // matrix_bytes)
        self._kept = [
            aligned(size) for size in (n * matrix_bytes, _BATCH * 4 * _N_IN, _BATCH * 4 * _N_OUT, 4 * LANES, 64)
        ]
        w, x, out, zeros, rows = (array.ctypes.data for array in self._kept)
        with ThreadPoolExecutor(n_threads) as pool:  # pages are there from now on
            list(pool.map(lambda part: part.fill(0), np.array_split(self._kept[0], 4 * n_threads)))
        self._kept[1].fill(0)  # x: memory that was never written is one page for all rows, and slow to read
        kernel = matmul(panel)
        row = x_stride(_N_IN) if isinstance(shape, IntPanel) else 4 * _N_IN
        none = {"residual_stride": 0, "residual_group": 0, "bias": 0, "scratch": 0, "scratch_stride": 0}
        fields = {"rows": rows, "n_out": _N_OUT, "x": x, "x_stride": row, "out": out, "out_stride": 4 * _N_OUT}
        numbers = {name: value for name, value in vars(Tuning()).items() if name in (kernel.fields.names or ())}
        record = kernel.bind(w=w, residual=zeros, **panel_sizes(shape, _N_IN), **fields, **none, **ONE_HEAD, **numbers)
        self._records = np.repeat(record, n)
        self._records["w"] += np.arange(n) * matrix_bytes
        places = self._records.ctypes.data + np.arange(n) * self._records.itemsize
        self._tape: NDArray[np.int64] = np.stack([np.full(n, kernel.compiled.address), places], axis=1)
        self._n_run = max(1, min(n // 4, _RUN_BYTES * n_threads // matrix_bytes))
        self._starts = itertools.cycle(range(0, n - self._n_run + 1, self._n_run))

    def seconds(self, team: Team, tuning: Tuning, n_tokens: int, clock: Callable[[], float]) -> float:
        """Return the time of a run: one token by matrices that were not read for long, or a batch by one matrix."""
        for name in vars(tuning).keys() & set(self._records.dtype.names or ()):
            self._records[name] = getattr(tuning, name)
        self._kept[-1].view(np.int64)[0] = n_tokens
        start = next(self._starts) if n_tokens == 1 else 0
        tape = self._tape[start : start + (self._n_run if n_tokens == 1 else 1)]
        begin = clock()
        team.run(tape)
        return clock() - begin
