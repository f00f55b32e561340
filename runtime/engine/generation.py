"""One prompt to a text: prefill, then one token after the other."""

import time
from collections.abc import Iterator

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.models.kv_cache import GROUP
from gguf_run.runtime.engine.context import Context, check_prompt, kept
from gguf_run.runtime.engine.reply import Reply


class Generation:
    """Runs one reply: yields the pieces of text, and counts tokens and seconds in its attributes."""

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

    def __iter__(self) -> Iterator[str]:
        start = time.perf_counter()
        logits, self.n_reused = self._context.prefill(self._reply.ids, self._n_keep)
        turn = self._context.turn
        text = self._reply.advance(logits, self._is_full)
        self.prefill_s = time.perf_counter() - start
        while True:
            if text:
                yield text
            if self.finish:
                return
            if self._context.turn != turn:
                raise GgufRunError(
                    "this answer cannot go on: a later generate, chat or logits has taken the context; read it to its "
                    "end first, or use generate_batch"
                )
            start = time.perf_counter()
            following = self._context.append_top(self._reply.next, self._n_keep, self.sampler.n_top)
            text = self._reply.advance(following, self._is_full)
            self.n_decoded += 1
            self.decode_s += time.perf_counter() - start

    @property
    def _is_full(self) -> bool:
        return self._n_keep is None and self._context.n_free == 0
