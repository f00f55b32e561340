"""Several prompts answered together. Their common start is computed once; then one step decodes a token of each."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.models.kv_moves import copy_prefix
from gguf_run.runtime.engine.context import Context, check_prompt, n_common
from gguf_run.runtime.engine.reply import Answer, Reply, ReplyParams

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray


class Batch:
    """Runs several replies together. Reply i has sequence i of the KV cache; a finished reply leaves the batch.

    Times and counts are sums over all replies, with the names of Generation.
    """

    def __init__(self, context: Context, replies: Sequence[Reply]) -> None:
        """GgufRunError for more replies than the cache has sequences; ContextError for a prompt that does not fit."""
        decoder = context.decoder
        if not 1 <= len(replies) <= decoder.cache.n_seq:
            raise GgufRunError(
                f"a batch of {len(replies)} prompts: the model was loaded for 1 to {decoder.cache.n_seq}; load it "
                "with a larger n_seq or give it fewer at a time"
            )
        for i, reply in enumerate(replies):
            check_prompt(reply.ids, reply.max_tokens, decoder.n_ctx, f"prompt {i}")
        self._context, self._replies = context, replies
        self.n_prompt = sum(len(reply.ids) for reply in replies)
        self.n_reused = 0  # prompt tokens whose keys and values were in the cache, or were copied from another reply
        self.prefill_s = self.decode_s = 0.0
        self.finish, self.seed = "", replies[0].sampler.seed

    @property
    def n_decoded(self) -> int:
        """Tokens after the first one of each reply."""
        return sum(max(0, len(reply.tokens) - 1) for reply in self._replies)

    def run(self) -> list[Answer]:
        """Answer all prompts; return the answers in the order of the prompts."""
        start = time.perf_counter()
        try:
            self._advance(self._prefill())
            self.prefill_s = time.perf_counter() - start
            while active := {i: reply.tokens[-1:] for i, reply in enumerate(self._replies) if not reply.finish}:
                self._advance(dict(zip(active, self._context.decoder.step(active), strict=True)))
            self.decode_s = time.perf_counter() - start - self.prefill_s
        finally:
            self._context.forget()
        return [reply.answer() for reply in self._replies]

    def _advance(self, logits: "Mapping[int, NDArray[float32]]") -> None:
        decoder = self._context.decoder
        for i, row in logits.items():
            self._replies[i].advance(row, is_full=decoder.cache.n_past(i) == decoder.n_ctx)

    def _prefill(self) -> "dict[int, NDArray[float32]]":
        """Run the prompts, as many tokens at once as a batch of the decoder holds; return the logits after each."""
        decoder, prompts = self._context.decoder, [reply.ids for reply in self._replies]
        common = min(min(n_common(prompts[0], ids) for ids in prompts), *(len(ids) - 1 for ids in prompts))
        self.n_reused = self._context.hold(prompts[0][:common]) + (len(prompts) - 1) * common
        for i in range(1, len(prompts)):
            copy_prefix(decoder.cache, 0, i, common)
        rest, logits = {i: list(ids[common:]) for i, ids in enumerate(prompts)}, {}
        while rest:
            part, room = {}, decoder.n_batch
            for i, ids in rest.items():
                if room:
                    part[i] = ids[:room]
                    room -= len(part[i])
            for i, row in zip(part, decoder.step(part), strict=True):
                rest[i] = rest[i][len(part[i]) :]
                if not rest[i]:
                    logits[i] = row.copy()
                    del rest[i]
        return dict(sorted(logits.items()))


def params_of(prompts: Sequence[Any], options: Mapping[str, Any]) -> list[ReplyParams]:
    """Return the options of the answer to each prompt: prompt i draws with seed + i."""
    if isinstance(prompts, str):
        raise OptionError(f"prompts is the text {prompts[:40]!r}; allowed: a list of texts")
    params = ReplyParams.of(options, without=("context_shift", "n_keep"))
    first = params.sampling.seed
    seeds = [None if first is None else (first + i) % 2**64 for i in range(len(prompts))]
    return [replace(params, sampling=replace(params.sampling, seed=seed)) for seed in seeds]
