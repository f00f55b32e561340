"""Several prompts answered together."""

from collections.abc import Sequence

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.engine.check import check
from gguf_run.runtime.engine.engine import Engine
from gguf_run.runtime.engine.reply import Answer, Request


class Batch:
    """The answers to some requests. Times and counts are those of all answers, with the names of Stats."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        """Answer all requests. GgufRunError for none; others as check.py: then nothing has run."""
        if not requests:
            raise GgufRunError("a batch of 0 prompts: give one at least")
        for i, request in enumerate(requests):
            check(request, engine.n_ctx, engine.decoder.adapters, f"prompt {i}")
        start = engine.clock()
        self.answers: list[Answer] = []  # in the order of the requests
        self.n_prompt = self.n_reused = self.n_decoded = self.n_guessed = self.n_right = 0
        self.prefill_s = 0.0  # until all have their first token
        self.finish, self.seed = "", 0
        for first in range(0, len(requests), engine.max_queue):
            sequences = [engine.add(request) for request in requests[first : first + engine.max_queue]]
            for sequence in sequences:
                sequence.job.n_readers += 1  # all run, while one of them is read
            for job, answer in [(sequence.job, sequence.answer()) for sequence in sequences]:
                self.answers.append(answer)
                self.n_prompt += job.n_prompt
                self.n_reused += job.n_reused
                self.n_guessed += job.n_guessed
                self.n_right += job.n_right
                self.n_decoded += max(0, answer.n_decoded - 1)
                self.prefill_s = max(self.prefill_s, job.first_at - start)
            self.seed = self.answers[0].seed
        self.decode_s = engine.clock() - start - self.prefill_s
