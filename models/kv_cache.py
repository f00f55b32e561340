"""The KV cache of a model counts the tokens of each sequence, and rewinds, copies, shifts, saves and restores them.

Backends make the caches of the layers (operands.CacheHandle) and know their formats. The constants and rules that all
formats share are here.

Layers with a window hold only the last positions of a sequence. An operation that needs older positions empties the
sequence. Such a method returns how many tokens are left, and the caller runs the other tokens again.

A recurrent layer has a state in place of rows, and no token can be taken out of it. A sequence has N_STATES slots: for
the state after its last token, for the one that a step writes, and for older ones, to which it can go back.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.frozen import frozen
from gguf_run.models.backend import Run
from gguf_run.models.operands import Cache, Rotation, State

GROUP = 32  # positions that backends store side by side and move together
BLOCK = 32  # columns of a row that share a scale, in cache types with blocks; only heads of whole blocks are rotated
KINDS = ("k", "v", "s0", "s1")  # parts of a layer: rows of K and of V, and the states of up to two recurrent ops
N_STATES = 4  # slots of a recurrent state that each sequence has
_PROMPT = 16  # the state after the last run of so many tokens is kept: the next text often begins with the same tokens
_MARK = 64  # the state after each so many tokens is kept until its slot is needed
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
    states: list[int] = field(default_factory=lambda: [0] * N_STATES)  # tokens before the state of each slot; 0: free
    state: int = 0  # the slot of the state after n_past tokens
    n_prompt: int = 0  # tokens before the state that is kept for the next text


@frozen
class CacheLayer(Generic[Cache, State]):
    """The cache of one layer."""

    cache: Cache | None  # None: the layer has no attention
    window: int  # positions that the layer looks back on, a token's own included; 0: all
    rotation: Rotation | None
    states: tuple[State, ...] = ()  # of its recurrent ops: N_STATES slots for each sequence
    is_shared: bool = False  # the cache is that of an earlier layer, and listed there

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the layer holds, by the names of KINDS."""
        kinds = () if self.cache is None or self.is_shared else self.cache.kinds
        return (*kinds, *KINDS[2 : 2 + len(self.states)])


class KvCache:
    """n_seq sequences, numbered from 0, of up to n_ctx tokens each.

    Methods raise GgufRunError for a sequence that does not exist.
    """

    def __init__(self, layers: Sequence[CacheLayer[Any, Any]], n_ctx: int, n_seq: int) -> None:
        self.n_ctx, self.n_seq = n_ctx, n_seq
        self._layers = layers
        self._slots = [_Slot() for _ in range(n_seq)]
        self._n_held = min([n_ctx, *(layer.cache.n_ctx for layer in layers if layer.cache is not None)])
        self._has_states = any(layer.states for layer in layers)
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
        return [self._begin(seq, self._slot(seq), n) for seq, n in counts.items()]

    def _begin(self, seq: int, slot: _Slot, n: int) -> Run:
        # An interrupted step adds no tokens, but has overwritten old rows and a state: they are given up first.
        slot.n_lost = max(slot.n_lost, slot.n_past + n - self._n_held)
        old = [(0 < at == slot.n_prompt, at, i) for i, at in enumerate(slot.states) if i != slot.state]
        _, _, writes = min(old)
        slot.states[writes] = 0
        return Run(seq, slot.n_past, n, slot.is_long, seq * N_STATES + slot.state, seq * N_STATES + writes)

    def end(self, runs: Sequence[Run], ids: Sequence[int]) -> None:
        """Count the tokens of a step that has run. ids: of all runs."""
        at = 0
        for seq, n_past, n, _, _, writes in runs:
            slot = self._slots[seq]
            slot.n_past = n_past + n
            if n == 1 and n_past % _MARK and n_past != slot.n_prompt:
                slot.states[slot.state] = 0
            slot.state = writes % N_STATES
            slot.states[slot.state] = slot.n_past
            slot.n_prompt = slot.n_past if n >= _PROMPT else slot.n_prompt
            slot.ids[n_past:] = ids[at : at + n]
            at += n

    def tail(self, n: int) -> int:
        """Return how many of the last of n tokens run by themselves, so that the state before them is kept.

        Chat templates end a prompt with the start of the answer, which the next prompt may have in another form.
        """
        return _PROMPT - 1 if self._has_states and n > 2 * _PROMPT else 0

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
        self._set(slot, 0, 0)
        return ids

    def rewind(self, n_past: int, seq: int = 0) -> int:
        """Forget a sequence's tokens from position n_past on. Return how many tokens are left, at most n_past.

        n_past tokens are left if n_past is at most n_batch below the greatest length that the sequence has had. Else 0
        are left. With recurrent layers, as many are left as a state is kept for, or 0.
        """
        slot = self._slot(seq)
        if not 0 <= n_past <= slot.n_past:
            raise ValueError(f"cannot rewind to {n_past}: {slot.n_past} tokens are in the context")
        return self._set(slot, n_past, slot.n_lost)

    def _set(self, slot: _Slot, n_past: int, n_lost: int) -> int:
        """Set a slot to n_past tokens, or to fewer that a state is kept for. Return how many.

        They are 0 if the next token would read one of the first n_lost.
        """
        if self._has_states:
            n_past, slot.state = max(((at, i) for i, at in enumerate(slot.states) if at <= n_past), default=(0, 0))
        possible = n_past and max(0, n_past + 1 - self._window) >= n_lost
        possible = possible and (n_past > self._n_short or not slot.is_long)
        slot.n_past, slot.n_lost = (n_past, n_lost) if possible else (0, 0)
        slot.states = [at if at <= slot.n_past else 0 for at in slot.states]
        return slot.n_past

    def copy_prefix(self, source: int, target: int, n: int) -> int:
        """Replace sequence `target` by the first n tokens of `source`. Return the tokens of `target`: see rewind."""
        a, b = self._slot(source), self._slot(target)
        if not 0 <= n <= a.n_past or source == target:
            raise ValueError(f"cannot copy {n} tokens from sequence {source} to {target}: it has {a.n_past}")
        b.n_past = b.n_lost = 0
        b.is_long, b.ids, b.states = a.is_long, a.ids[:n], list(a.states)
        for layer in self._layers:
            if layer.cache is not None and not layer.is_shared:
                layer.cache.copy(source, target, n if a.n_past <= layer.cache.n_ctx else layer.cache.n_ctx)
            for state, i in itertools.product(layer.states, range(N_STATES)):
                state.copy(source * N_STATES + i, target * N_STATES + i)
        return self._set(b, n, a.n_lost)

    def shift(self, n_keep: int, n_discard: int, seq: int = 0) -> int:
        """Remove the n_discard tokens after the first n_keep. Later tokens move to the places of the removed tokens.

        The keys of later tokens are turned back by n_discard positions. Keys and values still depend on the removed
        tokens, as in llama.cpp's context shift. n_keep and n_discard are multiples of GROUP.

        Returns how many tokens are left, or 0: always with recurrent layers, as no token can be taken out of a state.
        """
        slot = self._slot(seq)
        if n_keep % GROUP or n_discard % GROUP or n_keep < 0 or not 0 < n_discard <= slot.n_past - n_keep:
            raise ValueError(f"cannot take {n_discard} of {slot.n_past} tokens out behind {n_keep}")
        n_past, n_lost = slot.n_past, slot.n_lost
        slot.n_past = 0  # until all layers have moved
        del slot.ids[n_keep : n_keep + n_discard]
        if self._has_states:
            return self._set(slot, 0, 0)
        for layer in self._layers:
            if layer.cache is None or layer.is_shared:
                continue
            rotation = layer.rotation.of(slot.is_long) if layer.rotation else None
            layer.cache.shift(seq, n_past, n_keep, n_discard, rotation)
        return self._set(slot, n_past - n_discard, max(n_keep, n_lost - n_discard) if n_lost else 0)

    def export(self, seq: int = 0) -> Iterator[tuple[int, str, Any]]:
        """Yield (layer, kind, bytes) for each layer: what it holds of a sequence, as the backend stores it.

        kind: one of KINDS.
        """
        slot = self._slot(seq)
        for il, layer in enumerate(self._layers):
            first = -(-slot.n_lost // GROUP) if layer.window else 0
            for kind in layer.kinds:
                if layer.cache is not None and kind in "kv":
                    yield il, kind, layer.cache.read(seq, kind, first, -(-slot.n_past // GROUP))
                else:
                    yield il, kind, layer.states[int(kind[1])].read(seq * N_STATES + slot.state)

    def _write(self, seq: int, il: int, kind: str, end: int, data: Any) -> int | None:
        """Store a part of a layer. Return its first group, None if the part does not fit."""
        layer = self._layers[il]
        if layer.cache is not None and kind in "kv":
            return layer.cache.write(seq, kind, end, data)
        return 0 if layer.states[int(kind[1])].write(seq * N_STATES, data) else None

    def load(
        self, n_past: int, parts: Iterable[tuple[int, str, Any]], seq: int = 0, ids: Sequence[int] | None = None
    ) -> None:
        """Replace a sequence by n_past tokens. parts: what `export` yields. ids: of the tokens; None: not known.

        Raises GgufRunError if the parts do not fit. The sequence is empty after any error, those of `parts` included.
        """
        slot = self._slot(seq)
        self._set(slot, 0, 0)
        slot.is_long, slot.ids = 0 < self._n_short < n_past, list(ids or ())
        n_lost, end = 0, -(-n_past // GROUP)
        missing = {(il, kind) for il, layer in enumerate(self._layers) for kind in layer.kinds}
        for il, kind, data in parts:
            first = self._write(seq, il, kind, end, data) if (il, kind) in missing else None
            if first is None or (first and not self._layers[il].window):
                raise GgufRunError(f"the saved cache does not fit this model: layer {il} {kind}, {len(data)} bytes")
            missing.remove((il, kind))
            n_lost = max(n_lost, first * GROUP)
        fits = not missing and n_past <= self.n_ctx
        slot.states[0] = n_past
        if self._set(slot, n_past if fits else 0, n_lost) != n_past or not fits:
            raise GgufRunError(f"the saved cache does not fit this model: parts are missing for {n_past} tokens")
