"""The KV cache of a model as one thing: how many tokens of each sequence it holds, and what can be done with them.

It stands above the caches of the layers (models.backend.Cache), whose formats it does not know. Layers with a window
hold only the last positions of a sequence. What needs more than they hold ends with an empty sequence: those methods
return how many tokens are left, and the caller runs the rest again.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf_run.formats.errors import GgufRunError
from gguf_run.models.backend import Cache, Rope, Run

GROUP = 32  # positions that are moved together: backends store them side by side


@dataclass
class _Slot:
    """One sequence: n_past of its tokens are here. n_lost: of these, how many are not in all layers any more."""

    n_past: int = 0
    n_lost: int = 0


@dataclass(frozen=True)
class CacheLayer:
    """window: positions that the layer looks back on, itself included (0: all)."""

    cache: Cache
    window: int
    rope: Rope | None


class KvCache:
    """n_seq sequences, numbered from 0 on, of up to n_ctx tokens each. Methods raise GgufRunError for a sequence that
    there is not."""

    def __init__(self, layers: Sequence[CacheLayer], n_ctx: int, n_seq: int) -> None:
        self.n_ctx, self.n_seq = n_ctx, n_seq
        self._layers = layers
        self._slots = [_Slot() for _ in range(n_seq)]
        self._n_held = min([n_ctx, *(layer.cache.n_ctx for layer in layers)])
        self._window = max(layer.window for layer in layers)

    def n_past(self, seq: int = 0) -> int:
        """Tokens of a sequence."""
        return self._slot(seq).n_past

    def _slot(self, seq: int) -> _Slot:
        if not 0 <= seq < self.n_seq:
            raise GgufRunError(
                f"sequence {seq} does not exist: the cache has {self.n_seq} (n_seq), numbered from 0 to "
                f"{self.n_seq - 1}; load the model with more"
            )
        return self._slots[seq]

    def begin(self, counts: Mapping[int, int]) -> list[Run]:
        """The runs of a step that appends tokens, {seq: how many}. They count only after `end`."""
        runs = [Run(seq, self._slot(seq).n_past, n) for seq, n in counts.items()]
        for seq, n_past, n in runs:
            # an interrupted step has written over what it pushed out, but has added nothing
            self._slots[seq].n_lost = max(self._slots[seq].n_lost, n_past + n - self._n_held)
        return runs

    def end(self, runs: Sequence[Run]) -> None:
        for seq, n_past, n in runs:
            self._slots[seq].n_past = n_past + n

    def rewind(self, n_past: int, seq: int = 0) -> int:
        """Forget a sequence's tokens from position n_past on; returns how many are left: n_past or 0.

        Going back by a batch (n_batch) or less from the longest it has been is always possible.
        """
        slot = self._slot(seq)
        if not 0 <= n_past <= slot.n_past:
            raise ValueError(f"cannot rewind to {n_past}: {slot.n_past} tokens are in the context")
        return self._set(slot, n_past, slot.n_lost)

    def _set(self, slot: _Slot, n_past: int, n_lost: int) -> int:
        """The slot holds n_past tokens but for the first n_lost; nothing, if the next one would look back on those."""
        possible = n_past and max(0, n_past + 1 - self._window) >= n_lost
        slot.n_past, slot.n_lost = (n_past, n_lost) if possible else (0, 0)
        return slot.n_past

    def copy_prefix(self, source: int, target: int, n: int) -> int:
        """Make the first n tokens of a sequence another one's only content; returns how many that are: n or 0."""
        a, b = self._slot(source), self._slot(target)
        if not 0 <= n <= a.n_past or source == target:
            raise ValueError(f"cannot copy {n} tokens from sequence {source} to {target}: it has {a.n_past}")
        b.n_past = b.n_lost = 0
        for layer in self._layers:
            layer.cache.copy(source, target, n if a.n_past <= layer.cache.n_ctx else layer.cache.n_ctx)
        return self._set(b, n, a.n_lost)

    def shift(self, n_keep: int, n_discard: int, seq: int = 0) -> int:
        """Take n_discard tokens out behind the first n_keep, both multiples of GROUP; those that follow move up.

        Their keys are turned back by n_discard positions; their keys and values still are what they were with the
        tokens that are gone (as llama.cpp's context shift). Returns how many tokens are left, or 0.
        """
        slot = self._slot(seq)
        if n_keep % GROUP or n_discard % GROUP or n_keep < 0 or not 0 < n_discard <= slot.n_past - n_keep:
            raise ValueError(f"cannot take {n_discard} of {slot.n_past} tokens out behind {n_keep}")
        n_past, n_lost = slot.n_past, slot.n_lost
        slot.n_past = 0  # until all layers are done
        for layer in self._layers:
            layer.cache.shift(seq, n_past, n_keep, n_discard, layer.rope)
        return self._set(slot, n_past - n_discard, max(n_keep, n_lost - n_discard) if n_lost else 0)

    def export(self, seq: int = 0) -> Iterator[tuple[int, str, Any]]:
        """Yield (layer, "k" or "v", bytes) of all that is held of a sequence, as the backends store it."""
        slot = self._slot(seq)
        for il, layer in enumerate(self._layers):
            first = -(-slot.n_lost // GROUP) if layer.window else 0
            for kind in "kv":
                yield il, kind, layer.cache.read(seq, kind, first, -(-slot.n_past // GROUP))

    def load(self, n_past: int, parts: Iterable[tuple[int, str, Any]], seq: int = 0) -> None:
        """Make what `export` gave for n_past tokens a sequence's only content. GgufRunError if the parts do not fit;
        then, or if iterating over them fails, the sequence is empty."""
        slot = self._slot(seq)
        slot.n_past = slot.n_lost = 0
        n_lost, end = 0, -(-n_past // GROUP)
        missing = {(il, kind) for il in range(len(self._layers)) for kind in "kv"}
        for il, kind, data in parts:
            first = self._layers[il].cache.write(seq, kind, end, data) if (il, kind) in missing else None
            if first is None or (first and not self._layers[il].window):
                raise GgufRunError(f"the saved cache does not fit this model: layer {il} {kind}, {len(data)} bytes")
            missing.remove((il, kind))
            n_lost = max(n_lost, first * GROUP)
        if missing or n_past > self.n_ctx or (self._set(slot, n_past, n_lost) != n_past):
            raise GgufRunError(f"the saved cache does not fit this model: parts are missing for {n_past} tokens")
