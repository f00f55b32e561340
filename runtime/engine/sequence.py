"""A request on its way: what the engine knows of it, and what its reader holds."""

from collections import abc, deque
from collections.abc import AsyncIterator, Iterator
from typing import Protocol

from gguf_run.formats.frozen import frozen
from gguf_run.runtime.engine.reply import Answer, Piece, Reply, Request


@frozen
class Stats:
    """Times, in seconds, and counts of the last generation. Job and Batch have attributes of these names."""

    load_s: float  # to load the model
    n_prompt: int = 0  # tokens of the prompt
    n_reused: int = 0  # tokens of the prompt that the cache held already
    prefill_s: float = 0.0  # to compute the other tokens of the prompt
    n_decoded: int = 0  # tokens of the answer
    decode_s: float = 0.0  # to compute the tokens of the answer
    finish: str = ""  # why the answer ended, see Reply
    seed: int = 0  # of the draws
    n_guessed: int = 0  # tokens that ran before they were chosen: see speculation.py
    n_right: int = 0  # of them, those that were chosen

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens computed per second (0: none)."""
        return (self.n_prompt - self.n_reused) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_speed(self) -> float:
        """Tokens decoded per second (0: none)."""
        return self.n_decoded / self.decode_s if self.decode_s else 0.0


@frozen
class Cut:
    """What context shifts have taken out of a text: see shift.py."""

    at: int = 0  # place of the first id
    ids: tuple[int, ...] = ()


class Job:
    """What the engine knows of a request."""

    def __init__(self, request: Request, reply: Reply, number: int, arrived: float) -> None:
        self.request, self.reply = request, reply
        self.number = number  # jobs are numbered in the order in which they come
        self.arrived = arrived  # by the engine's clock
        self.ids = list(request.ids)  # of the prompt and the answer: what the cache holds or must hold
        self.cut = Cut()  # what context shifts have taken out of `ids`
        self.row = -1  # of the cache; -1: none
        self.pieces: deque[Piece] = deque()  # that nobody has read yet
        self.is_over = False  # nothing more will come
        self.error: Exception | None = None  # that the next reader gets
        self.n_readers = 0  # threads that wait for a piece
        self.is_eager = False  # its reader has just taken a piece: one step runs before the reader is back
        self.read_at = 0  # number of the last step that somebody waited for
        self.n_preempted = 0  # times that it has lost its row
        self.n_wanted = 0  # free pages that it lacked when it was refused a row
        self.shared: dict[int, int] = {}  # tokens that its prompt shares with the job of a number: see scheduler.py
        self.seed = reply.sampler.seed
        self.n_prompt = len(request.ids)
        self.n_reused = -1  # tokens of the prompt that stood in the cache already; -1: it has had no row
        self.n_held = 0  # tokens that the row held when the job got it
        self.n_chosen = 0  # tokens, the end of the answer included
        self.prefill_s = 0.0  # seconds of the steps up to the first token
        self.first_at = arrived  # when the first token was there
        self.decode_s = 0.0  # seconds of the steps of the n_decoded tokens
        self.n_guessed = self.n_right = 0  # see Stats

    @property
    def finish(self) -> str:
        """Why the text ended, "" while it goes on: see Reply."""
        return self.reply.finish

    @property
    def n_decoded(self) -> int:
        """Tokens chosen after the first one, the end of the answer included."""
        return max(0, self.n_chosen - 1)

    def take(self, id: int, n_ctx: int) -> str | Exception:
        """Take the next token; return the text that is complete with it, or why it cannot be taken.

        n_ctx: a full context ends the text, unless it can be shifted.
        """
        reply, constraint = self.reply, self.request.constraint
        try:
            text = reply.take(id, len(self.ids) == n_ctx and not self.request.context_shift)
            self.n_chosen += 1
            if not reply.finish:
                self.ids.append(int(id))
                if constraint is not None:
                    constraint.accept(id)
                    # Whoever asks for logprobs gets those of all tokens: then all are chosen.
                    for forced in constraint.forced() if self.request.sampling.logprobs is None else ():
                        if not reply.finish:
                            text += reply.take(forced, len(self.ids) == n_ctx and not self.request.context_shift)
                            self.ids += [forced] * (not reply.finish)
            return text
        except Exception as error:  # the others go on
            return error

    def count(self, start: float, end: float) -> None:
        """Count the seconds of a step that ran tokens of the job, after `take`."""
        if self.n_chosen > 1:
            self.decode_s += end - start
        else:
            self.prefill_s, self.first_at = self.prefill_s + end - start, end

    def push(self, news: str | Exception) -> None:
        """Give text, or the error that ends the answer, to the reader."""
        if isinstance(news, Exception):
            self.error, self.is_over = news, True
        elif news or self.finish:
            self.pieces.append(self.reply.piece(news))
            self.is_over = self.is_over or bool(self.finish)

    def raise_error(self) -> None:
        """Raise the error that has ended the answer, once."""
        error, self.error = self.error, None
        if error is not None:
            raise error


class Reader(Protocol):
    """What an answer needs of the engine."""

    def read(self, job: Job, /) -> Piece | None:
        """Return the next piece; None: there is no more."""

    def news(self, job: Job, /) -> AsyncIterator[Piece]:
        """Yield the pieces as they come."""

    def cancel(self, sequence: "Sequence", /) -> None:
        """End the answer."""


class Sequence(Iterator[Piece]):
    """An answer while it is made: an iterator over its pieces, which any thread may read or close.

    In a coroutine `async for` reads it, once Engine.start has been called. A dropped one is closed.
    """

    def __init__(self, engine: Reader, job: Job) -> None:
        self._engine, self.job = engine, job

    def __next__(self) -> Piece:
        """Return the next piece. GgufRunError if the model was closed; others as the steps of the engine."""
        piece = self._engine.read(self.job)
        if piece is None:
            raise StopIteration
        return piece

    async def __aiter__(self) -> AsyncIterator[Piece]:
        async for piece in self._engine.news(self.job):  # and not its iterator: a loop holds the answer
            yield piece

    def answer(self) -> Answer:
        """Compute the rest; return the whole answer, with what was read before."""
        for _ in self:
            pass
        return self.job.reply.answer()

    def close(self) -> None:
        """End the answer here: no more pieces come."""
        self._engine.cancel(self)

    def __del__(self) -> None:
        self.job.is_over = True  # the engine takes its row at the next step


def n_common(a: abc.Sequence[int], b: abc.Sequence[int]) -> int:
    """Return the length of the common start of two lists."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), n)
