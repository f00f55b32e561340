"""Tables that attention reads on the device: pages of sequences, tiles of tokens."""

import numpy as np
import pytest
from gpu_ops import DEVICE
from paged import mixed_table

from gguf_run.kernels_gpu.tables import Pages, Tiles


def test_rows_that_change_are_sent() -> None:
    table = mixed_table(1000, 5)
    pages = Pages(table, DEVICE)
    at = pages.rows.data_ptr()
    pages.send()
    assert np.array_equal(pages.rows.cpu(), table.pages)
    table.pages[1:4] += 100
    pages.send()  # no version has changed
    assert np.array_equal(pages.rows[1:4].cpu() + 100, table.pages[1:4])
    table.versions[[1, 3]] += 1
    pages.send()
    assert np.array_equal(pages.rows.cpu(), table.pages)
    assert pages.rows.data_ptr() == at


@pytest.mark.parametrize("size", [1, 4, 16])
def test_tiles_have_tokens_of_one_run(size: int) -> None:
    """Every token is in one tile, and no two neighbours of one run could share more of them."""
    tiles, rng = Tiles(size, 128, DEVICE), np.random.default_rng(size)
    for counts in ([1], [16], [17], [1, 40, 1, 1, 16, 5], rng.integers(1, 9, 20).tolist()):
        run_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        tiles.send(run_of)
        found = [(first, n) for first, n in tiles.rows[: tiles.n].tolist()]
        expected, at = [], 0
        for count in counts:
            expected += [(at + i, min(size, count - i)) for i in range(0, count, size)]
            at += count
        assert found == expected


def test_runs_of_wanted_rows() -> None:
    """Some runs have none, and they may come in any order."""
    tiles = Tiles(2, 32, DEVICE)
    tiles.send(np.array([4, 4, 4, 1, 7, 7], np.int32))
    assert tiles.rows[: tiles.n].tolist() == [[0, 2], [2, 1], [3, 1], [4, 2]]
