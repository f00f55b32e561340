"""Copies, shifts, saves and restores the sequences of a KvCache."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gguf_run.formats.errors import GgufRunError
from gguf_run.models.kv_cache import GROUP, N_STATES, CacheLayer, KvCache

KINDS = ("k", "v", "s0", "s1")  # parts of a layer: rows of K and of V, and the states of up to two recurrent ops


def _kinds(layer: CacheLayer[Any, Any]) -> tuple[str, ...]:
    """Return what a layer holds, by the names of KINDS."""
    kinds = () if layer.cache is None or layer.is_shared else layer.cache.kinds
    return (*kinds, *KINDS[2 : 2 + len(layer.states)])


def copy_prefix(cache: KvCache, source: int, target: int, n: int) -> int:
    """Replace sequence `target` by the first n tokens of `source`. Return the tokens of `target`: see rewind."""
    a, b = cache.slot(source), cache.slot(target)
    if not 0 <= n <= a.n_past or source == target:
        raise ValueError(f"cannot copy {n} tokens from sequence {source} to {target}: it has {a.n_past}")
    b.n_past = b.n_lost = 0
    b.is_long, b.ids, b.states = a.is_long, a.ids[:n], list(a.states)
    for layer in cache.layers:
        if layer.cache is not None and not layer.is_shared:
            layer.cache.copy(source, target, n if a.n_past <= layer.cache.n_ctx else layer.cache.n_ctx)
        for state, i in itertools.product(layer.states, range(N_STATES)):
            state.copy(source * N_STATES + i, target * N_STATES + i)
    return cache.reset(b, n, a.n_lost)


def shift(cache: KvCache, n_keep: int, n_discard: int, seq: int = 0) -> int:
    """Remove the n_discard tokens after the first n_keep. Later tokens move to the places of the removed tokens.

    The keys of later tokens are turned back by n_discard positions. Keys and values still depend on the removed
    tokens, as in llama.cpp's context shift. n_keep and n_discard are multiples of GROUP.

    Returns how many tokens are left, or 0: always with recurrent layers, as no token can be taken out of a state.
    """
    slot = cache.slot(seq)
    if n_keep % GROUP or n_discard % GROUP or n_keep < 0 or not 0 < n_discard <= slot.n_past - n_keep:
        raise ValueError(f"cannot take {n_discard} of {slot.n_past} tokens out behind {n_keep}")
    n_past, n_lost = slot.n_past, slot.n_lost
    slot.n_past = 0  # until all layers have moved
    del slot.ids[n_keep : n_keep + n_discard]
    if cache.has_states:
        return cache.reset(slot, 0, 0)
    for layer in cache.layers:
        if layer.cache is None or layer.is_shared:
            continue
        rotation = layer.rotation.of(slot.is_long) if layer.rotation else None
        layer.cache.shift(seq, n_past, n_keep, n_discard, rotation)
    return cache.reset(slot, n_past - n_discard, max(n_keep, n_lost - n_discard) if n_lost else 0)


def export(cache: KvCache, seq: int = 0) -> Iterator[tuple[int, str, Any]]:
    """Yield (layer, kind, bytes) for each layer: what it holds of a sequence, as the backend stores it.

    kind: one of KINDS.
    """
    slot = cache.slot(seq)
    for il, layer in enumerate(cache.layers):
        first = -(-slot.n_lost // GROUP) if layer.window else 0
        for kind in _kinds(layer):
            if layer.cache is not None and kind in "kv":
                yield il, kind, layer.cache.read(seq, kind, first, -(-slot.n_past // GROUP))
            else:
                yield il, kind, layer.states[int(kind[1])].read(seq * N_STATES + slot.state)


def _write(cache: KvCache, seq: int, il: int, kind: str, end: int, data: Any) -> int | None:
    """Store a part of a layer. Return its first group, None if the part does not fit."""
    layer = cache.layers[il]
    if layer.cache is not None and kind in "kv":
        return layer.cache.write(seq, kind, end, data)
    return 0 if layer.states[int(kind[1])].write(seq * N_STATES, data) else None


def restore(
    cache: KvCache, n_past: int, parts: Iterable[tuple[int, str, Any]], seq: int = 0, ids: Sequence[int] | None = None
) -> None:
    """Replace a sequence by n_past tokens. parts: what `export` yields. ids: of the tokens; None: not known.

    Raises GgufRunError if the parts do not fit. The sequence is empty after any error, those of `parts` included.
    """
    slot = cache.slot(seq)
    cache.reset(slot, 0, 0)
    slot.is_long, slot.ids = 0 < cache.n_short < n_past, list(ids or ())
    n_lost, end = 0, -(-n_past // GROUP)
    missing = {(il, kind) for il, layer in enumerate(cache.layers) for kind in _kinds(layer)}
    for il, kind, data in parts:
        first = _write(cache, seq, il, kind, end, data) if (il, kind) in missing else None
        if first is None or (first and not cache.layers[il].window):
            raise GgufRunError(f"the saved cache does not fit this model: layer {il} {kind}, {len(data)} bytes")
        missing.remove((il, kind))
        n_lost = max(n_lost, first * GROUP)
    fits = not missing and n_past <= cache.n_ctx
    slot.states[0] = n_past
    if cache.reset(slot, n_past if fits else 0, n_lost) != n_past or not fits:
        raise GgufRunError(f"the saved cache does not fit this model: parts are missing for {n_past} tokens")
