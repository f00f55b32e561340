"""The sequences of the KV cache, and what was said in them: a text that begins like one of them takes it over."""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from gguf_run.models.pages import PAGE
from gguf_run.runtime.engine.sequence import Cut, Job, n_common

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

    from gguf_run.models.adapter_scales import AdapterScales
    from gguf_run.models.kv_cache import KvCache

_SIMILAR = 16  # tokens that a text shares with a row that it takes over, if another row is empty or older


class Row:
    """A sequence of the cache."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.job: Job | None = None  # whose tokens it holds; None: the row is parked, or empty
        self.left_at = -1  # number of the step before which the last job left it; -1: it is empty
        self.cut = Cut()  # what context shifts have taken out of its tokens


class Rows:
    """All sequences of a cache. A job that ends or is preempted leaves its row parked: tokens and pages stay."""

    def __init__(self, cache: "KvCache", scales: "AdapterScales | None", is_fixed: bool) -> None:
        """scales: of the adapters, for each row. is_fixed: only whole pages are reused."""
        self.cache, self._scales, self._is_fixed = cache, scales, is_fixed
        self.all = [Row(i) for i in range(cache.n_seq)]
        self.n_steps = self.n_preempted = 0
        self.last = 0  # the row that was used last
        # The same prompt gets the same logits, to the last bit. Its last token alone would run through other kernels.
        self.asked: tuple[Sequence[int], Hashable, NDArray[float32]] | None = None  # the last prompt, its root, logits

    def n_left(self, job: Job) -> int:
        """Return how many tokens of a job that has a row must run. 0: its next token can be chosen."""
        return len(job.ids) - self.cache.slots[job.row].n_past

    def is_asked(self, job: Job) -> bool:
        """Return whether the logits after the prompt of a job are known."""
        asked, request = self.asked, job.request
        return asked is not None and not job.n_chosen and asked[1] == request.root and asked[0] == job.ids

    def chunk(self, job: Job, most: int) -> int:
        """Return how many of at most `most` tokens run next. 0: the logits after the last one are known.

        A part of a prompt ends with a page where states are kept: later texts find the states only there.
        """
        cache, slot = self.cache, self.cache.slots[job.row]
        if slot.n_past == cache.n_ctx and self.n_left(job):
            from gguf_run.runtime.engine.shift import make_room  # late: few contexts are ever full

            make_room(cache, job)
        if not self.n_left(job) and not self.is_asked(job):  # interrupted: the logits are lost
            cache.rewind(slot.n_past - 1, job.row)
        n_left, n_tail = self.n_left(job), cache.tail(len(job.ids) - job.n_held)
        n = min(most, n_left - n_tail if n_left > n_tail else n_left, cache.n_ctx - slot.n_past)
        if self._is_fixed:
            return min(n, PAGE - slot.n_past % PAGE)
        n_whole = (slot.n_past + n) // PAGE * PAGE - slot.n_past
        return n_whole if cache.has_states and n_whole > 0 else n

    def place(self, job: Job) -> bool:
        """Give a job a row, with as many of its tokens as are known. Return whether there was one."""
        free = [row for row in self.all if row.job is None]
        if not free:
            return False
        root, parts = job.request.root, not self._is_fixed
        n_known = 0
        if self.cache.index is not None:
            from gguf_run.models.kv_find import adopt, known  # late: a first text finds nothing

            n_known = known(self.cache, job.ids, root, parts=parts)
        oldest, best = min(free, key=lambda row: row.left_at), max(free, key=lambda row: self._n_shared(row, job))
        n_shared = self._n_shared(best, job)
        row, n = oldest, -1
        if n_shared >= max(1, n_known) and (best is oldest or n_shared >= min(_SIMILAR, len(job.ids) - 1)):
            row, n = best, self._resume(best, job, n_shared)
        if n < n_known:
            if n_known:
                adopt(self.cache, row.number, job.ids, root, parts=parts)
            else:
                self.cache.clear(row.number, root)
            n = n_known
        row.job, job.row, self.last = job, row.number, row.number
        row.cut, job.n_held = Cut(), n
        if self._scales is not None:
            self._scales.set(row.number, job.request.adapters)
        job.n_reused = n + len(job.cut.ids) if job.n_reused < 0 else job.n_reused
        return True

    def _n_shared(self, row: Row, job: Job) -> int:
        """Return how many first tokens of a row are those of a job."""
        slot = self.cache.slots[row.number]
        if slot.root != job.request.root:
            return 0
        if row.cut.ids or job.cut.ids:
            from gguf_run.runtime.engine.shift import n_shared  # late: few contexts are ever full

            return n_shared(row.cut, slot.ids, job)
        return n_common(slot.ids, job.ids)

    def _resume(self, row: Row, job: Job, n: int) -> int:
        """Rewind a row to the n tokens that it shares with a job, or to fewer. Return how many are left."""
        if row.cut.ids and not job.cut.ids:
            from gguf_run.runtime.engine.shift import take_over

            take_over(row.cut, self.cache.slots[row.number].ids, job, n)
        if n == len(job.ids) and not self.is_asked(job):
            n -= 1  # the last token runs in any case, because its logits are wanted
        if self._is_fixed and n < len(job.ids):
            n = n // PAGE * PAGE
        return self.cache.rewind(n, row.number)

    def park(self, job: Job) -> Row | None:
        """Take a job from its row, and return the row. What it holds stays."""
        if job.row < 0:
            return None
        row, job.row = self.all[job.row], -1
        row.job, row.left_at, row.cut = None, self.n_steps, job.cut
        return row

    def preempt(self, job: Job) -> None:
        """Take the row and the pages from a job that goes on later. What is found of them then is not run again."""
        self.n_preempted += 1
        job.n_preempted += 1
        self.clear(self.park(job))

    def clear(self, row: Row | None) -> None:
        """Empty a row that no job has. Its pages stay findable until they are needed."""
        if row is not None:
            self.cache.clear(row.number)
            row.left_at, row.cut = -1, Cut()

    def clear_oldest(self) -> bool:
        """Empty the row that has been parked longest. Return whether there was one."""
        parked = [row for row in self.all if row.job is None and row.left_at >= 0]
        if parked:
            self.clear(min(parked, key=lambda row: row.left_at))
        return bool(parked)

    def vacant(self, ids: Sequence[int] = ()) -> Row:
        """Return a row without a job: the one that begins like `ids`, or the one that was left first.

        If there is none, the job whose reader has been away longest loses its row.
        """
        if all(row.job is not None for row in self.all):
            self.park(min((row.job for row in self.all if row.job is not None), key=lambda job: job.read_at))
        free = [row for row in self.all if row.job is None]
        return max(free, key=lambda row: (n_common(self.cache.slots[row.number].ids, ids), -row.left_at))

    def forget(self) -> None:
        """Empty all rows that no job has. Nothing that was computed is found again."""
        from gguf_run.models.kv_moves import forget

        while self.clear_oldest():
            pass
        forget(self.cache)
        self.asked = None
