"""Guesses the next tokens of answers with a second, smaller model of the same vocabulary."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gguf_run.models.kv_find import adopt, known
from gguf_run.runtime.engine.sequence import Job, n_common

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

    from gguf_run.models.decoder import Decoder

_PART = 128  # tokens of a text that run in a step, until all of them have run


class DraftModel:
    """A decoder whose cache has a sequence for each of the engine's, with the same tokens."""

    def __init__(self, decoder: "Decoder") -> None:
        """decoder: has the n_ctx and the n_seq of the engine's."""
        self._decoder = decoder

    def guess(self, wanted: Mapping[Job, int]) -> dict[Job, list[int]]:
        """Return the wanted number of tokens for each job, or none if its text has not run yet: a part of it runs."""
        decoder, found = self._decoder, dict[Job, list[int]]()
        slots, n_room = decoder.cache.slots, decoder.n_batch
        todo = dict[Job, list[int]]()
        for job in wanted:
            self._take_back(job)
            n_past = slots[job.row].n_past
            part = job.ids[n_past : n_past + min(_PART, n_room)]
            n_room -= len(part)
            if part:
                todo[job] = part
                if n_past + len(part) == len(job.ids):
                    found[job] = []
        while todo:
            rows = {job.row: int(job in found) for job in todo}
            logits = decoder.step({job.row: ids for job, ids in todo.items()}, rows)
            going = [job for job in todo if job in found]
            for job, row in zip(going, logits, strict=True):
                found[job].append(_chosen(job, row, found[job]))
            todo = {job: found[job][-1:] for job in going if len(found[job]) < wanted[job]}
        return found

    def _take_back(self, job: Job) -> None:
        """Let the sequence of a job hold the longest known start of its text, without the last token."""
        cache, row = self._decoder.cache, job.row
        n = min(n_common(cache.slots[row].ids, job.ids), len(job.ids) - 1)
        if known(cache, job.ids) > n:
            adopt(cache, row, job.ids)
        else:
            cache.rewind(n, row)


def _chosen(job: Job, logits: "NDArray[float32]", before: list[int]) -> int:
    """Return the token that the sampler of a job chooses with the same random number: a good model agrees often."""
    sampler = job.reply.sampler
    params = sampler.params
    if params.logits_processors or params.logprobs is not None or sampler.selector or job.request.constraint:
        return int(logits.argmax())
    return int(sampler.sample(logits, None, before))
