"""Each sampler against llama.cpp's own: candidates left and their probabilities, made by
benchmarks/samplers_vs_llamacpp.py; and how tokens with breakers for DRY are found."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samplers_vs_llamacpp import cases, logits

from gguf_run.runtime.sampling import sampler as sampler_module
from gguf_run.runtime.sampling import uncommon
from gguf_run.runtime.sampling.candidates import Candidates
from gguf_run.runtime.sampling.params import DEFAULT_CHAIN, SAMPLERS, SamplingParams
from gguf_run.runtime.sampling.sampler import Sampler

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "sampler_cases.json").read_text())


class Chooses:
    """Stands in for the random numbers: makes the sampler draw one token."""

    def __init__(self, sampler: Sampler) -> None:
        self._draw = sampler_module._draw
        self.wanted, self.left = -1, Candidates(np.zeros(0))

    def draw(self, candidates: Candidates, _: float) -> int:
        """Check that a number in the middle of the token's share draws it."""
        self.left = candidates
        ids = np.arange(len(candidates.logits)) if candidates.ids is None else candidates.ids
        probabilities, at = candidates.probabilities(), int(np.flatnonzero(ids == self.wanted)[0])
        before = probabilities[ids < self.wanted].sum()
        assert self._draw(candidates, float((before + probabilities[at] / 2) / probabilities.sum())) == at
        return at


@pytest.mark.parametrize("number", range(len(CASES)))
def test_as_llama_cpp(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[number]
    options = case["options"]
    if "logit_bias" in options:
        options = options | {"logit_bias": {int(id): bias for id, bias in options["logit_bias"].items()}}
    sampler = Sampler(SamplingParams(**options), {head: (tuple(rest),) for head, *rest in case["breakers"]})
    source = Chooses(sampler)
    monkeypatch.setattr(sampler_module, "_draw", source.draw)
    monkeypatch.setattr(uncommon, "uniform", lambda seed, position, stream: 0.0)  # XTC asks whether it shall act
    sampler.accept(case.get("context", ()))
    for step, (ids, probabilities, source.wanted) in enumerate(case["rows"]):
        source.left = Candidates(np.zeros(1), np.array([source.wanted]))  # what is left where nothing is drawn
        chosen = sampler.sample(logits(case["n"], case["seed"] + step, case["spread"]))
        left = source.left
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
