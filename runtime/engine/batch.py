"""Several prompts answered together: what they begin with in common is computed once, then one step decodes a token of
each. A sequence that has come to its end leaves the batch."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.engine.generation import Session, StopStrings, check_prompt, n_common
from gguf_run.runtime.sampling.sampler import Sampler, TokenLogprob

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

    from gguf_run.runtime.tokenizers.tokenizer import TokenStream


@dataclass(frozen=True)
class Answer:
    """The text that one prompt of a batch got. finish: as Generation's; n_decoded: tokens of it.
    logprobs: if they were asked for."""

    text: str
    finish: str
    n_prompt: int
    n_decoded: int
    seed: int
    logprobs: "tuple[TokenLogprob, ...]" = ()


class OneOfMany:
    """One prompt on its way: its slot of the cache is its place in the batch."""

    def __init__(self, ids: Sequence[int], sampler: Sampler, stream: "TokenStream", stop: StopStrings) -> None:
        self.ids, self.sampler, self._stream, self._stop = ids, sampler, stream, stop
        self._pieces: list[str] = []
        self.n_decoded, self.next, self.finish = 0, -1, ""
        sampler.accept(ids)

    def choose(self, logits: "NDArray[float32]", stop_ids: frozenset[int], most: int | None, is_full: bool) -> None:
        """Take the next token, or finish. is_full: there is no room to run it."""
        id = self.sampler.sample(logits)
        if id in stop_ids:
            self.finish = "stop"
            return
        self.n_decoded += 1
        self.next = id
        self.sampler.accept([id])
        self._pieces.append(self._stop.push(self._stream.push(id)))
        if self._stop.found:
            self.finish = "stop"
        elif self.n_decoded == most:
            self.finish = "length"
        elif is_full:
            self.finish = "context"

    def answer(self) -> Answer:
        rest = "" if self._stop.found else self._stop.push(self._stream.flush()) + self._stop.flush()
        logprobs = tuple(self.sampler.logprobs)
        return Answer(
            "".join(self._pieces) + rest, self.finish, len(self.ids), self.n_decoded, self.sampler.seed, logprobs
        )


class Batch:
    """The run of a batch, and what it took: see Generation for the names. Times and counts are of all sequences;
    n_reused counts the tokens that were not computed for a sequence of their own."""

    def __init__(
        self, session: Session, sequences: Sequence[OneOfMany], stop_ids: Iterable[int], max_tokens: int | None
    ) -> None:
        """GgufRunError for more sequences than the cache has; ContextError for a prompt that does not fit into it."""
        decoder = session.decoder
        if not 1 <= len(sequences) <= decoder.cache.n_seq:
            raise GgufRunError(
                f"a batch of {len(sequences)} prompts: the model was loaded for 1 to {decoder.cache.n_seq}; load it "
                "with a larger n_seq or give it fewer at a time"
            )
        for i, sequence in enumerate(sequences):
            check_prompt(sequence.ids, max_tokens, decoder.n_ctx, f"prompt {i}")
        self._session, self._sequences, self._stop_ids = session, sequences, frozenset(stop_ids)
        self._max_tokens = max_tokens
        self.n_prompt, self.n_reused = sum(len(sequence.ids) for sequence in sequences), 0
        self.prefill_s = self.decode_s = 0.0
        self.finish, self.seed = "", sequences[0].sampler.seed

    @property
    def n_decoded(self) -> int:
        """Tokens after each sequence's first, as Generation counts them."""
        return sum(max(0, sequence.n_decoded - 1) for sequence in self._sequences)

    def run(self) -> list[Answer]:
        """Answer all prompts, in their order."""
        start = time.perf_counter()
        try:
            self._choose(self._prefill())
            self.prefill_s = time.perf_counter() - start
            while active := {i: [one.next] for i, one in enumerate(self._sequences) if not one.finish}:
                self._choose(dict(zip(active, self._session.decoder.step(active), strict=True)))
            self.decode_s = time.perf_counter() - start - self.prefill_s
        finally:
            self._session.forget()
        return [sequence.answer() for sequence in self._sequences]

    def _choose(self, rows: "Mapping[int, NDArray[float32]]") -> None:
        decoder = self._session.decoder
        for i, logits in rows.items():
            is_full = decoder.cache.n_past(i) == decoder.n_ctx
            self._sequences[i].choose(logits, self._stop_ids, self._max_tokens, is_full)

    def _prefill(self) -> "dict[int, NDArray[float32]]":
        """Logits after each prompt."""
        decoder, all_ids = self._session.decoder, [sequence.ids for sequence in self._sequences]
        common = min(min(n_common(all_ids[0], ids) for ids in all_ids), *(len(ids) - 1 for ids in all_ids))
        self.n_reused = self._session.hold(all_ids[0][:common]) + (len(all_ids) - 1) * common
        for i in range(1, len(all_ids)):
            decoder.cache.copy_prefix(0, i, common)
        rest, logits = {i: list(ids[common:]) for i, ids in enumerate(all_ids)}, {}
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
