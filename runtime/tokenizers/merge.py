"""What byte-level BPE and SentencePiece share: the loop that merges pairs, and a table of words met before."""

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush


def _byte_characters() -> dict[str, int]:
    """Printing bytes are written as themselves, the others, in their order, as the characters from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_CHARACTERS = _byte_characters()

CACHED_WORDS = 1 << 16
CACHED_CHARS = 64  # of a word; longer words hardly ever come twice


class WordIds(dict[str, list[int]]):
    """The token ids of words. A word that is not in the table is encoded, and kept if there is room for it."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> list[int]:
        ids = self._encode(word)
        if len(word) <= CACHED_CHARS and len(self) < CACHED_WORDS:
            self[word] = ids
        return ids


def by_merges(merges: Sequence[str]) -> Callable[[str, str], float | None]:
    """Return how early two symbols are joined by a list of merges, "left right" each: see merge."""
    ranks = {merges[i]: i for i in range(len(merges) - 1, -1, -1)}  # from the end: of equal ones, the first counts
    return lambda left, right: ranks.get(f"{left} {right}")


def merge(symbols: list[str], rank: Callable[[str, str], float | None]) -> list[str]:
    """Join adjacent symbols until no pair can be joined: the pair of the smallest rank first, of equals the leftmost.

    symbols: is changed. rank(left, right): how early a pair is joined; None: never.
    A heap holds the possible pairs, so this takes O(n log n). An entry is stale if a symbol of it has changed since.
    Symbols only grow, or become "" when they are joined to their left neighbour, so their length shows a change.
    Sennrich et al., "Neural machine translation of rare words with subword units".
    """
    n = len(symbols)
    before = list(range(-1, n - 1))
    after = list(range(1, n + 1))
    ranks = map(rank, symbols, symbols[1:])
    # rank, indices of left and right, length of both together
    heap = [(r, i, i + 1, len(symbols[i]) + len(symbols[i + 1])) for i, r in enumerate(ranks) if r is not None]
    heapify(heap)
    while heap:
        _, i, j, length = heappop(heap)
        left, right = symbols[i], symbols[j]
        if not left or not right or len(left) + len(right) != length:
            continue
        joined = symbols[i] = left + right
        symbols[j] = ""
        k = after[i] = after[j]
        if k < n:
            before[k] = i
            r = rank(joined, symbols[k])
            if r is not None:
                heappush(heap, (r, i, k, length + len(symbols[k])))
        h = before[i]
        if h >= 0:
            r = rank(symbols[h], joined)
            if r is not None:
                heappush(heap, (r, h, i, length + len(symbols[h])))
    return [symbol for symbol in symbols if symbol]
