"""The thread that runs the steps of an engine, and how coroutines hear of them: once per step."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.engine.reply import Piece
from gguf_run.runtime.engine.sequence import Job

Future = asyncio.Future[None]


class Runner:
    """Runs steps while there are jobs; sleeps while there are none."""

    def __init__(self, step: Callable[[], bool], fail: Callable[[Exception], None]) -> None:
        """step: Engine.step. fail: Engine.fail."""
        self._step, self._fail = step, fail
        self._lock = threading.Lock()
        self._readers: list[tuple[Job, Future]] = []  # coroutines that wait for news of a job
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

    def news(self, job: Job) -> Future:
        """Return a future of the running loop, which is done as soon as a job has a piece or is over."""
        future = asyncio.get_running_loop().create_future()
        with self._lock:
            self._readers.append((job, future))
        self.wake()  # the news may have come just before
        return future

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
        with self._lock:
            ready = [(job, future) for job, future in self._readers if job.pieces or job.is_over]
            self._readers = [pair for pair in self._readers if pair not in ready] if ready else self._readers
        loops: dict[asyncio.AbstractEventLoop, list[Future]] = {}
        for _, future in ready:
            loops.setdefault(future.get_loop(), []).append(future)
        for loop, futures in loops.items():
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_wake, futures)


def _wake(futures: Iterable[Future]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


async def pieces_of(runner: Runner | None, job: Job) -> AsyncIterator[Piece]:
    """Yield the pieces of an answer. Raises as Sequence.__next__ does."""
    while True:
        is_over = job.is_over  # before the pieces: the last one comes before the end
        while job.pieces:
            yield job.pieces.popleft()
        if is_over:
            job.raise_error()
            return
        if runner is None:
            raise GgufRunError("`async for` reads an answer of an engine with a thread: call Engine.start first")
        await runner.news(job)
