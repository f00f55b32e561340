"""Several tokens of an answer in one step: guessed ones run with the last token, and as many stay as would have come.

A row of logits is read only if all tokens before it are those of the answer. Then the sampler chooses from it as it
always does. So guesses never change what the answer may be, whatever the sampler, and no probabilities are compared.

A guess is tried if it is worth its time: rows make a step longer, and more so in a large batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakKeyDictionary

from gguf_run.runtime.engine.lookup import LONG, Lookup
from gguf_run.runtime.engine.sequence import Job, n_common

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

    from gguf_run.models.decoder import Decoder
    from gguf_run.runtime.engine.draft_model import DraftModel
    from gguf_run.runtime.engine.rows import Rows

MOST = 15  # guessed tokens of an answer in a step
_MOST_KNOWN = 8  # tokens of an answer that must run: more are a prompt
_FIRST_EXTRA = 0.08  # part of a step's time that one more row takes, before anything was measured
_RATE = 0.1  # weight of a step in the averages of those before
_RETURN = 0.002  # way back to _FIRST_EXTRA with each guess that is not tried
_GAIN = 1.03  # an answer must get so many times faster
_SIZES = (1, 3, 7, MOST)  # with the token before them they fill tiles of rows
_Choose: TypeAlias = "Callable[[list[Job], NDArray[float32]], Sequence[tuple[Job, int | Exception]]]"


class Speculation:
    """Guesses for the answers of an engine."""

    def __init__(self) -> None:
        self.draft: DraftModel | None = None  # guesses where the text itself tells little
        self.guesses: dict[Job, list[int]] = {}  # that run in this step
        self.n = 0  # how many they are
        self._lookups = WeakKeyDictionary[Job, Lookup]()
        self._starts: dict[Job, int] = {}  # where the guesses stand in the ids of a job
        self._rows: dict[Job, int] = {}  # the first row of a job in the logits of the step
        self._logits: NDArray[float32]
        self._n_known = 0  # tokens of this step that are no guesses; 0: parts of prompts are among them
        self._plain: dict[int, float] = {}  # milliseconds of a step of so many tokens without guesses
        self._asks = False  # whether the draft model has guessed in this step
        self._n, self._gain = 0, 0.0  # guesses that are planned, and how many of them are expected to be right
        # What a guess adds to a step, as a part of it, by _n_known, _asks and the logarithm of the number of guesses.
        self._extra: dict[tuple[int, bool, int], float] = {}

    def plan(self, counts: Mapping[Job, int], rows: "Rows", decoder: "Decoder") -> None:
        """Choose the guesses of a step. counts: tokens that run."""
        self._asks, self._n, self._gain = False, 0, 0.0
        is_known = all(job.n_chosen and 0 < n <= _MOST_KNOWN and rows.n_left(job) == n for job, n in counts.items())
        self._n_known = sum(counts.values()) if is_known else 0
        if self._n_known not in self._plain or rows.cache.has_states:
            return
        n_room, asked = min(decoder.n_batch - self._n_known, decoder.n_outputs - len(counts)), dict[Job, int]()
        for job in counts:
            lookup, most = self._lookups.get(job), min(n_room, _most(job, rows))
            if lookup is None:
                lookup = Lookup()
                lookup.extend(job.request.ids)
                self._lookups[job] = lookup
            lookup.extend(job.reply.tokens[lookup.n - job.n_prompt :])
            found = self._worth(lookup, lookup.guess(most))
            if self.draft is not None and not (found and lookup.n_same == LONG):
                lookup.n_same, self._asks = 0, True
                found = []
                asked[job] = n = len(self._worth(lookup, [0] * most))
                n_room -= n
            n_room -= len(found)
            self.guesses[job], self._starts[job] = found, len(job.ids)
        if self.draft is not None and any(asked.values()):
            self.guesses |= self.draft.guess({job: n for job, n in asked.items() if n})
        self.guesses = {job: ids for job, ids in self.guesses.items() if ids}
        if self.guesses and not rows.cache.room(
            {job.row: n + len(self.guesses.get(job, ())) for job, n in counts.items()}
        ):
            self.guesses.clear()
        self.n = sum(map(len, self.guesses.values()))

    def _worth(self, lookup: Lookup, ids: list[int]) -> list[int]:
        """Return the first of the guessed ids: as many as make the step fastest, for the tokens that it gives."""
        n_known, chance, best, gain = self._n_known + self._gain, min(lookup.chances[lookup.n_same], 0.999), 0, 0.0
        most = _GAIN * n_known / self._cost(self._n)
        for n in _SIZES:
            expected = chance * (1 - chance**n) / (1 - chance)
            if n <= len(ids) and (speed := (n_known + expected) / self._cost(self._n + n)) > most:
                most, best, gain = speed, n, expected
        if ids and not best:
            lookup.skip()
            for key, extra in self._extra.items():
                self._extra[key] = extra + _RETURN * (_FIRST_EXTRA - extra)
        self._n, self._gain = self._n + best, self._gain + gain
        return ids[:best]

    def _cost(self, n: int) -> float:
        """Return how many times longer the step takes with n guesses."""
        return 1 + n * self._extra.get((self._n_known, self._asks, n.bit_length()), _FIRST_EXTRA)

    def first_rows(self, jobs: Sequence[Job], logits: "NDArray[float32]") -> "NDArray[float32]":
        """Return the rows after the last known tokens of the jobs of a step. logits: of all rows, kept for `verify`."""
        self._logits, n = logits, 0
        for job in jobs:
            self._rows[job] = n
            n += 1 + len(self.guesses.get(job, ()))
        return logits[[*self._rows.values()]]

    def verify(
        self, said: Sequence[tuple[Job, str | Exception]], choose: _Choose, rows: "Rows"
    ) -> list[tuple[Job, str | Exception]]:
        """Take tokens as long as they are the guessed ones, and one more. Return what the jobs have said.

        said: what each has said with its first token. choose: Engine._choose.
        """
        texts = {job: text for job, text in said if isinstance(text, str)}
        errors = {job: error for job, error in said if isinstance(error, Exception)}
        try:
            while going := [job for job in self.guesses if job not in errors and self._is_right(job)]:
                at = [self._rows[job] + len(job.ids) - self._starts[job] for job in going]
                for job, id in choose(going, self._logits[at]):
                    text = job.take(id, rows.cache.n_ctx) if isinstance(id, int) else id
                    if isinstance(text, Exception):
                        errors[job] = text
                    else:
                        texts[job] += text
        except BaseException:  # an interrupt: what has been said is not lost
            for job, text in texts.items():
                job.push(text)
            raise
        self.settle(rows)
        return [*texts.items(), *errors.items()]

    def _is_right(self, job: Job) -> bool:
        """Return whether a job goes on, and all of its new tokens were guessed."""
        new = job.ids[self._starts[job] :]
        return not job.finish and len(new) > 0 and new == self.guesses[job][: len(new)]

    def settle(self, rows: "Rows") -> None:
        """Take out of the cache what was guessed wrong. The last token of an answer that goes on has not run."""
        for job, ids in self.guesses.items():
            n_right = n_common(job.ids[self._starts[job] :], ids)
            job.n_guessed, job.n_right = job.n_guessed + len(ids), job.n_right + n_right
            self._lookups[job].learn(n_right, n_right < len(ids) and not job.finish)
            n_past = min(len(job.ids) - (not job.finish), self._starts[job] + n_right)  # forced tokens have not run
            if job.row >= 0 and n_past < rows.cache.slots[job.row].n_past:
                rows.cache.rewind(n_past, job.row)
        for of_step in (self.guesses, self._starts, self._rows):
            of_step.clear()

    def measured(self, ms: float) -> None:
        """Learn how long a step took."""
        n_known, n, self._n_known, self.n = self._n_known, self.n, 0, 0
        if n_known and not n and not self._asks:
            before = self._plain.get(n_known, ms)
            self._plain[n_known] = before + (_RATE if ms > before else 0.5) * (ms - before)  # the first may be slow
        elif n_known and n:
            extra, key = max(0.0, (ms / self._plain[n_known] - 1) / n), (n_known, self._asks, n.bit_length())
            before = self._extra.get(key, _FIRST_EXTRA)
            self._extra[key] = before + _RATE * (min(extra, 4 * before + 0.1) - before)


def _most(job: Job, rows: "Rows") -> int:
    """Return how many tokens may be guessed: the answer and the context go on behind them."""
    cache, n = rows.cache, len(job.ids)
    most = min(MOST, cache.n_ctx - n)
    if job.request.max_tokens is not None:
        most = min(most, job.request.max_tokens - len(job.reply.tokens) - 1)
    if n <= cache.n_short:  # a rotation for longer texts would run all tokens again
        most = min(most, cache.n_short - n)
    return max(0, most)
