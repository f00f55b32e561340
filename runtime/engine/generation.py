"""One prompt to a text: prefill, then one token after the other."""

import time
from collections.abc import Generator, Iterator

from gguf_run.formats.errors import OptionError
from gguf_run.formats.frozen import frozen
from gguf_run.models.kv_cache import GROUP
from gguf_run.runtime.engine.context import Claim, Context, Turns, check_prompt, kept
from gguf_run.runtime.engine.reply import Answer, Piece, Reply


@frozen
class Stats:
    """Times, in seconds, and counts of the last generation. Generation and Batch have attributes of these names."""

    load_s: float  # to load the model
    n_prompt: int = 0  # tokens of the prompt
    n_reused: int = 0  # tokens of the prompt that the cache held already
    prefill_s: float = 0.0  # to compute the other tokens of the prompt
    n_decoded: int = 0  # tokens of the answer
    decode_s: float = 0.0  # to compute the tokens of the answer
    finish: str = ""  # why the answer ended, see Reply
    seed: int = 0  # of the draws

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens computed per second (0: none)."""
        return (self.n_prompt - self.n_reused) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_speed(self) -> float:
        """Tokens decoded per second (0: none)."""
        return self.n_decoded / self.decode_s if self.decode_s else 0.0


class Generation:
    """Runs one reply: yields its pieces, and counts tokens and seconds in its attributes."""

    def __init__(self, context: Context, reply: Reply, n_keep: int | None = None) -> None:
        """Check the options. Nothing runs yet.

        n_keep: number of first tokens that stay when a full context drops others, see Context. None: a full context
            ends the text.
        ContextError if the prompt does not fit, GgufRunError if it is empty, OptionError if n_keep or max_tokens is not
        allowed.
        """
        n_ctx = context.decoder.n_ctx
        if n_keep is not None and not (n_keep >= 0 and kept(n_keep) + 2 * GROUP <= n_ctx):
            raise OptionError(
                f"n_keep (--keep) is {n_keep} in a context of {n_ctx} tokens (--ctx-size); allowed: 0 to "
                f"{n_ctx - 2 * GROUP}, and contexts of {3 * GROUP} or more, so that they can be shifted"
            )
        check_prompt(reply.ids, reply.max_tokens, n_ctx if n_keep is None else None)
        self._context, self._reply, self._n_keep = context, reply, n_keep
        self.sampler, self.seed = reply.sampler, reply.sampler.seed
        self.n_prompt = len(reply.ids)
        self.n_reused = 0  # tokens of the prompt that stood in the context already
        self.n_decoded = 0  # tokens chosen after the first one, the end of the answer included
        self.prefill_s = 0.0  # seconds until the first token was chosen
        self.decode_s = 0.0  # seconds for the n_decoded tokens

    @property
    def finish(self) -> str:
        """Why the text ended, "" while it goes on: see Reply."""
        return self._reply.finish

    def __iter__(self) -> Generator[Piece, None, None]:
        start = time.perf_counter()
        logits, self.n_reused = self._context.prefill(self._reply.ids, self._n_keep)
        text = self._reply.advance(logits, self._is_full)
        self.prefill_s = time.perf_counter() - start
        while True:
            if text or self.finish:
                yield self._reply.piece(text)
            if self.finish:
                return
            start = time.perf_counter()
            following = self._context.append_top(self._reply.tokens[-1], self._n_keep, self.sampler.n_top)
            text = self._reply.advance(following, self._is_full)
            self.n_decoded += 1
            self.decode_s += time.perf_counter() - start

    @property
    def _is_full(self) -> bool:
        return self._n_keep is None and self._context.n_free == 0


class Pieces(Iterator[Piece]):
    """An answer while it is made: an iterator over its pieces, which any thread may read or close."""

    def __init__(self, generation: Generation, reply: Reply, turns: Turns) -> None:
        """generation: of this reply. turns: of the context that the generation runs in."""
        self._reply, self._turns, self._claim = reply, turns, Claim()
        self._pieces = iter(generation)
        self._is_over = False

    def __next__(self) -> Piece:
        """Compute the next piece. GgufRunError if the context was taken or the model closed; others as Generation."""
        if self._is_over:
            raise StopIteration
        try:
            with self._turns.computing(self._claim):
                piece = next(self._pieces)
        except BaseException:
            self._end()
            raise
        if piece.finish_reason:
            self._end()
        return piece

    def answer(self) -> Answer:
        """Compute the rest; return the whole answer, with what was read before."""
        for _ in self:
            pass
        return self._reply.answer()

    def close(self) -> None:
        """End the answer here: no more pieces come, and other threads may use the model."""
        with self._turns.computing(takes=False, waits=False):
            self._pieces.close()
        self._end()

    def _end(self) -> None:
        self._is_over = True
        self._turns.leave(self._claim)

    __del__ = _end
