"""The merge loop that byte-level BPE and SentencePiece share: join the best adjacent pair until none can be joined."""

from collections.abc import Callable
from heapq import heapify, heappop, heappush

# Words met again are looked up. Longer ones hardly ever come twice, and the table must not grow without end.
CACHED_WORDS = 1 << 16
CACHED_CHARS = 64

Rank = Callable[[str, str], float | None]


def merge(symbols: list[str], rank: Rank) -> list[str]:
    """Join adjacent symbols, the pair of the smallest rank first, the leftmost of equals; `symbols` is used up.

    rank(left, right) says how early a pair is joined, None: never. A heap holds the possible pairs; an entry whose
    symbols have changed since is stale, which their length shows (symbols only grow, and an absorbed one is ""), so
    the whole takes O(n log n). As in Sennrich et al., "Neural machine translation of rare words with subword units".
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
