"""Whole models on the GPU backend, in Triton's interpreter, against the CPU backend and NumPy."""

import functools
import gc
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_ops import cpu
from gpu_ops import fast_dots, gpu, only_interpreted, pytestmark, torch, use_tuning
from numpy_backend import NumpyBackend
from real import smollm2
from tinymodel import ALL_BIASES, TINY_GEMMA3, Tiny, write_tiny
from triton.runtime.errors import OutOfResources

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_gpu import backend as gpu_backend
from gguf_run.kernels_gpu import program as gpu_program
from gguf_run.kernels_gpu.attention.cache_types import CACHE_FORMATS
from gguf_run.kernels_gpu.backend import GpuBackend
from gguf_run.kernels_gpu.device.device import measure_limits
from gguf_run.kernels_gpu.device.errors import explain
from gguf_run.kernels_gpu.program import GpuProgram, Launches
from gguf_run.models.backend import CacheType, Top
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.models.kv_find import adopt
from gguf_run.models.kv_moves import copy_prefix, export, restore, shift
from gguf_run.models.stages import page_tables
from gguf_run.runtime.load.cache_plan import plan_cache
from gguf_run.runtime.load.fit import fit, gpu_sizes, needed
from gguf_run.runtime.load.memory import MemoryPlan
from gguf_run.runtime.load.options import CPU, Device

__all__ = ["fast_dots", "pytestmark"]
LLAMA = Tiny(n_layer=1, n_embd=64, n_head=2, n_head_kv=1, n_ff=32, type="Q8_0", biases=ALL_BIASES)
MODELS = {
    "llama": replace(LLAMA, types={"attn_v": "Q5_1", "ffn_down": "F16"}),
    "gemma3": replace(TINY_GEMMA3, n_layer=1, window=0, type="Q4_0", types={"attn_v": "F32"}),
}
GPU_ERRORS = [
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee"),
        "fewer --gpu-layers or",
    ),
    (RuntimeError("CUDA error: unspecified launch failure\nCompile with ..."), "a kernel failed, .*please report it"),
    (
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        "the GPU is lost or busy; .*nvidia-smi",
    ),
    (torch.AcceleratorError("CUDA error: device is lost"), "the GPU is lost or busy"),
    (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "driver and torch 2"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), "the GPU failed; start again"),
    (OutOfResources(300000, 232448, "shared memory"), "triton 3.* cannot build a kernel .*use --device cpu"),
]
IDS = [(7 * i * i + 3 * i + 1) % 270 for i in range(12)]


def open_decoder(path: Path, backend: Any, n_layer: int | None = None, n_ctx: int = 64, **options: Any) -> Decoder:
    """n_layer: the first so many only. backend: one, or those of the layers."""
    file = GGUFFile.open(path)
    config = ModelConfig.from_metadata(file.metadata, file.tensors)
    config = replace(config, layers=config.layers[:n_layer])
    backends = backend if isinstance(backend, list) else [backend] * config.n_layer
    return Decoder(config, file.tensors, backends, n_ctx, n_batch=32, n_outputs=16, **options)


def logits(decoder: Decoder, ids: Sequence[int], n_outputs: int) -> np.ndarray:
    return np.concatenate([block.copy() for block in decoder.forward(ids, n_outputs)])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(((a - b) ** 2).mean() / (b**2).mean()))


@pytest.mark.parametrize("name", MODELS)
def test_tiny_models(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch, with f16 activations, and one token with int8 ones, which cost as much accuracy as on the CPU. Large
    tiles: the interpreter takes no longer for them."""
    use_tuning(monkeypatch, tile=(256, 16), rows=((1, 16),))
    write_tiny(tmp_path / "model.gguf", MODELS[name])
    one, other, exact = (
        open_decoder(tmp_path / "model.gguf", backend) for backend in (gpu(), cpu(2), NumpyBackend(np.float64))
    )
    batches = [logits(decoder, IDS[:11], 11) for decoder in (one, other, exact)]
    assert distance(batches[0], batches[2]) < 3e-3
    assert distance(batches[0], batches[1]) < 0.05
    if name == "llama":
        singles = [logits(decoder, IDS[11:], 1) for decoder in (one, other, exact)]
        assert distance(singles[0], singles[2]) < max(0.01, 1.5 * distance(singles[1], singles[2]))
        one.rewind(11)
        found = one.top({0: IDS[11:]}, None, [Top(3)])
        assert np.array_equal(found.greatest, singles[0][:, found.columns[0]])
        assert np.array_equal(found.columns[0], np.argsort(-singles[0][0], kind="stable")[:3])
        assert one.n_past == 12


# Norms of a layer beyond llama's, and how many values they have; None: llama's that are not there.
NORMS: dict[str, dict[str, int | None]] = {
    "llama": {},
    "qwen3": {"attn_q_norm": 32, "attn_k_norm": 32},
    "gemma2": {"post_attention_norm": 64, "post_ffw_norm": 64},
    "gemma3": {},  # tinymodel has them
    "olmo2": {"attn_norm": None, "ffn_norm": None, "post_attention_norm": 64, "post_ffw_norm": 64}
    | {"attn_q_norm": 128, "attn_k_norm": 32},
}


@only_interpreted
@pytest.mark.parametrize("arch", NORMS)
def test_launches_of_a_layer(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token and one layer more: 7 launches. Norms of whole rows of q and k are launches of their own."""
    from triton.runtime.interpreter import GridExecutor

    launched: list[str] = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *_, **__: launched.append(self.fn.__name__))
    norms = {f"{name}.weight": None if n is None else np.ones(n, np.float32) for name, n in NORMS[arch].items()}
    tensors = {f"blk.{il}.{name}": values for il in range(3) for name, values in norms.items()}
    model = Tiny(arch=arch, n_layer=3, n_embd=64, n_head_kv=1, n_ff=32, type="Q8_0", tensors=tensors)
    write_tiny(tmp_path / "model.gguf", model)
    counts = []
    for n_layer in (1, 2, 3):
        launched.clear()
        logits(open_decoder(tmp_path / "model.gguf", gpu(), n_layer), [5], 1)
        counts.append(launched.copy())
    n = 9 if arch == "olmo2" else 7
    assert [len(more) - len(few) for few, more in itertools.pairwise(counts)] == [n, n], counts[-1]


@only_interpreted
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_graph_serves_any_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of a bucket have the same grids and arguments whatever is in the step. Nothing runs here."""
    from triton.runtime.interpreter import GridExecutor

    def note(self: Any, *args: Any, **options: Any) -> None:
        launched.append(
            (self.fn.__name__, self.grid, [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args])
        )

    launched: list[Any] = []
    monkeypatch.setattr(GridExecutor, "__call__", note)
    write_tiny(tmp_path / "model.gguf", replace(MODELS[name], n_ctx=512, window=70))
    decoder = open_decoder(tmp_path / "model.gguf", gpu(), n_ctx=512, n_seq=33)
    steps: tuple[list[dict[int, int]], ...] = (
        [{1: 1, 2: 1, 4: 1}, {0: 4}, {3: 2, 4: 1}],
        [dict.fromkeys(range(33), 1), {5: 16, 6: 16, 8: 1}, dict.fromkeys(range(11), 3)],
        [{0: 18, 1: 1, 3: 14}, {4: 32, 5: 1}],  # wide
    )
    tops = [Top(3), None, Top(40, np.zeros(-(-decoder.config.n_vocab // 32), np.uint32))]
    for same in steps:
        found = []
        for counts in same:
            launched.clear()
            rows, left = {}, 3
            for seq, n in counts.items():
                rows[seq] = min(n, left)
                left -= rows[seq]
            decoder.top({seq: [7] * n for seq, n in counts.items()}, rows, tops)
            found.append([str(launch) for launch in launched if "keys" not in launch[0]])
        assert len(found[0]) > 10
        assert all(launches == found[0] for launches in found)


def test_layers_on_several_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embeddings on the CPU, a layer on a GPU, one on another, one on the CPU: a batch, two sequences, caches of
    two types, which cost as much accuracy as on the CPU. From GPU to GPU nothing goes through the host."""
    write_tiny(tmp_path / "model.gguf", replace(LLAMA, n_layer=3, n_ff=32))
    places: list[Any] = [gpu(), gpu(), cpu(2)]
    options = {"n_seq": 2, "cache_types": [CacheType("q8_0", "q8_0"), CacheType(), CacheType("q8_0", "q8_0")]}
    mixed = open_decoder(tmp_path / "model.gguf", places, embedding=cpu(2), **options)
    monkeypatch.setattr(mixed._stages[1].program, "to_host", None)
    one, exact = (open_decoder(tmp_path / "model.gguf", b, **options) for b in (cpu(2), NumpyBackend(np.float64)))
    results = []
    for decoder in (mixed, one, exact):
        made = [logits(decoder, IDS[:10], 3)]
        decoder.rewind(9)
        copy_prefix(decoder.cache, 0, 1, 9)
        parts = [(il, kind, bytes(data)) for il, kind, data in export(decoder.cache, 1)]
        restore(decoder.cache, 9, parts, seq=0)
        made.append(decoder.step({1: IDS[:5], 0: IDS[5:9]}).copy())  # more than FEW: quicker in the interpreter
        results.append(made)
    for a, b, c in zip(*results, strict=True):
        assert distance(a, b) < 0.05
        assert distance(a, c) < max(0.01, 1.5 * distance(b, c))


def test_sequences_that_share_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer with a window and one without: a prefix that is found, a page that is copied when two go on from it, a
    shift, bytes out and in, as float64 has it. Products of few tokens run as those of many, which is quicker."""
    monkeypatch.setattr(gpu_program, "FEW", 0)
    use_tuning(monkeypatch, tile=(256, 16))
    two = {"attention.sliding_window_pattern": [True, False]}
    write_tiny(tmp_path / "model.gguf", replace(TINY_GEMMA3, n_layer=2, n_ctx=512, window=40, metadata=two))
    text = [(7 * i * i + 3 * i + 1) % 270 for i in range(110)]

    def play(backend: Any) -> list[np.ndarray]:
        kinds = [CacheType("f32", "f32")] * 2
        decoder = open_decoder(tmp_path / "model.gguf", backend, n_ctx=256, n_seq=3, cache_types=kinds)
        assert [layer.window for layer in decoder.config.layers] == [40, 0]
        cache, made = decoder.cache, [logits(decoder, text, 1)]
        assert adopt(cache, 1, [*text[:80], 9]) == 64
        assert copy_prefix(cache, 0, 2, 101) == 101
        made.append(decoder.step({1: text[64:82], 0: [5], 2: [6, 7]}).copy())
        assert shift(cache, 32, 32, 0) == 79
        made.append(decoder.step({seq: [8] for seq in (0, 2, 1)}).copy())
        parts = [(il, kind, bytes(data)) for il, kind, data in export(cache, 2)]
        restore(cache, 104, parts, seq=1)
        made.append(decoder.step({seq: [seq] for seq in range(3)}).copy())
        return made

    for found, expected in zip(play(gpu()), play(NumpyBackend(np.float64)), strict=True):
        assert distance(found, expected) < 3e-3


def test_the_last_layers_on_a_gpu(tmp_path: Path) -> None:
    """As --gpu-layers 1 has it: the output too, whose rows are those that are wanted."""
    write_tiny(tmp_path / "model.gguf", replace(LLAMA, n_layer=2, types={"token_embd": "F32"}))
    mixed, one = (open_decoder(tmp_path / "model.gguf", places) for places in ([cpu(2), gpu()], cpu(2)))
    a, b = (logits(decoder, IDS, 9) for decoder in (mixed, one))
    assert a.shape == b.shape == (9, mixed.config.n_vocab)
    assert distance(a, b) < 0.05


@only_interpreted
@pytest.mark.parametrize(("n_gpu", "tied"), [(1, True), (2, False), (3, True), (3, False)])
def test_planned_sizes(n_gpu: int, tied: bool, tmp_path: Path) -> None:
    """Weights and caches to the byte, buffers no less than are made."""
    types = {"attn_v": "Q5_1", "ffn_down": "F16", "token_embd": "Q8_0"}
    write_tiny(tmp_path / "model.gguf", replace(LLAMA, n_layer=3, types=types, tied=tied))
    file = GGUFFile.open(tmp_path / "model.gguf")
    config = ModelConfig.from_metadata(file.metadata, file.tensors)
    plan = MemoryPlan(config, list(file.tensors.values()), 64, plan_cache(config), 32)
    device = Device("cuda")
    placement = fit(gpu_sizes(plan), [n_gpu], (), {device: 1 << 40})
    assert placement is not None
    backends: dict[Device, Any] = {CPU: cpu(2), device: gpu()}

    def allocated() -> int:
        storages = {t.untyped_storage() for t in gc.get_objects() if type(t) is torch.Tensor}
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    gc.collect()
    before = allocated()
    decoder = open_decoder(
        tmp_path / "model.gguf", [backends[d] for d in placement.layers], embedding=backends[placement.embedding]
    )
    need = needed(placement, device, gpu_sizes(plan))
    held = backends[device].nbytes()
    biases = sum(tensor.nbytes for name, tensor in file.tensors.items() if name.endswith("bias")) // 3
    vectors = 4 * 64 * (2 * n_gpu + 1) + biases * n_gpu
    assert (held["weights"] + vectors, held["cache"]) == (need.weights, need.cache)
    pinned = sum(staging.nbytes for staging in backends[device]._uploader._staging)
    pinned += next(s.program for s in decoder._stages if isinstance(s.program, GpuProgram))._host.nbytes
    made = allocated() - before - need.weights - need.cache - pinned
    assert need.buffers / 2 < made <= need.buffers
    decoder.close()


def test_planned_caches(tmp_path: Path) -> None:
    """To the byte: every type, windows, several sequences that share few cells, a batch beyond the context."""
    write_tiny(tmp_path / "model.gguf", replace(TINY_GEMMA3, window=70))
    with GGUFFile.open(tmp_path / "model.gguf") as file:
        config, tensors = ModelConfig.from_metadata(file.metadata, file.tensors), [*file.tensors.values()]
    names = [*CACHE_FORMATS] * 2
    for first, n_ctx, n_batch, n_seq, n_cells in ((0, 1000, 32, 1, None), (4, 100, 512, 3, 250), (8, 128, 1, 2, None)):
        kinds = [CacheType(*names[at : at + 2]) for at in range(first, first + config.n_layer)]
        plan = MemoryPlan(config, tensors, n_ctx, kinds, n_batch, n_seq, n_cells)
        for il, kind in enumerate(kinds):
            backend = gpu()
            tables = page_tables(config, n_ctx, plan.n_rows, n_seq, n_cells)
            shape = config.attention(il)
            table = next((table for table in tables if table.window == shape.window), tables[0])
            backend.cache(shape, table, kind)
            assert backend.nbytes()["cache"] == gpu_sizes(plan).caches[il]


def test_errors_of_gpus_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path / "model.gguf", LLAMA)
    decoder = open_decoder(tmp_path / "model.gguf", gpu())
    for error, words in GPU_ERRORS:

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Launches, "run", fail)
        with pytest.raises(GgufRunError, match=words) as caught:
            logits(decoder, IDS[:3], 1)
        assert "\n" not in str(caught.value)
        assert decoder.n_past == 0
    for other in (RuntimeError("shapes do not fit"), ValueError("out of memory")):
        assert explain(other) is None


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GpuBackend, "free_memory", lambda self: 1 << 16)
    monkeypatch.setattr(gpu_backend, "measure_limits", functools.partial(measure_limits, side=32))
    assert all(0 < rate < float("inf") for rate in gpu().limits())


def test_two_layers_of_a_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2, Q4_1: large tiles, because the interpreter takes no longer for them. The GPU multiplies f16 with what
    the CPU makes int8 of."""
    use_tuning(monkeypatch, tile=(1024, 32))
    ids = [1, 4093, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712]
    exact = open_decoder(smollm2(), NumpyBackend(np.float64), n_layer=2)
    one, other = (open_decoder(smollm2(), backend, n_layer=2) for backend in (gpu(), cpu(2)))
    a, b, c = (logits(decoder, ids, 12) for decoder in (one, other, exact))
    assert distance(a, c) < 1e-3
    assert distance(b, c) < 0.015
    assert (a.argmax(-1) == c.argmax(-1)).all()
