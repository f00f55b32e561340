"""Answers that must have a form: what a grammar must do, and how its bits act on logits."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """What may follow, token by token: a grammar, say. The engine asks in the order of the text."""

    def allowed(self) -> NDArray[np.uint32]:
        """Return a bit for each token of the vocabulary, 32 in a word, the lowest bit first: 1 if it may come next."""

    def accept(self, id: int, /) -> None:
        """Note the token that has come."""

    def forced(self) -> Sequence[int]:
        """Return the tokens that alone may come next, and note them: they are not chosen."""


def masked(logits: NDArray[np.float32], constraint: Constraint) -> NDArray[np.float32]:
    """Return logits f32[n_vocab] in which the tokens that may not come are -inf."""
    bits = np.unpackbits(constraint.allowed().astype("<u4").view(np.uint8), bitorder="little")
    return np.where(bits[: len(logits)], logits, np.float32(-np.inf))
