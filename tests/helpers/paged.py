"""Page tables for tests of kernels: every sequence has all its pages, in random order."""

import numpy as np

from gguf_run.models.pages import PAGE, PageTable


def mixed_table(n_ctx: int, n_seq: int = 1, window: int = 0) -> PageTable:
    """A table of n_seq sequences of n_ctx positions. Some pages belong to nobody."""
    per_seq = -(-n_ctx // PAGE)
    order = np.random.default_rng(n_ctx).permutation(n_seq * per_seq + 3)[: n_seq * per_seq]
    return PageTable(window, n_seq * per_seq + 3, order.reshape(n_seq, per_seq).astype(np.int32), np.ones(n_seq, int))


def places(table: PageTable, seq: int, positions: np.ndarray) -> np.ndarray:
    """The rows of a layer's cache that some positions of a sequence have."""
    result: np.ndarray = table.pages[seq, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
    return result
