"""The sampler against a plain reference: sort everything, in float64, one filter after the other."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime.sampling import Sampler
from gguf_run.runtime.sampling_params import SamplingParams

OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def reference(logits: np.ndarray, params: SamplingParams) -> dict[int, float]:
    """Probability of each id that the chain leaves."""
    left = sorted(enumerate(logits.astype(np.float64)), key=lambda pair: -pair[1])  # stable: lower ids first
    if params.top_k:
        left = left[: params.top_k]
    if params.top_p < 1:
        weights = [math.exp(logit - left[0][1]) for _, logit in left]
        total, mass, n_keep = sum(weights), 0.0, 0
        for weight in weights:
            mass, n_keep = mass + weight / total, n_keep + 1
            if mass >= params.top_p:
                break
        left = left[:n_keep]
    if params.min_p > 0:
        left = [(id, logit) for id, logit in left if math.exp(logit - left[0][1]) >= params.min_p]
    weights = [math.exp((logit - left[0][1]) / params.temperature) for _, logit in left]
    return {id: weight / sum(weights) for (id, _), weight in zip(left, weights, strict=True)}


class Grid:
    """Stands in for the random generator: numbers spread evenly over [0, 1)."""

    def __init__(self, n: int) -> None:
        self._values = iter((np.arange(n) + 0.5) / n)

    def random(self) -> float:
        return float(next(self._values))


def drawn(logits: np.ndarray, params: SamplingParams, n: int = 1000) -> dict[int, float]:
    """How often each id comes when draws are spread evenly: its probability, to within 1 / n."""
    sampler = Sampler(params)
    sampler._random = Grid(n)  # type: ignore[assignment]
    ids, counts = np.unique([sampler.sample(logits) for _ in range(n)], return_counts=True)
    return dict(zip(ids.tolist(), (counts / n).tolist(), strict=True))


def agree(logits: np.ndarray, params: SamplingParams) -> None:
    expected, found = reference(logits, params), drawn(logits, params)
    assert set(found) <= set(expected)
    for id, probability in expected.items():
        assert found.get(id, 0.0) == pytest.approx(probability, abs=1.1e-3)


CHAINS: list[dict[str, Any]] = [
    {},
    OFF,
    OFF | {"top_k": 1},
    OFF | {"top_k": 5},
    OFF | {"top_k": 10_000},
    OFF | {"top_p": 0.0},
    OFF | {"top_p": 0.5},
    OFF | {"top_p": 0.999},
    OFF | {"min_p": 0.1},
    OFF | {"min_p": 1.0},
    OFF | {"top_k": 20, "top_p": 0.7},
    OFF | {"top_p": 0.9, "min_p": 0.02, "temperature": 2.0},
    OFF | {"temperature": 0.3, "top_k": 7, "top_p": 0.8, "min_p": 0.3},
]


@pytest.mark.parametrize("chain", CHAINS, ids=str)
@pytest.mark.parametrize("n_vocab", [1, 2, 63, 130, 3001])
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_chain(chain: dict[str, Any], n_vocab: int, spread: float) -> None:
    logits = (np.random.default_rng(n_vocab).standard_normal(n_vocab) * spread).astype(np.float32)
    agree(logits, SamplingParams(**chain))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_chain_with_equal_logits(data: st.DataObject) -> None:
    """Few different values: ties everywhere, at the border of top_k too. The lower id wins."""
    values = data.draw(st.lists(st.integers(-2, 2), min_size=1, max_size=400))
    logits = np.repeat(np.array(values, np.float32), data.draw(st.integers(1, 5)))
    agree(logits, SamplingParams(**OFF | {"top_k": data.draw(st.integers(1, len(logits)))}))


def test_temperature_zero_is_argmax() -> None:
    logits = np.array([1, 3, -2, 3, 0], np.float32)
    sampler = Sampler(SamplingParams(temperature=0, top_k=0))
    assert {sampler.sample(logits) for _ in range(20)} == {1}


def test_tiny_temperature_does_not_overflow() -> None:
    assert Sampler(SamplingParams(temperature=1e-300)).sample(np.array([-5, 7, 7.5], np.float32)) == 2


def test_masked_tokens_never_come() -> None:
    logits = np.array([-np.inf, 0, -np.inf, 0.1], np.float32)
    assert set(drawn(logits, SamplingParams(**OFF))) == {1, 3}


def test_repeat_penalty_divides_positive_and_multiplies_negative() -> None:
    logits = np.array([2.0, 1.9, -1.0, -1.1], np.float32)
    sampler = Sampler(SamplingParams(temperature=0, repeat_penalty=1.5))
    before = logits.copy()
    assert sampler.sample(logits) == 0
    sampler.accept([0, 0, 0])  # a token counts once
    assert sampler.sample(logits) == 1
    sampler.accept([1])
    assert sampler.sample(logits) == 0
    assert (logits == before).all()
    negative = Sampler(SamplingParams(temperature=0, repeat_penalty=1.5))
    negative.accept([2])
    assert negative.sample(np.array([-9, -9, -1.0, -1.1], np.float32)) == 3


def test_repeat_penalty_forgets_after_64_tokens() -> None:
    logits = np.array([2.0, 1.9, 0.0], np.float32)
    sampler = Sampler(SamplingParams(temperature=0, repeat_penalty=2.0))
    sampler.accept([0, *[2] * 63])
    assert sampler.sample(logits) == 1
    sampler.accept([2])
    assert sampler.sample(logits) == 0


def test_seed_repeats_draws() -> None:
    logits = np.zeros(1000, np.float32)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(**OFF, seed=seed))
        return [sampler.sample(logits) for _ in range(8)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)
    unseeded = Sampler(SamplingParams(**OFF))
    assert draws(unseeded.seed) == [unseeded.sample(logits) for _ in range(8)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_must_be_numbers(bad: float, temperature: float) -> None:
    logits = np.array([0, bad, 1], np.float32)
    with pytest.raises(GgufRunError, match="not a number"):
        Sampler(SamplingParams(temperature=temperature)).sample(logits)
    with pytest.raises(GgufRunError, match="not a number"):
        Sampler(SamplingParams(temperature=temperature)).sample(np.full(3, -np.inf, np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
        ("top_k", -1), ("top_k", 2.5), ("top_k", True), ("top_p", 1.01), ("top_p", -1), ("min_p", 2), ("min_p", None),
        ("repeat_penalty", 0), ("repeat_penalty", -1), ("repeat_last_n", -1), ("seed", -1),
        ("seed", 2**64), ("seed", 0.5),
    ],
)  # fmt: skip
def test_values_not_allowed(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{name} is .*allowed"):
        SamplingParams(**{name: value})
