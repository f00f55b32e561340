"""Guesses the next tokens of a text from the text itself: the last tokens often came before, and others after them."""

from collections.abc import Sequence

N_SAME = 3  # tokens that must have come before
LONG = 8  # as many and more are as good
_RATE = 0.15  # weight of a guess in the average of those before
_RETURN = 0.002  # way back to the first chance with each guess that is not tried


class Lookup:
    """The places of all tokens of a text, by the N_SAME tokens before them; and how often guesses have been right."""

    def __init__(self) -> None:
        self.n = 0  # tokens of the text
        # Tokens before the last guess that also came before its source, at most LONG; 0: a model has guessed.
        self.n_same = N_SAME
        self.chances = [_first_chance(n) for n in range(LONG + 1)]  # that a guessed token is right, by n_same
        self._ids: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}  # the last ones
        self._source, self._source_of = 0, 0  # where the last guess came from, and n at that time

    def extend(self, ids: Sequence[int]) -> None:
        """Add tokens to the text."""
        first = max(self.n, N_SAME)  # the last token has no place yet: the end of the text must not find itself
        self._ids += ids
        self.n = n = len(self._ids)
        parts = [self._ids[first - i : n - 1] for i in range(N_SAME, 0, -1)]
        self._places.update(zip(zip(*parts, strict=False), range(first, n), strict=False))

    def guess(self, most: int) -> list[int]:
        """Return `most` tokens that may come next, or none."""
        ids, n = self._ids, self.n
        at = self._source + n - self._source_of  # a source that was right goes on
        last = ids[n - N_SAME :]
        if not self._source or ids[at - N_SAME : at] != last:
            at = self._places.get(tuple(last), 0)
        self._source, self._source_of = at, n
        if not at:
            return []
        n_same = N_SAME
        while n_same < min(at, LONG) and ids[at - n_same - 1] == ids[n - n_same - 1]:
            n_same += 1
        self.n_same = n_same
        return [ids[at + i % (n - at)] for i in range(most)]

    def learn(self, n_right: int, is_wrong: bool) -> None:
        """Note that n_right tokens of the last guess came, and whether the next of them did not."""
        chance = 1 - (1 - self.chances[self.n_same]) * (1 - _RATE) ** n_right
        self.chances[self.n_same] = chance * (1 - _RATE * is_wrong)

    def skip(self) -> None:
        """Note that the last guess was not tried. So it will be one day: texts change."""
        self.chances[self.n_same] += _RETURN * (_first_chance(self.n_same) - self.chances[self.n_same])


def _first_chance(n_same: int) -> float:
    return 0.3 + 0.08 * (n_same - N_SAME) if n_same else 0.6
