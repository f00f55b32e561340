"""The ops of a step in torch: logits against the float64 twin and the CPU, gradients against differences of a loss."""

import math
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_tiny
import tiny
import torch
from cpu_ops import Q8Backend, cpu, error
from documents import ROOT
from numpy_backend import NumpyBackend
from tinymodel import AWKWARD_LLAMA, TINY_GEMMA3, WIDE_LLAMA, tiny_moe, write_tiny

from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models import ops, rare_ops
from gguf_run.models.config import ModelConfig
from gguf_run.runtime.convert.open_checkpoint import open_checkpoint
from gguf_run.runtime.train import ops as torch_ops
from gguf_run.runtime.train.backend import Pair
from gguf_run.runtime.train.model import TorchModel, in_chunks

IDS = tiny.IDS[:40]
ROWS: dict[str, Any] = {name: name for name in ("llama", "qwen2moe", "gpt-oss", "phi3-longrope", "starcoder2")}
for _module, _names in {
    "mixtures": ("dots1", "phimoe", "llama4"),
    "hybrid": ("lfm2", "granitehybrid-moe", "nemotron_h"),
    "gemma": ("gemma4-e", "gemma4-26", "gemma3n"),
    "latent": ("V3",),
    "dense": ("apertus",),
    "delta_net": (),
}.items():
    _table = runpy.run_path(str(ROOT / f"tests/models/test_{_module}.py"))["TINY"]
    ROWS |= {name: _table[name] for name in _names or [*_table][:1]}
FILES = {
    "F32, biases": AWKWARD_LLAMA,
    "window": TINY_GEMMA3,
    "Q8_0, experts": tiny_moe(2, "Q8_0"),
    "Q4_K": WIDE_LLAMA.__class__(**{**vars(WIDE_LLAMA), "type": "Q4_K", "types": {"attn_v": "Q6_K"}}),
}


@contextmanager
def checkpoint(name: str, folder: Path) -> Iterator[GGUFFile]:
    row = ROWS[name]
    if isinstance(row, str):
        hf_tiny.make(row, folder)
    else:
        tiny.make(folder, *row)
    with open_checkpoint(folder) as file:
        yield file


def loss_of(model: TorchModel, ids: Any) -> Any:
    rows, targets = model.hidden(ids[:, :-1]), ids[:, 1:].reshape(-1)

    def loss(rows: Any, targets: Any) -> Any:
        return torch.nn.functional.cross_entropy(model.head(rows), targets, reduction="sum")

    return in_chunks(loss, rows, targets) / len(targets)


@pytest.mark.filterwarnings("ignore:.*tensors for images, sound or drafts are left out")
@pytest.mark.parametrize("name", ROWS)
def test_logits_and_gradients(name: str, tmp_path: Path) -> None:
    """Logits of the list of ops in float64, and the derivative of the loss in one direction of all trained numbers."""
    torch.set_num_threads(1)
    with checkpoint(name, tmp_path) as file:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        twin = tiny.logits(config, file.tensors, NumpyBackend(np.float64), (40,), IDS)
        model = TorchModel(file, 64, dtype=torch.float64)
        with torch.no_grad():
            assert error(model.logits(IDS).numpy(), twin) < 1e-12
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Any:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        for full, tensor in model.matrices.items():
            if len(tensor.ne) == 2:
                a, b = (random(*shape) / 10 for shape in ((2, tensor.ne[0]), (tensor.ne[1], 2)))
                model.backend.adapted[full] = Pair(a.requires_grad_(), b.requires_grad_(), 0.5)
        numbers = [half for pair in model.backend.adapted.values() for half in (pair.a, pair.b)]
        ids = torch.tensor([IDS[:20], IDS[20:]])
        loss_of(model, ids).backward()
        assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in numbers)
        ways = [random(*x.shape) for x in numbers]
        slope = sum(float((x.grad * way).sum()) for x, way in zip(numbers, ways, strict=True))
        ends, step = [], 1e-7  # no expert is chosen anew
        with torch.no_grad():
            for move in (step, -2 * step):
                for x, way in zip(numbers, ways, strict=True):
                    x.add_(way, alpha=move)
                ends.append(float(loss_of(model, ids)))
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)
        assert abs(slope) > 1e-3


@pytest.mark.filterwarnings("ignore:.*tensors for images, sound or drafts are left out")
def test_every_op_is_in_one_of_these_models(tmp_path: Path) -> None:
    """Except the positions of encoders, which make no text."""
    seen = set[type]()
    for i, name in enumerate(ROWS):
        with checkpoint(name, tmp_path / str(i)) as file:
            model = TorchModel(file, 64)
            seen |= {type(op) for part in [*model._segments, model._head] for op in part}
    assert set(torch_ops.FUNCTIONS) - seen == {rare_ops.AddPositions}


@pytest.mark.parametrize("name", FILES)
def test_logits_of_a_file(name: str, tmp_path: Path) -> None:
    """In float32: of the twin, and of the CPU. With int8 activations: of the CPU's oracle for them."""
    write_tiny(tmp_path / "tiny.gguf", FILES[name])
    ids = [id % 270 for id in IDS]
    with GGUFFile.open(tmp_path / "tiny.gguf") as file, torch.no_grad():
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        twin, rounded = (
            tiny.logits(config, file.tensors, kind(np.float64), (40,), ids) for kind in (NumpyBackend, Q8Backend)
        )
        model = TorchModel(file, 64)
        found = model.logits(ids).numpy()
        assert error(found, twin) < 1e-5
        on_cpu = tiny.logits(config, file.tensors, cpu(2), (40,), ids)
        assert error(found, on_cpu) < (1e-5 if name in ("F32, biases", "window") else 0.1)
        model.backend.rounds_activations = True
        if name == "Q4_K":
            assert error(found, rounded) > 1e-3
            # Where a number lies between two codes, noise decides: not for most of the first rows.
            assert np.median([error(model.logits(ids).numpy()[i], rounded[i]) for i in range(8)]) < 1e-5


def test_sequences_of_a_batch_do_not_see_each_other(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf", TINY_GEMMA3)
    with GGUFFile.open(tmp_path / "tiny.gguf") as file, torch.no_grad():
        model = TorchModel(file, 64)
        both = model.head(model.hidden(torch.tensor([IDS[:16], IDS[16:32]])))
        alone = torch.cat([model.logits(IDS[:16]), model.logits(IDS[16:32])])
        assert error(both.numpy(), alone.numpy()) < 1e-5
        shorter = model.head(model.hidden(torch.tensor([IDS[:9] + [0] * 7])))
        assert error(shorter[:9].numpy(), alone[:9].numpy()) < 1e-5


def test_what_a_layer_keeps_for_its_gradients(tmp_path: Path) -> None:
    """Nothing, if it runs again: gradients are the same."""
    write_tiny(tmp_path / "tiny.gguf", TINY_GEMMA3)
    with GGUFFile.open(tmp_path / "tiny.gguf") as file:
        found = []
        for recompute in (False, True):
            model = TorchModel(file, 64, recompute=recompute)
            a, b = torch.ones(1, 64, requires_grad=True), torch.ones(96, 1, requires_grad=True)
            model.backend.adapted["blk.1.ffn_up.weight"] = Pair(a, b, 0.1)
            loss_of(model, torch.tensor([IDS])).backward()
            found.append(torch.cat([a.grad.reshape(-1), b.grad.reshape(-1)]).numpy())
        np.testing.assert_array_equal(*found)


def test_what_cannot_be_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path / "tiny.gguf", TINY_GEMMA3)
    fewer = {op: function for op, function in torch_ops.FUNCTIONS.items() if op is not ops.Rope}
    monkeypatch.setattr("gguf_run.runtime.train.model.FUNCTIONS", fewer)
    with (
        GGUFFile.open(tmp_path / "tiny.gguf") as file,
        pytest.raises(
            UnsupportedError, match=r"tiny.gguf: gemma3 has the op Rope, which has no gradient: it cannot be trained"
        ),
    ):
        TorchModel(file, 64)


def test_chunks_of_rows_add_up() -> None:
    rows = torch.arange(1200.0, requires_grad=True)
    total = in_chunks(lambda part: part.square().sum(), rows)
    total.backward()
    assert math.isclose(float(total.detach()), float((torch.arange(1200.0) ** 2).sum()), rel_tol=1e-6)
    np.testing.assert_array_equal(rows.grad, 2 * torch.arange(1200.0))
