"""Answers that must have a form: what the engine asks a grammar."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """What may follow, token by token: a grammar, say. The engine asks in the order of the text."""

    def allowed(self) -> NDArray[np.uint32]:
        """Return a bit for each token of the vocabulary, 32 in a word, the lowest bit first: 1 if it may come next."""

    def accept(self, id: int, /) -> None:
        """Note the token that has come, unless it has ended the answer."""

    def forced(self) -> Sequence[int]:
        """Return the tokens that alone may come next, and note them: they are not chosen."""
