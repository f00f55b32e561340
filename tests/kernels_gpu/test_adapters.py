"""Adapters on the GPU backend, in Triton's interpreter: few tokens and many, different adapters side by side."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapter_files import IDS, decoder, random_pairs, write_adapter
from cpu_ops import error
from gpu_ops import fast_dots, gpu, pytestmark, use_tuning
from numpy_backend import NumpyBackend
from tinymodel import TINY_GEMMA3, Tiny, write_tiny

from gguf_run.kernels_gpu.device.tuning import FEW

__all__ = ["fast_dots", "pytestmark"]
LLAMA = Tiny(n_layer=1, n_embd=64, n_head=2, n_head_kv=1, n_ff=32)
ALL = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), 4)
UNEVEN = {"attn_q": 1, "attn_v": 5, "ffn_up": 17, "ffn_down": 3}


@pytest.mark.parametrize(("type", "limit"), [("F32", 1e-5), ("F16", 3e-3), ("BF16", 3e-3)])
def test_sequences_use_different_adapters(
    type: str, limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many tokens are multiplied as f16 with F16 and BF16 adapters."""
    use_tuning(monkeypatch, tile=(256, 16), rows=tuple((n, 16) for n in (1, 2, 4, FEW)))
    write_tiny(tmp_path / "base.gguf", LLAMA)
    pairs = [random_pairs(LLAMA, ranks, seed, type) for seed, ranks in enumerate((ALL, UNEVEN))]
    files = [(write_adapter(tmp_path / f"{i}.gguf", one, type=type), 1.0) for i, one in enumerate(pairs)]
    made = [decoder(tmp_path / "base.gguf", backend, files, 3) for backend in (gpu(), NumpyBackend(np.float64))]
    results = []
    for one in made:
        assert one.adapters is not None
        one.adapters.scales.set(0, {"1": -2.0})
        steps = [one.step({2: IDS[:5], 0: IDS[:9], 1: IDS[3:7]}).copy()]
        one.adapters.scales.set(1, {"0": 0.5})
        steps += [one.step({0: IDS[9:10], 1: IDS[7:8]}).copy(), one.step({1: IDS[8:9]}).copy()]
        results.append(np.concatenate(steps))
    assert error(*results) < limit


@pytest.mark.parametrize(
    ("tiny", "ranks"), [(replace(LLAMA, type="Q8_0"), UNEVEN), (replace(TINY_GEMMA3, n_layer=1, type="Q4_0"), ALL)]
)
def test_at_scale_0_all_bits_are_those_of_the_model(
    tiny: Tiny, ranks: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma's norms follow products: they must still be fused."""
    use_tuning(monkeypatch, tile=(256, 16), rows=tuple((n, 16) for n in (1, 2, 4, FEW)))
    write_tiny(tmp_path / "base.gguf", tiny)
    path = write_adapter(tmp_path / "adapter.gguf", random_pairs(tiny, ranks), tiny.arch)
    results = []
    for adapters in ((), ((path, 0.0),)):
        one = decoder(tmp_path / "base.gguf", gpu(), adapters)
        results.append(np.concatenate([one.step({0: ids}).copy() for ids in (IDS[:9], IDS[9:10])]))
    np.testing.assert_array_equal(*(result.view(np.uint32) for result in results))
