"""Who runs when: parts of prompts beside answers, shared prompts, priorities, and what happens when pages run out."""

import random

import pytest
from fake_decoder import FakeDecoder, check, engine_of, expected, ids_of, pool_of, request

from gguf_run.models.pages import PAGE

LONG = [7 * i % 97 for i in range(4000)]
SLOW = (20.0, 2.0, 3.0, 0.3)  # a model of a billion weights on two cores


@pytest.mark.parametrize("cost", [SLOW, (3, 0.3, 0.28, 0.02), (150, 15, 20, 1)])
def test_answers_go_on_while_a_prompt_arrives(cost: tuple[float, float, float, float]) -> None:
    """The longest gap, and the time to the first token of the newcomer, against the time that it takes alone."""
    alone = FakeDecoder(n_ctx=8192, n_batch=512, cost=cost)
    ids_of(engine_of(alone).add(request(LONG, 1)))
    decoder = FakeDecoder(n_ctx=8192, n_batch=512, cost=cost)
    engine = engine_of(decoder)
    answers = [engine.add(request([i, 2, 3], 4000)) for i in range(2)]
    for _ in range(20):
        engine.step()
    newcomer, start, gap = engine.add(request(LONG, 1)), decoder.now, 0.0
    while not newcomer.job.is_over:
        before = decoder.now
        engine.step()
        assert all(job in engine.jobs and decoder.runs[-1][job.row] == 1 for job in (a.job for a in answers))
        gap = max(gap, decoder.now - before)
    assert newcomer.answer().ids == tuple(expected(LONG, 1))
    least = (cost[0] + 2 * cost[1] + 16 * cost[2] + 16 * 4 * cost[3]) / 1000  # a step with 16 tokens of the prompt
    assert gap <= max(0.11, 1.1 * least)
    if cost == SLOW:
        assert decoder.now - start < 1.35 * alone.now
    check(engine)


def test_nobody_waits_when_there_is_no_answer() -> None:
    decoder = FakeDecoder(n_batch=256, cost=SLOW)
    engine = engine_of(decoder)
    sequences = [engine.add(request([i, *LONG[:300]], 1)) for i in range(2)]
    while engine.step():
        pass
    assert decoder.runs == [{0: 256}, {0: 45, 1: 192}, {1: 109}]  # a part ends with a page
    assert [ids_of(sequence) for sequence in sequences] == [expected([i, *LONG[:300]], 1) for i in range(2)]


def test_at_most_two_prompts_are_in_work() -> None:
    decoder = FakeDecoder(n_ctx=2048, n_batch=64, n_seq=8)
    engine = engine_of(decoder)
    for i in range(6):
        engine.add(request([i, *LONG[:200]], 1)).job.n_readers = 1
    while engine.step():
        begun = [job for job in engine.jobs if job.row >= 0 and decoder.cache.slots[job.row].n_past < job.n_prompt]
        assert len(begun) <= 2


def test_many_short_prompts_share_a_step() -> None:
    decoder = FakeDecoder(n_batch=256, n_seq=16)
    engine = engine_of(decoder)
    sequences = [engine.add(request([i, *range(12)], 1)) for i in range(16)]
    while engine.step():
        pass
    assert len(decoder.runs) <= 3
    assert all(ids_of(sequence) == expected([i, *range(12)], 1) for i, sequence in enumerate(sequences))


def test_a_shared_prompt_is_computed_once() -> None:
    alone = FakeDecoder(n_ctx=4096, n_batch=256)
    engine_of(alone).add(request(LONG[:2048], 1)).answer()
    decoder = FakeDecoder(n_ctx=4096, n_batch=256, n_seq=8)
    engine = engine_of(decoder)
    sequences = [engine.add(request([*LONG[:2048], i], 1)) for i in range(8)]
    while engine.step():
        pass
    assert sum(n for run in decoder.runs for n in run.values()) <= 2048 + 8
    assert decoder.now < 1.15 * alone.now
    assert [ids_of(sequence) for sequence in sequences] == [expected([*LONG[:2048], i], 1) for i in range(8)]
    assert sum(sequence.job.n_reused for sequence in sequences) == 7 * 2048


def test_other_salts_share_nothing() -> None:
    decoder = FakeDecoder(n_seq=2)
    engine = engine_of(decoder)
    for salt, n_reused in (("a", 0), ("b", 0), ("a", 199), ("b", 199)):
        sequence = engine.add(request(LONG[:200], 1, salt=salt))
        assert ids_of(sequence) == expected(LONG[:200], 1)
        assert sequence.job.n_reused >= n_reused
        assert sequence.job.n_reused == 0 or n_reused


def test_pages_run_out() -> None:
    """The youngest waits, goes on later and says what it would have said. The oldest is never stopped."""
    decoder = FakeDecoder(n_ctx=640, n_seq=4, n_cells=640)
    engine = engine_of(decoder)
    sequences = [engine.add(request([i, *LONG[:100]], 400)) for i in range(4)]
    while engine.step():
        check(engine)
    assert [ids_of(sequence) for sequence in sequences] == [expected([i, *LONG[:100]], 400) for i in range(4)]
    counts = [sequence.job.n_preempted for sequence in sequences]
    assert counts[0] == 0
    assert sum(counts) > 0
    assert engine.rows.n_preempted == sum(counts) < 10  # it does not go to and fro


def test_a_request_that_does_not_fit_alone() -> None:
    decoder = FakeDecoder(n_ctx=1024, n_seq=3, n_cells=192)
    engine = engine_of(decoder)
    big, small = engine.add(request(LONG[:100], 900)), engine.add(request([1, 2], 150))
    while engine.step():
        check(engine)
    assert (big.job.finish, small.job.finish) == ("context", "length")
    assert ids_of(small) == expected([1, 2], 150)
    found = ids_of(big)
    assert found == expected(LONG[:100], len(found))
    assert len(found) == 192 - 100 + 1


def test_priorities_and_age() -> None:
    decoder = FakeDecoder(n_seq=1)
    engine = engine_of(decoder)
    first = engine.add(request([1], 40))
    engine.step()
    usual, urgent = engine.add(request([2], 40)), engine.add(request([3], 40, priority=1))
    order = []
    while engine.step():
        order += [job.number for job in engine.jobs if job.row >= 0 and job.number not in order]
    assert order == [1, 3, 2]
    waiting = engine.add(request([4], 5))
    decoder.now += 25  # seconds: it has grown older than a priority of 2
    later = engine.add(request([5], 5, priority=2))
    while engine.step():
        pass
    assert waiting.job.first_at < later.job.first_at
    assert all(sequence.job.finish == "length" for sequence in (first, usual, urgent))


def test_a_prompt_that_stops_leaves_its_pages_to_the_next() -> None:
    decoder = FakeDecoder(n_ctx=1024, n_batch=64, n_seq=2)
    engine = engine_of(decoder)
    first, second = engine.add(request(LONG[:600], 1)), engine.add(request([*LONG[:500], 1], 1))
    engine.step()
    engine.step()
    engine.cancel(first)
    while engine.step():
        pass
    assert ids_of(second) == expected([*LONG[:500], 1], 1)
    assert second.job.n_reused == 2 * PAGE
    assert sum(n for run in decoder.runs for n in run.values()) == 501


def test_whoever_is_read_runs() -> None:
    """Without a thread: a paused answer costs nothing; of two that are read in turns each step runs both."""
    decoder = FakeDecoder(n_seq=4)
    engine = engine_of(decoder)
    paused, first, second = (engine.add(request([i], 100)) for i in range(3))
    next(paused)
    decoder.runs.clear()
    for _ in range(30):
        next(first)
        next(second)
    assert len(decoder.runs) <= 34
    assert sum(paused.job.row in run for run in decoder.runs) <= 1
    assert ids_of(paused) == expected([0], 100)[1:]


def test_pages_of_a_window_run_out_too() -> None:
    rng = random.Random(3)
    decoder = FakeDecoder(n_ctx=512, n_seq=4, n_batch=64, windows=(0, 40))
    engine = engine_of(decoder)
    texts = [[rng.randrange(97) for _ in range(300)] for _ in range(10)]
    sequences = [engine.add(request(text, 50)) for text in texts]
    while engine.step():
        check(engine)
    assert [ids_of(sequence) for sequence in sequences] == [expected(text, 50) for text in texts]
    assert len(pool_of(engine).free) > 0


@pytest.mark.parametrize("n_seq", [1, 4])
def test_deterministic_parts(n_seq: int) -> None:
    """The parts of a prompt are pages, from its beginning on: alone, among others, and behind a known start."""
    decoder = FakeDecoder(n_ctx=1024, n_seq=n_seq, n_batch=256)
    engine = engine_of(decoder, deterministic=True)
    for text in (LONG[:300], LONG[:300], [*LONG[:290], 1], LONG[:64], LONG[100:300]):
        sequence = engine.add(request(text, 3))
        others = [engine.add(request([5, *LONG[:100]], 30)) for _ in range(n_seq - 1)]
        assert ids_of(sequence) == expected(text, 3)
        assert all(len(other.answer().ids) == 30 for other in others)
        assert sequence.job.n_reused % PAGE == 0
    assert {n_past % PAGE for n_past, n in decoder.parts if n > 1} == {0}
    assert {n for _, n in decoder.parts} <= {1, PAGE, 300 % PAGE, 291 % PAGE, 200 % PAGE, 101 % PAGE}
