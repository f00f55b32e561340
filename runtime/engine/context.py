"""The token ids in the KV cache, and whose turn it is to use them.

What a prompt shares with the start of the one before is not computed again.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.formats.frozen import frozen
from gguf_run.models.kv_cache import GROUP
from gguf_run.runtime.sampling.candidates import Candidates

if TYPE_CHECKING:
    from gguf_run.models.decoder import Decoder

Part = tuple[int, str, Any]  # layer, one of kv_moves.KINDS, bytes: see kv_moves.export
PATIENCE = 5.0  # seconds that other threads wait for an answer that nobody reads


class ContextError(GgufRunError):
    """The prompt is longer than the context."""


class Closed:
    """Takes the place of a decoder that has been freed: any use raises GgufRunError."""

    def __getattr__(self, name: str) -> NoReturn:
        raise GgufRunError("the model is closed: load it again, or stay within its `with`")


class Claim:
    """What an answer has of the context: its right to go on, until another one takes the context."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = threading.current_thread()  # made and reads the answer; None: several do
        self.read_at = 0.0  # when the last piece was computed
        self.is_lost = False  # another one has taken the context


@frozen(eq=False)
class Ticket:
    """A request to compute: see Turns.computing."""

    thread: threading.Thread
    claim: Claim | None
    waits: bool


class Turns:
    """Orders the threads that use one model: one computes at a time, and an answer keeps the context until it ends.

    Other threads wait for the end of an answer, and the first that came is the first to go on. They take the context
    if nobody has read the answer for PATIENCE seconds, or if its thread has ended. A thread takes the context from its
    own answer at once: it would wait for itself.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None  # the one that computes now
        self._holder: Claim | None = None  # of the answer that has the context
        self._queue: list[Ticket] = []  # who waits, in the order in which they came

    @contextmanager
    def computing(self, claim: Claim | None = None, *, takes: bool = True, waits: bool = True) -> Iterator[None]:
        """Wait until this thread may compute; it alone does so within the block.

        claim: of the answer that goes on; None: something else than an answer.
        takes: the block changes the context, so that the answer that has it cannot go on.
        waits: wait for the end of another thread's answer, not only for what is computed now.

        GgufRunError if the claim is lost, or if this thread computes already.
        """
        thread = threading.current_thread()
        if self._thread is thread:
            raise GgufRunError(
                "a logits processor, or what it calls, uses the model that waits for it: only its tokenizer may be used"
            )
        ticket = Ticket(thread, claim, waits)
        try:
            with self._changed:
                self._queue.append(ticket)
                while self._thread is not None or self._next() is not ticket:
                    seconds = self._wait_for(ticket)
                    self._changed.wait(seconds if seconds > 0 and self._thread is None else None)
                self._queue.remove(ticket)
                self._thread = thread
                if claim is not None and claim.is_lost:
                    raise GgufRunError(
                        "this answer cannot go on: a later generate, chat or logits has taken the context; read it to "
                        "its end first, or use generate_batch"
                    )
                if takes and self._holder is not claim:
                    if self._holder is not None:
                        self._holder.is_lost = True
                    self._holder = claim
            yield
        finally:
            with self._changed:
                if self._thread is thread:
                    self._thread = None
                elif ticket in self._queue:  # interrupted while it waited
                    self._queue.remove(ticket)
                if claim is not None:
                    claim.read_at = time.monotonic()
                    claim.thread = thread if claim.thread is thread else None
                self._changed.notify_all()

    def leave(self, claim: Claim | None = None) -> None:
        """Let others have the context: an answer is at its end. claim: None for whichever has the context."""
        with self._changed:
            if claim is None or self._holder is claim:
                self._holder = None
                self._changed.notify_all()

    def _next(self) -> Ticket | None:
        return next((ticket for ticket in self._queue if self._wait_for(ticket) <= 0), None)

    def _wait_for(self, ticket: Ticket) -> float:
        """Return how many seconds a ticket waits for the answer that has the context, 0 or less if not at all."""
        holder, claim = self._holder, ticket.claim
        if holder is None or holder is claim or holder.thread is ticket.thread or not ticket.waits:
            return 0
        if (claim is not None and claim.is_lost) or (holder.thread is not None and not holder.thread.is_alive()):
            return 0
        return holder.read_at + PATIENCE - time.monotonic()


_NOTHING: tuple[list[int], NDArray[np.float32]] = ([], np.empty(0, np.float32))


class Context:
    """A decoder, and the token ids whose keys and values its first sequence holds.

    A full context ends a text, or drops tokens and goes on, as llama.cpp's context shift does. Then the first n_keep
    tokens stay, and half of the others are removed from the cache. The removed ids are still remembered here: a
    conversation that is sent again from its beginning is recognized.
    """

    def __init__(self, decoder: "Decoder") -> None:
        self.decoder = decoder
        self._history: list[int] = []  # all ids since the beginning, also the removed ones
        self._cut = range(0)  # places in _history of the removed ids
        self._asked = _NOTHING  # the last prompt, and the logits after it

    def close(self) -> None:
        """Drop the decoder: every later call raises GgufRunError."""
        self.decoder = cast("Decoder", Closed())

    @property
    def n_free(self) -> int:
        """Positions left in the context."""
        return self.decoder.n_ctx - self.decoder.n_past

    @property
    def ids(self) -> list[int]:
        """The ids in the cache, in order."""
        return self._history[: self._cut.start] + self._history[self._cut.stop :]

    def prefill(self, ids: Sequence[int], n_keep: int | None = None) -> tuple[NDArray[np.float32], int]:
        """Make `ids` the whole context; return the logits f32[n_vocab] after the last one and how many ids were reused.

        Only ids behind the common start with the present context are computed.
        n_keep: tokens that stay when the context is full; None: `ids` must fit.
        """
        # The same prompt gets the same logits, to the last bit. Its last token alone would run through other kernels.
        asked, logits = self._asked
        is_same = bool(ids) and asked == list(ids) and not self._cut
        if is_same and self._rewind(n_common(self._history, ids)) == len(ids):
            return logits, len(ids)
        # Otherwise the last token runs in any case, because its logits are wanted.
        n_reused = self._rewind(min(n_common(self._history, ids), len(ids) - 1))
        logits = self._run(ids[n_reused:], n_keep)
        self._asked = list(ids), logits.copy()
        return logits, n_reused

    def append_top(self, id: int, n_keep: int | None, n_top: int) -> NDArray[np.float32] | Candidates:
        """Run one more token; return the logits f32[n_vocab] after it, or the n_top greatest if the decoder finds them.

        n_keep: as for prefill. n_top: 0 if all logits are wanted.
        """
        if not n_top:
            return self._run([id], n_keep)
        if n_keep is not None and not self.n_free:
            self._make_room(n_keep)
        found = self.decoder.top([id], n_top)
        self._history.append(id)
        return found.values[0] if found.columns is None else Candidates(found.values[0], found.columns, True)

    def hold(self, ids: Sequence[int]) -> int:
        """Make `ids` the whole context, without logits; return how many ids were reused."""
        self._asked = _NOTHING
        n_reused = self._rewind(n_common(self._history, ids))
        for _ in self.decoder.forward(ids[n_reused:], 0):
            pass
        self._history.extend(ids[n_reused:])
        return n_reused

    def logits(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Run `ids` in an empty context; yield the logits after each of them in blocks f32[n, n_vocab].

        A block is valid until the next one, see Decoder.forward.
        """
        self.forget()
        yield from self.decoder.forward(ids, len(ids))
        self._history = list(ids)

    def settle(self) -> list[int]:
        """Repair what an interrupted run has left; return the ids whose keys and values the cache holds."""
        self._rewind(len(self._history))
        return self.ids

    def restore(self, ids: Sequence[int], parts: Iterable[Part]) -> None:
        """Make `ids` the context, with the parts of a cache that kv_moves.export gave.

        GgufRunError if the parts do not fit this model; the context is empty then.
        """
        self.forget()
        from gguf_run.models.kv_moves import restore

        restore(self.decoder.cache, len(ids), parts, ids=ids)
        self._history = list(ids)

    def forget(self) -> None:
        """Empty the context."""
        self._asked = _NOTHING
        self._rewind(0)

    def _rewind(self, n: int) -> int:
        """Keep the first n ids of the history. Return how many stay: fewer if the cache cannot go back to n.

        This also repairs an interrupted run: the decoder may then hold more tokens than the history, or none.
        """
        if n < self._cut.stop:
            n = min(n, self._cut.start)
            self._cut = range(n, n)
        n_past = n - len(self._cut)
        n_left = self.decoder.rewind(min(n_past, self.decoder.n_past))
        if n_left < n_past:
            n = n_left
            if n <= self._cut.start:
                self._cut = range(n, n)
            else:
                n += len(self._cut)
        del self._history[n:]
        return n

    def _run(self, ids: Sequence[int], n_keep: int | None) -> NDArray[np.float32]:
        while True:
            if n_keep is not None and not self.n_free:
                self._make_room(n_keep)
            part = ids if n_keep is None else ids[: self.n_free]
            (logits,) = (block[-1] for block in self.decoder.forward(part, 1))
            self._history.extend(part)
            ids = ids[len(part) :]
            if not ids:
                return logits

    def _make_room(self, n_keep: int) -> None:
        """Remove half of the tokens behind the kept ones. What was kept the first time is kept later, too."""
        start = self._cut.start if self._cut else kept(n_keep)
        n_discard = max(GROUP, (self.decoder.n_past - start) // 2 // GROUP * GROUP)
        from gguf_run.models.kv_moves import shift  # late: few contexts are ever full

        n_left = shift(self.decoder.cache, start, n_discard)
        self._cut = range(start, start + len(self._cut) + n_discard)
        if not n_left:  # layers with a window have lost tokens that are within it now: compute all again
            for _ in self.decoder.forward(self.ids, 0):
                pass


def kept(n_keep: int) -> int:
    """Return n_keep rounded up to whole groups of the cache, at least one group.

    Much of the attention rests on the first tokens: a model without them breaks down (Xiao et al. 2023, StreamingLLM).
    """
    return max(1, -(-n_keep // GROUP)) * GROUP


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common start of two lists."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def check_prompt(ids: Sequence[int], max_tokens: int | None, n_ctx: int | None, name: str = "the prompt") -> None:
    """Check what is asked: ContextError for more than n_ctx ids, GgufRunError for none, OptionError for max_tokens < 1.

    n_ctx: None if a longer prompt is allowed. name: of the prompt, for the error.
    """
    if max_tokens is not None and max_tokens < 1:
        raise OptionError(f"max_tokens (--max-tokens) is {max_tokens}; allowed: at least 1")
    if not ids:
        raise GgufRunError(f"{name} is empty: give at least one token of text")
    if n_ctx is not None and len(ids) > n_ctx:
        raise ContextError(
            f"{name} has {len(ids)} tokens, the context holds {n_ctx}: shorten the prompt or choose a larger context "
            "(--ctx-size)"
        )
