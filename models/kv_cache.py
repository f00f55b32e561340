"""The KV cache of a model counts the tokens of each sequence, and gives them pages. kv_moves.py has the rest.

Backends make the caches of the layers (handles.CacheHandle) and know their formats. The constants and rules that all
formats share are here.

Layers with a window release the pages behind it. An operation that needs older positions looks for them in the index,
and else empties the sequence. Such a method returns how many tokens are left, and the caller runs the others again.

A recurrent layer has a state in place of rows, and no token can be taken out of it. States have slots, which are
counted like pages. A sequence holds up to four: for its last state, the one that a step writes, the one before a batch,
and that of its prompt. States at the ends of pages stay findable as long as their slots are not needed.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.frozen import frozen
from gguf_run.models.backend import Run
from gguf_run.models.operands import Rotation
from gguf_run.models.ops import Cache, State
from gguf_run.models.pages import NO_PAGE, PAGE, CacheFullError, Node, PageTable, Pool

if TYPE_CHECKING:
    from gguf_run.models.prefix_index import PrefixIndex

GROUP = 32  # positions that backends store side by side and move together: half a page
N_STATES = 6  # slots of a recurrent state for each sequence
_PROMPT = 16  # the state after the last run of so many tokens is kept: the next text often begins with the same tokens


@dataclass
class Slot:
    """One sequence."""

    pages: list[list[int]]  # of each group: the page of each PAGE positions; NO_PAGE: it is behind the window
    n_past: int = 0  # number of tokens
    is_long: bool = False  # the keys have the rotation of long sequences
    ids: list[int] = field(default_factory=list)  # of the tokens
    root: Hashable = ()  # what makes the rows of equal tokens differ: see kv_find.adopt
    nodes: list[Node] = field(default_factory=list)  # of its first pages in the index
    n_indexed: int = 1 << 30  # the most pages that may enter the index
    states: dict[int, int] = field(default_factory=dict)  # slots of held states, by the number of tokens before them
    writes: int = NO_PAGE  # the slot of the state that a step writes
    n_prompt: int = 0  # tokens before the state that is kept for the next text


@frozen
class CacheLayer(Generic[Cache, State]):
    """The cache of one layer."""

    cache: Cache | None  # None: the layer has no attention
    window: int  # of the layer's page table; 0: all positions
    rotation: Rotation | None
    states: tuple[State, ...] = ()  # of its recurrent ops
    is_shared: bool = False  # the cache is that of an earlier layer, and listed there


class KvCache:
    """n_seq sequences, numbered from 0, of up to n_ctx tokens each.

    Methods raise GgufRunError for a sequence that does not exist.
    """

    def __init__(self, layers: Sequence[CacheLayer[Any, Any]], tables: Sequence[PageTable], n_ctx: int) -> None:
        """tables: one for each window of `layers`, first that of window 0, which every model has."""
        self.n_ctx, self.n_seq = n_ctx, len(tables[0].versions)
        self.layers, self.tables = layers, tables
        self.has_states = any(layer.states for layer in layers)
        self.pools = [Pool(i, table.n_pages) for i, table in enumerate(tables)]
        self.groups = self.pools[:]  # without the slots of states
        if self.has_states:
            self.pools.append(Pool(len(tables), self.n_seq * N_STATES))
        self.index: PrefixIndex | None = None  # made with the first full page
        self.slots = [Slot([[] for _ in tables]) for _ in range(self.n_seq)]
        rotations = [layer.rotation for layer in layers if layer.rotation is not None]
        # The tokens of a sequence up to which its rotation is that of short ones; 0: there is one rotation.
        self.n_short = max((r.n_short for r in rotations if r.long_inv_freq is not None), default=0)

    def n_past(self, seq: int = 0) -> int:
        """Return the number of tokens of a sequence."""
        return self.slot(seq).n_past

    def slot(self, seq: int) -> Slot:
        if not 0 <= seq < self.n_seq:
            raise GgufRunError(
                f"sequence {seq} does not exist: the cache has {self.n_seq} (n_seq), numbered from 0 to "
                f"{self.n_seq - 1}; load the model with more"
            )
        return self.slots[seq]

    def room(self, counts: Mapping[int, int]) -> bool:
        """Return whether there are pages for a step that appends tokens, {seq: how many}."""
        return all(self._fits(pool, counts, copies=False) for pool in self.groups)

    def _fits(self, pool: Pool, counts: Mapping[int, int], *, copies: bool) -> bool:
        """Return whether a step finds its pages. copies: a page that only the index has too is copied as well."""
        for seq in counts if self.tables[pool.number].window else ():
            self._release_behind(seq, pool)
        if (n_free := len(pool.free)) >= sum(counts.values()) // PAGE + 3 * len(counts):  # mostly, and quick
            return True
        n_pages = 0
        for seq, n in counts.items():
            slot = self.slots[seq]
            pages = slot.pages[pool.number]
            n_pages += -(-(slot.n_past + n) // PAGE) - len(pages)
            if slot.n_past % PAGE:
                n_pages += pool.uses[pages[-1]] > 1 or (copies and pool.nodes[pages[-1]] is not None)
        return n_pages <= n_free

    def begin(self, counts: Mapping[int, int]) -> list[Run]:
        """Return the runs of a step that appends tokens, {seq: how many}. The tokens count only after `end`.

        Raises CacheFullError if there are not enough pages. Then nothing has changed.
        """
        if not self.room(counts):
            raise CacheFullError(
                f"the KV cache is full: {len(self.groups[0].free)} of {len(self.groups[0].uses)} pages of {PAGE} "
                "tokens are free; give it more (cache_ram) or run fewer sequences at once"
            )
        for pool in self.groups:
            copies = self._fits(pool, counts, copies=True)
            for seq, n in counts.items():
                slot = self.slots[seq]
                pages = slot.pages[pool.number]
                if slot.n_past % PAGE:
                    self.own(seq, pool, slot.n_past // PAGE, copies=copies)
                while len(pages) * PAGE < slot.n_past + n:
                    self.set_page(seq, pool, len(pages), pool.take(pages[-1] if pages else NO_PAGE))
        return [self._run(seq, self.slots[seq], n) for seq, n in counts.items()]

    def _run(self, seq: int, slot: Slot, n: int) -> Run:
        if self.has_states and slot.writes == NO_PAGE:  # an interrupted step has left its slot
            slot.writes = self.pools[-1].take()
        writes = max(0, slot.writes)
        return Run(seq, slot.n_past, n, slot.is_long, slot.states.get(slot.n_past, int(not writes)), writes)

    def set_page(self, seq: int, pool: Pool, i: int, page: int) -> None:
        """Set the page of positions PAGE * i on of a sequence, which may be the one behind its last page."""
        table, pages = self.tables[pool.number], self.slots[seq].pages[pool.number]
        pages[i : i + 1] = [page]
        table.pages[seq, i] = page
        table.versions[seq] += 1

    def own(self, seq: int, pool: Pool, i: int, *, copies: bool) -> None:
        """Make a page of a sequence writable. Another sequence that has the page needs it as it is.

        copies: if only the index has it too, the page is copied; else the index forgets it.
        """
        page = self.slots[seq].pages[pool.number][i]
        if pool.uses[page] == 1 and not (copies and pool.nodes[page] is not None):
            pool.forget(page)
            return
        new = pool.take(page)
        for cache, _ in self.caches(pool):
            cache.copy(page, new)
        self.set_page(seq, pool, i, new)
        pool.release(page)

    def caches(self, pool: Pool) -> list[tuple[Any, Rotation | None]]:
        """Return the caches whose pages a pool counts, with the rotations of their keys."""
        window = self.tables[pool.number].window
        return [
            (layer.cache, layer.rotation)
            for layer in self.layers
            if layer.cache is not None and not layer.is_shared and layer.window == window
        ]

    def _release_behind(self, seq: int, pool: Pool) -> None:
        """Release the pages behind a window. The last page before it stays: tokens may be taken back."""
        slot, window = self.slot(seq), self.tables[pool.number].window
        pages = slot.pages[pool.number]
        for i in range(first_page(slot.n_past, window) - 2, -1, -1):
            if pages[i] == NO_PAGE:
                break
            pool.release(pages[i])
            self.set_page(seq, pool, i, NO_PAGE)

    def end(self, runs: Sequence[Run], ids: Sequence[int]) -> None:
        """Count the tokens of a step that has run. ids: of all runs."""
        at = 0
        for seq, n_past, n, *_ in runs:
            slot = self.slots[seq]
            slot.n_past = n_past + n
            slot.ids[n_past:] = ids[at : at + n]
            if self.has_states:
                slot.states[slot.n_past], slot.writes = slot.writes, NO_PAGE
                slot.n_prompt = slot.n_past if n >= _PROMPT else slot.n_prompt
            if len(slot.nodes) < slot.n_past // PAGE:
                self._add_to_index(seq, slot)
            if slot.states:
                kept = slot.n_past, slot.n_prompt, n_past if n > 1 else 0  # drafts may be taken back
                for old in [old for old in slot.states if old not in kept]:
                    self.pools[-1].release(slot.states.pop(old))
            at += n

    def _add_to_index(self, seq: int, slot: Slot) -> None:
        """Let the index find the full pages of a sequence, and their states."""
        if self.index is None:
            from gguf_run.models.prefix_index import PrefixIndex

            self.index = PrefixIndex(self.pools)
        while (i := len(slot.nodes)) < min(slot.n_past // PAGE, slot.n_indexed):
            parent = slot.nodes[-1] if slot.nodes else self.index.root((slot.root, slot.is_long))
            pages = [pages[i] for pages in slot.pages]
            if self.has_states:
                pages.append(slot.states.get(PAGE * (i + 1), NO_PAGE))
            node = self.index.add(parent, slot.ids[PAGE * i : PAGE * (i + 1)], pages)
            slot.nodes.append(node)
            for pool, page in zip(self.groups, pages, strict=False):
                if NO_PAGE not in (page, node.pages[pool.number]) and page != node.pages[pool.number]:
                    self.set_page(seq, pool, i, pool.share(node.pages[pool.number]))  # another one was earlier
                    pool.release(page)

    def tail(self, n: int) -> int:
        """Return how many of the last of n tokens run by themselves, so that the state before them is kept.

        Chat templates end a prompt with the start of the answer, which the next prompt may have in another form.
        """
        return _PROMPT - 1 if self.has_states and n > 2 * _PROMPT else 0

    def clear(self, seq: int, root: Hashable = ()) -> None:
        """Empty a sequence. Its pages stay findable until they are needed. root: see kv_find.adopt."""
        self.keep(seq, 0)
        slot = self.slots[seq]
        slot.root, slot.is_long, slot.n_indexed, slot.n_prompt = root, False, 1 << 30, 0

    def rewind(self, n_past: int, seq: int = 0) -> int:
        """Forget a sequence's tokens from position n_past on. Return how many tokens are left, at most n_past.

        n_past tokens are left if all pages are there that the next token reads. Else 0 are left. With recurrent
        layers, as many are left as a state is kept for, or 0.
        """
        slot = self.slot(seq)
        if not 0 <= n_past <= slot.n_past:
            raise ValueError(f"cannot rewind to {n_past}: {slot.n_past} tokens are in the context")
        if self.has_states:
            at_ends = (PAGE * (i + 1) for i, node in enumerate(slot.nodes) if node.pages[-1] != NO_PAGE)
            n_past = max((at for at in (*slot.states, *at_ends) if at <= n_past), default=0)
        return self.keep(seq, n_past)

    def keep(self, seq: int, n_past: int) -> int:
        """Take all but the first n_past tokens out of a sequence, or all if the next token cannot go on from there."""
        slot = self.slot(seq)
        if slot.is_long and n_past <= self.n_short:
            n_past = 0
        if not all(self._takes_back(seq, pool, n_past) for pool in self.groups):
            n_past = 0
        for pool, pages in zip(self.groups, slot.pages, strict=True):
            while len(pages) * PAGE >= n_past + PAGE:
                if (page := pages.pop()) != NO_PAGE:
                    pool.release(page)
        if self.has_states:
            self._keep_states(slot, n_past)
        slot.n_past = n_past
        del slot.ids[n_past:], slot.nodes[n_past // PAGE :]
        slot.is_long = slot.is_long and n_past > 0
        return n_past

    def _takes_back(self, seq: int, pool: Pool, n_past: int) -> bool:
        """Use the pages again that the token after the first n_past reads. Return whether all are there."""
        slot = self.slots[seq]
        pages = slot.pages[pool.number]
        for i in range(first_page(n_past, self.tables[pool.number].window), -(-n_past // PAGE)):
            if pages[i] == NO_PAGE:
                if i >= len(slot.nodes) or slot.nodes[i].pages[pool.number] == NO_PAGE:
                    return False
                self.set_page(seq, pool, i, pool.share(slot.nodes[i].pages[pool.number]))
        return True

    def _keep_states(self, slot: Slot, n_past: int) -> None:
        """Hold the state after n_past tokens, and none after more. A rewind has found that state."""
        pool = self.pools[-1]
        if n_past and n_past not in slot.states:
            slot.states[n_past] = pool.share(slot.nodes[n_past // PAGE - 1].pages[-1])
        for at in [at for at in slot.states if at > n_past or not n_past]:
            pool.release(slot.states.pop(at))
        slot.n_prompt = min(slot.n_prompt, n_past)


def first_page(n_past: int, window: int) -> int:
    """Return the first page of a sequence that the token after n_past tokens reads."""
    return max(0, n_past + 1 - window) // PAGE if window else 0
