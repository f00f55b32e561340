"""Answers for whose next token the greatest logits are enough. The decoder finds these on a GPU."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from gguf_run.models.backend import Results, Top
from gguf_run.runtime.engine.sequence import Job
from gguf_run.runtime.sampling.candidates import Candidates
from gguf_run.runtime.sampling.many import ManySampler, Row


def tops_of(jobs: Iterable[Job], guesses: Mapping[Job, Sequence[int]], most: int) -> dict[Job, Top]:
    """Return what is wanted of the logits of these jobs, for those that need no more than the `most` greatest.

    All logits are kept of a first token (Rows.asked), and what a constraint says of guessed tokens is not known yet.
    """
    found = dict[Job, Top]()
    for job in jobs:
        n, constraint = job.reply.sampler.n_top, job.request.constraint
        if 0 < n <= most and job.n_chosen and job not in guesses:
            with suppress(Exception):  # the constraint's: it comes again when the token is chosen from all logits
                found[job] = Top(n, None if constraint is None else constraint.allowed())
    return found


def choose_top(many: ManySampler | None, tops: Mapping[Job, Top], found: Results) -> list[tuple[Job, int | Exception]]:
    """Choose the next token of each job, or tell why it has none. many: samples them together; None: one by one."""
    if many is not None:
        rows = [Row(job.reply.sampler, (), top.mask) for job, top in tops.items()]
        return list(zip(tops, many.sample_top(rows, found.greatest, found.columns), strict=True))
    chosen: list[tuple[Job, int | Exception]] = []
    for (job, top), logits, ids in zip(tops.items(), found.greatest, found.columns, strict=True):
        try:
            chosen.append((job, job.reply.sampler.sample(Candidates(logits, ids, True), top.mask)))
        except Exception as error:  # the others go on
            chosen.append((job, error))
    return chosen
