"""The engine: requests come in, each step runs tokens of some of them, pieces of answers go out. Start with `step`."""

import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import TYPE_CHECKING, NoReturn, cast

from gguf_run.formats.errors import GgufRunError
from gguf_run.models.pages import PAGE
from gguf_run.runtime.engine.reply import Piece, Reply, Request
from gguf_run.runtime.engine.rows import Rows
from gguf_run.runtime.engine.sequence import Job, Sequence

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

    from gguf_run.models.backend import Top
    from gguf_run.models.decoder import Decoder
    from gguf_run.runtime.engine.runner import Runner
    from gguf_run.runtime.engine.scheduler import Scheduler
    from gguf_run.runtime.engine.speculation import Speculation
    from gguf_run.runtime.sampling.many import ManySampler


class Closed:
    """Takes the place of a decoder that has been freed: any use raises GgufRunError."""

    def __getattr__(self, name: str) -> NoReturn:
        raise GgufRunError("the model is closed: load it again, or stay within its `with`")


class Engine:
    """Runs requests together. Threads may share it: one of them computes at a time.

    Without `start`, whoever reads an answer runs the steps, for all answers that somebody waits for. An answer that
    nobody reads costs nothing, and its row of the cache goes to others if they need it: then what the cache has lost
    of it is computed again.
    """

    def __init__(
        self,
        decoder: "Decoder",
        reply_of: Callable[[Request], Reply],
        *,
        max_step_ms: float = 100.0,
        max_queue: int = 512,
        deterministic: bool = False,
        many: "Callable[[], ManySampler] | None" = None,
        speculation: "Speculation | None" = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Nothing runs yet.

        reply_of: makes the reply to a request, with its sampler.
        max_step_ms: milliseconds that a step takes at most while an answer is being made.
        max_queue: requests that may wait for their first step.
        deterministic: an answer has the same bits whatever else runs and whatever the cache holds.
        many: makes what samples several rows together; None: they are sampled one after the other.
        speculation: guesses tokens, so that a step may run several of an answer.
        """
        self.decoder, self.max_queue, self.clock = decoder, max_queue, clock
        self.max_step_ms, self.deterministic = max_step_ms, deterministic
        self.jobs: list[Job] = []  # that have no end yet, in the order in which they came
        scales = None if decoder.adapters is None else decoder.adapters.scales
        self.rows = Rows(decoder.cache, scales, deterministic)
        self.n_failed = 0  # steps in a row that raised an error
        self.scoring: threading.Thread | None = None  # reads logits, and lets nobody else compute
        self.changed = threading.Condition()  # tells that a step has ended
        self.runner: Runner | None = None  # the thread that runs all steps; None: the readers do
        self._reply_of, self._many, self._speculation = reply_of, many, speculation
        self._chooser: ManySampler | None = None  # made when two rows are sampled at once
        self._new: deque[Job] = deque()
        self._numbers = count(1)  # of jobs: threads may add them together
        self._threads: list[threading.Thread] = []  # the one that computes, and those that wait to compute
        self._scheduler: Scheduler | None = None  # made when two jobs run at once

    @property
    def healthy(self) -> bool:
        """Whether one of the last two steps has succeeded."""
        return self.n_failed < 2

    @property
    def n_ctx(self) -> int:
        """The most tokens of a prompt: positions of the context, and of all pages of the cache."""
        return min(self.decoder.n_ctx, PAGE * self.decoder.cache.tables[0].n_pages)

    @property
    def n_waiting(self) -> int:
        """Requests that wait for their first step."""
        return len(self._new) + sum(job.n_reused < 0 for job in self.jobs)

    def add(self, request: Request) -> Sequence:
        """Take a request; return its answer, which nothing has computed yet.

        Raises ContextError, QueueFullError and others: see check.py.
        """
        n_waiting = self.n_waiting
        fits = 0 < len(request.ids) <= self.n_ctx and (request.max_tokens is None or request.max_tokens > 0)
        if not fits or request.context_shift or request.adapters or n_waiting >= self.max_queue:
            from gguf_run.runtime.engine.check import QueueFullError, check  # late: few are refused

            check(request, self.n_ctx, self.decoder.adapters)
            if n_waiting >= self.max_queue:
                raise QueueFullError(f"{n_waiting} requests wait, max_queue is {self.max_queue}: try again later")
        job = Job(request, self._reply_of(request), next(self._numbers), self.clock())
        self._new.append(job)
        if self.runner is not None:
            self.runner.wake()
        return Sequence(self, job)

    def cancel(self, sequence: Sequence) -> None:
        """End an answer here: its readers get no more pieces. Twice, or at its end: nothing happens."""
        sequence.job.is_over = True
        with self.changed:
            self.changed.notify_all()
        if self.runner is not None:
            self.runner.wake()

    def fail(self, error: Exception) -> None:
        """End all answers with an error, and count as unhealthy."""
        self.n_failed = 2
        for job in [*self.jobs, *self._new]:
            job.push(error)

    def start(self) -> None:
        """Let a thread of its own run all requests, until `close`. Twice: nothing happens."""
        if self.runner is None:
            if self._many is not None:
                self._chooser = self._chooser or self._many()
            from gguf_run.runtime.engine.runner import Runner  # late: a prompt needs no thread

            self.runner = Runner(self.step, self.fail)

    def close(self, free: Callable[[], None] = lambda: None) -> None:
        """End all answers with an error, and drop the decoder. free: called when nothing is computed any more."""
        if self.runner is not None:
            self.runner.stop()
        # An error may have left logits of this thread half read: see scores.py.
        with nullcontext() if self.scoring is threading.current_thread() else self.working():
            free()
            self.decoder = cast("Decoder", Closed())
            self.fail(GgufRunError("the model is closed: this answer cannot go on"))
            if self.runner is not None:
                self.runner.deliver()
            self.jobs, self.rows, self._scheduler = [], cast("Rows", self.decoder), None
            self._new.clear()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Wait until this thread may compute; it alone does so within the block. The first that came is the first."""
        self._refuse_nested()
        thread = threading.current_thread()
        self._threads.append(thread)
        try:
            with self.changed:
                while self._threads[0] is not thread:
                    self.changed.wait()
            yield
        finally:
            with self.changed:
                self._threads.remove(thread)
                self.changed.notify_all()

    def read(self, job: Job) -> Piece | None:
        """Return the next piece of an answer; None: it is at its end. Run steps until it is there.

        Raises the error that has ended the answer, once.
        """
        self._refuse_nested()
        job.n_readers += 1
        try:
            while True:
                with self.changed:
                    while not job.pieces and not job.is_over and (self._threads or self.runner):
                        self.changed.wait()
                is_over = job.is_over  # before the pieces: the last one comes before the end
                if job.pieces:
                    job.is_eager = True
                    return job.pieces.popleft()
                if is_over:
                    job.raise_error()
                    return None
                with self.working():
                    if not job.pieces and not job.is_over:
                        self._step(lambda job: job.n_readers > 0 or job.is_eager)
        finally:
            job.n_readers -= 1

    def news(self, job: Job) -> AsyncIterator[Piece]:
        """Yield the pieces of an answer, as `read` returns them, in a coroutine."""
        from gguf_run.runtime.engine.runner import pieces_of

        return pieces_of(self.runner, job)

    def step(self) -> bool:
        """Run one step of all answers. Return whether any of them goes on."""
        with self.working():
            self._step(lambda job: True)
        return bool(self.jobs or self._new)

    def _refuse_nested(self) -> None:
        if self._threads[:1] == [threading.current_thread()]:
            raise GgufRunError(
                "a logits processor, or what it calls, uses the model that waits for it: only its tokenizer may be used"
            )

    def _step(self, is_wanted: Callable[[Job], bool]) -> None:
        start, rows, speculation = self.clock(), self.rows, self._speculation
        rows.n_steps += 1
        if speculation is not None:
            speculation.settle(rows)  # the last step may have been interrupted
        while self._new:
            self.jobs.append(self._new.popleft())
        wanted = [job for job in self._living() if is_wanted(job)]
        for job in wanted:
            job.read_at, job.is_eager = rows.n_steps, False
        counts: Mapping[Job, int] = {}
        chosen: list[tuple[Job, int | Exception]] = []
        try:
            counts = self._plan(wanted)
            if speculation is not None:
                speculation.plan(counts, rows, self.decoder)
            chosen = self._run(counts)
            self.n_failed = 0
        except Exception as error:
            self.n_failed += 1
            chosen = [(job, error) for job in counts or wanted]
            for job, _ in chosen:
                rows.clear(rows.park(job))
        texts = [(job, job.take(id, rows.cache.n_ctx) if isinstance(id, int) else id) for job, id in chosen]
        if speculation is not None and speculation.guesses:
            texts = speculation.verify(texts, self._choose, rows)
        end = self.clock()
        for job in counts:
            job.count(start, end)
        if self._scheduler is not None:
            self._scheduler.measured(1000 * (end - start), speculation.n if speculation else 0)
        if speculation is not None:
            speculation.measured(1000 * (end - start))
        for job, text in texts:  # last: readers are on their way with them
            job.push(text)
        self._living()

    def _living(self) -> list[Job]:
        """Return the jobs that go on. Those that are over leave their rows."""
        over = [job for job in self.jobs if job.is_over]
        for job in over:
            self.rows.park(job)
        self.jobs = [job for job in self.jobs if not job.is_over] if over else self.jobs
        return self.jobs

    def _plan(self, wanted: list[Job]) -> Mapping[Job, int]:
        """Return how many tokens of which jobs run next. 0: the logits after the last one are known."""
        if len(self.jobs) > 1 or self.runner is not None:
            if self._scheduler is None:
                from gguf_run.runtime.engine.scheduler import Scheduler  # late: a prompt is alone

                n_batch = self.decoder.n_batch
                self._scheduler = Scheduler(self.rows, n_batch, self.max_step_ms, self.clock)
            return self._scheduler.plan(wanted, self.jobs)
        for job in wanted:
            if job.row < 0:
                self.rows.place(job)
            n = self.rows.chunk(job, self.decoder.n_batch)
            while n and not self.rows.cache.room({job.row: n}):
                if not self.rows.clear_oldest():
                    job.push(job.reply.end("context"))
                    return {}
            return {job: n}
        return {}

    def _run(self, counts: Mapping[Job, int]) -> list[tuple[Job, int | Exception]]:
        """Run tokens. Return the jobs that have got a token, with its id or the reason why there is none."""
        rows = self.rows
        batch: dict[int, list[int]] = {}
        n_rows: dict[int, int] = {}  # whose logits are wanted: those after the last known token and the guessed ones
        ready: list[Job] = []
        chosen: list[tuple[Job, int | Exception]] = []
        guesses: Mapping[Job, list[int]] = {} if self._speculation is None else self._speculation.guesses
        for job, n in counts.items():
            if n:
                end, guess = rows.cache.slots[job.row].n_past + n, guesses.get(job, [])
                batch[job.row], n_rows[job.row] = job.ids[end - n : end] + guess, len(guess)
                if end == len(job.ids):
                    n_rows[job.row] += 1
                    ready.append(job)
            elif rows.asked is not None:
                chosen.append((job, _sampled(job, rows.asked[2])))
        if not batch:
            return chosen
        tops: Mapping[Job, Top] = {}
        if self.decoder.n_top and not self.deterministic:
            from gguf_run.runtime.engine.tops import choose_top, tops_of  # late: for a GPU only

            tops = tops_of(ready, guesses, self.decoder.n_top)
        wanted = [tops.get(job) for job in ready for _ in range(n_rows[job.row])] if tops else []
        found = self.decoder.top(batch, n_rows, wanted)
        if tops:
            chosen += choose_top(self._together(len(tops)), tops, found)
            ready = [job for job in ready if job not in tops]
        logits = found.values
        if guesses and self._speculation is not None:
            logits = self._speculation.first_rows(ready, logits)
        for i, job in enumerate(ready):
            if not (job.n_chosen or job.cut.ids or self.deterministic):
                rows.asked = list(job.request.ids), job.request.root, logits[i].copy()
        return chosen + self._choose(ready, logits) if ready else chosen

    def _together(self, n: int) -> "ManySampler | None":
        """Return what samples n rows together; None: they are sampled one after the other."""
        if self._many is None or not (n > 1 or self.deterministic):
            return None
        self._chooser = self._chooser or self._many()
        return self._chooser

    def _choose(self, jobs: list[Job], logits: "NDArray[float32]") -> list[tuple[Job, int | Exception]]:
        """Choose the next token of each job, or tell why it has none. logits: f32[len(jobs), n_vocab]."""
        if many := self._together(len(jobs)):
            from gguf_run.runtime.engine.choose import choose  # late: a prompt is alone

            return list(zip(jobs, choose(many, jobs, logits), strict=True))
        return [(job, _sampled(job, logits[i])) for i, job in enumerate(jobs)]


def _sampled(job: Job, logits: "NDArray[float32]") -> int | Exception:
    """Return the next token of a job, or why it has none."""
    try:
        constraint = job.request.constraint
        return job.reply.sampler.sample(logits, None if constraint is None else constraint.allowed())
    except Exception as error:  # the others go on
        return error
