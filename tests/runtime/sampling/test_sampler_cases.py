"""Each sampler against llama.cpp's own: candidates left and their probabilities, made by
benchmarks/samplers_vs_llamacpp.py; and how tokens with breakers for DRY are found."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samplers_vs_llamacpp import cases, logits

from gguf_run.runtime.sampling.candidates import Candidates
from gguf_run.runtime.sampling.params import DEFAULT_CHAIN, SAMPLERS, SamplingParams
from gguf_run.runtime.sampling.sampler import Sampler

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "sampler_cases.json").read_text())


class Chooses:
    """A source of random numbers that makes the sampler draw one token."""

    def __init__(self, sampler: Sampler) -> None:
        self._distribution = sampler._distribution
        self.wanted, self.seen = -1, Candidates(np.zeros(0))

    def distribution(self, candidates: Candidates) -> Candidates:
        self.seen = self._distribution(candidates)
        return self.seen

    def random(self) -> float:
        if not len(self.seen.logits):  # XTC asks whether it shall act
            return 0.0
        probabilities = self.seen.probabilities()
        at = next(i for i in range(len(probabilities)) if self.seen.id(i) == self.wanted)
        return float((probabilities.cumsum()[at] - probabilities[at] / 2) / probabilities.sum())


@pytest.mark.parametrize("number", range(len(CASES)))
def test_as_llama_cpp(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[number]
    options = case["options"]
    if "logit_bias" in options:
        options = options | {"logit_bias": {int(id): bias for id, bias in options["logit_bias"].items()}}
    sampler = Sampler(SamplingParams(**options), {head: (tuple(rest),) for head, *rest in case["breakers"]})
    source = Chooses(sampler)
    monkeypatch.setattr(sampler, "_distribution", source.distribution)
    sampler._state.random = source  # type: ignore[assignment]
    sampler.accept(case.get("context", ()))
    for step, (ids, probabilities, source.wanted) in enumerate(case["rows"]):
        source.seen = Candidates(np.zeros(0))
        chosen = sampler.sample(logits(case["n"], case["seed"] + step, case["spread"]))
        left = source.seen
        found = {left.id(i): p for i, p in enumerate(left.probabilities()) if left.logits[i] > -np.inf}
        assert sorted(found) == ids
        np.testing.assert_allclose([found[id] for id in ids], probabilities, rtol=2e-4, atol=1e-12)
        assert chosen == source.wanted
        sampler.accept([chosen])


def test_cases_cover_all_samplers() -> None:
    assert [{key: case[key] for key in ("options", "n", "spread", "seed")} for case in CASES] == json.loads(
        json.dumps([{key: case[key] for key in ("options", "n", "spread", "seed")} for case in cases()])
    )
    options = {name for case in CASES for name in case["options"]}
    assert options >= {name for kind in SAMPLERS.values() for name in kind.parameters}
    assert "".join(SAMPLERS[name].letter for name in DEFAULT_CHAIN) == "edskypmxt"
