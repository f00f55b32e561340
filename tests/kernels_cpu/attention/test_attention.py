"""Attention of the CPU backend over its KV cache, against a dense float64 softmax over the same rounded K and V."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from cpu_ops import Step, cpu, error, new_cache
from numpy_backend import attend

from gguf_run.models.backend import CacheType, Run
from gguf_run.models.kv_cache import CacheLayer, KvCache
from gguf_run.models.operands import AttentionShape
from gguf_run.models.ops import Attend
from gguf_run.models.pages import PAGE, PageTable

BOUND = 1e-5
CACHE_TYPES = {"f32": np.float32, "f16": np.float16}
# Numbers of tokens of the steps, one after the other: a batch, some decoding, a second batch.
CHUNKS = (5, 1, 1, 1, 23, 1, 64, 1, 1)


@dataclass(frozen=True)
class Heads:
    n_head: int
    n_head_kv: int
    head_dim: int
    window: int = 0
    scale: float = 0.0
    is_chunked: bool = False

    def __str__(self) -> str:
        return f"{self.n_head} heads, {self.n_head_kv} kv, {self.head_dim} wide, window {self.window}"

    @property
    def shape(self) -> AttentionShape:
        scale = self.scale or 1.3 / self.head_dim**0.5
        return AttentionShape(self.n_head, self.n_head_kv, self.head_dim, scale, self.window, 0.0, self.is_chunked)


HEADS = (
    Heads(1, 1, 8),
    Heads(3, 3, 20),
    Heads(9, 3, 64),
    Heads(8, 1, 80),
    Heads(16, 2, 128),
    Heads(4, 1, 256),
    Heads(40, 1, 24),  # 40 rows a token: two tokens are more than a piece holds
    Heads(100, 1, 16),  # one token is more
    Heads(2, 2, 33),
    Heads(1, 1, 1),
)
WINDOWS = (Heads(4, 1, 32, 1), Heads(4, 2, 16, 7), Heads(3, 1, 64, 16), Heads(2, 1, 64, 33), Heads(8, 4, 16, 200))
WINDOWS += (Heads(4, 1, 32, 1, is_chunked=True), Heads(3, 1, 64, 16, is_chunked=True), Heads(8, 4, 16, 90, 0.0, True))


def random_values(heads: Heads, n_tokens: int) -> dict[str, np.ndarray]:
    """Rows of q, k and v; q such that scores choose."""
    rng = np.random.default_rng(n_tokens)
    widths = {"q": heads.n_head, "k": heads.n_head_kv, "v": heads.n_head_kv}
    values = {name: rng.standard_normal((n_tokens, n * heads.head_dim)) for name, n in widths.items()}
    return {name: (part * (3 if name == "q" else 1)).astype(np.float32) for name, part in values.items()}


class Case:
    """A program of one attention op and its oracle. values: rows of q, k and v, or how many random ones."""

    def __init__(
        self,
        heads: Heads,
        values: dict[str, np.ndarray] | int,
        n_threads: int,
        cache_type: str,
        n_batch: int = 64,
        n_seq: int = 1,
    ) -> None:
        self.heads, self.dtype = heads, CACHE_TYPES.get(cache_type)
        self.values = random_values(heads, values) if isinstance(values, int) else values
        self.step = Step(cpu(n_threads), n_batch)
        # q, k and v are columns of one buffer, as in a decoder
        qkv = self.step.buffer(sum(part.shape[1] for part in self.values.values()) + 3)
        at, parts = 3, []
        for part in self.values.values():
            parts.append(self.step.input(part, qkv.columns(at, part.shape[1])))
            at += part.shape[1]
        cache = new_cache(self.step.backend, heads.shape, len(self.values["k"]), n_seq, cache_type)
        out = self.step.buffer(heads.n_head * heads.head_dim)
        self.step.add(Attend(*parts, cache, heads.shape, out))
        self.step.finish(out)

    def expected(self, ids: Iterable[int], positions: np.ndarray) -> np.ndarray:
        """ids: the tokens that stand in the cache, by position; positions: those that ask."""
        ids = np.asarray(list(ids))
        n, shape = len(positions), self.heads.shape
        q = self.values["q"][ids[positions]].astype(np.float64).reshape(n, -1, shape.head_dim)
        k, v = (
            self.values[name][ids].astype(self.dtype).astype(np.float64).reshape(len(ids), -1, shape.head_dim)
            for name in "kv"
        )
        limits = shape.scale, shape.window, 0.0, None, shape.is_chunked
        return attend(q, k, v, positions, *limits).reshape(n, -1)

    def check(self, n_past: int, n_tokens: int) -> None:
        """Run tokens that follow on n_past others, with id = position."""
        result = self.step.run(n_tokens, n_past, first_id=n_past)
        positions = n_past + np.arange(n_tokens)
        assert error(result, self.expected(range(n_past + n_tokens), positions)) < BOUND, (n_past, n_tokens)

    def run(self, runs: Iterable[Run], ids: Iterable[int]) -> np.ndarray:
        """All result rows of a step of several sequences."""
        tokens = np.fromiter(ids, np.int32)
        result: np.ndarray = self.step.program.run(tokens, list(runs), range(len(tokens))).values.copy()
        return result

    def check_chunks(self, chunks: Iterable[int]) -> None:
        n_past = 0
        for n_tokens in chunks:
            self.check(n_past, n_tokens)
            n_past += n_tokens


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
@pytest.mark.parametrize("heads", HEADS + WINDOWS, ids=str)
def test_batches_and_single_tokens(heads: Heads, cache_type: str) -> None:
    for n_threads in (1, 2, 3):
        Case(heads, sum(CHUNKS), n_threads, cache_type).check_chunks(CHUNKS)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "heads",
    [Heads(1, 1, 16), Heads(3, 1, 20), Heads(6, 2, 64), Heads(40, 1, 8), Heads(2, 1, 32, 300), Heads(4, 1, 32, 511)],
    ids=str,
)
def test_split_positions(heads: Heads, n_threads: int) -> None:
    """Few heads and many positions: threads share the positions, at all the lengths around the limits of a part."""
    case = Case(heads, 1200, n_threads, "f16", n_batch=600)
    case.check_chunks([250, *[1] * 12, 121, *[1] * 3, 3, 600, 1, 1, 64, *[1] * 4])


@pytest.mark.parametrize(
    "heads",
    [Heads(4, 2, 64), Heads(9, 3, 80), Heads(5, 1, 96), Heads(8, 1, 128, 50), Heads(4, 1, 256), Heads(7, 7, 64, 64)],
    ids=str,
)
def test_every_number_of_tokens(heads: Heads) -> None:
    """Tiles, pieces and spans that end anywhere."""
    case = Case(heads, 400, 2, "f16", n_batch=320)
    case.check(0, 313)
    for n_tokens in range(1, 71, 1 if heads.head_dim == 64 else 5):
        case.check(7 * n_tokens % 241, n_tokens)


def test_long_context() -> None:
    case = Case(Heads(8, 2, 64), 5200, 2, "f16", n_batch=700)
    for n_past in range(0, 4900, 700):
        case.step.run(700, n_past, n_past)
    for n_past, n_tokens in ((4900, 1), (4901, 9), (4910, 120), (5030, 1)):
        case.check(n_past, n_tokens)


@pytest.mark.parametrize("slope", [2.0**-6, 2.0**-3, 2.0, -(2.0**-3)])  # powers of two: scores are exact
def test_maximum_that_moves(slope: float) -> None:
    """Scores that rise from position to position: slower and faster than the kernel lets its maximum lag behind."""
    heads = Heads(4, 1, 32, scale=1.0)
    values = random_values(heads, 700)
    values["q"][:] = np.float32(1 / 8)
    values["k"][:] = np.float32(slope / 4) * np.arange(700, dtype=np.float32)[:, None]
    case = Case(heads, values, 2, "f32", n_batch=700)
    case.check_chunks([600, 1, 40, 1])


def test_many_positions_for_few_tokens_in_a_batch() -> None:
    """Parts of positions and several blocks of tokens at once."""
    case = Case(Heads(16, 1, 32), 900, 3, "f32", n_batch=700)
    case.check_chunks([700, 9, 5, 4, 1, 7])


def test_rewinding_writes_over_what_followed() -> None:
    """Positions beyond the last token hold old numbers, which must not be seen."""
    case = Case(Heads(4, 2, 32), 400, 2, "f16")
    case.check_chunks([64] * 6)
    ids = list(range(384))
    for n_past, n_tokens, first_id in ((30, 3, 390), (33, 1, 10), (0, 1, 5), (1, 17, 300), (18, 64, 0)):
        ids = ids[:n_past] + list(range(first_id, first_id + n_tokens))
        result = case.step.run(n_tokens, n_past, first_id)
        assert error(result, case.expected(ids, n_past + np.arange(n_tokens))) < BOUND


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
@pytest.mark.parametrize("n_ctx", [1, 15, 16, 17, 33])
def test_cache_can_be_filled_to_its_end(n_ctx: int, cache_type: str) -> None:
    """Several heads: what is written at the end of one head's part must not reach into the next."""
    case = Case(Heads(3, 3, 12), n_ctx, 2, cache_type, n_batch=n_ctx)
    case.check(0, n_ctx)
    case.check(n_ctx - 1, 1)
    case.check(0, n_ctx)


@pytest.mark.parametrize("size", [2.0**-10, 32.0, 1024.0])
def test_scores_of_any_size(size: float) -> None:
    """From all positions alike to a softmax that is one position; scores of thousands do not overflow.

    Numbers of few bits, so that scores are exact in float32 whatever their size.
    """
    heads = Heads(4, 2, 64, scale=0.125)
    values = {name: np.round(part * 16) / np.float32(16) for name, part in random_values(heads, 300).items()}
    values["q"] *= np.float32(size)
    case = Case(heads, values, 3, "f32", n_batch=300)
    case.check(0, 299)
    case.check(299, 1)


def test_layers_share_scratch_but_not_caches() -> None:
    """Layers of different shapes in one program, over and over; the one that needs most is in the middle."""
    shapes = [AttentionShape(2, 1, 16, 0.3), AttentionShape(8, 8, 64, 0.2, 5), AttentionShape(4, 2, 8, 0.5)]
    values = np.random.default_rng(0).standard_normal((200, 512)).astype(np.float32)
    step = Step(cpu(3), 100)
    x, out = step.input(values), step.buffer(3 * 512)
    for i, shape in enumerate(shapes):
        q, kv = (x.columns(0, n * shape.head_dim) for n in (shape.n_head, shape.n_head_kv))
        cache = new_cache(step.backend, shape, 200)
        step.add(Attend(q, kv, kv, cache, shape, out.columns(i * 512, q.width)))
    step.finish(out)
    kept = values.astype(np.float16).astype(np.float64)
    n_past = 0
    for n in (40, 1, 100, 1, 33):
        result = step.run(n, n_past, n_past)
        positions = n_past + np.arange(n)
        n_past += n
        for i, shape in enumerate(shapes):
            n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
            q = values[positions, :n_q].astype(np.float64).reshape(n, -1, shape.head_dim)
            kv = kept[:n_past, :n_kv].reshape(n_past, -1, shape.head_dim)
            expected = attend(q, kv, kv, positions, shape.scale, shape.window).reshape(n, n_q)
            assert error(result[:, i * 512 : i * 512 + n_q], expected) < BOUND, i
        for _ in range(10):  # threads may have had no time to meet
            np.testing.assert_array_equal(step.run(n, n_past - n, n_past - n), result)


def test_cache_size_is_reported() -> None:
    backend = cpu(2)
    before = backend.nbytes()["cache"]
    backend.cache(AttentionShape(9, 3, 64, 0.125), PageTable.new(0, 4096, 512, 1), CacheType())
    assert backend.nbytes()["cache"] - before == 2 * 2 * 3 * 64 * 4096


class Sequences:
    """Some sequences of random ids in one cache, and steps for a few of them at a time."""

    def __init__(self, case: Case, n_seq: int) -> None:
        self.case, self.ids = case, [list[int]() for _ in range(n_seq)]
        self.rng = np.random.default_rng(0)

    def step(self, counts: dict[int, int]) -> np.ndarray:
        """counts: {seq: how many tokens it gets}."""
        runs = [Run(seq, len(self.ids[seq]), n) for seq, n in counts.items()]
        new = {seq: self.rng.integers(0, len(self.case.values["q"]), n).tolist() for seq, n in counts.items()}
        for seq, ids in new.items():
            self.ids[seq] += ids
        return self.case.run(runs, [id for ids in new.values() for id in ids])

    def expected(self, counts: dict[int, int]) -> np.ndarray:
        """The same rows of the last step."""
        ends = {seq: len(self.ids[seq]) for seq in counts}
        return np.concatenate(
            [self.case.expected(self.ids[seq], np.arange(ends[seq] - n, ends[seq])) for seq, n in counts.items()]
        )


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("heads", [Heads(3, 1, 64), Heads(4, 2, 20), Heads(2, 2, 32, 100)], ids=str)
def test_sequences_of_different_lengths_in_one_step(heads: Heads, n_threads: int) -> None:
    n_seq = 7
    case = Case(heads, 1300, n_threads, "f16", 700, n_seq)
    sequences, rng = Sequences(case, n_seq), np.random.default_rng(n_threads)
    steps = [{3: 700}, {3: 400, 5: 250}, dict.fromkeys(range(n_seq), 1), {6: 1}, {1: 70, 0: 1, 4: 130, 3: 9}]
    for _ in range(6):
        chosen = rng.permutation(n_seq)[: rng.integers(1, n_seq + 1)].tolist()
        steps.append({seq: int(rng.choice([1, 1, 3, 17])) for seq in chosen})
    for counts in steps:
        result = sequences.step(counts)
        assert error(result, sequences.expected(counts)) < BOUND, counts


def test_a_sequence_gets_the_same_numbers_alone_or_among_others() -> None:
    """On one thread, where positions are not shared out."""
    results = []
    for n_seq in (1, 4):
        sequences = Sequences(Case(Heads(6, 2, 32), 500, 1, "f16", 128, n_seq), n_seq)
        for i, n in enumerate([20, 1, 1, 9, 1]):
            sequences.rng = np.random.default_rng(i)
            results.append(sequences.step({0: n} | {seq: 1 + 10 * seq * (i == 0) for seq in range(1, n_seq)})[:n])
    for alone, among in zip(results[:5], results[5:], strict=True):
        np.testing.assert_array_equal(alone, among)


@pytest.mark.parametrize("cache_type", ["f32", "f16", "q8_0", "q4_1", "fp8_e4m3"])
@pytest.mark.parametrize("heads", [Heads(3, 1, 64), Heads(2, 2, 32, 70), Heads(16, 1, 32)], ids=str)
def test_a_prompt_gets_the_same_bits_in_chunks_of_any_size(heads: Heads, cache_type: str) -> None:
    """Each row is computed as if it were alone, whatever stands in its tile, on any number of threads."""
    n = 300
    whole = Case(heads, n, 1, cache_type, n).run([Run(0, 0, n)], range(n))
    for n_threads, chunks in ((1, (100, 100, 100)), (2, (64, 37, 9, 190)), (3, (256, 10, 34)), (5, (13,) * 23)):
        case, n_past = Case(heads, n, n_threads, cache_type, n), 0
        for size in chunks:
            end = n_past + size
            np.testing.assert_array_equal(case.run([Run(0, n_past, size)], range(n_past, end)), whole[n_past:end])
            n_past = end


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize(("window", "n_batch"), [(1, 1), (33, 8), (64, 64), (200, 70), (300, 20)])
def test_pages_behind_a_window_are_used_again(window: int, n_batch: int, is_chunked: bool, n_threads: int) -> None:
    """The results are those of a cache that holds everything."""
    heads, n_tokens = Heads(4, 2, 16, window, is_chunked=is_chunked), 1000
    case, full = (Case(heads, n_tokens, n_threads, "f16", n, 2) for n in (n_batch, n_tokens))
    tables = [PageTable.new(w, n_tokens, n_batch, 2) for w in (0, window)]
    assert PAGE * tables[1].n_pages <= 2 * (window + n_batch + 3 * PAGE)
    handle = case.step.backend.cache(heads.shape, tables[1], CacheType())
    case.step.parts[0][-1] = replace(case.step.parts[0][-1], cache=handle)
    case.step.after.clear()
    case.step.finish(case.step.parts[0][-1].out)
    cache, n_past = KvCache([CacheLayer(handle, window, None)], tables, n_tokens), 0
    while n_past + n_batch <= 700:
        for n, first in ((n_batch, n_past), (1, n_past + n_batch), (n_batch, n_past + 1)):  # the last one goes back
            assert cache.rewind(first, 1) == first
            runs, ids = cache.begin({1: n}), range(first, first + n)
            result = case.run(runs, ids)
            cache.end(runs, ids)
            np.testing.assert_array_equal(full.run(runs, ids), result)
        n_past += n_batch + 1
    assert error(result, case.expected(range(first + n), np.arange(first, first + n))) < BOUND
