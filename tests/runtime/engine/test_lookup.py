"""Guesses from the text itself."""

import random

import pytest

from gguf_run.runtime.engine.lookup import LONG, N_SAME, Lookup


def lookup_of(ids: list[int], *more: int) -> Lookup:
    lookup = Lookup()
    lookup.extend(ids)
    for id in more:
        lookup.extend([id])
    return lookup


@pytest.mark.parametrize("ids", [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 9, 2, 3]])
def test_nothing_has_come_before(ids: list[int]) -> None:
    assert lookup_of(ids).guess(5) == []


def test_the_last_place_counts() -> None:
    lookup = lookup_of([1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8], 1, 2, 3)
    assert lookup.guess(4) == [6, 7, 8, 1]
    assert lookup.n_same == N_SAME


def test_a_source_that_was_right_goes_on() -> None:
    lookup = lookup_of([1, 2, 3, 4, 5, 6, 9, 4, 5, 6, 8, 0], 1, 2, 3)
    assert lookup.guess(1) == [4]
    lookup.extend([4, 5, 6])
    assert lookup.guess(1) == [9]  # 8 is what came last after 4, 5, 6
    assert lookup.n_same == 6


def test_a_loop_goes_on() -> None:
    assert lookup_of([7, 1, 2, 1, 2, 1, 2]).guess(5) == [1, 2, 1, 2, 1]
    assert lookup_of([5] * 20).guess(3) == [5] * 3


def test_all_places_are_found() -> None:
    """As by looking at each place."""
    rng, ids, lookup = random.Random(1), list[int](), Lookup()
    for _ in range(300):
        ids += (new := [rng.randrange(4) for _ in range(rng.randint(1, 3))])
        lookup.extend(new)
        lookup._source = 0
        n = len(ids)
        places = [at for at in range(N_SAME, n) if ids[at - N_SAME : at] == ids[n - N_SAME :]]
        found = lookup.guess(3)
        if not places:
            assert found == []
            continue
        n_same = next((i for i in range(min(LONG, places[-1])) if ids[places[-1] - i - 1] != ids[n - i - 1]), None)
        assert lookup.n_same == (min(LONG, places[-1]) if n_same is None else n_same)
        for at, id in enumerate(found, places[-1]):
            assert id == [*ids, *found][at]


def test_chances_follow_what_comes() -> None:
    lookup = lookup_of([1, 2, 3, 4, 1, 2, 3])
    lookup.guess(1)
    before = lookup.chances[N_SAME]
    for _ in range(20):
        lookup.learn(0, True)
    low = lookup.chances[N_SAME]
    assert low < 0.05
    for _ in range(4000):
        lookup.skip()
    assert lookup.chances[N_SAME] == pytest.approx(before, abs=0.01)
    for _ in range(20):
        lookup.learn(3, False)
    assert lookup.chances[N_SAME] > 0.95
