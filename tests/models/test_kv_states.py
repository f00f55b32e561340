"""The slots of recurrent states: a state that is read must always be that of the sequence's text, whatever was done."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy_backend import NumpyState

from gguf_run.formats.errors import GgufRunError
from gguf_run.kernels_cpu.recurrent.state import CpuState
from gguf_run.models.kv_cache import N_STATES, CacheLayer, KvCache
from gguf_run.models.kv_moves import copy_prefix, export, restore, shift
from gguf_run.models.pages import PageTable


class Model:
    """One layer, whose state is a hash of the tokens before."""

    def __init__(self, make: Any = NumpyState, n_seq: int = 2, n_ctx: int = 1000, width: int = 1) -> None:
        self.state = make(np.full((n_seq * N_STATES, width), np.nan, np.float32))
        self.cache = KvCache([CacheLayer(None, 0, None, (self.state,))], [PageTable.new(0, n_ctx, 1, n_seq)], n_ctx)

    def run(self, texts: dict[int, list[int]], *, interrupted: bool = False) -> None:
        runs = self.cache.begin({seq: len(ids) for seq, ids in texts.items()})
        for run in runs:
            value = self.state.data[run.reads] if run.n_past else np.zeros(1, np.float32)
            assert run.reads != run.writes
            self.state.data[run.writes] = np.nan if interrupted else hashed(texts[run.seq], value)
        if not interrupted:
            self.cache.end(runs, [id for ids in texts.values() for id in ids])

    def hash(self, seq: int) -> np.ndarray:
        (_, _, data), *_ = export(self.cache, seq)
        return np.frombuffer(data, np.float32)


def hashed(ids: list[int], value: Any = 0.0) -> Any:
    for id in ids:
        value = (value * 31 + id + 1) % 65521
    return value


WHAT = st.sampled_from(["decode", "prompt", "rewind", "copy", "interrupt", "shift", "save"])


@given(st.lists(st.tuples(WHAT, st.integers(0, 1 << 12)), max_size=40))
def test_a_state_is_that_of_its_text(steps: list[tuple[str, int]]) -> None:
    model, texts = Model(), [[1, 2], [3]]
    model.run({0: texts[0], 1: texts[1]})
    for what, number in steps:
        seq, amount = number % 2, number // 2
        text = texts[seq]
        if what == "rewind" or (what != "copy" and len(text) > 900):
            left = model.cache.rewind(len(text) - min(amount % 70, len(text)), seq)
            assert left <= len(text) - min(amount % 70, len(text))
            del text[left:]
        elif what in ("decode", "prompt"):
            for new in [[amount % 7]] * (amount % 70) if what == "decode" else [[amount % 7] * (amount % 70 + 1)]:
                model.run({seq: new})
                text += new
        elif what == "copy":
            texts[1 - seq] = text[: copy_prefix(model.cache, seq, 1 - seq, amount % (len(text) + 1))]
        elif what == "interrupt":
            model.run({seq: [5] * (amount % 5 + 1)}, interrupted=True)
        elif what == "shift" and len(text) >= 32:
            assert shift(model.cache, 0, 32, seq) == 0
            texts[seq] = []
        elif what == "save" and text:
            parts = [(il, kind, bytes(data)) for il, kind, data in export(model.cache, seq)]
            restore(model.cache, len(text), parts, 1 - seq)
            texts[1 - seq] = list(text)
        for i in range(2):
            assert model.cache.n_past(i) == len(texts[i])
            if texts[i]:
                assert model.hash(i) == hashed(texts[i])


def test_states_are_kept_where_texts_part() -> None:
    """A prompt's end outlives its answer. So do the start of a batch, and the last ends of pages."""
    cache = Model().cache

    def run(n: int) -> None:
        cache.end(cache.begin({0: n}), [0] * n)

    run(100)
    for _ in range(300):
        run(1)
    assert cache.rewind(390) == 384
    for _ in range(20):
        run(1)
    run(5)  # drafts
    assert cache.rewind(407) == 404
    assert cache.rewind(370) == 320
    assert cache.rewind(110) == 100
    run(50)
    assert cache.rewind(149) == 128  # of the same text before
    assert cache.rewind(99) == 0
    assert cache.n_past() == 0


@pytest.mark.parametrize("make", [NumpyState, CpuState])
def test_saved_states_that_do_not_fit_are_refused(make: Any) -> None:
    model, other = Model(make), Model(make, width=2)
    model.run({0: [1, 2, 3]})
    parts = list(export(model.cache))
    for cache, wrong in (
        (other.cache, parts),
        (model.cache, []),
        (model.cache, parts * 2),
        (model.cache, [(0, "k", b"")]),
    ):
        cache.end(cache.begin({1: 2}), [1, 2])
        with pytest.raises(GgufRunError, match="does not fit"):
            restore(cache, 3, wrong, 1)
        assert cache.n_past(1) == 0
    restore(model.cache, 3, parts, 1)
    assert model.hash(1) == hashed([1, 2, 3])
