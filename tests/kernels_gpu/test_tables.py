"""Tables that attention reads on the device: pages of sequences, items of work."""

import numpy as np
import pytest
from gpu_ops import DEVICE
from paged import mixed_table

from gguf_run.kernels_gpu.tables import Cut, Items, Pages


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


LENGTHS = (0, 1, 62, 63, 64, 127, 128, 500, 3000)


def made(cut: Cut, run_of: list[int], positions: list[int]) -> list[tuple[int, ...]]:
    """The items of a step, in a table for as many tokens. Those behind them are 0."""
    items = Items(cut, len(run_of), DEVICE)
    items.rows.fill_(7)
    first = np.flatnonzero(np.diff(run_of, prepend=-1))
    n_tokens = np.diff(first, append=len(run_of))
    items.send(first, n_tokens, np.array(positions, np.intp)[first + n_tokens - 1])
    rows = items.rows.cpu().numpy()
    assert items.n <= items.most(len(run_of)) == len(rows)
    assert (rows[items.n :] == 0).all()
    return [tuple(row) for row in rows[: items.n].tolist()]


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("n_part", [1, 7, 33, 264])
def test_items(size: int, n_part: int) -> None:
    """Every token is in one tile, and no two neighbours of one run could share more of them. The parts of a tile are
    complete, stand side by side, and have rows of their own. There are no more of them than memory was made for."""
    rng = np.random.default_rng(size * n_part)
    for counts in ([1], [16], [17], [1, 40, 1, 1, 16, 5], [1] * 33, rng.integers(1, 9, 20).tolist()):
        run_of = np.repeat(np.arange(len(counts)), counts).tolist()
        past = rng.choice(LENGTHS, len(counts))
        positions = np.concatenate([n + np.arange(count) for n, count in zip(past, counts, strict=True)]).tolist()
        found = made(Cut(size, 64, 60, n_part), run_of, positions)
        expected, at = [], 0
        for count in counts:
            expected += [(at + i, min(size, count - i)) for i in range(0, count, size)]
            at += count
        assert [(token, n) for token, n, part, *_ in found if part == 0] == expected
        row = 0
        for i, (token, n, part, n_of, first) in enumerate(found):
            assert (part, first) == (0 if part == 0 else found[i - 1][2] + 1, row)
            assert 1 <= n_of <= (past + counts)[run_of[token]] // 64 + 1
            assert part == n_of - 1 or found[i + 1][:2] == (token, n)
            row += n
        assert row <= len(run_of) + size * n_part


def test_a_long_sequence_among_short_ones() -> None:
    """It alone is cut, into parts as long as all that a program would do else."""
    items = made(Cut(1, 64, 512, 33), [*range(32)], [32767, *range(100, 410, 10)])
    assert [n_part for *_, n_part, _ in items] == [26] * 26 + [1] * 31
    alone = made(Cut(1, 64, 512, 33), [0], [32767])
    assert len(alone) == 32
    short = made(Cut(1, 64, 512, 33), [*range(8)], [1000] * 8)
    assert {n_part for *_, n_part, _ in short} == {4}


def test_runs_of_wanted_rows() -> None:
    """Some runs have none, and they may come in any order."""
    items = made(Cut(2, 64, 1, 9), [4, 4, 4, 1, 7, 7], [8, 9, 10, 3, 0, 1])
    assert [item[:2] for item in items] == [(0, 2), (2, 1), (3, 1), (4, 2)]
