"""The beginning of a text that the KV cache knows already: some sequence has computed its pages."""

from collections.abc import Hashable, Sequence

from gguf_run.models.kv_cache import KvCache, first_page
from gguf_run.models.pages import NO_PAGE, PAGE, Node


def known(cache: KvCache, ids: Sequence[int], root: Hashable = (), *, parts: bool = True) -> int:
    """Return how many of the first tokens of a text `adopt` would find."""
    return _find(cache, ids, root, parts)[1]


def adopt(cache: KvCache, seq: int, ids: Sequence[int], root: Hashable = (), *, parts: bool = True) -> int:
    """Replace a sequence by the first tokens of a text whose pages are known. Return how many they are.

    They are fewer than len(ids): the last token runs in any case, because its logits are wanted.

    root: what else the rows depend on, such as adapters. Only sequences with an equal root share pages.
    parts: the last page may be one of another text that begins alike.
    """
    nodes, n = _find(cache, ids, root, parts)
    held = [
        [NO_PAGE] * first + [pool.share(node.pages[pool.number]) for node in nodes[first:]]
        for table, pool in zip(cache.tables, cache.groups, strict=True)
        for first in [first_page(n, table.window)]
    ]  # before the pages of the sequence become free
    state = cache.pools[-1].share(nodes[-1].pages[-1]) if cache.has_states and nodes else NO_PAGE
    cache.clear(seq, root)
    slot = cache.slots[seq]
    slot.n_past, slot.ids, slot.nodes, slot.is_long = n, list(ids[:n]), nodes[: n // PAGE], 0 < cache.n_short < n
    for pool, pages in zip(cache.groups, held, strict=True):
        for i, page in enumerate(pages):
            cache.set_page(seq, pool, i, page)
    if state != NO_PAGE:
        slot.states[n] = state
    return n


def _find(cache: KvCache, ids: Sequence[int], root: Hashable, parts: bool) -> tuple[list[Node], int]:
    """Return the nodes of the longest known start of a text, and its tokens."""
    ids, index = ids[: len(ids) - 1], cache.index
    if index is None:
        return [], 0
    for is_long in (True, False) if cache.n_short else (False,):
        nodes = index.find((root, is_long), ids)
        ends = [PAGE * (i + 1) for i in range(len(nodes))]
        if parts and nodes and not cache.has_states:
            child, n = index.beside(nodes[-1], ids[ends[-1] :])
            if child is not None:
                nodes.append(child)
                ends.append(ends[-1] + n)
        for n in reversed(ends):
            chain = nodes[: -(-n // PAGE)]
            if (0 < cache.n_short < n) == is_long and _is_whole(cache, chain, n):
                return chain, n
    return [], 0


def _is_whole(cache: KvCache, chain: Sequence[Node], n: int) -> bool:
    """Return whether all pages are there that the token after the first n reads, and the state before it."""
    if cache.has_states and chain[-1].pages[-1] == NO_PAGE:
        return False
    return all(
        node.pages[pool.number] != NO_PAGE
        for table, pool in zip(cache.tables, cache.groups, strict=True)
        for node in chain[first_page(n, table.window) :]
    )
