"""Choosing types: the solver against all combinations, errors against NumPy, sizes against written files."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinymodel import WIDE_LLAMA, Tiny, write_tiny

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import OptionError
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.quantizers.quantizer import quantize
from gguf_run.runtime.quantize import allocate as module
from gguf_run.runtime.quantize.allocate import (
    allocate,
    cheapest,
    check_size,
    name_of,
    places,
    probe_type,
    relative_errors,
    size_at,
    steadied,
)
from gguf_run.runtime.quantize.file import quantize_file
from gguf_run.runtime.quantize.file_types import FILE_TYPES, file_type
from gguf_run.runtime.quantize.plan import Options, Plan, make_plan
from gguf_run.runtime.quantize.rules import Overrides


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_is_cheaper(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [rng.integers(1, 40, rng.integers(1, 5)) for _ in range(5)]
    costs = [rng.random(len(size)) for size in sizes]  # a larger type may be worse
    budget = int(rng.integers(sum(size.min() for size in sizes), sum(size.max() for size in sizes) + 9))
    picks = cheapest(sizes, costs, budget)
    assert sum(size[pick] for size, pick in zip(sizes, picks, strict=True)) <= budget
    found = sum(cost[pick] for cost, pick in zip(costs, picks, strict=True))
    every = itertools.product(*(range(len(size)) for size in sizes))
    fits = [c for c in every if sum(size[i] for size, i in zip(sizes, c, strict=True)) <= budget]
    assert found == pytest.approx(min(sum(cost[i] for cost, i in zip(costs, c, strict=True)) for c in fits))


def test_large_sizes_are_counted_in_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_N_UNITS", 64)
    rng = np.random.default_rng(1)
    sizes = [np.sort(rng.integers(10**9, 2 * 10**9, 4)) for _ in range(8)]
    costs = [np.sort(rng.random(4))[::-1] for _ in sizes]
    for budget in (sum(int(size[0]) for size in sizes), 12 * 10**9, 10**11):
        picks = cheapest(sizes, costs, budget)
        assert sum(size[pick] for size, pick in zip(sizes, picks, strict=True)) <= budget
    assert picks == [3] * 8


def plan_of(path: Path, tiny: Tiny, **overrides: Any) -> Iterator[Plan]:
    write_tiny(path, tiny)
    with GGUFFile.open(path) as file:
        yield make_plan(file, Options(FILE_TYPES["Q8_0"], Overrides(pure=True, **overrides)))


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[Plan]:
    yield from plan_of(tmp_path / "m.gguf", Tiny(n_ff=256, tied=False))  # rows of 96, 128 and 256 weights


def test_errors_are_those_of_all_rows(plan: Plan) -> None:
    [place] = [place for place in places(plan) if name_of(place) == "blk.0.ffn_down.weight"]
    types = [type_by_name(name) for name in ("Q2_K", "Q4_0", "F32")]
    x = place[0].source.blocks().view(np.float32).astype(np.float64)
    expected = []
    for type in types:
        error = dequantize(quantize(x.astype(np.float32), type), type) - x
        expected.append((error**2).sum() / (x**2).sum())
    assert relative_errors(place, types) == pytest.approx(expected, rel=1e-5)
    assert probe_type(place).name == "Q4_K"


@pytest.mark.parametrize("part", [0.0, 0.3, 0.71, 1.0])
def test_the_file_has_the_size_and_the_costly_tensor_gets_most_bits(plan: Plan, tmp_path: Path, part: float) -> None:
    low, high = limits(plan)
    size = low + int(part * (high - low))
    costs = {item.source.name: 1.0 for item in plan.items} | {"blk.1.attn_q.weight": 100.0}
    chosen, expected = allocate(plan, costs, size, 1)
    writer, _ = quantize_file(chosen, tmp_path / "out.gguf", 1, lambda done, total: None)
    n_bytes = (tmp_path / "out.gguf").stat().st_size
    assert n_bytes == writer.nbytes
    assert size - (high - low) / 20 <= n_bytes <= size
    bits = {
        i.target.name: i.target.type.type_size / i.target.type.block_size for i in chosen.items if len(i.target.ne) > 1
    }
    assert bits["blk.1.attn_q.weight"] == max(bits[name] for name in bits if name.startswith("blk.1.attn"))
    assert (expected < 1e-4) == (part == 1.0)
    if part == 1.0:
        assert {item.target.type.name for item in chosen.items} == {"F32", "F16"}


def limits(plan: Plan) -> tuple[int, int]:
    with pytest.raises(OptionError) as error:
        check_size(plan, 1)
    words = str(error.value).split()
    return int(words[-4]), int(words[-2])


def test_sizes_that_no_types_make(plan: Plan) -> None:
    low, high = limits(plan)
    check_size(plan, low)
    check_size(plan, high)
    for size in (low - 1, high + 1):
        with pytest.raises(OptionError, match=f"the target is {size} bytes: .* of {low} to {high} bytes"):
            check_size(plan, size)


def test_bits_per_weight_and_types_that_the_user_names(tmp_path: Path) -> None:
    rules = ((re.compile("attn_v"), type_by_name("Q5_1")),)
    named = {"tensor_types": rules, "token_embd_type": type_by_name("Q8_0")}
    for plan in plan_of(tmp_path / "m.gguf", WIDE_LLAMA, **named):
        chosen, _ = allocate(plan, {item.source.name: 1.0 for item in plan.items}, size_at(plan, 5.0), 1)
        n_bytes = sum(item.target.nbytes for item in chosen.items)
        assert 4.8 < 8 * n_bytes / sum(item.target.n_elements for item in chosen.items) <= 5.0
        types = {item.target.name: item.target.type.name for item in chosen.items}
        assert {types.pop(name) for name in list(types) if "attn_v" in name} == {"Q5_1"}
        assert types["token_embd.weight"] == "Q8_0"
        weights: Counter[str] = Counter()
        for item in chosen.items:
            weights[item.target.type.name] += item.target.n_elements
        [(most, _)] = weights.most_common(1)
        assert chosen.metadata["general.file_type"] == Typed("u32", file_type(most).id)


def test_costs_are_steadied() -> None:
    """One layer that stands out comes nearer to the others; a tensor that is alone keeps its cost."""
    costs = {"blk.0.ffn_up.weight": 9.0, "blk.1.ffn_up.weight": 0.0, "blk.2.ffn_up.weight": 3.0, "output.weight": 5.0}
    found = steadied(costs)
    assert found == pytest.approx({
        "blk.0.ffn_up.weight": 6.0, "blk.1.ffn_up.weight": 0.0, "blk.2.ffn_up.weight": 12**0.5, "output.weight": 5.0,
    })  # fmt: skip
