"""The tokens of several answers are chosen together."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gguf_run.models.backend import Top
from gguf_run.runtime.engine.sequence import Job
from gguf_run.runtime.sampling.many import ManySampler, Row


def choose(
    many: ManySampler,
    jobs: Sequence[Job],
    logits: NDArray[np.float32],
    columns: NDArray[np.intp] | None,
    tops: Mapping[Job, Top],
) -> list[int | Exception]:
    """Return the next token of each job, or why it has none. logits, columns, tops: see Engine._choose."""
    rows, failed = [], dict[int, Exception]()
    for i, job in enumerate(jobs):
        mask = tops[job].mask if job in tops else None
        if columns is None and job.request.constraint is not None:
            try:
                mask = job.request.constraint.allowed()
            except Exception as error:  # the others go on
                failed[i] = error
        rows.append(Row(job.reply.sampler, (), mask))
    chosen = many.sample(rows, logits) if columns is None else many.sample_top(rows, logits, columns)
    return [failed.get(i, id) for i, id in enumerate(chosen)] if failed else chosen
