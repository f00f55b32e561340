"""Full contexts that go on: half of the tokens behind the first ones are taken out, as llama.cpp's context shift does.

The ids that are taken out are remembered: a conversation that is sent again from its beginning is recognized.
"""

from collections.abc import Sequence

from gguf_run.models.kv_cache import GROUP, KvCache
from gguf_run.models.kv_moves import shift
from gguf_run.models.pages import CacheFullError
from gguf_run.runtime.engine.check import kept
from gguf_run.runtime.engine.sequence import Cut, Job, n_common


def make_room(cache: KvCache, job: Job) -> None:
    """Take half of the tokens behind the kept ones out. What was kept the first time is kept later, too.

    Layers with a window may have lost tokens that are within it now. Then the cache holds none, and all run again.
    """
    start = job.cut.at if job.cut.ids else kept(job.request.n_keep)
    n_discard = max(GROUP, (cache.n_ctx - start) // 2 // GROUP * GROUP)
    job.cut = Cut(start, (*job.cut.ids, *job.ids[start : start + n_discard]))
    del job.ids[start : start + n_discard]
    try:
        shift(cache, start, n_discard, job.row)
    except CacheFullError:  # another row shares its pages, and there are none for a copy
        cache.clear(job.row, job.request.root)


def n_shared(cut: Cut, held: Sequence[int], job: Job) -> int:
    """Return how many first tokens of a row are those of a job, if one of them has been shifted.

    cut: what is not in the row. held: the ids that are in it.
    """
    if job.cut.ids:
        n = n_common(held, job.ids)
        return n if cut == job.cut else min([n, job.cut.at, *([cut.at] if cut.ids else [])])
    n = n_common([*held[: cut.at], *cut.ids, *held[cut.at :]], job.ids) - len(cut.ids)
    return n if n > cut.at and job.request.context_shift else min(n + len(cut.ids), cut.at)


def take_over(cut: Cut, held: Sequence[int], job: Job, n: int) -> None:
    """Let a job go on in a row that has been shifted, with the first n of the ids that it holds."""
    if n > cut.at:
        job.ids[:] = [*held[:n], *job.ids[n + len(cut.ids) :]]
        job.cut = cut
