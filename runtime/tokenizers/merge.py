"""The merge loop of byte-level BPE and SentencePiece: join the best adjacent pair until no pair can be joined."""

from collections.abc import Callable
from heapq import heapify, heappop, heappush

# Limits of the encoders' tables of words that they have met.
CACHED_WORDS = 1 << 16
CACHED_CHARS = 64  # of a word; longer words hardly ever come twice

Rank = Callable[[str, str], float | None]


def merge(symbols: list[str], rank: Rank) -> list[str]:
    """Join adjacent symbols and return the result: the pair of the smallest rank first, of equals the leftmost.

    symbols: is changed. rank(left, right): how early a pair is joined; None: never.
    A heap holds the possible pairs, so this takes O(n log n). An entry is stale if a symbol of it has changed since.
    Symbols only grow, or become "" when they are joined to their left neighbour, so their length shows it.
    Sennrich et al., "Neural machine translation of rare words with subword units".
    """
    n = len(symbols)
    before = list(range(-1, n - 1))
    after = list(range(1, n + 1))
    heap: list[tuple[float, int, int, int]] = []  # rank, indices of left and right, length of both together
    for i in range(n - 1):
        r = rank(symbols[i], symbols[i + 1])
        if r is not None:
            heap.append((r, i, i + 1, len(symbols[i]) + len(symbols[i + 1])))
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
