"""Which second moments round which matrix: shared inputs, experts, changed channels; and what is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tinymodel import WIDE_LLAMA, Tiny, tiny_moe, write_tiny

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.errors import FormatError, GgufRunError, OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.quantizers.feedback import round_rows
from gguf_run.formats.quantizers.metric import make_metric
from gguf_run.runtime.quantize import file as file_module
from gguf_run.runtime.quantize.file import quantize_file
from gguf_run.runtime.quantize.file_types import file_type
from gguf_run.runtime.quantize.fold import fold, places
from gguf_run.runtime.quantize.gptq import GptqOptions, with_gptq
from gguf_run.runtime.quantize.plan import Options, Plan, make_plan
from gguf_run.runtime.quantize.rules import Overrides


class RandomMoments:
    """Moments of inputs that depend on each other, other ones for each expert. attn_k reads what attn_q reads."""

    def __init__(self, plan: Plan, missing: str = "nothing") -> None:
        self.widths = {item.source.name: item.source.ne[0] for item in plan.items}
        self.asked: list[tuple[str, int]] = []
        self._missing = missing

    def group(self, name: str) -> str | None:
        return None if self._missing in name else name.replace("attn_k", "attn_q")

    def sums(self, name: str) -> None:
        pass

    def mean(self, name: str, expert: int = 0) -> NDArray[np.float32]:
        self.asked.append((name, expert))
        rng, n = np.random.default_rng([*name.encode(), expert]), self.widths[name]
        x = rng.standard_normal((2 * n, n)) + 2 * rng.standard_normal((2 * n, 4)) @ rng.standard_normal((4, n))
        return (x.T @ x / len(x)).astype(np.float32)


@contextmanager
def planned(folder: Path, tiny: Tiny = WIDE_LLAMA, type: str = "Q4_0") -> Iterator[Plan]:
    write_tiny(folder / "model.gguf", replace(tiny, n_layer=1))
    with GGUFFile.open(folder / "model.gguf") as file:
        yield make_plan(file, Options(file_type(type), Overrides(pure=True, leave_output=True)))


def written(plan: Plan, path: Path, n_threads: int = 2) -> dict[str, NDArray[np.uint8]]:
    quantize_file(plan, path, n_threads, lambda *_: None)
    with GGUFFile.open(path) as out:
        return {name: tensor.blocks().copy() for name, tensor in out.tensors.items()}


def expected(plan: Plan, moments: Any, name: str, options: GptqOptions) -> NDArray[np.uint8]:
    """Return the blocks of a tensor, each expert with its own moments."""
    item = next(item for item in plan.items if item.target.name == name)
    n_rows, type, parts = item.source.ne[1], item.target.type, []
    for first in range(0, item.source.n_rows, n_rows):
        x = dequantize(item.source.blocks(first, first + n_rows), item.source.type)
        h = moments.mean(moments.group(name), first // n_rows)
        if item.change is not None:
            s = item.change.columns[first // n_rows % len(item.change.columns)]
            x, h = x * s * item.change.rows[first : first + n_rows, None], h / np.outer(s, s)
        metric = make_metric(h, type.block_size, options.rho, bool(options.order))
        parts.append(round_rows(x, type, metric, options.sweeps, bool(options.refit)))
    return np.concatenate(parts)


@pytest.mark.parametrize("options", [GptqOptions(), GptqOptions(rho=0.1, order=0, sweeps=0)], ids=["default", "plain"])
@pytest.mark.parametrize("name", ["dense", "experts"])
def test_each_matrix_has_its_moments(
    name: str, options: GptqOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "_SLAB", 1 << 12)  # several slabs for a matrix
    with planned(tmp_path, WIDE_LLAMA if name == "dense" else tiny_moe(1)) as plan:
        moments: Any = RandomMoments(plan)
        changed = with_gptq(plan, moments, options)
        assert changed.notes == plan.notes
        found, plain = written(changed, tmp_path / "gptq.gguf", 1), written(plan, tmp_path / "plain.gguf")
        assert len({*moments.asked}) == len(moments.asked)  # each was made ready once
        by_two = written(changed, tmp_path / "gptq.gguf")
        assert all((blocks == by_two[name]).all() for name, blocks in found.items())
        assert not any("attn_k" in name for name, _ in moments.asked)
        n_experts = 0
        for item in plan.items:
            target = item.target
            if target.type.is_quantized:
                assert (found[target.name] != plain[target.name]).any()
                np.testing.assert_array_equal(found[target.name], expected(plan, moments, target.name, options))
                n_experts += len(target.ne) > 2
            else:
                np.testing.assert_array_equal(found[target.name], plain[target.name])
        assert n_experts == (3 if name == "experts" else 0)


def test_changed_channels(tmp_path: Path) -> None:
    """With scales in its columns a matrix reads x / s: its moments change with them."""
    with planned(tmp_path) as plan:
        rng, moments, options = np.random.default_rng(3), RandomMoments(plan), GptqOptions()
        chosen = [
            (place, np.exp(rng.standard_normal((place.n_expert, place.channels.max() + 1))).astype(np.float32))
            for place in places(plan)
        ]
        folded = fold(plan, chosen)
        found = written(with_gptq(folded, moments, options), tmp_path / "out.gguf")  # type: ignore[arg-type]
        n_changed = 0
        for item in folded.items:
            if item.target.type.is_quantized:
                n_changed += item.change is not None and (item.change.columns != 1).any()
                np.testing.assert_array_equal(
                    found[item.target.name], expected(folded, moments, item.target.name, options)
                )
        assert n_changed >= 6


def test_matrices_without_moments_are_named(tmp_path: Path) -> None:
    with planned(tmp_path) as plan:
        moments: Any = RandomMoments(plan, "ffn_down")
        changed = with_gptq(plan, moments, GptqOptions())
        assert changed.notes[-1] == "rounded without gptq, for lack of second moments: blk.0.ffn_down.weight"
        found, plain = written(changed, tmp_path / "a.gguf"), written(plan, tmp_path / "b.gguf")
        np.testing.assert_array_equal(found["blk.0.ffn_down.weight"], plain["blk.0.ffn_down.weight"])
        assert (found["blk.0.ffn_up.weight"] != plain["blk.0.ffn_up.weight"]).any()
        with pytest.raises(OptionError, match="no matrix becomes quantized and has second moments"):
            with_gptq(plan, RandomMoments(plan, ""), GptqOptions())  # type: ignore[arg-type]
    with planned(tmp_path, type="F16") as plan, pytest.raises(OptionError, match="no matrix becomes quantized"):
        with_gptq(plan, RandomMoments(plan), GptqOptions())  # type: ignore[arg-type]


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    with planned(tmp_path) as plan:
        item = next(item for item in plan.items if "ffn_up" in item.target.name)
        bad = item.source.blocks().view(np.float32).copy()
        bad[3, 5] = np.inf
        write_tiny(tmp_path / "bad.gguf", replace(WIDE_LLAMA, n_layer=1, tensors={item.source.name: bad}))
    with GGUFFile.open(tmp_path / "bad.gguf") as file:
        plan = make_plan(file, Options(file_type("Q4_0")))
        changed = with_gptq(plan, RandomMoments(plan), GptqOptions())  # type: ignore[arg-type]
        with pytest.raises(GgufRunError, match=r"ffn_up\.weight.*: 1 of \d+ weights are NaN or infinite, the first at"):
            quantize_file(changed, tmp_path / "out.gguf", 1, lambda *_: None)
    assert not (tmp_path / "out.gguf").exists()


def test_moments_that_are_not_finite_are_found_first(tmp_path: Path) -> None:
    class Bad(RandomMoments):
        def sums(self, name: str) -> None:
            raise FormatError(f"moments of {name} are not finite")

    with planned(tmp_path) as plan, pytest.raises(FormatError, match="are not finite"):
        with_gptq(plan, Bad(plan), GptqOptions())  # type: ignore[arg-type]


def test_too_little_memory(tmp_path: Path) -> None:
    with planned(tmp_path) as plan, pytest.raises(OptionError, match=r"512 columns need 11 MB of memory, 1 MB"):
        with_gptq(plan, RandomMoments(plan), GptqOptions(), 1_000_000)  # type: ignore[arg-type]
