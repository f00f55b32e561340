"""Pages and their index: every row that a token reads must be that of its text, whatever was shared, taken or moved."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_run.models.kv_cache import CacheLayer, KvCache, first_page
from gguf_run.models.kv_find import adopt, known
from gguf_run.models.kv_moves import copy_prefix
from gguf_run.models.pages import NO_PAGE, PAGE, CacheFullError, PageTable, pages_stored

N_CTX, N_BATCH = 640, 130


class Rows:
    """A cache whose rows are hashes of all tokens up to their own."""

    kinds = "k"

    def __init__(self, table: PageTable) -> None:
        self.table, self.data = table, np.full(table.n_pages * PAGE, -1, np.int64)

    def copy(self, source: int, target: int) -> None:
        self.data[target * PAGE : (target + 1) * PAGE] = self.data[source * PAGE : (source + 1) * PAGE]

    def places(self, seq: int, first: int, end: int) -> np.ndarray:
        positions = np.arange(first, end)
        pages = self.table.pages[seq, positions // PAGE].astype(np.int64)
        assert (pages != NO_PAGE).all()
        result: np.ndarray = pages * PAGE + positions % PAGE
        return result


def hashes(ids: Sequence[int], root: Any) -> list[int]:
    value, result = hash(root), []
    for id in ids:
        value = hash((value, id))
        result.append(value)
    return result


class Model:
    """Layers that see all positions, and layers with a window."""

    def __init__(self, n_seq: int, n_cells: int | None = None, windows: Sequence[int] = (0, 100)) -> None:
        tables = [PageTable.new(window, N_CTX, N_BATCH, n_seq, n_cells) for window in windows]
        self.rows = [Rows(table) for table in tables]
        layers = [CacheLayer(rows, rows.table.window, None) for rows in self.rows]
        self.cache: KvCache = KvCache(layers, tables, N_CTX)

    def run(self, seq: int, ids: Sequence[int], *, interrupted: bool = False) -> None:
        slot = self.cache.slots[seq]
        runs = self.cache.begin({seq: len(ids)})
        n_past, text = slot.n_past, [*slot.ids, *ids]
        for rows in self.rows:
            new = rows.places(seq, n_past, len(text))
            rows.data[new] = -2 if interrupted else hashes(text, slot.root)[n_past:]
        if not interrupted:
            self.cache.end(runs, list(ids))
            self.check(seq)

    def check(self, seq: int) -> None:
        """The next token reads rows of its own text."""
        slot = self.cache.slots[seq]
        assert len(slot.ids) == slot.n_past
        expected = hashes(slot.ids, slot.root)
        for rows in self.rows:
            first = max(0, slot.n_past + 1 - rows.table.window) if rows.table.window else 0
            np.testing.assert_array_equal(rows.data[rows.places(seq, first, slot.n_past)], expected[first:])

    def check_all(self) -> None:
        """Uses are those of the sequences; free and used pages are all; what the index finds is what it says."""
        for pool in self.cache.pools:
            held = Counter(page for slot in self.cache.slots for page in slot.pages[pool.number] if page != NO_PAGE)
            assert [held[page] for page in range(len(pool.uses))] == pool.uses
            assert set(pool.free) == {page for page, n in enumerate(pool.uses) if not n}
            for page, node in enumerate(pool.nodes):
                assert node is None or node.pages[pool.number] == page
        for seq, slot in enumerate(self.cache.slots):
            self.check(seq)
            for pages in slot.pages:
                assert len(pages) == -(-slot.n_past // PAGE) or slot.n_past == 0


TEXTS = st.tuples(st.integers(0, 2), st.integers(1, 2 * N_BATCH))  # which text, and how much of it
STEPS = st.tuples(
    st.sampled_from(["run", "rewind", "adopt", "clear", "copy", "interrupt"]), st.integers(0, 2), TEXTS, st.booleans()
)


def text_of(which: int, n: int) -> list[int]:
    """Texts 0, 1 and 2 begin alike: for 150, or for 300 tokens."""
    return [1 if i < 150 * (1 + which // 2) else 2 + which for i in range(n)]


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=40), st.sampled_from([None, 11 * PAGE]))
def test_rows_are_those_of_the_text(steps: list[Any], n_cells: int | None) -> None:
    model = Model(3, n_cells)
    for what, seq, (which, n), flag in steps:
        cache, slot = model.cache, model.cache.slots[seq]
        if what in ("run", "interrupt") and slot.n_past + 1 < N_CTX:
            new = text_of(which, slot.n_past + min(n, N_BATCH))[slot.n_past :][: N_CTX - slot.n_past]
            before = [list(pages) for pages in slot.pages]
            if cache.room({seq: len(new)}):
                model.run(seq, new, interrupted=what == "interrupt")
            else:
                with pytest.raises(CacheFullError, match="is full"):
                    cache.begin({seq: len(new)})
                assert [len(pages) for pages in slot.pages] == [len(pages) for pages in before]
        elif what == "rewind":
            wanted = slot.n_past - min(n, slot.n_past)
            assert cache.rewind(wanted, seq) in (0, wanted)
        elif what == "adopt":
            text, root = text_of(which, min(2 * n, N_CTX)), flag
            n_known = known(cache, text, root, parts=flag)
            assert adopt(cache, seq, text, root, parts=flag) == n_known < len(text)
            assert (slot.ids, slot.root) == (text[:n_known], root)
            assert flag or n_known % PAGE == 0
        elif what == "clear":
            cache.clear(seq)
        elif what == "copy":
            other = (seq + 1) % 3
            wanted = min(n, slot.n_past)
            assert copy_prefix(cache, seq, other, wanted) in (0, wanted)
        if what != "interrupt":
            model.check_all()
        else:
            model.cache.rewind(slot.n_past, seq)


def test_a_known_prefix_is_shared() -> None:
    model = Model(4)
    text = text_of(0, 330)
    for start in range(0, 330, N_BATCH):
        model.run(0, text[start : start + N_BATCH])
    used = len(model.cache.pools[0].free)
    assert adopt(model.cache, 1, text) == 320  # the pages that are full; sequence 0 goes on with the last one
    assert adopt(model.cache, 2, text[:200]) == 199  # one token runs in any case; the rest of its page is not read
    assert adopt(model.cache, 3, [*text[:128], *[7] * 100]) == 128
    assert known(model.cache, text, root="another adapter") == 0
    assert len(model.cache.pools[0].free) == used
    model.run(2, [9])  # now it needs a page of its own
    assert len(model.cache.pools[0].free) == used - 1
    model.check_all()
    model.cache.clear(0)
    assert known(model.cache, text) == 320  # until the pages are used for something else
    assert known(model.cache, text[:321]) == 320


def test_the_ends_of_texts_are_taken_first() -> None:
    model = Model(2, 8 * PAGE, windows=(0,))
    shared = text_of(0, 128)
    model.run(0, shared)
    for last in (5, 6):
        assert adopt(model.cache, 0, [*shared, 0]) == 128
        model.run(0, [last] * 128)
    model.cache.clear(0)
    model.run(1, [8] * 120)
    model.run(1, [8] * 120)  # four pages: the oldest end has gone
    assert known(model.cache, [*shared, *[5] * 129]) == 128
    assert known(model.cache, [*shared, *[6] * 129]) == 256
    model.check_all()


def test_pages_behind_the_window_are_found_until_they_are_taken() -> None:
    model = Model(2)
    text = text_of(0, 600)
    for start in range(0, 600, N_BATCH):
        model.run(0, text[start : start + N_BATCH])
    window = model.cache.pools[1]
    assert model.cache.slots[0].pages[1][0] == NO_PAGE
    assert adopt(model.cache, 1, text[:300]) == 299
    model.check(1)
    model.cache.clear(1)
    for _ in range(len(window.free)):
        window.forget(window.take())  # by other sequences
    assert known(model.cache, text[:300]) == 0
    assert known(model.cache, text) == 576
    assert first_page(576, 100) == 7


@pytest.mark.parametrize("window", [1, 64, 100, 300])
def test_a_sequence_alone_finds_its_pages(window: int) -> None:
    """However a batch and the window lie."""
    assert pages_stored(N_CTX, N_CTX, N_BATCH, 1) == N_CTX // PAGE == pages_stored(0, N_CTX, 1, 1)
    for offset in range(1, 70):
        model = Model(1, windows=(0, window))
        for n in (offset, N_BATCH, N_BATCH, 1, 1, N_BATCH):
            model.run(0, [1] * n)


def test_equal_texts_at_once_come_to_share() -> None:
    model = Model(2)
    for start in (0, 100):
        for seq in (0, 1):
            model.run(seq, text_of(0, start + 100)[start:])
    assert model.cache.slots[0].pages[0][:3] == model.cache.slots[1].pages[0][:3]
    model.check_all()


def test_a_moved_page_is_never_found() -> None:
    """tests/models/test_kv_cache.py has shifts of real models."""
    model = Model(1, windows=(0,))
    model.rows[0].move = lambda *_: None  # type: ignore[attr-defined]
    from gguf_run.models.kv_moves import shift

    model.run(0, text_of(0, 130))
    model.run(0, text_of(1, 130))
    assert shift(model.cache, 64, 64) == 196
    slot = model.cache.slots[0]
    runs = model.cache.begin({0: 130})
    model.cache.end(runs, [4] * 130)
    assert known(model.cache, [*slot.ids, 0]) == 64
