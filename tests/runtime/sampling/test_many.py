"""Rows that are sampled together get what Sampler.sample gives each."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gguf_run.formats.errors import GgufRunError
from gguf_run.kernels_cpu.replay.team import Team
from gguf_run.runtime.sampling.choice import Choice
from gguf_run.runtime.sampling.many import ManySampler, Row
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.sampling.sampler import Sampler

OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
COMPILED: list[dict[str, Any]] = [
    {}, OFF, {"temperature": 0}, OFF | {"temperature": 0.3}, OFF | {"temperature": 1e30},
    OFF | {"top_k": 1}, OFF | {"top_k": 5}, OFF | {"top_k": 700, "top_p": 0.99}, OFF | {"top_k": 10**9},
    OFF | {"top_p": 0.0}, OFF | {"top_p": 0.5}, OFF | {"top_p": 0.95}, OFF | {"top_p": 0.9999},
    OFF | {"min_p": 0.05}, OFF | {"min_p": 1.0}, OFF | {"top_p": 0.9, "min_p": 0.01, "temperature": 2.0},
    {"repeat_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    OFF | {"repeat_penalty": 0.7, "repeat_last_n": 10}, {"temperature": 0, "presence_penalty": 1e30},
    {"logit_bias": {0: 5.0, 2: -math.inf}}, {"logprobs": 5}, OFF | {"logprobs": 0, "top_p": 0.9},
]  # fmt: skip
ALONE: list[dict[str, Any]] = [
    {"dry_multiplier": 2.0}, {"typical_p": 0.7}, {"xtc_probability": 0.5}, {"mirostat": 1}, {"mirostat": 2},
    {"dynatemp_range": 0.5}, {"top_n_sigma": 1.0}, {"samplers": "tkp"}, {"samplers": "kk"}, {"temperature": 1e-5},
    {"samplers": "ka", "adaptive_target": 0.3}, {"logits_processors": [lambda ids, logits: -logits]},
    {"logprobs": 70}, {"samplers": "t", "temperature": 0.5},
]  # fmt: skip


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    team = Team(3)
    yield team
    team.close()


def made_rows(options: list[dict[str, Any]], n_vocab: int, rng: np.random.Generator) -> list[Row]:
    """Rows with texts, drafts and masks of any kind."""
    rows = []
    for chain in options:
        bias = {id: value for id, value in chain.get("logit_bias", {}).items() if id < n_vocab - 1}
        sampler = Sampler(SamplingParams(**chain | {"logit_bias": bias}, seed=int(rng.integers(2**63)) * 2))
        sampler.accept(rng.integers(0, n_vocab, int(rng.integers(0, 100))).tolist())
        mask = None
        if rng.random() < 0.3:
            bits = rng.random(n_vocab) < rng.random()
            bits[-1] = True
            mask = np.packbits(np.pad(bits, (0, -n_vocab % 32)), bitorder="little").view("<u4").astype(np.uint32)
        rows.append(Row(sampler, rng.integers(0, n_vocab, int(rng.integers(0, 3))).tolist(), mask))
    return rows


def alone(row: Row, logits: np.ndarray) -> int:
    return row.sampler.sample(logits, row.mask, row.drafts)


@pytest.mark.parametrize("n_vocab", [1, 2, 63, 64, 257, 4096, 5000, 50_257])
@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
def test_as_one_by_one(team: Team, n_vocab: int, spread: float) -> None:
    rng = np.random.default_rng(n_vocab)
    rows = made_rows(COMPILED * 3 + ALONE, n_vocab, rng)
    logits = (rng.standard_normal((len(rows), n_vocab)) * spread).astype(np.float32)
    logits[::3] = np.round(logits[::3])  # with equal ones
    before = logits.copy()
    many = ManySampler(team, n_vocab)
    for _ in range(2):
        found = many.sample(rows, logits)
        assert found == [alone(row, x) for row, x in zip(rows, logits, strict=True)]
        for row, id in zip(rows, found, strict=True):
            assert not isinstance(id, GgufRunError)
            row.sampler.accept([id])
    assert (logits == before).all()


@pytest.mark.parametrize("n_vocab", [40, 5000])
def test_the_greatest_logits_are_enough(team: Team, n_vocab: int) -> None:
    """The very same tokens, and the same errors. With a mask, the greatest are those that may come, then others."""
    rng, n = np.random.default_rng(n_vocab), 64
    options = [{}, {"temperature": 0}, {"top_k": 1}, {"top_k": 64, "top_p": 0.9}, {"top_k": 5, "temperature": 2.0}]
    options += [{"top_k": 50, "typical_p": 0.9}, {"top_k": 20, "min_p": 0.0, "top_p": 1.0, "temperature": 5.0}]
    rows = made_rows(options * 20, n_vocab, rng)
    logits = (rng.standard_normal((len(rows), n_vocab)) * 3).astype(np.float32)
    logits[::3] = np.round(logits[::3])  # with equal ones
    logits[5, 3], logits[9] = np.nan, -np.inf
    rows[30] = rows[30]._replace(mask=np.zeros(-(-n_vocab // 32), np.uint32))
    values, ids = np.full((len(rows), n), -np.inf, np.float32), np.full((len(rows), n), -1)
    for i, row in enumerate(rows):
        every = np.arange(n_vocab)
        bits = 1 if row.mask is None else row.mask[every >> 5] >> (every & 31).astype(np.uint32) & 1
        order = np.lexsort((-logits[i], ~(np.isnan(logits[i]) | (bits == 1)), ~np.isnan(logits[i])))[:n]
        values[i, : len(order)], ids[i, : len(order)] = logits[i, order], order
    many = ManySampler(team, n_vocab)
    found, expected = many.sample_top(rows, values, ids), many.sample(rows, logits)
    assert [str(one) for one in found] == [str(one) for one in expected]
    assert sum(isinstance(one, GgufRunError) for one in found) == 3


def test_no_row_depends_on_others(team: Team) -> None:
    rng = np.random.default_rng(8)
    rows = made_rows(COMPILED * 2 + ALONE, 6000, rng)
    logits = rng.standard_normal((len(rows), 6000), np.float32)
    together = ManySampler(team, 6000).sample(rows, logits)
    with_one_thread = ManySampler(Team(1), 6000)
    for i in rng.permutation(len(rows)):
        assert with_one_thread.sample([rows[i]], logits[i : i + 1]) == [together[i]]
    assert ManySampler(team, 6000).sample(rows[::-1], logits[::-1].copy()) == together[::-1]
    assert ManySampler(team, 6000).sample([], logits[:0]) == []


def test_log_probabilities(team: Team) -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((4, 3000), np.float32) * 3
    logits[3, 5:] = -np.inf
    rows = [Row(Sampler(SamplingParams(logprobs=n, seed=1, repeat_penalty=2.0))) for n in (0, 1, 64, 20)]
    for row, id, x in zip(rows, ManySampler(team, 3000).sample(rows, logits), logits, strict=True):
        expected = alone(row, x)
        assert isinstance(id, Choice) and isinstance(expected, Choice)  # noqa: PT018
        assert id.logprob is not None and expected.logprob is not None  # noqa: PT018
        assert id.logprob.logprob == pytest.approx(expected.logprob.logprob, abs=1e-5)
        assert [id for id, _ in id.logprob.top] == [id for id, _ in expected.logprob.top]
        assert [p for _, p in id.logprob.top] == pytest.approx([p for _, p in expected.logprob.top], abs=1e-5)


def test_an_error_is_of_its_row_alone(team: Team) -> None:
    n_vocab = 300
    logits = np.random.default_rng(1).standard_normal((8, n_vocab), np.float32)
    logits[1, 7], logits[2, 299], logits[3, 0] = np.nan, -np.nan, np.inf
    logits[4] = -np.inf
    rows = [Row(Sampler(SamplingParams(seed=i))) for i in range(8)]
    rows[2] = Row(rows[2].sampler, mask=np.full(10, 7, np.uint32))  # its nan is masked
    rows[5] = Row(rows[5].sampler, mask=np.zeros(10, np.uint32))
    rows[6] = Row(Sampler(SamplingParams(logit_bias=dict.fromkeys(range(n_vocab), -math.inf))))
    found = ManySampler(team, n_vocab).sample(rows, logits)
    for i, message in {1: "is nan", 2: "is nan", 3: "is inf", 4: "is -inf", 5: "a mask", 6: "logit_bias"}.items():
        assert isinstance(found[i], GgufRunError)
        assert message in str(found[i])
    assert [found[i] for i in (0, 7)] == [alone(rows[i], logits[i]) for i in (0, 7)]


@pytest.mark.parametrize("n_vocab", [50, 9000])
def test_draws_follow_the_distribution(team: Team, n_vocab: int) -> None:
    """Chi-square against float64. Above the bound in 1 of 10,000 cases."""
    logits = np.full((64, n_vocab), -30, np.float32)
    logits[:, ::7] = np.random.default_rng(2).standard_normal(len(range(0, n_vocab, 7))) * 2
    rows = [Row(Sampler(SamplingParams(**OFF, seed=i))) for i in range(64)]
    many, counts = ManySampler(team, n_vocab), Counter[Any]()
    for _ in range(50):
        ids = many.sample(rows, logits)
        counts.update(ids)
        for row in rows:
            row.sampler.accept([0])
    weights = np.exp(logits[0].astype(np.float64))
    groups = np.array_split(np.argsort(-weights), 8)
    expected = np.array([weights[group].sum() for group in groups]) / weights.sum() * 3200
    found = np.array([sum(counts[int(id)] for id in group) for group in groups])
    assert ((found - expected)[expected > 5] ** 2 / expected[expected > 5]).sum() < 30
    assert found[expected < 1e-3].sum() == 0


def test_shapes_are_checked(team: Team) -> None:
    many, row, logits = ManySampler(team, 40), Row(Sampler(SamplingParams())), np.zeros((1, 40), np.float32)
    for bad in (
        logits[:, :39],
        logits.astype(np.float64),
        np.zeros((2, 40), np.float32),
        np.zeros((1, 80), "f4")[:, ::2],
    ):
        with pytest.raises(ValueError, match=r"logits are .*; allowed: float32\(1, 40\)"):
            many.sample([row], bad)
    for mask in (np.zeros(1, np.uint32), np.zeros(2, np.int32), np.zeros(4, np.uint32)[::2]):
        with pytest.raises(ValueError, match="a mask is "):
            many.sample([Row(row.sampler, mask=mask)], logits)
