"""The thread team: every piece of every op once and in order, on more threads than cores; sleeping and ending."""

import faulthandler
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numba import carray

from gguf_run.kernels_cpu.replay.op import TapeOp, items, n_pieces, n_shrinking, op, shrinking
from gguf_run.kernels_cpu.replay.team import MAX_THREADS, Team
from gguf_run.kernels_cpu.vector.native import atomic_add, i64_at

MODULUS = 1_000_003


@op("pieces n x out done threads")
def mix(args, piece, ith, nth):  # type: ignore[no-untyped-def]
    """out[i] depends on all of x, so that an op that starts too early shows. Counts the runs of each piece."""
    a = carray(args, 1)[0]
    if piece < 0:
        return a.pieces
    x, out = i64_at(a.x, a.n), i64_at(a.out, a.n)
    for i in range(a.n * piece // a.pieces, a.n * (piece + 1) // a.pieces):
        total = i
        for k in range(a.n):
            total = (total * 31 + x[k]) % 1_000_003
        out[i] = total
    atomic_add(a.done + 8 * piece, 1)
    if ith < nth:
        atomic_add(a.threads + 8 * ith, 1)
    return 0


@op("rows table")
def pieces_of(args, piece, ith, nth):  # type: ignore[no-untyped-def]
    """table[n] = 1 for the items of each piece, as n_pieces and items deal them out."""
    a = carray(args, 1)[0]
    if piece < 0:
        return n_pieces(a.rows, 3, nth)
    first, end = items(piece, a.rows, 3, nth)
    for i in range(first, end):
        atomic_add(a.table + 8 * i, 1)
    return 0


def tape_of(*ops: tuple[TapeOp, np.ndarray]) -> np.ndarray:
    return np.array([(op.compiled.address, record.ctypes.data) for op, record in ops], np.int64).reshape(-1, 2)


@op("rows table")
def shrinking_of(args, piece, ith, nth):  # type: ignore[no-untyped-def]
    """table[n] = 1 + its piece, the pieces shrinking."""
    a = carray(args, 1)[0]
    pieces = n_shrinking(a.rows, 3, nth)
    if piece < 0:
        return pieces
    first, end = shrinking(piece, a.rows, pieces)
    for i in range(first, end):
        atomic_add(a.table + 8 * i, 1 + piece)
    return 0


class Chain:
    """A tape of `mix` ops, each of which reads what the one before wrote, with odd numbers of pieces, also none."""

    PIECES = (1, 7, 2, 0, 24, 1, 0, 0, 3, 16, 5, 0)

    def __init__(self, n: int = 24) -> None:
        self.x = np.zeros((len(self.PIECES) + 1, n), np.int64)
        self.done = np.zeros((len(self.PIECES), 24), np.int64)
        self.threads = np.zeros(MAX_THREADS, np.int64)
        self.records, self.last = [], 0
        for i, pieces in enumerate(self.PIECES):
            to = i + 1 if pieces else self.last
            addresses = {"x": self.x[self.last], "out": self.x[to], "done": self.done[i], "threads": self.threads}
            record = mix.bind(pieces=pieces, n=n, **{name: array.ctypes.data for name, array in addresses.items()})
            self.records.append(record)
            self.last = to
        self.tape = tape_of(*[(mix, record) for record in self.records])

    def expected(self) -> np.ndarray:
        x = [int(value) for value in self.x[0]]
        for pieces in self.PIECES:
            if pieces:
                totals = list(range(len(x)))
                for value in x:
                    totals = [(total * 31 + value) % MODULUS for total in totals]
                x = totals
        return np.array(x)

    def check(self, team: Team, steps: int) -> None:
        """The result of a step is the next one's start."""
        before = self.done.sum()
        for _ in range(steps):
            expected = self.expected() if steps < 50 else None
            team.run(self.tape)
            if expected is not None:
                np.testing.assert_array_equal(self.x[self.last], expected)
            self.x[0] = self.x[self.last]
        assert self.done.sum() - before == steps * sum(self.PIECES)

    def check_counts(self, steps: int) -> None:
        """Every piece ran once in each step."""
        for done, pieces in zip(self.done, self.PIECES, strict=True):
            np.testing.assert_array_equal(done[:pieces], steps)
            assert not done[pieces:].any()


def helpers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "_helper" in thread.name}


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A team that waits for ever would keep the whole test run from ending."""
    faulthandler.dump_traceback_later(300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def team_of() -> Iterator[Callable[[int], Team]]:
    teams: list[Team] = []

    def make(n_threads: int) -> Team:
        teams.append(Team(n_threads))
        return teams[-1]

    yield make
    for team in teams:
        team.close()


@pytest.mark.parametrize("n_threads", [1, 2, 3, 4, 8])
def test_every_piece_runs_once_and_in_order(n_threads: int, team_of: Callable[[int], Team]) -> None:
    """Thousands of steps of a dozen ops, on more threads than this machine may have cores."""
    team, chain = team_of(n_threads), Chain()
    chain.check(team, 20)
    alone = Chain()
    alone.x[0] = chain.x[0]
    chain.check(team, 3000)
    alone.check(team_of(1), 3000)
    np.testing.assert_array_equal(chain.x[0], alone.x[0])
    chain.check_counts(3020)
    assert chain.threads[n_threads:].sum() == 0, "ith is below nth"


def test_threads_share_the_work(team_of: Callable[[int], Team]) -> None:
    chain = Chain(n=200)
    team = team_of(2)
    assert wait_for(lambda: chain.check(team, 100) or bool((chain.threads[:2] > 50).all()), 30)


def test_sleeping_helpers_are_called(team_of: Callable[[int], Team]) -> None:
    """The work is done without them too, but not as fast."""
    team, chain = team_of(2), Chain(n=2000)

    def helped_after_sleep() -> bool:
        time.sleep(0.1)
        before = chain.threads[1]
        team.run(chain.tape)
        return bool(chain.threads[1] > before)

    assert wait_for(helped_after_sleep, 30)


def test_steps_between_pauses(team_of: Callable[[int], Team]) -> None:
    """Helpers that sleep, are falling asleep or still spin: each is called where it must be."""
    team, chain = team_of(4), Chain()
    rng = np.random.default_rng(0)
    for pause in rng.choice([0.0, 0.0, 1e-5, 1e-4, 1e-3, 3e-3], 400):
        chain.check(team, 1)
        if pause:
            time.sleep(pause)
    chain.check_counts(400)


def test_tapes_without_work(team_of: Callable[[int], Team]) -> None:
    team, chain = team_of(3), Chain()
    idle = mix.bind(pieces=0, n=24, **dict.fromkeys(("x", "out", "done", "threads"), 0))
    for _ in range(300):
        team.run(np.zeros((0, 2), np.int64))
        team.run(tape_of((mix, idle)))
        team.run(tape_of(*[(mix, idle)] * 5))
        chain.check(team, 1)


def test_a_new_tape_at_each_step(team_of: Callable[[int], Team]) -> None:
    """Memory of a tape that is done may be used again: nobody reads it any more."""
    team, chain = team_of(5), Chain()
    for i in range(500):
        tape = chain.tape.copy()
        start = chain.x[0].copy()
        team.run(tape)
        tape[:] = -1  # an address at which any call would crash
        if i % 50 == 0:
            chain.x[0], result = start, chain.x[chain.last].copy()
            np.testing.assert_array_equal(result, chain.expected())
        chain.x[0] = chain.x[chain.last]
    chain.check_counts(500)


def test_several_teams_at_once(team_of: Callable[[int], Team]) -> None:
    chains = [Chain() for _ in range(4)]
    errors: list[BaseException] = []

    def work(chain: Chain, n_threads: int) -> None:
        try:
            chain.check(team_of(n_threads), 40)
            for _ in range(20):
                chain.check(team_of(n_threads), 5)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(chain, 1 + i)) for i, chain in enumerate(chains)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    for chain in chains:
        chain.check_counts(140)


@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_interrupted_step_runs_completely_or_not_at_all(n_threads: int, team_of: Callable[[int], Team]) -> None:
    """Ctrl-C may come at any moment of run(); the next step must find the team in order."""
    team, chain = team_of(n_threads), Chain()
    rng = np.random.default_rng(0)
    done = []

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for microseconds in rng.uniform(20, 300, 500):
            try:
                signal.setitimer(signal.ITIMER_REAL, microseconds * 1e-6)
                while True:
                    team.run(chain.tape)
            except KeyboardInterrupt:
                done.append(chain.done.copy())
    finally:
        signal.signal(signal.SIGALRM, before)
    for counts in done:
        chain.done = counts
        chain.check_counts(counts[0, 0])
    chain.done = np.zeros(0)
    np.testing.assert_array_equal(chain.x[chain.last], chain.expected())


def test_items_are_dealt_out_completely(team_of: Callable[[int], Team]) -> None:
    for n_threads in (1, 3):
        team = team_of(n_threads)
        for rows in (0, 1, 2, 3, 7, 35, 36, 37, 1000):
            table = np.zeros(max(rows, 1), np.int64)
            record = pieces_of.bind(rows=rows, table=table.ctypes.data)
            team.run(tape_of((pieces_of, record)))
            np.testing.assert_array_equal(table[:rows], 1)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_shrinking_pieces_cover_all_items(n_threads: int, team_of: Callable[[int], Team]) -> None:
    team = team_of(n_threads)
    for rows in (0, 1, 2, 3, 7, 35, 36, 37, 1000, 100_000):
        table = np.zeros(max(rows, 1), np.int64)
        record = shrinking_of.bind(rows=rows, table=table.ctypes.data)
        team.run(tape_of((shrinking_of, record)))
        sizes = np.bincount(table[:rows])[1:]  # each item is in one piece: else the sum of two would break the order
        assert (np.diff(table[:rows]) <= 0).all(), "pieces that are taken sooner stand sooner"
        assert sizes.sum() == rows
        assert (np.diff(sizes) >= -1).all(), "but for rounding, pieces that are taken sooner are larger"
        assert len(sizes) <= 8 * n_threads
        assert not len(sizes) or sizes[0] >= min(rows, 3) - 1


def test_idle_helpers_sleep(team_of: Callable[[int], Team]) -> None:
    team, chain = team_of(4), Chain()
    chain.check(team, 10)
    time.sleep(0.2)  # they spin for a moment
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.03
    chain.check(team, 10)


def test_close_ends_the_threads() -> None:
    before = helpers()
    team, chain = Team(4), Chain()
    new = helpers() - before
    assert len(new) == 3
    chain.check(team, 3)
    team.close()
    assert wait_for(lambda: not helpers() & new)
    team.close()  # again: nothing


def test_close_of_sleeping_and_of_fresh_threads() -> None:
    before = helpers()
    teams = [Team(3) for _ in range(5)]
    time.sleep(0.2)
    teams += [Team(2) for _ in range(5)]
    new = helpers() - before
    assert len(new) == 15
    for team in teams:
        team.close()
    assert wait_for(lambda: not helpers() & new)


def test_collected_team_ends_its_threads() -> None:
    before = helpers()
    team = Team(5)
    Chain().check(team, 2)
    new = helpers() - before
    assert len(new) == 4
    del team
    gc.collect()
    assert wait_for(lambda: not helpers() & new)


@pytest.mark.parametrize("n_threads", [0, -1, MAX_THREADS + 1])
def test_number_of_threads_is_checked(n_threads: int) -> None:
    with pytest.raises(ValueError, match=f"n_threads is {n_threads}; allowed are 1 to {MAX_THREADS}"):
        Team(n_threads)


def test_most_threads(team_of: Callable[[int], Team]) -> None:
    chain = Chain()
    chain.check(team_of(MAX_THREADS), 10)
    chain.check_counts(10)


def test_op_wants_all_its_fields() -> None:
    with pytest.raises(TypeError, match=r"pieces_of: arguments differ from fields: \['rows', 'size'\]"):
        pieces_of.bind(table=0, size=1)
