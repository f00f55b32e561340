"""Who runs in the next step, and how many tokens: answers first, then parts of prompts while time and pages last."""

from collections.abc import Callable, Iterator, Sequence

from gguf_run.models.pages import PAGE
from gguf_run.runtime.engine.cost import CostModel
from gguf_run.runtime.engine.rows import Rows
from gguf_run.runtime.engine.sequence import Job, n_common

SHORT = 8  # tokens that run as an answer's next token does: the first
_MIN_CHUNK = 16  # tokens of a prompt that run together at least
_MOST_PARTIAL = 2  # prompts of which parts run
_LOOKED_AT = 8  # waiting jobs that are looked at in a step
_MOST_RESERVED = 4096  # tokens of an answer for which pages are kept
_MOST_SHARE, _LEAST_SHARE, _SHARE_STEPS = 0.7, 0.14, 600  # of its tokens, at first and after so many steps
_AGE = 10.0  # seconds of waiting that count as much as a priority of 1


class Scheduler:
    """Plans steps. It gives rows to waiting jobs and takes them from running ones."""

    def __init__(self, rows: Rows, n_batch: int, max_step_ms: float, clock: Callable[[], float]) -> None:
        self.cost = CostModel()
        self.share = _MOST_SHARE  # of the tokens that answers may have, for which pages are kept
        self._rows, self._n_batch, self._max_step_ms, self._clock = rows, n_batch, max_step_ms, clock
        self._planned = 0, 0, 0.0  # the last step, for the cost model

    def measured(self, ms: float, n_guessed: int) -> None:
        """Learn how long the planned step took, if one was planned. Answers alone teach little: one step of four.

        n_guessed: tokens that ran besides.
        """
        n_answers, n_prompt, n_read = self._planned
        if n_prompt or (n_answers and self._rows.n_steps % 4 == 0):
            self.cost.measure(n_answers + n_guessed, n_prompt, n_read, ms)
        self._planned = 0, 0, 0.0

    def plan(self, wanted: Sequence[Job], jobs: Sequence[Job]) -> dict[Job, int]:
        """Return how many tokens of which jobs run.

        wanted: jobs that may run, in the order in which they came. jobs: all that have no end yet.
        """
        self.share = max(_LEAST_SHARE, self.share - (_MOST_SHARE - _LEAST_SHARE) / _SHARE_STEPS)
        rows, slots, n_room = self._rows, self._rows.cache.slots, self._n_batch
        counts, prompts, waiting = dict[Job, int](), list[Job](), list[Job]()
        for job in wanted:
            if job.row < 0:
                waiting.append(job)
                continue
            n_past = slots[job.row].n_past
            n = len(job.ids) - n_past
            if n > SHORT:
                prompts.append(job)
            elif n_room:
                counts[job] = n = 1 if n == 1 and n_past < rows.cache.n_ctx else rows.chunk(job, min(SHORT, n_room))
                n_room -= n
        was_full = self._make_pages(counts, jobs)
        self._note(counts)
        if prompts or (waiting and not was_full):
            self._add_prompts(counts, prompts, [] if was_full else waiting, jobs, n_room)
            self._note(counts)
        return counts

    def _add_prompts(
        self, counts: dict[Job, int], prompts: list[Job], waiting: list[Job], jobs: Sequence[Job], n_room: int
    ) -> None:
        """Add parts of prompts to a step, as long as its time, its pages and its n_room tokens last."""
        rows = self._rows
        is_timed = any(job.n_chosen for job in counts)
        ms = self._max_step_ms - self.cost.predict(*self._planned)
        n_prompt = n_partial = 0
        for job in self._prompts(prompts, waiting, jobs):
            n_past, most = rows.cache.slots[job.row].n_past, n_room
            if is_timed:
                fitting = self.cost.chunk(ms, n_past)
                most = min(most, fitting if n_prompt else max(_MIN_CHUNK, fitting))
            if n_room < 1 or (n_prompt and most < _MIN_CHUNK and most < rows.n_left(job)):
                break
            n = counts[job] = rows.chunk(job, most)
            if self._make_pages(counts, jobs):
                break
            n_room -= n
            n_prompt += n
            ms -= self.cost.predict(0, n, n * (n_past + n / 2)) - self.cost.predict(0, 0, 0)
            n_partial += rows.n_left(job) > n
            if n_partial == _MOST_PARTIAL:
                break

    def _note(self, counts: dict[Job, int]) -> None:
        """Note what the cost model needs to know of a step."""
        n_answers = n_prompt = 0
        n_read = 0.0
        for job, n in counts.items():
            n_read += n * (len(job.ids) if n == 1 else self._rows.cache.slots[job.row].n_past + n / 2)
            if n > SHORT:
                n_prompt += n
            else:
                n_answers += n
        self._planned = n_answers, n_prompt, n_read

    def _prompts(self, running: Sequence[Job], waiting: Sequence[Job], jobs: Sequence[Job]) -> Iterator[Job]:
        """Yield the jobs whose prompts run: first those that have a row. The others get one when it is their turn."""
        order = sorted(running, key=self._order)
        yield from order
        if not (any(row.job is None for row in self._rows.all) or self._idle(jobs)):
            return
        for job in sorted(waiting, key=self._order)[:_LOOKED_AT]:
            if not self._is_behind(job, order):
                if not self._admit(job, jobs):
                    return
                order.append(job)
                yield job

    def _order(self, job: Job) -> tuple[int, int]:
        """Return what sorts jobs: greater priorities first, then those that came first. Waiting raises a priority."""
        return -job.request.priority - int((self._clock() - job.arrived) / _AGE), job.number

    def _is_behind(self, job: Job, running: Sequence[Job]) -> bool:
        """Return whether pages that a job needs are being computed by another one."""
        for other in running:
            if other.number not in job.shared:
                same = other.request.root == job.request.root
                job.shared[other.number] = n_common(job.ids, other.ids) // PAGE * PAGE if same else 0
            if self._rows.cache.slots[other.row].n_past < job.shared[other.number]:
                return True
        return False

    def _admit(self, job: Job, jobs: Sequence[Job]) -> bool:
        """Give a waiting job a row, if there are pages for it. Return whether it has got one.

        The running jobs keep pages for a part of what they may still say, and one page each.
        """
        rows, pool = self._rows, self._rows.cache.groups[0]
        is_first = not any(other.row >= 0 and other.read_at == rows.n_steps for other in jobs)
        if not is_first and len(pool.free) < job.n_wanted and not any(row.left_at >= 0 for row in rows.all):
            return False
        if not rows.place(job):
            if not (idle := self._idle(jobs)):
                return False
            rows.park(min(idle, key=lambda job: job.read_at))  # its reader has been away longest
            rows.place(job)
        kept = sum(self._n_pages(other) + 1 for other in jobs if other.row >= 0 and other is not job)
        while len(pool.free) < kept + self._n_pages(job):
            if not rows.clear_oldest():
                if is_first:
                    break
                job.n_wanted = kept + self._n_pages(job)
                rows.clear(rows.park(job))
                return False
        job.shared.clear()
        return True

    def _n_pages(self, job: Job) -> int:
        """Return how many more pages a job is expected to need."""
        request, cache = job.request, self._rows.cache
        most = cache.n_ctx - job.n_prompt if request.max_tokens is None else request.max_tokens
        n_more = int(self.share * min(max(0, most - job.n_chosen), _MOST_RESERVED))
        n_past = cache.slots[job.row].n_past
        return -(-min(len(job.ids) + n_more, cache.n_ctx) // PAGE) - -(-n_past // PAGE)

    def _idle(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs with rows that nobody waits for."""
        return [job for job in jobs if job.row >= 0 and job.read_at < self._rows.n_steps]

    def _make_pages(self, counts: dict[Job, int], jobs: Sequence[Job]) -> bool:
        """Make pages free for a step; jobs that lose theirs leave `counts`. Return whether any has lost its pages."""
        rows, was_full = self._rows, False
        while not rows.cache.room({job.row: n for job, n in counts.items() if n}):
            if rows.clear_oldest():
                continue
            was_full = True
            running = [job for job in jobs if job.row >= 0]
            job = self._victim(running)
            if len(running) == 1:  # it has all pages
                job.push(job.reply.end("context"))
            self.share = _MOST_SHARE
            rows.preempt(job)
            counts.pop(job, None)
        return was_full

    def _victim(self, running: Sequence[Job]) -> Job:
        """Return the job that gives its pages up: nobody waits for it, or it is the last in order."""
        if idle := self._idle(running):
            return min(idle, key=lambda job: (job.read_at, -job.number))
        return max(running, key=self._order)
