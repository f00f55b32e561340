"""Thousands of requests through the engine, on a simulated clock: nothing leaks, nothing is mixed up, nobody starves.

python tests/runtime/engine/test_soak.py 100000     the size of the nightly run
"""

import random
import sys
import tracemalloc

import pytest
from fake_decoder import N_VOCAB, FakeDecoder, check, check_index, engine_of, expected, ids_of, request

from gguf_run.runtime.engine.check import QueueFullError
from gguf_run.runtime.engine.sequence import Sequence

STOP = (0,)


class Client:
    """One request and what came of it."""

    def __init__(self, sequence: Sequence, ids: list[int], max_tokens: int, patience: int) -> None:
        self.sequence, self.ids, self.max_tokens, self.patience = sequence, ids, max_tokens, patience
        self.got: list[int] = []
        self.last, self.gap = 0.0, 0.0  # seconds: when the last token came, the longest time between two tokens

    def take(self, now: float) -> bool:
        """Take what is there. Return whether the answer is over."""
        job = self.sequence.job
        while job.pieces:
            new = ids_of([job.pieces.popleft()])
            if new and self.got and job.row >= 0:
                self.gap = max(self.gap, now - self.last)
            if new:
                self.last = now
            self.got += new
        if len(self.got) >= self.patience:
            self.sequence.close()
        return job.is_over


def soak(
    n_requests: int, seed: int, n_cells: int | None, windows: tuple[int, ...], **options: object
) -> dict[str, float]:
    rng = random.Random(seed)
    decoder = FakeDecoder(512, 128, 8, n_cells, windows)
    decoder.keeps_runs = False
    engine = engine_of(decoder, STOP, max_queue=40, **options)
    starts = [[rng.randrange(N_VOCAB) for _ in range(rng.randrange(300))] for _ in range(6)]
    clients: list[Client] = []
    n_added = n_refused = n_context = n_over = 0
    longest_gap = longest_wait = 0.0
    while n_added < n_requests or clients:
        while n_added < n_requests and rng.random() < (0.06 if decoder.now % 20 < 14 else 0.4):  # and rushes
            ids = rng.choice(starts)[: rng.randrange(300)] + [rng.randrange(N_VOCAB) for _ in range(rng.randint(1, 60))]
            max_tokens, priority = rng.choice([1, 5, 40, 200]), rng.choice([0, 0, 0, 1])
            patience = rng.randrange(30) if rng.random() < 0.1 else 10**6
            n_added += 1
            try:
                sequence = engine.add(request(ids, max_tokens, priority=priority, salt=rng.choice(["", "", "other"])))
            except QueueFullError:
                n_refused += 1
                continue
            clients.append(Client(sequence, ids, max_tokens, patience))
        before = decoder.now
        engine.step()
        check(engine)
        if rng.random() < 0.02:
            check_index(engine)
        if decoder.now == before:
            decoder.now += 0.01
        for client in [client for client in clients if client.take(decoder.now)]:
            clients.remove(client)
            job = client.sequence.job
            answer = expected(client.ids, client.max_tokens, STOP)
            assert job.error is None
            assert client.got == answer[: len(client.got)]
            if job.finish == "context":
                n_context += 1
            elif job.finish:
                assert client.got == answer
            if job.n_preempted == 0:
                longest_gap = max(longest_gap, client.gap)
            longest_wait = max(longest_wait, decoder.now - job.arrived)
            n_over += 1
    assert n_over + n_refused == n_requests
    assert not engine.jobs
    assert check_index(engine) > 0
    found = {"gap": longest_gap, "time": longest_wait, "refused": n_refused, "context": n_context}
    return found | {"seconds": decoder.now, "preempted": engine.rows.n_preempted}


@pytest.mark.parametrize(
    ("n_cells", "windows"), [(None, (0,)), (1024, (0,)), (640, (0,)), (None, (0, 70)), (1024, (0, 70, 9))]
)
def test_soak(n_cells: int | None, windows: tuple[int, ...]) -> None:
    found = soak(600, 1, n_cells, windows)
    assert found["gap"] < 0.12
    assert found["time"] < 60
    assert found["refused"] < 500
    assert found["context"] == 0
    assert n_cells != 640 or found["preempted"] > 0


if __name__ == "__main__":
    tracemalloc.start()
    for cells in (None, 1024):
        soak(1000, 0, cells, (0, 70))
        size = tracemalloc.get_traced_memory()[0]
        print(cells, soak(int(sys.argv[1]), 1, cells, (0, 70)))
        print(f"{(tracemalloc.get_traced_memory()[0] - size) / 1e6:.1f} MB more than after 1000 requests")
