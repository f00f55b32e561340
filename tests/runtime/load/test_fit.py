"""What runs where: from options and sizes alone."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinymodel import Tiny, write_tiny

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.config import ModelConfig
from gguf_run.runtime.load import devices
from gguf_run.runtime.load.cache_plan import plan_cache
from gguf_run.runtime.load.devices import open_gpus, open_placement
from gguf_run.runtime.load.fit import MARGIN, GpuSizes, fit, gpu_sizes, place
from gguf_run.runtime.load.load_model import tries_gpus
from gguf_run.runtime.load.machine import driver_there
from gguf_run.runtime.load.memory import MemoryPlan, WeightSizes
from gguf_run.runtime.load.options import CPU, Device, Placement, Wanted

GPU = [Device("cuda", i) for i in range(3)]


def sizes(layers: list[int], embedding: int = 5, output: int = 6, buffers: int = 1, tied: bool = False) -> GpuSizes:
    """Layers whose cache takes 1."""
    return GpuSizes(WeightSizes(tuple(n - 1 for n in layers), embedding, output, tied), (1,) * len(layers), buffers)


def letters(placement: Placement | None) -> str:
    """The embeddings' device, and those of the layers: c for the CPU, 0 to 2 for GPUs."""
    assert placement is not None
    return "".join("c" if device == CPU else str(device.index) for device in (placement.embedding, *placement.layers))


@pytest.mark.parametrize(
    ("free", "split", "expected"),
    [
        ([52], (), "00000"),  # 4 layers of 10, output, embeddings, buffers
        ([51], (), "c0000"),
        ([47], (), "c0000"),
        ([46], (), "cc000"),
        ([17], (), "cccc0"),
        ([16], (), "ccccc"),
        ([100, 100], (), "00011"),
        ([100, 100], (1, 0), "00000"),
        ([100, 100], (0, 1), "11111"),
        ([100, 40], (), "00001"),
        ([100, 16], (), "00000"),  # no layer has its middle in the second one's share
        ([100, 100], (1, 3), "00111"),
        ([60, 60], (1, 8), "00111"),
        ([60, 36], (1, 8), "ccc11"),
        ([30, 30, 30], (), "00012"),
        ([0, 0], (), "ccccc"),
    ],
)
def test_as_many_layers_as_fit(free: list[int], split: tuple[float, ...], expected: str) -> None:
    room = {device: size + MARGIN for device, size in zip(GPU, free, strict=False)}
    found = letters(fit(sizes([10] * 4), range(4, -1, -1), split, room))
    assert found == expected


@pytest.mark.parametrize(("free", "expected"), [([60], "c0000"), ([40], "cc000"), ([30], "ccccc"), ([60, 45], "c0111")])
def test_layers_that_share_keys_are_on_one_device(free: list[int], expected: str) -> None:
    """The last three of four layers, of 10 each. Embeddings that are read from the file are beside the CPU."""
    room = {GPU[i]: n + MARGIN for i, n in enumerate(free)}
    bound = replace(sizes([10] * 4), n_bound=3, is_mapped=True)
    assert letters(fit(bound, range(4, -1, -1), (), room)) == expected


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        ([52, 100], "00000"),
        ([46, 52], "11111"),  # the second one holds all
        ([46, 46, 60], "22222"),
        ([46, 46, 30], "00011"),
        ([22, 22, 22], "c0012"),
        ([16, 30, 0], "cc011"),
        ([16, 16, 16], "ccccc"),
    ],
)
def test_as_few_gpus_as_hold_it(free: list[int], expected: str) -> None:
    room = {device: size + MARGIN for device, size in zip(GPU, free, strict=False)}
    assert letters(fit(sizes([10] * 4), range(4, -1, -1), (), room, fewest=True)) == expected


def test_tied_embeddings_are_there_once() -> None:
    for tied, room in ((True, 47), (False, 52)):
        tied_sizes = sizes([10] * 4, embedding=6 if tied else 5, tied=tied)
        assert letters(fit(tied_sizes, [4], (), {GPU[0]: room + MARGIN})) == "00000"
        assert letters(fit(tied_sizes, range(4, -1, -1), (), {GPU[0]: room - 1 + MARGIN})) == (
            "cc000" if tied else "c0000"
        )


@settings(max_examples=300, deadline=None)
@given(
    layers=st.lists(st.integers(1, 50), min_size=1, max_size=10),
    others=st.tuples(st.integers(0, 80), st.integers(0, 80), st.integers(0, 20), st.booleans()),
    free=st.lists(st.integers(0, 300), min_size=1, max_size=3),
    parts=st.none() | st.lists(st.integers(0, 5), min_size=3, max_size=3),
)
def test_what_is_placed_fits(
    layers: list[int], others: tuple[int, int, int, bool], free: list[int], parts: list[int] | None
) -> None:
    """And is in order; on one GPU nothing more would fit."""
    embedding, output, buffers, tied = others
    embedding = output if tied else embedding
    split = tuple(parts[: len(free)]) if parts and any(parts[: len(free)]) else ()
    room = {device: size + MARGIN for device, size in zip(GPU, free, strict=False)}
    placement = fit(sizes(layers, embedding, output, buffers, tied), range(len(layers), -1, -1), split, room)
    assert placement is not None
    where = letters(placement)
    assert list(where[1:]) == sorted(where[1:], key="c012".index)
    assert where[0] in ("c", where[1])
    for i, size in enumerate(free):
        used = sum(n for n, at in zip(layers, where[1:], strict=True) if at == str(i))
        used += output if where[-1] == str(i) else 0
        used += embedding if where[0] == str(i) and not (tied and where[-1] == str(i)) else 0
        assert str(i) not in where or used + buffers <= size
    if len(free) == 1 and where[1] == "c":
        more = layers[where.count("c") - 2 :]
        assert sum(more) + output + buffers > free[0]


@pytest.fixture
def plan(tmp_path: Path) -> MemoryPlan:
    write_tiny(tmp_path / "m.gguf", Tiny(n_layer=6, head_dim=64))
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        return MemoryPlan(config, list(file.tensors.values()), 4096, plan_cache(config), n_batch=32)


def need(plan: MemoryPlan, n_gpu: int) -> int:
    """Bytes that a GPU with the last n_gpu layers must have free, at least."""
    found = gpu_sizes(plan)
    weights = sum(found.weights.layers[6 - n_gpu :]) + found.weights.output
    return MARGIN + weights + sum(found.caches[6 - n_gpu :]) + found.buffers


def test_gpu_that_is_too_small(plan: MemoryPlan) -> None:
    """What is advised fits, and nothing more would."""
    with pytest.raises(GgufRunError) as error:
        place(plan, Wanted(n_gpu=5), {GPU[0]: need(plan, 3)})
    words = str(error.value)
    assert words.startswith("--gpu-layers 5: out of memory on cuda:0: 18")
    n_ctx = int(words.split("--ctx-size ")[1].split()[0])
    assert "--gpu-layers 3 or" in words
    assert need(replace(plan, n_ctx=n_ctx), 5) <= need(plan, 3) < need(replace(plan, n_ctx=n_ctx + 256), 5)
    for insisting in (Wanted((GPU[0],)), Wanted(n_gpu=-1)):
        with pytest.raises(GgufRunError, match=r"use a smaller context .* or --device cpu"):
            place(plan, insisting, {GPU[0]: MARGIN})
    assert letters(place(plan, Wanted(), {GPU[0]: MARGIN})) == "ccccccc"


def test_layers_out_of_range(plan: MemoryPlan) -> None:
    for free in ({}, {GPU[0]: 1 << 40}):
        with pytest.raises(OptionError, match="--gpu-layers 7: allowed are 0 to 6, the model's layers, all and auto"):
            place(plan, Wanted(n_gpu=7), free)
    assert letters(place(plan, Wanted(n_gpu=6), {GPU[0]: 1 << 40})) == "0000000"
    assert letters(place(plan, Wanted(n_gpu=2), {GPU[0]: 1 << 40})) == "ccccc00"


def test_the_cpu_needs_memory_for_what_is_left(plan: MemoryPlan) -> None:
    whole, half = plan.needed(), replace(plan, n_gpu=3).needed()
    assert half.cache * 2 == whole.cache
    assert half.weights == sum(gpu_sizes(plan).weights.layers[:3])  # F32: as wide on both
    assert half.buffers < whole.buffers


def test_the_plan_is_told(plan: MemoryPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """And which GPU the sizes are of."""
    free = {GPU[0]: need(plan, 2), GPU[1]: 0}
    monkeypatch.setattr(
        devices, "open_gpu", lambda device: SimpleNamespace(free_memory=lambda: free[device], device=device)
    )
    lines: list[str] = []
    placement, gpus = open_placement(plan, Wanted(), lines.append)
    assert (letters(placement), [*gpus]) == ("ccccc00", [GPU[0]])
    assert [line.split(" (")[0].rpartition(":")[0] for line in lines] == [
        "cpu: embeddings, layers 0 to 3",
        "cuda:0: layers 4 to 5, output",
    ]
    assert lines[1].endswith("MB free (500.00 MB to spare)")
    lines.clear()
    free[GPU[0]] = 0
    placement, gpus = open_placement(plan, Wanted(), lines.append)
    assert (placement.n_gpu, gpus, len(lines)) == (0, {}, 1)
    assert "all on the CPU: not one layer fits" in lines[0]


def test_gpus_are_asked_only_if_they_are_needed(plan: MemoryPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """By auto: the first one that is usable holds all, or all are asked. What names GPUs asks those."""
    free, asked = {GPU[1]: 1 << 40, GPU[2]: 1 << 40}, []

    def open_gpu(device: Device) -> Any:
        if device not in free:
            raise GgufRunError(f"--device {device}: too old")
        return SimpleNamespace(free_memory=lambda: asked.append(device) or free[device])

    monkeypatch.setattr(devices, "n_gpus", lambda: 3)
    monkeypatch.setattr(devices, "open_gpu", open_gpu)
    cases = [(Wanted(), need(plan, 6), "1"), (Wanted(n_gpu=2), need(plan, 2), "1"), (Wanted(), need(plan, 4), "12")]
    for wanted, size, expected in [*cases, (Wanted((GPU[1], GPU[2])), need(plan, 6), "12")]:
        free[GPU[1]] = size
        asked.clear()
        placement, gpus = open_placement(plan, wanted, lambda line: None)
        assert "".join(str(device.index) for device in asked) == expected
        assert {*gpus} == {*placement.devices} - {CPU}
    with pytest.raises(GgufRunError, match="too old"):
        open_placement(plan, Wanted((GPU[1], GPU[0])), lambda line: None)


def test_gpu_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error where it is insisted on, one line where the machine has a driver, nothing where it has none."""

    def broken(device: Device) -> Any:
        raise GgufRunError(f"--device {device}: no")

    monkeypatch.setattr(devices, "open_gpu", broken)
    lines: list[str] = []
    assert not driver_there(tmp_path)
    assert not tries_gpus(Wanted(), tmp_path)
    assert tries_gpus(Wanted(n_gpu=3), tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert tries_gpus(Wanted(), tmp_path)
    assert open_gpus(Wanted(), lines.append) == {}
    assert lines == ["all on the CPU: --device cuda:0: no"]
    assert not tries_gpus(Wanted((CPU,)), tmp_path)
    with pytest.raises(GgufRunError, match="--device cuda:0: no"):
        open_gpus(Wanted(n_gpu=3), lines.append)
