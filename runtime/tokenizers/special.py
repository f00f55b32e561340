"""Cuts special tokens out of a text before the rest is tokenized."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence, Set

from gguf_run.formats.frozen import frozen

ASCII_BLANKS = " \t\n\v\f\r"
# White space as Unicode defines it: Python's isspace counts four control characters more.
WHITE_SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f")


@frozen
class Flags:
    """Special tokens that do more than stand in a text."""

    left: frozenset[int]  # ids of tokens that take the white space on their left
    right: frozenset[int]  # of those that take it on their right
    single_word: frozenset[int]  # of those that are found only where no letter, digit or "_" stands beside them
    white_space: str  # what is taken


class SpecialTokens:
    """Finds special tokens in a text, as llama.cpp does: the longest token (in UTF-8 bytes) first, wherever it stands.

    This is no scan from the left: of two tokens that overlap in a text, the longer one is found, not the first one.
    """

    def __init__(self, tokens: Sequence[str], ids: Iterable[int], single_word: Set[int] = frozenset()) -> None:
        """tokens: the vocabulary; ids: those to find; single_word: those that must stand alone, see Flags."""
        self._tokens, self._single_word = tokens, single_word
        self._order = sorted(ids, key=lambda id: (-len(tokens[id].encode()), id))
        # There may be thousands of special tokens: a text is searched for their first two characters only.
        self._starts: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for i, id in enumerate(self._order):
            self._starts[tokens[id][:2]][tokens[id]] = i

    def split(self, text: str) -> list[str | int]:
        """Return the text's pieces in order: ids of special tokens, and non-empty strings between them."""
        pieces: list[str | int] = [text] if text else []
        for i in sorted(self._present(text)):
            id = self._order[i]
            cut: list[str | int] = []
            for piece in pieces:
                parts = [piece] if isinstance(piece, int) else self._parts(piece, id)
                cut += [item for part in parts for item in (id, part)][1:]  # the id stands between the parts
            pieces = [piece for piece in cut if piece != ""]
        return pieces

    def _parts(self, text: str, id: int) -> list[str]:
        if id in self._single_word:
            return re.split(rf"(?<!\w){re.escape(self._tokens[id])}(?!\w)", text)
        return text.split(self._tokens[id])

    @staticmethod
    def strip(pieces: list[str | int], flags: Flags) -> list[str | int]:
        """Remove the white space that tokens take."""
        stripped: list[str | int] = []
        for before, piece, after in zip([-1, *pieces], pieces, [*pieces[1:], -1], strict=False):
            if isinstance(piece, str):
                piece = piece.lstrip(flags.white_space) if before in flags.right else piece
                piece = piece.rstrip(flags.white_space) if after in flags.left else piece
            if piece != "":
                stripped.append(piece)
        return stripped

    def _present(self, text: str) -> set[int]:
        """Return the tokens that occur in the text, by their place in the order."""
        present: set[int] = set()
        for start, group in self._starts.items():
            found: set[int] = set()
            lengths = {len(token) for token in group}
            at = text.find(start)
            while at >= 0 and len(found) < len(group):
                found |= {group[part] for n in lengths if (part := text[at : at + n]) in group}
                at = text.find(start, at + 1)
            present |= found
        return present
