"""The KV cache of a model counts the tokens of each sequence, and rewinds, copies, shifts, saves and restores them.

Backends make the caches of the layers (operands.CacheHandle) and know their formats. The constants and rules that all
formats share are here.

Layers with a window hold only the last positions of a sequence. An operation that needs older positions empties the
sequence. Such a method returns how many tokens are left, and the caller runs the other tokens again.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.frozen import frozen
from gguf_run.models.backend import Run
from gguf_run.models.operands import CacheHandle, Rotation

GROUP = 32  # positions that backends store side by side and move together
BLOCK = 32  # columns of a row that share a scale, in cache types with blocks; only heads of whole blocks are rotated
_MOST_ROTATED_BITS = 8  # rotation lowers the divergence of 8-bit types by a quarter to a third, see docs/kv_cache.md


def rotates(bits: int, head_dim: int, rotate: bool | None, has_scales: bool) -> bool:
    """Return whether a head's rows go through the Hadamard transform before they are stored.

    bits: bits of a stored element.
    rotate: what the user wants, see backend.CacheType.
    has_scales: whether the type has static scales. These were measured on rows that are not rotated.
    """
    wanted = bits <= _MOST_ROTATED_BITS and not has_scales if rotate is None else rotate
    return wanted and head_dim % BLOCK == 0


def rows_stored(n_ctx: int, n_batch: int, window: int, *, multiple: int, span: int) -> int:
    """Return how many positions of a sequence a layer stores: all n_ctx, or its window, a batch and a group.

    A batch is appended before its first token reads the window, so both must fit. With one group more, a batch can be
    removed again, and what is left can be saved in whole groups.

    multiple: n_ctx is rounded up to a multiple of this.
    span: positions that attention reads at once. The ring of a window has whole spans.
    """
    full = -(-n_ctx // multiple) * multiple
    return min(full, -(-(window + n_batch + GROUP) // span) * span) if window else full


@dataclass
class _Slot:
    """One sequence."""

    n_past: int = 0  # number of tokens
    n_lost: int = 0  # number of first tokens that some layer no longer holds
    is_long: bool = False  # the keys have the rotation of long sequences
    ids: list[int] = field(default_factory=list)  # of the tokens


@frozen
class CacheLayer:
    """The cache of one layer."""

    cache: CacheHandle
    window: int  # positions that the layer looks back on, a token's own included; 0: all
    rotation: Rotation | None


class KvCache:
    """n_seq sequences, numbered from 0, of up to n_ctx tokens each.

    Methods raise GgufRunError for a sequence that does not exist.
    """

    def __init__(self, layers: Sequence[CacheLayer], n_ctx: int, n_seq: int) -> None:
        self.n_ctx, self.n_seq = n_ctx, n_seq
        self._layers = layers
        self._slots = [_Slot() for _ in range(n_seq)]
        self._n_held = min([n_ctx, *(layer.cache.n_ctx for layer in layers)])
        self._window = max(layer.window for layer in layers)
        rotations = [layer.rotation for layer in layers if layer.rotation is not None]
        # The tokens of a sequence up to which its rotation is that of short ones; 0: there is one rotation.
        self._n_short = max((r.n_short for r in rotations if r.long_inv_freq is not None), default=0)

    def n_past(self, seq: int = 0) -> int:
        """Return the number of tokens of a sequence."""
        return self._slot(seq).n_past

    def _slot(self, seq: int) -> _Slot:
        if not 0 <= seq < self.n_seq:
            raise GgufRunError(
                f"sequence {seq} does not exist: the cache has {self.n_seq} (n_seq), numbered from 0 to "
                f"{self.n_seq - 1}; load the model with more"
            )
        return self._slots[seq]

    def begin(self, counts: Mapping[int, int]) -> list[Run]:
        """Return the runs of a step that appends tokens, {seq: how many}. The tokens count only after `end`."""
        runs = [Run(seq, self._slot(seq).n_past, n, self._slots[seq].is_long) for seq, n in counts.items()]
        for seq, n_past, n, _ in runs:
            # An interrupted step adds no tokens, but has overwritten old rows: n_lost is set first.
            self._slots[seq].n_lost = max(self._slots[seq].n_lost, n_past + n - self._n_held)
        return runs

    def end(self, runs: Sequence[Run], ids: Sequence[int]) -> None:
        """Count the tokens of a step that has run. ids: of all runs."""
        at = 0
        for seq, n_past, n, _ in runs:
            slot = self._slots[seq]
            slot.n_past = n_past + n
            slot.ids[n_past:] = ids[at : at + n]
            at += n

    def outgrown(self, seq: int, n: int) -> list[int]:
        """Make a sequence ready for n more tokens. Return the ids that must run again first, mostly none.

        A sequence that becomes long has another rotation from its first token on. So it is emptied.
        """
        slot = self._slot(seq)
        was_long, slot.is_long = slot.is_long, 0 < self._n_short < slot.n_past + n
        if was_long == slot.is_long or not slot.n_past:
            return []
        ids = slot.ids[: slot.n_past]
        if len(ids) < slot.n_past:
            raise GgufRunError(f"sequence {seq} was loaded without its ids: it cannot become longer than {slot.n_past}")
        slot.n_past = slot.n_lost = 0
        return ids

    def rewind(self, n_past: int, seq: int = 0) -> int:
        """Forget a sequence's tokens from position n_past on. Return how many tokens are left: n_past or 0.

        n_past tokens are left if n_past is at most n_batch below the greatest length that the sequence has had.
        """
        slot = self._slot(seq)
        if not 0 <= n_past <= slot.n_past:
            raise ValueError(f"cannot rewind to {n_past}: {slot.n_past} tokens are in the context")
        return self._set(slot, n_past, slot.n_lost)

    def _set(self, slot: _Slot, n_past: int, n_lost: int) -> int:
        """Set a slot to n_past tokens, or to 0 if the next token would read one of the first n_lost. Return n_past."""
        possible = n_past and max(0, n_past + 1 - self._window) >= n_lost
        possible = possible and (n_past > self._n_short or not slot.is_long)
        slot.n_past, slot.n_lost = (n_past, n_lost) if possible else (0, 0)
        return slot.n_past

    def copy_prefix(self, source: int, target: int, n: int) -> int:
        """Replace sequence `target` by the first n tokens of `source`. Return the tokens of `target`: n or 0."""
        a, b = self._slot(source), self._slot(target)
        if not 0 <= n <= a.n_past or source == target:
            raise ValueError(f"cannot copy {n} tokens from sequence {source} to {target}: it has {a.n_past}")
        b.n_past = b.n_lost = 0
        b.is_long, b.ids = a.is_long, a.ids[:n]
        for layer in self._layers:
            layer.cache.copy(source, target, n if a.n_past <= layer.cache.n_ctx else layer.cache.n_ctx)
        return self._set(b, n, a.n_lost)

    def shift(self, n_keep: int, n_discard: int, seq: int = 0) -> int:
        """Remove the n_discard tokens after the first n_keep. Later tokens move to the places of the removed tokens.

        The keys of later tokens are turned back by n_discard positions. Keys and values still depend on the removed
        tokens, as in llama.cpp's context shift. n_keep and n_discard are multiples of GROUP.

        Returns how many tokens are left, or 0.
        """
        slot = self._slot(seq)
        if n_keep % GROUP or n_discard % GROUP or n_keep < 0 or not 0 < n_discard <= slot.n_past - n_keep:
            raise ValueError(f"cannot take {n_discard} of {slot.n_past} tokens out behind {n_keep}")
        n_past, n_lost = slot.n_past, slot.n_lost
        slot.n_past = 0  # until all layers have moved
        for layer in self._layers:
            rotation = layer.rotation.of(slot.is_long) if layer.rotation else None
            layer.cache.shift(seq, n_past, n_keep, n_discard, rotation)
        del slot.ids[n_keep : n_keep + n_discard]
        return self._set(slot, n_past - n_discard, max(n_keep, n_lost - n_discard) if n_lost else 0)

    def export(self, seq: int = 0) -> Iterator[tuple[int, str, Any]]:
        """Yield (layer, "k" or "v", bytes) for each layer: what it holds of a sequence, as the backend stores it."""
        slot = self._slot(seq)
        for il, layer in enumerate(self._layers):
            first = -(-slot.n_lost // GROUP) if layer.window else 0
            for kind in layer.cache.kinds:
                yield il, kind, layer.cache.read(seq, kind, first, -(-slot.n_past // GROUP))

    def load(
        self, n_past: int, parts: Iterable[tuple[int, str, Any]], seq: int = 0, ids: Sequence[int] | None = None
    ) -> None:
        """Replace a sequence by n_past tokens. parts: what `export` yields. ids: of the tokens; None: not known.

        Raises GgufRunError if the parts do not fit. The sequence is empty after any error, those of `parts` included.
        """
        slot = self._slot(seq)
        slot.n_past = slot.n_lost = 0
        slot.is_long, slot.ids = 0 < self._n_short < n_past, list(ids or ())
        n_lost, end = 0, -(-n_past // GROUP)
        missing = {(il, kind) for il, layer in enumerate(self._layers) for kind in layer.cache.kinds}
        for il, kind, data in parts:
            first = self._layers[il].cache.write(seq, kind, end, data) if (il, kind) in missing else None
            if first is None or (first and not self._layers[il].window):
                raise GgufRunError(f"the saved cache does not fit this model: layer {il} {kind}, {len(data)} bytes")
            missing.remove((il, kind))
            n_lost = max(n_lost, first * GROUP)
        if missing or n_past > self.n_ctx or (self._set(slot, n_past, n_lost) != n_past):
            raise GgufRunError(f"the saved cache does not fit this model: parts are missing for {n_past} tokens")
