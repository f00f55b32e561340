"""Recipes: words of a file become rules, types become a file that means them again."""

from pathlib import Path

import pytest
from tinymodel import Tiny, write_tiny

from gguf_run.formats.errors import OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.quantize.file_types import FILE_TYPES
from gguf_run.runtime.quantize.plan import Options, make_plan
from gguf_run.runtime.quantize.recipe import read_recipe, write_recipe
from gguf_run.runtime.quantize.rules import Overrides


def test_words_are_rules(tmp_path: Path) -> None:
    path = tmp_path / "r.txt"
    path.write_text("attn_v=q6_K ffn_(up|down)=Q4_0\n\n^output\\.weight$=q8_0\n")
    rules = read_recipe(path)
    assert [(pattern.pattern, type.name) for pattern, type in rules] == [
        ("attn_v", "Q6_K"), ("ffn_(up|down)", "Q4_0"), ("^output\\.weight$", "Q8_0")]  # fmt: skip
    named = Overrides(tensor_types=tuple(rules)).named
    assert [t and t.name for t in map(named, ("blk.0.ATTN_V.weight", "output.weight", "attn_output.weight"))] == [
        "Q6_K", "Q8_0", None]  # fmt: skip


@pytest.mark.parametrize("word", ["attn_v", "=Q4_0", "attn_v=Q9_9", "(=Q4_0", "a=IQ1_S"])
def test_other_words_are_refused(tmp_path: Path, word: str) -> None:
    path = tmp_path / "r.txt"
    path.write_text(f"attn_k=Q4_0 {word}")
    with pytest.raises(OptionError, match=r"r\.txt:"):
        read_recipe(path)


def test_a_recipe_says_all_types(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", Tiny(tied=False))
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        plan = make_plan(file, Options(FILE_TYPES["Q4_K_M"]))
        write_recipe(tmp_path / "r.txt", plan.items)
        again = make_plan(
            file, Options(FILE_TYPES["Q2_K"], Overrides(tensor_types=tuple(read_recipe(tmp_path / "r.txt"))))
        )
    assert [item.target for item in again.items] == [item.target for item in plan.items]
    assert "^output\\.weight$=" in (tmp_path / "r.txt").read_text()
