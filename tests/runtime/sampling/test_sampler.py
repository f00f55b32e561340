"""The sampler against a plain reference: sort everything, in float64, one filter after the other."""

import math
from collections import deque
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime.sampling import filters as samplers
from gguf_run.runtime.sampling.candidates import Candidates
from gguf_run.runtime.sampling.history import breakers, repeated_runs
from gguf_run.runtime.sampling.params import SAMPLERS, SamplingParams
from gguf_run.runtime.sampling.sampler import Sampler, function

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


def drawn(logits: np.ndarray, params: SamplingParams, n: int = 1000) -> dict[int, float]:
    """How often each id comes when draws are spread evenly: its probability, to within 1 / n."""
    sampler, numbers = Sampler(params), iter((np.arange(n) + 0.5) / n)
    with patch("gguf_run.runtime.sampling.sampler.uniform", lambda seed, position: float(next(numbers))):
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


@settings(max_examples=40, deadline=None)
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


@pytest.mark.parametrize(
    ("options", "n_top"),
    [
        ({"temperature": 0}, 1),
        ({}, 40),
        ({"top_k": 5, "min_p": 0.01, "top_p": 1.0}, 5),
        ({"top_k": 50, "typical_p": 0.9, "xtc_probability": 0.5}, 50),
        ({"temperature": 0, "adaptive_target": 0.5}, 1),
        ({"top_k": 0}, 0),
        ({"repeat_penalty": 1.1}, 0),
        ({"logprobs": 2}, 0),
        ({"logit_bias": {3: 1.0}}, 0),
        ({"top_n_sigma": 1.0}, 0),
        ({"mirostat": 2}, 0),
    ],
)
def test_the_greatest_logits_are_enough(options: dict[str, Any], n_top: int) -> None:
    """The very same tokens, also where many logits are alike or tokens cannot come."""
    every, few = (Sampler(SamplingParams(seed=3, **options)) for _ in range(2))
    assert every.n_top == few.n_top == n_top
    rng = np.random.default_rng(1)
    for i in range(40 if n_top else 0):
        logits = rng.integers(0, 12, 300).astype(np.float32) if i % 2 else rng.standard_normal(300, np.float32)
        logits[i + 1 :] = -np.inf if i % 3 == 0 else logits[i + 1 :]
        order = np.argsort(-logits, kind="stable")[:n_top]
        assert every.sample(logits) == few.sample(Candidates(logits[order], order, True))
        for sampler in (every, few):
            sampler.accept([i])
    with pytest.raises(GgufRunError, match="output for the next token is nan"):
        few.sample(Candidates(np.array([np.nan, 1], np.float32), np.array([4, 2]), True))


def test_seed_repeats_draws() -> None:
    logits = np.zeros(1000, np.float32)

    def draws(sampler: Sampler) -> list[int]:
        ids = []
        for _ in range(8):
            ids.append(sampler.sample(logits))
            assert sampler.sample(logits) == ids[-1]  # nothing changes until a token is accepted
            sampler.accept(ids[-1:])
        return ids

    def seeded(seed: int | None) -> Sampler:
        return Sampler(SamplingParams(**OFF, seed=seed))

    assert draws(seeded(7)) == draws(seeded(7))
    assert draws(seeded(7)) != draws(seeded(8))
    assert draws(seeded(None)) != draws(seeded(None))
    unseeded = seeded(None)
    assert draws(seeded(unseeded.seed)) == draws(unseeded)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"repeat_penalty": 3.0, "top_k": 0}, {"dry_multiplier": 9.0}, {"xtc_probability": 0.5},
        {"logits_processors": [lambda ids, logits: np.roll(logits, int(ids.sum()))]},
    ],
)  # fmt: skip
def test_drafts_count_as_accepted(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(2)
    behind, ahead = (Sampler(SamplingParams(seed=5, **options)) for _ in range(2))
    text = rng.integers(0, 8, 40).tolist()
    for sampler in (behind, ahead):
        sampler.accept(text[:10])
    for i in range(10, 40):
        logits = rng.standard_normal(20, np.float32)
        ahead.accept(text[i : i + 1])
        assert behind.sample(logits, drafts=text[10 : i + 1]) == ahead.sample(logits)


@pytest.mark.parametrize("options", [{"mirostat": 1}, {"mirostat": 2}, {"samplers": "a", "adaptive_target": 0.3}])
def test_selectors_learn_from_what_is_accepted(options: dict[str, Any]) -> None:
    logits = np.random.default_rng(1).standard_normal(1000, np.float32)
    first, second = (Sampler(SamplingParams(seed=9, **options)) for _ in range(2))
    for _ in range(30):
        second.sample(-logits)  # of a draft that is refused
        id = first.sample(logits)
        assert second.sample(logits) == id
        first.accept([id])
        second.accept([second.sample(logits)])


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
        ("repeat_penalty", 0), ("repeat_penalty", -1), ("repeat_last_n", -1), ("seed", -1), ("mirostat", 3),
        ("adaptive_decay", 1), ("typical_p", 2), ("xtc_threshold", -1), ("dry_base", math.nan), ("logprobs", -1),
        ("presence_penalty", math.inf), ("logit_bias", {1: math.inf}), ("logit_bias", {-1: 1}),
        ("logit_bias", {"a": 1}), ("logit_bias", {1: math.nan}), ("dry_sequence_breakers", "ab"),
        ("dry_sequence_breakers", [""]),
        ("seed", 2**64), ("seed", 0.5),
    ],
)  # fmt: skip
def test_values_not_allowed(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{name} is .*allowed"):
        SamplingParams(**{name: value})


def test_logits_processors_see_the_context_and_change_logits() -> None:
    seen: list[tuple[list[int], np.ndarray]] = []

    def forbid(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        seen.append((ids.tolist(), logits.copy()))
        logits[1] = -np.inf
        return logits

    def double(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        return (logits * 2).astype(np.float64)

    logits = np.array([1, 5, 2, 1.5], np.float32)
    params = SamplingParams(temperature=0, logit_bias={3: 1.0}, logits_processors=[forbid, double])
    sampler = Sampler(params)
    sampler.accept([7, 8])
    assert sampler.sample(logits) == 3
    sampler.accept(iter([3]))
    assert sampler.sample(logits) == 3
    assert [ids for ids, _ in seen] == [[7, 8], [7, 8, 3]]
    assert (seen[0][1] == [1, 5, 2, 2.5]).all()
    assert (logits == [1, 5, 2, 1.5]).all()


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda ids, logits: logits[:2], r"returned an array of shape \(2,\): it must return logits of \(3,\)"),
        (lambda ids, logits: logits - np.inf, "leaves no token to choose from"),
        (lambda ids, logits: logits * np.nan, "leaves no token to choose from"),
    ],
)
def test_bad_logits_processors(processor: Any, message: str) -> None:
    with pytest.raises(GgufRunError, match=message):
        Sampler(SamplingParams(logits_processors=[processor])).sample(np.zeros(3, np.float32))


def test_logprobs_are_the_models_own() -> None:
    logits = np.array([1, 5, 2, 1.5], np.float32)
    sampler = Sampler(SamplingParams(temperature=0, logit_bias={1: -math.inf}, logprobs=2))
    sampler.accept([sampler.sample(logits)])
    (found,) = sampler.logprobs
    total = math.log(np.exp(logits.astype(np.float64)).sum())
    assert (found.id, found.logprob) == (2, pytest.approx(2 - total, abs=1e-6))
    assert [id for id, _ in found.top] == [1, 2]
    assert [value for _, value in found.top] == pytest.approx([5 - total, 2 - total], abs=1e-6)
    only = Sampler(SamplingParams(logprobs=0))
    only.accept([only.sample(logits)])
    assert only.logprobs[0].top == ()
    assert Sampler(SamplingParams()).logprobs == []


def test_masks() -> None:
    logits, mask = np.arange(70, dtype=np.float32), np.zeros(3, np.uint32)
    mask[[0, 1]] = 1 << 3, 1 << 31  # tokens 3 and 63
    sampler = Sampler(SamplingParams(temperature=0, logit_bias={3: 100.0, 5: 900.0}))
    assert sampler.sample(logits) == 5
    assert sampler.sample(logits, mask) == 3
    assert logits[69] == 69
    with pytest.raises(GgufRunError, match="a mask or a logits processor leaves no token"):
        sampler.sample(logits, np.zeros(3, np.uint32))


def test_masks_of_most_of_the_vocabulary() -> None:
    """top_k finds what little is left."""
    logits = np.full(100_000, -np.inf, np.float32)
    logits[[5, 70_000]] = 1
    assert set(drawn(logits, SamplingParams(temperature=1))) == {5, 70_000}


@pytest.mark.parametrize(
    ("text", "chain"),
    [
        ("kpt", ("top_k", "top_p", "temperature")),
        ("top_k;TEMPERATURE; min-p ;typical", ("top_k", "temperature", "min_p", "typ_p")),
        ("temp", ("temperature",)),  # a name, not the letters t, e, m, p
        ("topk", ("top_k",)),
        (["nucleus", "xtc"], ("top_p", "xtc")),
        ("", ()),
    ],
)
def test_chain_by_names_and_letters(text: Any, chain: tuple[str, ...]) -> None:
    assert SamplingParams(samplers=text).samplers == chain


@pytest.mark.parametrize("text", ["kz", "top_k;nope", ["k"], "k;p;"])
def test_unknown_samplers(text: Any) -> None:
    with pytest.raises(OptionError, match=r"samplers: .* is not known; allowed, .*top_k"):
        SamplingParams(samplers=text)


def test_order_counts() -> None:
    """Temperature before min_p lets more through than after it."""
    logits = np.array([4, 2, 0], np.float32)
    params = OFF | {"temperature": 4.0, "min_p": 0.3}
    assert set(drawn(logits, SamplingParams(**params))) == {0}
    assert set(drawn(logits, SamplingParams(**params, samplers="tm"))) == {0, 1, 2}


def test_every_sampler_has_a_function() -> None:
    functions = [function(name) for name in SAMPLERS if name != "adaptive_p"]
    assert len({*functions}) == len(SAMPLERS) - 1


def test_breakers() -> None:
    """Tokens that hold a breaker, and those that end with its beginning, with what must follow."""
    pieces = [b"a", b"\n", b"x\n\n", b"y##", b"##", b"#", b"\xff", "é#".encode()]
    tokenizer: Any = SimpleNamespace(
        n_vocab=len(pieces), piece=lambda id: pieces[id], encode=lambda text, **_: [{"#": 5, "##": 4}[text]]
    )
    assert breakers(tokenizer, ["\n", "##"]) == {1: ((),), 2: ((),), 3: ((),), 4: ((),), 5: ((5,),), 7: ((5,),)}
    assert breakers(tokenizer, ["###"])[3] == ((4,), (5,))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(0, 3))
def test_runs_that_would_repeat(recent: list[int], allowed: int) -> None:
    expected: dict[int, int] = {}
    for at in range(len(recent) - 1):  # a run that ends here and one at the end of all, of the same tokens
        n = 0
        while n <= at and recent[at - n] == recent[len(recent) - 1 - n]:
            n += 1
        if n >= allowed and len(recent) > allowed:
            expected[recent[at + 1]] = max(n, expected.get(recent[at + 1], 0))
    params = SamplingParams(dry_allowed_length=allowed)
    assert repeated_runs(recent, params, {}) == expected


EXTREMES: dict[str, list[Any]] = {
    "temperature": [0, 1e-300, 1e-19, 1e-3, 1, 1e300],
    "dynatemp_range": [0, 1e-9, 1, 1e9], "dynatemp_exponent": [0, 1, 1e300],
    "top_k": [0, 1, 10**9], "top_p": [0, 1e-9, 1], "min_p": [0, 1e-300, 1], "typical_p": [0, 0.5, 1],
    "top_n_sigma": [-1, 1e-9, 1e9, 1e300], "xtc_probability": [0, 1], "xtc_threshold": [0, 1e-9, 0.5],
    "repeat_penalty": [1e-3, 1, 1e3], "frequency_penalty": [-1e30, 0, 1e30], "presence_penalty": [-1e30, 0, 1e30],
    "repeat_last_n": [0, 64, 10**6], "dry_multiplier": [-1e30, 0, 1, 1e30], "dry_base": [0, 1, 1.0000001, 1e30],
    "dry_allowed_length": [0, 2, 10**9], "mirostat": [0, 0, 1, 2],
    "mirostat_tau": [0, 5, 1e308], "mirostat_eta": [0, 1, 1e3],
    "adaptive_target": [-1, 0, 1], "adaptive_decay": [0, 0.99],
    "samplers": ["edskypmxt", "txmpyksde", "edskypmxta", "keyt", "", "ttkkee"],
    "logit_bias": [{}, {0: -math.inf, 2: 1e30}],
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.fixed_dictionaries({name: st.sampled_from(values) for name, values in EXTREMES.items()}), st.data())
def test_extreme_options_still_choose_a_token(options: dict[str, Any], data: st.DataObject) -> None:
    """Whatever is asked for: a token that is not forbidden, and no warning of NumPy's."""
    values = st.sampled_from([-math.inf, -3e38, -1e4, -1.0, 0.0, 0.5, 30.0, 1e4, 3e38])
    last = data.draw(st.sampled_from([-3e38, 1.0]))
    logits = np.array([*data.draw(st.lists(values, min_size=3, max_size=100)), last], np.float32)
    sampler = Sampler(SamplingParams(**options, seed=1))
    sampler.accept(data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=30)))
    for _ in range(3):
        id = sampler.sample(logits)
        assert logits[id] > -np.inf
        assert id not in options["logit_bias"] or id == 2
        sampler.accept([id])


@pytest.mark.parametrize("spread", [0.0, 0.4, 3.0])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.9999])
def test_top_p_of_many_alike(spread: float, top_p: float) -> None:
    """The set that a sort finds, also where it is thousands."""
    logits = (np.random.default_rng(3).standard_normal(30_000) * spread).astype(np.float32)
    logits[::3] = -np.inf
    kept = samplers.top_p(samplers.Candidates(logits), SamplingParams(top_p=top_p), samplers.State(0, 0, deque()))
    weights = np.exp(logits - logits.max(), dtype=np.float64)
    order = np.argsort(-logits, kind="stable")
    n = int((weights[order].cumsum() / weights.sum()).searchsorted(top_p)) + 1
    assert kept.ids is not None
    assert len(set(kept.ids.tolist()) ^ set(order[:n].tolist())) <= 1  # the sum is float32's
