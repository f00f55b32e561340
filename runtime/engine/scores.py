"""Logits of given tokens, for those who measure: no token is chosen."""

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gguf_run.runtime.engine.engine import Engine
from gguf_run.runtime.engine.sequence import Cut, n_common

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

_ROOT = ("logits",)  # texts that were computed in other parts have other last bits: their pages are not used


def logits(
    engine: Engine, ids: Sequence[int], n_outputs: int, *, resumes: bool = False
) -> "Iterator[NDArray[float32]]":
    """Run ids as a text of their own; yield the logits after each of the last n_outputs in blocks f32[n, n_vocab].

    A block is valid until the next one. Nothing else runs until all blocks have been read.

    resumes: ids that the last such text begins with too are not computed again, except those whose logits are wanted.
    """
    ids = list(ids)
    with engine.working():
        rows = engine.rows
        row, cache = rows.vacant(ids if resumes else ()), rows.cache
        slot = cache.slots[row.number]
        if resumes and slot.root == _ROOT and row.cut == Cut():
            cache.rewind(min(n_common(slot.ids, ids), len(ids) - n_outputs), row.number)
        else:
            cache.clear(row.number, _ROOT)
        row.left_at, row.cut = -1, Cut()  # so that it is not emptied for its own pages
        n_past = slot.n_past
        while not cache.room({row.number: len(ids) - n_past}) and rows.clear_oldest():
            pass
        engine.scoring = threading.current_thread()
        try:
            yield from engine.decoder.forward(ids[n_past:], n_outputs, row.number)
        finally:
            engine.scoring = None
        row.left_at, rows.last = rows.n_steps, row.number
