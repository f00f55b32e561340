"""The corpus, and some hundred mutants of each kind of file: see fuzz.py, which tries more of them."""

import pytest
from attacks import attacks
from fuzz import hunt, prepare
from targets import TARGETS

pytestmark = pytest.mark.skipif(
    not hasattr(__import__("os"), "fork"), reason="the mutants are read in forked processes"
)
MUTANTS = 150
ON_THEIR_OWN = "model"  # loads a model and generates, which takes longer


@pytest.mark.parametrize("target", TARGETS)
def test_mutants_and_attacks(target: str) -> None:
    prepare(target)
    corpus = [name for name, (of, _) in attacks().items() if of == target]
    mutants = [*corpus, *range(MUTANTS // 5 if target == ON_THEIR_OWN else MUTANTS)]
    assert [(finding.mutant, finding.what[:200]) for finding in hunt(target, mutants)] == []
