"""Channel scales: the model computes the same with any scales, and those that are chosen lose least."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_tiny
import numpy as np
import pytest
import tiny
from numpy.typing import NDArray
from numpy_backend import NumpyBackend
from tinymodel import AWKWARD_LLAMA, TINY_GEMMA3, WIDE_LLAMA, Tiny, tiny_moe, write_tiny

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.errors import OptionError
from gguf_run.formats.gguf.imatrix import Imatrix, Sums
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.config import ModelConfig
from gguf_run.runtime.convert.open_checkpoint import open_checkpoint
from gguf_run.runtime.quantize.file import quantize_file
from gguf_run.runtime.quantize.file_types import file_type
from gguf_run.runtime.quantize.fold import Place, awq, best_scales, fold, places
from gguf_run.runtime.quantize.plan import Options, Plan, make_plan

IDS = [i * 13 % 250 for i in range(24)]
NORM = np.linspace(0.5, 2, AWKWARD_LLAMA.n_embd, dtype=np.float32)
# A file may leave out the ".weight" of a norm.
NAMED = replace(AWKWARD_LLAMA, tensors={"blk.0.ffn_norm.weight": None, "blk.0.ffn_norm": NORM})
MODELS: dict[str, tuple[Tiny | str, str]] = {
    "grouped heads, biases": (NAMED, "attn_norm attn_v ffn_norm ffn_up"),
    "experts": (tiny_moe(1), "attn_norm attn_v ffn_norm ffn_up_exps ffn_up_shexp"),
    "norms behind": (replace(TINY_GEMMA3, n_layer=2), "attn_norm attn_v ffn_norm ffn_up"),
    "fused": ("phi3", "attn_norm attn_qkv ffn_norm ffn_up"),
    "one norm for both": ("stablelm-parallel", "attn_norm attn_v ffn_up"),
    "experts not linear in up": ("gpt-oss", "attn_norm attn_v post_attention_norm"),
    "ffn without gate": ("starcoder2", "attn_norm attn_v ffn_norm"),
}


def logits(file: Any) -> NDArray[np.float32]:
    config = ModelConfig.from_metadata(file.metadata, file.tensors)
    return tiny.logits(config, file.tensors, NumpyBackend(np.float64), (len(IDS),), IDS)


def random_scales(found: Sequence[Place]) -> list[tuple[Place, NDArray[np.float32]]]:
    rng = np.random.default_rng(1)
    shapes = [(place.n_expert, place.channels.max() + 1) for place in found]
    return [
        (place, np.exp(rng.standard_normal(shape)).astype("f4")) for place, shape in zip(found, shapes, strict=True)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_any_scales_leave_the_model_as_it_is(name: str, tmp_path: Path) -> None:
    model, expected = MODELS[name]
    if isinstance(model, str):
        hf_tiny.make(model, tmp_path / "model")
    else:
        write_tiny(tmp_path / "model.gguf", model)
    opened = open_checkpoint(tmp_path / "model") if isinstance(model, str) else GGUFFile.open(tmp_path / "model.gguf")
    with opened as file:
        plan = make_plan(file, Options(file_type("F32")))
        found = list(places(plan))
        assert {re.sub(r"blk\.\d+\.|\.weight", "", place.producer) for place in found} == set(expected.split())
        quantize_file(fold(plan, random_scales(found)), tmp_path / "out.gguf", 1, lambda *_: None)
        with GGUFFile.open(tmp_path / "out.gguf") as out:
            for place in found:
                for name in (place.producer, *place.biases, *place.readers):
                    assert (out.tensors[name].blocks() != file.tensors[name].blocks()).any(), name
            before = logits(file)
            assert np.abs(logits(out) - before).max() < 1e-5 * np.abs(before).max()


class RandomMoments:
    """Second moments whose diagonals are over decades, of inputs that depend on each other; ffn_down has none."""

    def group(self, name: str) -> str | None:
        return None if "ffn_down" in name else name

    def mean(self, name: str, expert: int = 0) -> NDArray[np.float32]:
        n, rng = 256, np.random.default_rng(5)
        x = rng.standard_normal((2 * n, n)) @ (np.eye(n) + 0.05 * rng.standard_normal((n, n)))
        x *= 10 ** rng.uniform(-1.5, 1.5, n)
        return (x.T @ x / len(x)).astype(np.float32)


@contextmanager
def planned(folder: Path, type: str) -> Iterator[Plan]:
    """Yield the plan of a model whose inputs are those of RandomMoments."""
    write_tiny(folder / "model.gguf", replace(WIDE_LLAMA, n_layer=1))
    with GGUFFile.open(folder / "model.gguf") as file:
        matrices = [name for name, tensor in file.tensors.items() if name.startswith("blk.") and len(tensor.ne) > 1]
        diagonal, one = np.diag(RandomMoments().mean("")), np.ones(1, np.float32)
        sums = {name: Sums(np.tile(diagonal, file.tensors[name].ne[0] // 256)[None], one) for name in matrices}
        yield make_plan(file, Options(file_type(type), imatrix=Imatrix(sums, (), 0, 0), imatrix_path="im"))


def true_loss(plan: Plan, place: Place, folder: Path) -> float:
    """Return tr(E H ET) of a place's readers in the file that a plan makes, in float64."""
    quantize_file(plan, folder / "out.gguf", 1, lambda *_: None)
    total, moments = 0.0, RandomMoments()
    with GGUFFile.open(folder / "out.gguf") as out:
        for item in (item for item in plan.items if item.target.name in place.readers):
            tensor = out.tensors[item.target.name]
            found = dequantize(tensor.blocks(), tensor.type).astype(np.float64)
            error = found / (item.change.columns if item.change else 1) - item.source.blocks().view(np.float32)
            h = moments.mean("")
            if moments.group(tensor.name) is None:
                h = np.diag(np.tile(np.diag(h), 2))
            total += float(np.einsum("ri,ij,rj->", error, h, error, optimize=True))
    (folder / "out.gguf").unlink()
    return total


@pytest.mark.parametrize("type", ["Q4_0", "Q3_K_S"])
def test_scales_are_never_worse_than_none(type: str, tmp_path: Path) -> None:
    ratios = {}
    with planned(tmp_path, type) as plan:
        for place in places(plan):
            readers = [item for item in plan.items if item.target.name in place.readers]
            scales = best_scales(place, readers, RandomMoments(), 1)
            assert np.log(scales).mean() == pytest.approx(0, abs=1e-5)
            losses = [true_loss(one, place, tmp_path) for one in (fold(plan, [(place, scales)]), plan)]
            ratios[place.producer] = losses[0] / losses[1]
    assert max(ratios.values()) <= 1.001, ratios
    assert min(ratios.values()) < 0.9, ratios


def test_importance_follows_the_scales(tmp_path: Path) -> None:
    with planned(tmp_path, "Q4_0") as plan:
        done: list[tuple[int, int]] = []
        changed = awq(plan, None, 1, lambda *step: done.append(step))
        assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert "of 4 places" in changed.notes[-1]
        for old, new in zip(plan.items, changed.items, strict=True):
            if new.importance is not None and new.change is not None and old.importance is not None:
                assert new.importance == pytest.approx(old.importance / new.change.columns**2)
                scaled = new.change.moments(np.diag(old.importance[0]))
                assert np.diag(scaled) == pytest.approx(new.importance[0])


def test_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model.gguf", WIDE_LLAMA)
    with GGUFFile.open(tmp_path / "model.gguf") as file, pytest.raises(OptionError, match="--imatrix"):
        awq(make_plan(file, Options(file_type("Q4_0"))), None, 1, lambda *_: None)
