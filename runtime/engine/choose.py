"""The tokens of several answers are chosen together."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gguf_run.runtime.engine.sequence import Job
from gguf_run.runtime.sampling.many import ManySampler, Row


def choose(many: ManySampler, jobs: Sequence[Job], logits: NDArray[np.float32]) -> list[int | Exception]:
    """Return the next token of each job, or why it has none. logits: f32[len(jobs), n_vocab]."""
    rows, failed = [], dict[int, Exception]()
    for i, job in enumerate(jobs):
        mask = None
        if job.request.constraint is not None:
            try:
                mask = job.request.constraint.allowed()
            except Exception as error:  # the others go on
                failed[i] = error
        rows.append(Row(job.reply.sampler, (), mask))
    chosen = many.sample(rows, logits)
    return [failed.get(i, id) for i, id in enumerate(chosen)] if failed else chosen
