"""The thread that runs the steps of an engine, and how coroutines hear of them: once per step."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.engine.reply import Piece
from gguf_run.runtime.engine.sequence import Job


class Runner:
    """Runs steps while there are jobs; sleeps while there are none."""

    def __init__(self, step: Callable[[], bool], fail: Callable[[Exception], None]) -> None:
        """step: Engine.step. fail: Engine.fail."""
        self._step, self._fail = step, fail
        self._lock = threading.Lock()
        self._listeners: dict[Job, tuple[asyncio.AbstractEventLoop, asyncio.Event]] = {}
        self._has_work, self._ends = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="gguf-run engine", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Tell that there is a new job, or that one is over."""
        self._has_work.set()

    def stop(self) -> None:
        """Wait for the end of the step, and end."""
        self._ends = True
        self.wake()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def listen(self, jobs: Iterable[Job]) -> asyncio.Event:
        """Return an event of the running loop that is set after each step that gave one of the jobs news.

        It is not set for news that came before: look at the jobs first.
        """
        event, loop = asyncio.Event(), asyncio.get_running_loop()
        with self._lock:
            self._listeners |= dict.fromkeys(jobs, (loop, event))
        return event

    def unlisten(self, jobs: Iterable[Job]) -> None:
        """Forget the events of jobs."""
        with self._lock:
            for job in jobs:
                self._listeners.pop(job, None)

    def _run(self) -> None:
        while not self._ends:
            self._has_work.clear()
            try:
                goes_on = self._step()
            except Exception as error:  # a fault of ours, as the errors of steps are caught there
                self._fail(error)
                goes_on = False
            self.deliver()
            if not goes_on:
                self._has_work.wait()

    def deliver(self) -> None:
        """Tell each loop, in one call, which of its coroutines have news."""
        ready: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
        with self._lock:
            for job, (loop, event) in self._listeners.items():
                if job.pieces or job.is_over:
                    ready.setdefault(loop, []).append(event)
        for loop, events in ready.items():
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_wake, events)


def _wake(events: Iterable[asyncio.Event]) -> None:
    for event in events:
        event.set()


async def pieces_of(runner: Runner | None, job: Job) -> AsyncIterator[Piece]:
    """Yield the pieces of an answer. Raises as Sequence.__next__ does."""
    if runner is None:
        raise GgufRunError("`async for` reads an answer of an engine with a thread: call Engine.start first")
    event = runner.listen([job])
    try:
        while True:
            event.clear()
            is_over = job.is_over  # before the pieces: the last one comes before the end
            while job.pieces:
                yield job.pieces.popleft()
            if is_over:
                job.raise_error()
                return
            await event.wait()
    finally:
        runner.unlisten([job])
