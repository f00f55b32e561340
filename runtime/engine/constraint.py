"""Answers that must have a form: what the engine asks a grammar."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gguf_run.runtime.tokenizers.tokenizer import Tokenizer


class Constraint(Protocol):
    """What may follow, token by token: a grammar, say. The engine asks in the order of the text."""

    def allowed(self) -> NDArray[np.uint32]:
        """Return a bit for each token of the vocabulary, 32 in a word, the lowest bit first: 1 if it may come next."""

    def accept(self, id: int, /) -> None:
        """Note the token that has come, unless it has ended the answer."""

    def forced(self) -> Sequence[int]:
        """Return the tokens that alone may come next, and note them: they are not chosen."""


class After:
    """Lets the answer think first: anything up to a text, and behind it what a constraint allows."""

    def __init__(self, constraint: Constraint, text: str, tokenizer: "Tokenizer") -> None:
        """text: the tag that ends the reasoning. It must come: until then the answer cannot end."""
        self._constraint, self._text, self._tokenizer = constraint, text.encode(), tokenizer
        self._seen = b""
        self._is_open = False  # the text has come
        self._any = np.full_like(constraint.allowed(), 0xFFFFFFFF)
        for id in tokenizer.stop_ids:
            self._any[id // 32] &= ~np.uint32(1 << id % 32)

    def allowed(self) -> NDArray[np.uint32]:
        """See Constraint."""
        return self._constraint.allowed() if self._is_open else self._any

    def accept(self, id: int) -> None:
        """See Constraint."""
        if self._is_open:
            self._constraint.accept(id)
        else:
            self._seen = self._seen[-len(self._text) :] + self._tokenizer.piece(id)
            self._is_open = self._text in self._seen

    def forced(self) -> Sequence[int]:
        """See Constraint."""
        return self._constraint.forced() if self._is_open else ()
