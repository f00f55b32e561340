"""Models whose layers are on several backends: the hidden state crosses over, all else stays as it was."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from cpu_ops import cpu, error
from tinymodel import AWKWARD_LLAMA, TINY_GEMMA3, Tiny, tiny_moe, write_tiny

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_cpu.backend import CpuBackend
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.models.kv_moves import copy_prefix, export, restore, shift
from gguf_run.runtime import Model
from gguf_run.runtime.cli.run import main
from gguf_run.runtime.load import devices, load_model
from gguf_run.runtime.load.cache_plan import plan_cache
from gguf_run.runtime.load.fit import MARGIN, gpu_sizes
from gguf_run.runtime.load.memory import MemoryPlan

IDS = [(7 * i * i + 3 * i + 1) % 270 for i in range(60)]
# Which of two backends looks up the embeddings and has each of the six layers.
PLACES = ("aaaabbb", "aabbbbb", "abbbbbb", "abbaaba", "aababab")
MODELS = {"llama": replace(AWKWARD_LLAMA, n_layer=6, type="Q8_0"), "gemma3": replace(TINY_GEMMA3, n_layer=6)}

MOE = tiny_moe(3)


def logits(decoder: Decoder, ids: Sequence[int], n_outputs: int | None = None, seq: int = 0) -> np.ndarray:
    wanted = len(ids) if n_outputs is None else n_outputs
    return np.concatenate([block.copy() for block in decoder.forward(ids, wanted, seq)])


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Decoder]:
    """Write a model and open it over the backends that the letters of `places` stand for."""

    def build(tiny: Tiny, places: str, backends: dict[str, Any], **options: Any) -> Decoder:
        write_tiny(tmp_path / "tiny.gguf", tiny)
        file = GGUFFile.open(tmp_path / "tiny.gguf")
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        embedding, *layers = (backends[letter] for letter in places)
        return Decoder(config, file.tensors, layers, 96, embedding=embedding, **options)

    return build


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_several_backends_give_the_same_logits(name: str, places: str, build: Callable[..., Decoder]) -> None:
    """To the last bit: in batches with some logits wanted, one by one, after a rewind, in several sequences, after
    shifts and copies of a cache."""
    backends = {"a": cpu(2), "b": cpu(3)}
    options = {"n_batch": 16, "n_outputs": 4, "n_seq": 3}
    one, several = (build(MODELS[name], p, backends, **options) for p in ("aaaaaaa", places))

    def results(decoder: Decoder) -> list[np.ndarray]:
        made = [logits(decoder, IDS[:37], 9), *(logits(decoder, [id]) for id in IDS[37:40])]
        assert decoder.rewind(38) == 38
        made.append(logits(decoder, IDS[38:50]))
        if copy_prefix(decoder.cache, 0, 1, 32):
            made.append(logits(decoder, IDS[:5], 2, seq=1))
        made.append(decoder.step({0: IDS[:3], 1: IDS[3:4], 2: IDS[4:9]}).copy())
        parts = [(il, kind, bytes(data)) for il, kind, data in export(decoder.cache)]
        restore(decoder.cache, decoder.n_past, parts, seq=2)
        made.append(logits(decoder, IDS[9:13], seq=2))
        decoder.rewind(0)
        logits(decoder, IDS)
        if shift(decoder.cache, 0, 32):
            made.append(logits(decoder, IDS[:6], 3))
        return made

    for a, b in zip(results(one), results(several), strict=True):
        assert np.array_equal(a, b)


def test_what_matrices_read_is_observed_on_all_backends(build: Callable[..., Decoder]) -> None:
    backends = {"a": cpu(2), "b": cpu(3)}
    observed = []
    for places in ("aaaaaaa", "bbbaaba"):
        decoder = build(MODELS["gemma3"], places, backends, observe=True)
        logits(decoder, IDS, 2)
        assert decoder.observed is not None
        observed.append({seen.names: seen.squares.take() for seen in decoder.observed})
    assert observed[0].keys() == observed[1].keys()
    for name, (sums, counts) in observed[0].items():
        assert (sums == observed[1][name][0]).all()
        assert (counts == observed[1][name][1]).all()


class FakeGpu(CpuBackend):
    """Runs on the CPU."""

    name = "a GPU"
    free = 1 << 40

    def free_memory(self) -> int:
        return self.free


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of three layers, and GPUs to run it on."""
    monkeypatch.setattr(load_model, "driver_there", lambda root: True)
    monkeypatch.setattr(devices, "open_gpu", lambda device: FakeGpu(1))
    write_tiny(tmp_path / "tiny.gguf", Tiny(n_layer=3))
    return str(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("options", "where", "lines"),
    [
        ([], "3 layers on a GPU", ["cuda:0: embeddings, layers 0 to 2, output"]),
        (["--device", "cuda:2"], "3 layers on a GPU", ["cuda:2: embeddings, layers 0 to 2, output"]),
        (["-ngl", "2"], "1 layer on CPU", ["cpu: embeddings, layer 0", "cuda:0: layers 1 to 2, output"]),
        (
            ["-dev", "cuda:1,cuda:0", "-ngl", "2", "-ts", "1,1"],
            "1 layer on CPU",
            ["cpu: embeddings, layer 0", "cuda:1: layer 1", "cuda:0: layer 2, output"],
        ),
        (["-ngl", "0"], "3 layers on CPU", []),
    ],
)
def test_command_line(model: str, options: list[str], where: str, lines: list[str]) -> None:
    done = CliRunner().invoke(main, [model, "--raw", "-p", "the", "-n", "2", "--temperature", "0", *options])
    assert done.exit_code == 0, done.stderr
    *plan, last = (line for line in done.stderr.splitlines() if not line.startswith("compiling"))
    assert len(plan) == len(lines)
    assert all(found.startswith(f"{line}: ") for found, line in zip(plan, lines, strict=True))
    assert where in last
    plain = CliRunner().invoke(main, [model, "--raw", "-p", "the", "-n", "2", "--temperature", "0", "--device", "cpu"])
    assert done.stdout == plain.stdout


@pytest.mark.parametrize(
    ("options", "room", "lines"),
    [
        (
            ["-ngl", "2", "--cpu-moe"],
            1.0,
            ["cpu: embeddings, layer 0, experts of layers 1 to 2", "cuda:0: layers 1 to 2"],
        ),
        (["-ngl", "2", "-ncmoe", "2"], 1.0, ["cpu: embeddings, layer 0, experts of layer 1", "cuda:0: layers 1 to 2"]),
        (["-ngl", "2", "-ncmoe", "1"], 1.0, ["cpu: embeddings, layer 0", "cuda:0: layers 1 to 2"]),
        ([], 1.0, ["cuda:0: embeddings, layers 0 to 2"]),
        ([], 0.9, ["cuda:0: embeddings, layers 0 to 2", "cpu: experts of layer 0"]),
        ([], 0.45, ["cuda:0: embeddings, layers 0 to 2", "cpu: experts of layers 0 to 2"]),
        ([], 0.2, ["cpu: embeddings, layers 0 to 1, experts of layer 2", "cuda:0: layer 2"]),
    ],
)
def test_experts_on_the_cpu(
    model: str, options: list[str], room: float, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no room for all layers, experts stay on the CPU first. room: of what all layers take."""
    write_tiny(Path(model), MOE)
    with GGUFFile.open(model) as file:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        plan = MemoryPlan(config, list(file.tensors.values()), 128, plan_cache(config))
    sizes = gpu_sizes(plan)
    others = sizes.buffers + sizes.weights.output + sum(sizes.caches)
    monkeypatch.setattr(FakeGpu, "free", MARGIN + others + int(room * sum(sizes.weights.layers)))
    arguments = [model, "--raw", "-p", "the", "-n", "2", "--temperature", "0"]
    done, plain = (CliRunner().invoke(main, [*arguments, *more]) for more in (options, ["--device", "cpu"]))
    assert done.exit_code == 0, done.stderr
    *told, _ = (line for line in done.stderr.splitlines() if not line.startswith("compiling"))
    assert [line.split(": ")[0] + ": " + line.split(": ")[1].removesuffix(", output") for line in told] == lines
    assert done.stdout == plain.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_cpu_moe": 4}, "--n-cpu-moe 4: allowed are 0 to 3, the model's layers"),
        ({"n_cpu_moe": -1}, "--n-cpu-moe -1: must be a number of layers from 0"),
        ({"n_cpu_moe": 1, "cpu_moe": True}, "--n-cpu-moe 1: .* without --cpu-moe"),
    ],
)
def test_experts_out_of_range(model: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Model.load(model, **options)


def test_layers_that_do_not_fit(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeGpu, "free", MARGIN)
    with pytest.raises(GgufRunError, match=r"tiny\.gguf: --gpu-layers 2: out of memory on cuda:0"):
        Model.load(model, gpu_layers=2)
    lines: list[str] = []
    Model.load(model, report=lines.append).close()
    assert lines == ["all on the CPU: not one layer fits into the free memory of the GPU"]


def test_sessions_know_where_their_bytes_are_of(model: str, tmp_path: Path) -> None:
    """A GPU lays its cache out in its own way: the session of another placement is not read."""
    arguments = [model, "--raw", "-p", "the", "-n", "2", "--session", str(tmp_path / "s")]
    for options, code in ((["-ngl", "2"], 0), (["-ngl", "2"], 0), (["-ngl", "1"], 1), (["--device", "cpu"], 1)):
        done = CliRunner().invoke(main, [*arguments, *options])
        assert done.exit_code == code, done.stderr
        assert code == 0 or "the last 2 layers' on a GPU" in done.stderr


def test_sizes_are_those_of_all_backends(build: Callable[..., Decoder]) -> None:
    backends = {"a": CpuBackend(1), "b": CpuBackend(1)}
    decoder = build(MODELS["llama"], "aaabbbb", backends)
    a, b = (backend.nbytes() for backend in backends.values())
    assert decoder.nbytes() == {kind: a[kind] + b[kind] for kind in a}
    assert a["cache"] * 2 == b["cache"]
    assert a["weights"] < b["weights"]
    decoder.close()
    for backend in backends.values():
        backend.close()


@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.parametrize("places", ["aaaa", "abbb", "babb"])
def test_experts_on_another_backend(places: str, observe: bool, build: Callable[..., Decoder]) -> None:
    """Logits of some tokens, more of them than fit at once. The shared expert is added before the others then."""
    backends = {letter: cpu(n) for n, letter in enumerate("cab", 1)}
    options = {"n_batch": 16, "n_outputs": 4, "observe": observe, "cache_types": [CacheType("f32", "f32")] * 3}
    one, away = (
        build(MOE, places, backends, experts=[backends[e] for e in "cca"] if split else None, **options)
        for split in (False, True)
    )
    for ids, n_outputs in ((IDS[:37], 9), (IDS[37:38], 1), (IDS[38:50], 0)):
        a, b = ([block.copy() for block in decoder.forward(ids, n_outputs)] for decoder in (one, away))
        assert len(a) == len(b)
        assert all(error(x, y) < 1e-5 for x, y in zip(a, b, strict=True))
    if observe:
        sums = [{seen.names: seen.squares.take()[0] for seen in decoder.observed or ()} for decoder in (one, away)]
        assert sums[0].keys() == sums[1].keys()
        assert all(error(sums[0][name], sums[1][name]) < 1e-5 for name in sums[0])
