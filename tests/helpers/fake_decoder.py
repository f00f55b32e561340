"""A decoder without layers over the real KV cache: its pages hold sums of tokens, its next token is made of such a sum.

Each position holds the sum of all tokens up to it, weighted by their positions. A step reads what the tables say,
so a page of another text changes the answer, and the step finds it at once. Time is simulated.
"""

import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from gguf_run.models.backend import Results, Top
from gguf_run.models.kv_cache import GROUP, CacheLayer, KvCache
from gguf_run.models.pages import NO_PAGE, PAGE, PageTable, Pool
from gguf_run.runtime.engine.engine import Engine
from gguf_run.runtime.engine.lookup import LONG, Lookup
from gguf_run.runtime.engine.reply import Reply, Request
from gguf_run.runtime.engine.stop import StopStrings
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.sampling.sampler import Sampler

N_VOCAB = 97
_WEIGHTS = np.random.default_rng(0).integers(1, 1 << 62, 1 << 18, np.uint64)
GREEDY = SamplingParams(temperature=0)


def sums(ids: Sequence[int]) -> np.ndarray:
    """What the cache holds of a text."""
    return np.cumsum((np.asarray(ids, np.uint64) + np.uint64(1)) * _WEIGHTS[: len(ids)])


def next_id(total: Any) -> int:
    return int(total >> np.uint64(20)) % N_VOCAB


def expected(ids: Sequence[int], n: int, stop_ids: Sequence[int] = ()) -> list[int]:
    """The answer to a prompt."""
    total, out = sums(ids)[-1], list[int]()
    while len(out) < n:
        id = next_id(total)
        if id in stop_ids:
            break
        out.append(id)
        with np.errstate(over="ignore"):
            total += np.uint64(id + 1) * _WEIGHTS[len(ids) + len(out) - 1]
    return out


class FakeCache:
    """The rows of one layer."""

    kinds = "k"

    def __init__(self, n_pages: int) -> None:
        self.rows = np.zeros((n_pages, PAGE), np.uint64)

    def copy(self, source: int, target: int) -> None:
        self.rows[target] = self.rows[source]

    def move(self, source: np.ndarray, target: np.ndarray, rotation: Any, distance: int) -> None:
        groups = self.rows.reshape(-1, GROUP)
        groups[target] = groups[source]


class FakeDecoder:
    """Logits are 1 for the next token and 0 for all others."""

    def __init__(
        self,
        n_ctx: int = 1024,
        n_batch: int = 256,
        n_seq: int = 4,
        n_cells: int | None = None,
        windows: Sequence[int] = (0,),
        cost: tuple[float, float, float, float] = (5, 1, 1.5, 0.05),
    ) -> None:
        """cost: milliseconds of a step, of an answer's token, of a prompt's, and of a thousand positions read."""
        self.n_ctx, self.n_batch, self.n_outputs, self.n_top = n_ctx, max(n_batch, n_seq), max(64, n_seq), 40
        self.config, self.adapters = SimpleNamespace(n_vocab=N_VOCAB), None
        tables = [PageTable.new(window, n_ctx, n_batch, n_seq, n_cells) for window in windows]
        layers: list[Any] = [CacheLayer(FakeCache(table.n_pages), table.window, None) for table in tables]
        self.cache = KvCache(layers, tables, n_ctx)
        self.cost, self.now = cost, 0.0  # seconds
        self.is_shifted = False  # sums are those of other positions then: only the last tokens are compared
        self.fails: list[BaseException] = []  # what the next steps raise
        self.runs: list[dict[int, int]] = []  # tokens of each row, step by step
        self.parts: list[tuple[int, int]] = []  # the first position of each run, and its tokens
        self.keeps_runs = True
        self.asked: list[tuple[int, bool]] = []  # of each Top: how many values, and whether there was a mask

    def clock(self) -> float:
        return self.now

    def step(self, batch: Mapping[int, Sequence[int]], rows: Mapping[int, int]) -> np.ndarray:
        counts = {seq: len(ids) for seq, ids in batch.items()}
        assert counts
        assert min(counts.values()) > 0
        assert sum(counts.values()) <= self.n_batch
        if self.keeps_runs:
            self.runs.append(counts)
            self.parts += [(self.cache.slots[seq].n_past, n) for seq, n in counts.items()]
        runs = self.cache.begin(counts)
        if self.fails:
            raise self.fails.pop(0)
        totals = [self._append(seq, batch[seq]) for seq in batch]
        n_read = sum(n * (self.cache.slots[seq].n_past + n / 2) for seq, n in counts.items())
        n_prompt = sum(n for n in counts.values() if n > 1)
        a, b, c, d = self.cost
        self.now += (a + b * (sum(counts.values()) - n_prompt) + c * n_prompt + d * n_read / 1000) / 1000
        self.cache.end(runs, [id for ids in batch.values() for id in ids])
        wanted = [total for part, seq in zip(totals, batch, strict=True) for total in part[len(part) - rows[seq] :]]
        assert len(wanted) <= self.n_outputs
        logits = np.zeros((len(wanted), N_VOCAB), np.float32)
        logits[np.arange(len(wanted)), [next_id(total) for total in wanted]] = 1
        return logits

    def top(
        self, batch: Mapping[int, Sequence[int]], rows: Mapping[int, int], tops: Sequence[Top | None] = ()
    ) -> Results:
        logits = self.step(batch, rows)
        if not tops:
            return Results(logits)
        assert len(tops) == len(logits)
        self.asked += [(top.n, top.mask is not None) for top in tops if top]
        few, most = [i for i, top in enumerate(tops) if top], max(top.n for top in tops if top)
        found, ids = logits[few], np.arange(logits.shape[1])
        for row, top in zip(found, (tops[i] for i in few), strict=True):
            assert top is not None
            if top.mask is not None:
                row[(top.mask[ids >> 5] >> (ids & 31).astype(np.uint32) & 1) == 0] -= 99
        columns = np.argsort(-found, axis=1, kind="stable")[:, :most]
        values = np.take_along_axis(logits[few], columns, 1)
        return Results(logits[[i for i, top in enumerate(tops) if not top]], values, columns)

    def _append(self, seq: int, ids: Sequence[int]) -> Any:
        """Store the sums of tokens, and return them."""
        slot = self.cache.slots[seq]
        n_past, n = slot.n_past, len(ids)
        with np.errstate(over="ignore"):
            new = (np.asarray(ids, np.uint64) + np.uint64(1)) * _WEIGHTS[n_past : n_past + n]
            for layer, table, pool in zip(self.cache.layers, self.cache.tables, self.cache.groups, strict=True):
                pages = table.pages[seq, : -(-(n_past + n) // PAGE)]
                first = max(0, n_past + 1 - table.window) if table.window else 0
                assert (pages[first // PAGE :] != NO_PAGE).all()
                rows, at = layer.cache.rows, np.arange(first, n_past + n)  # type: ignore[union-attr]
                seen = rows[pages[at // PAGE], at % PAGE]
                if not self.is_shifted:
                    assert (seen[: n_past - first] == sums(slot.ids[:n_past])[first:]).all()
                total = np.cumsum(np.append(seen[max(0, n_past - first - 1) : n_past - first], new))
                for page in pages[n_past // PAGE :]:
                    assert pool.uses[page] == 1
                    assert pool.nodes[page] is None
                written = np.arange(n_past, n_past + n)
                rows[pages[written // PAGE], written % PAGE] = total[-n:]
        return total[-n:]


class IdStream:
    """Each token is one character, of which `ids_of` makes the token again."""

    def push(self, id: int) -> str:
        return chr(0x4E00 + id)

    def flush(self) -> str:
        return ""


def ids_of(pieces: Any) -> list[int]:
    return [ord(character) - 0x4E00 for piece in pieces for character in piece]


class Oracle(Lookup):
    """Guesses the tokens that come, with some faults."""

    right = 0.9

    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(3)

    def guess(self, most: int) -> list[int]:
        self.n_same = LONG
        ids = expected(self._ids, most)
        return [id if self.rng.random() < self.right else (id + 1) % N_VOCAB for id in ids]


def reply_of(request: Request, stop_ids: Sequence[int] = ()) -> Reply:
    return Reply(
        request.ids, Sampler(request.sampling), IdStream(), StopStrings(request.stop), frozenset(stop_ids),  # type: ignore[arg-type]
        request.max_tokens,
    )  # fmt: skip


def engine_of(decoder: FakeDecoder, stop_ids: Sequence[int] = (), **options: Any) -> Engine:
    return Engine(decoder, lambda request: reply_of(request, stop_ids), clock=decoder.clock, **options)  # type: ignore[arg-type]


def request(
    ids: Sequence[int], max_tokens: int | None = 5, sampling: SamplingParams = GREEDY, **options: Any
) -> Request:
    return Request(list(ids), sampling, max_tokens, **options)


def check(engine: Engine) -> None:
    """References are uses, free pages and used ones are all, rows and jobs belong together."""
    cache = engine.decoder.cache
    for pool in cache.groups:
        uses = [0] * len(pool.uses)
        for slot in cache.slots:
            for page in slot.pages[pool.number]:
                if page != NO_PAGE:
                    uses[page] += 1
        assert uses == pool.uses
        assert set(pool.free) == {page for page, n in enumerate(uses) if not n}
    for row in engine.rows.all:
        assert row.job is None or row.job.row == row.number
        slot = cache.slots[row.number]
        assert len(slot.ids) == slot.n_past
        assert row.job is None or slot.ids == row.job.ids[: slot.n_past]
    assert sum(row.job is not None for row in engine.rows.all) == sum(job.row >= 0 for job in engine.jobs)


def check_index(engine: Engine) -> int:
    """All pages that the index finds hold what their tokens make. Return how many there are."""
    cache, n = engine.decoder.cache, 0
    todo = [(node, list[int]()) for node in (cache.index._roots.values() if cache.index else ())]
    while todo:
        node, ids = todo.pop()
        if node.key:
            ids = [*ids, *np.frombuffer(node.key, np.int32).tolist()]
            for pool, layer in zip(cache.groups, cache.layers, strict=True):
                page = node.pages[pool.number]
                if page != NO_PAGE:
                    assert pool.nodes[page] is node
                    assert (layer.cache.rows[page] == sums(ids)[-PAGE:]).all()  # type: ignore[union-attr]
                    n += 1
        todo += [(child, ids) for child in node.children.values()]
    return n


def pool_of(engine: Engine) -> Pool:
    return engine.decoder.cache.groups[0]
