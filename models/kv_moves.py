"""Copies, shifts, lengthens, saves and restores the sequences of a KvCache."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError
from gguf_run.models.kv_cache import GROUP, CacheLayer, KvCache, first_page
from gguf_run.models.pages import NO_PAGE, PAGE, Pool

KINDS = ("k", "v", "s0", "s1")  # parts of a layer: rows of K and of V, and the states of up to two recurrent ops
_GROUPS = PAGE // GROUP  # of a page


def _kinds(layer: CacheLayer[Any, Any]) -> tuple[str, ...]:
    """Return what a layer holds, by the names of KINDS."""
    kinds = () if layer.cache is None or layer.is_shared else layer.cache.kinds
    return (*kinds, *KINDS[2 : 2 + len(layer.states)])


def _pool(cache: KvCache, layer: CacheLayer[Any, Any]) -> Pool:
    return next(pool for pool, table in zip(cache.pools, cache.tables, strict=False) if table.window == layer.window)


def _groups(cache: KvCache, seq: int, pool: Pool, first: int, end: int) -> NDArray[np.int64]:
    """Return where the groups first .. end of a sequence are in the caches of a pool."""
    numbers = np.arange(first, end)
    pages = np.array(cache.slots[seq].pages[pool.number], np.int64)
    return pages[numbers // _GROUPS] * _GROUPS + numbers % _GROUPS


def forget(cache: KvCache) -> None:
    """Empty the index of a cache: nothing that was computed is found again."""
    for pool in cache.pools:
        for page in range(len(pool.uses)):
            pool.forget(page)
    for slot in cache.slots:
        slot.nodes, slot.n_indexed = [], 0


def outgrown(cache: KvCache, seq: int, n: int) -> list[int]:
    """Make a sequence ready for n more tokens. Return the ids that must run again first, mostly none.

    A sequence that becomes long has another rotation from its first token on. So it is emptied.
    """
    slot = cache.slot(seq)
    was_long, is_long, ids = slot.is_long, 0 < cache.n_short < slot.n_past + n, list[int]()
    if was_long != is_long and slot.n_past:
        ids = slot.ids[: slot.n_past]
        if len(ids) < slot.n_past:
            raise GgufRunError(f"sequence {seq} was loaded without its ids: it cannot become longer than {slot.n_past}")
        cache.keep(seq, 0)
    slot.is_long = is_long
    return ids


def copy_prefix(cache: KvCache, source: int, target: int, n: int) -> int:
    """Replace sequence `target` by the first n tokens of `source`. Return the tokens of `target`: see rewind.

    No row is copied: both sequences use the same pages. The last page is copied when one of them writes to it.
    """
    a = cache.slot(source)
    if not 0 <= n <= a.n_past or source == target:
        raise ValueError(f"cannot copy {n} tokens from sequence {source} to {target}: it has {a.n_past}")
    cache.clear(target, a.root)
    b = cache.slots[target]
    b.n_past, b.ids, b.nodes, b.is_long = a.n_past, list(a.ids), list(a.nodes), a.is_long
    b.n_indexed, b.n_prompt = a.n_indexed, a.n_prompt
    for pool, pages in zip(cache.pools, a.pages, strict=False):
        for i, page in enumerate(pages):
            cache.set_page(target, pool, i, page if page == NO_PAGE else pool.share(page))
    b.states = {at: cache.pools[-1].share(slot) for at, slot in a.states.items()}
    return cache.rewind(n, target)


def shift(cache: KvCache, n_keep: int, n_discard: int, seq: int = 0) -> int:
    """Remove the n_discard tokens after the first n_keep. Later tokens move to the places of the removed tokens.

    The keys of later tokens are turned back by n_discard positions. Keys and values still depend on the removed
    tokens, as in llama.cpp's context shift. So the index never finds them. n_keep and n_discard are multiples of GROUP.

    Returns how many tokens are left, or 0: always with recurrent layers, as no token can be taken out of a state.
    """
    slot = cache.slot(seq)
    if n_keep % GROUP or n_discard % GROUP or n_keep < 0 or not 0 < n_discard <= slot.n_past - n_keep:
        raise ValueError(f"cannot take {n_discard} of {slot.n_past} tokens out behind {n_keep}")
    n_past, slot.n_past = slot.n_past - n_discard, 0  # until all layers have moved
    del slot.ids[n_keep : n_keep + n_discard], slot.nodes[n_keep // PAGE :]
    slot.n_indexed = len(slot.nodes)
    if cache.has_states or not all(_move(cache, seq, pool, n_past, n_keep, n_discard) for pool in cache.groups):
        return cache.keep(seq, 0)
    slot.n_past = n_past
    return cache.keep(seq, n_past)


def _move(cache: KvCache, seq: int, pool: Pool, n_past: int, n_keep: int, n_discard: int) -> bool:
    """Shift a sequence in the caches of one pool. Return False if the next token would read a page that is gone.

    n_past: the tokens that are left. Pages with rows that cannot be moved are released.
    """
    slot = cache.slots[seq]
    pages, end = slot.pages[pool.number], -(-n_past // PAGE)
    behind = max((i + 1 for i, page in enumerate(pages) if page == NO_PAGE), default=0)
    first, start = n_keep // PAGE, n_keep // GROUP
    if PAGE * behind > n_keep:
        first = max(first, -(-(PAGE * behind - n_discard) // PAGE), -(-n_keep // PAGE))
        start = first * _GROUPS
        for i in range(first):
            if pages[i] != NO_PAGE:
                pool.release(pages[i])
                cache.set_page(seq, pool, i, NO_PAGE)
    if NO_PAGE in pages[first_page(n_past, cache.tables[pool.number].window) : first]:
        return False
    source = _groups(cache, seq, pool, start + n_discard // GROUP, -(-(n_past + n_discard) // GROUP))
    spare = pages[end:]
    del pages[end:]
    for i in range(first, end):
        if pages[i] == NO_PAGE:
            cache.set_page(seq, pool, i, spare.pop() if spare else pool.take())
        cache.own(seq, pool, i, copies=False)
    target = _groups(cache, seq, pool, start, -(-n_past // GROUP))
    for handle, rotation in cache.caches(pool):
        handle.move(source, target, rotation and rotation.of(slot.is_long), -n_discard)
    for page in reversed(spare):
        pool.release(page)
    return True


def export(cache: KvCache, seq: int = 0) -> Iterator[tuple[int, str, Any]]:
    """Yield (layer, kind, bytes) for each layer: what it holds of a sequence, as the backend stores it.

    kind: one of KINDS.
    """
    slot = cache.slot(seq)
    for il, layer in enumerate(cache.layers):
        for kind in _kinds(layer):
            if layer.cache is not None and kind in "kv":
                pool = _pool(cache, layer)
                first = _GROUPS * first_page(slot.n_past, layer.window)
                groups = _groups(cache, seq, pool, first, -(-slot.n_past // GROUP))
                yield il, kind, layer.cache.read(kind, groups)
            else:
                yield il, kind, layer.states[int(kind[1])].read(slot.states.get(slot.n_past, 0))


def restore(
    cache: KvCache, n_past: int, parts: Iterable[tuple[int, str, Any]], seq: int = 0, ids: Sequence[int] | None = None
) -> None:
    """Replace a sequence by n_past tokens. parts: what `export` yields. ids: of the tokens; None: not known.

    Raises GgufRunError if the parts do not fit. The sequence is empty after any error, those of `parts` included.
    """
    cache.clear(seq)
    if n_past > cache.n_ctx:
        raise GgufRunError(f"the saved cache does not fit this model: {n_past} tokens, the context has {cache.n_ctx}")
    missing = {(il, kind) for il, layer in enumerate(cache.layers) for kind in _kinds(layer)}
    try:
        _take_pages(cache, seq, n_past)
        for il, kind, data in parts:
            if (il, kind) not in missing or not _write(cache, seq, il, kind, n_past, data):
                raise GgufRunError(f"the saved cache does not fit this model: layer {il} {kind}, {len(data)} bytes")
            missing.remove((il, kind))
        if missing:
            raise GgufRunError(f"the saved cache does not fit this model: parts are missing for {n_past} tokens")
    except BaseException:
        cache.keep(seq, 0)
        raise
    slot = cache.slots[seq]
    slot.n_past, slot.ids, slot.is_long = n_past, list(ids or ()), 0 < cache.n_short < n_past
    slot.n_indexed = 0  # the context may have been shifted before it was saved


def _take_pages(cache: KvCache, seq: int, n_past: int) -> None:
    """Give an empty sequence pages, and slots of states, for n_past tokens."""
    for pool in cache.groups:
        first = first_page(n_past, cache.tables[pool.number].window)
        for i in range(-(-n_past // PAGE)):
            cache.set_page(seq, pool, i, NO_PAGE if i < first else pool.take())
    if cache.has_states:
        cache.slots[seq].states[n_past] = cache.pools[-1].take()


def _write(cache: KvCache, seq: int, il: int, kind: str, n_past: int, data: Any) -> bool:
    """Store a part of a layer: its last groups, if the part has more than the layer needs. Return whether it fits."""
    layer = cache.layers[il]
    if layer.cache is None or kind not in "kv":
        return layer.states[int(kind[1])].write(cache.slots[seq].states[n_past], data)
    first, end = _GROUPS * first_page(n_past, layer.window), -(-n_past // GROUP)
    n_groups, rest = divmod(len(data), layer.cache.group_bytes(kind))
    if rest or not end - first <= n_groups <= (end if layer.window else end - first):
        return False
    layer.cache.write(kind, _groups(cache, seq, _pool(cache, layer), first, end), data)
    return True
