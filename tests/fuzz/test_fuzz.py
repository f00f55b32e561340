"""The corpus, and some mutants of each kind of file: see fuzz.py, which tries more of them."""

import os

import pytest
from attacks import attacks
from fuzz import hunt, prepare
from targets import TARGETS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants are read in forked processes")
MUTANTS, FEW = 150, {"model": 10, "checkpoint": 20, "shards": 20, "tekken": 20}  # few where each takes long


@pytest.mark.parametrize("target", TARGETS)
def test_mutants_and_attacks(target: str) -> None:
    prepare(target)
    corpus = [name for name, (of, _) in attacks().items() if of == target]
    found = hunt(target, [*corpus, *range(FEW.get(target, MUTANTS))])
    assert [(finding.mutant, finding.what[:200]) for finding in found] == []
