"""Attention of the GPU backend that sees later tokens of its step, with a window to both sides and without one."""

import pytest
from both_ways import check_both_ways
from gpu_ops import fast_dots, gpu, pytestmark

from gguf_run.kernels_gpu.attention import launch as attention_launch
from gguf_run.models.operands import AttentionShape

__all__ = ["fast_dots", "pytestmark"]
STEPS = ([(0, 0, 40)], [(1, 0, 1)], [(0, 0, 3), (2, 0, 37), (1, 0, 10)], [(0, 3, 30), (1, 10, 2)], [(2, 0, 3)])


@pytest.mark.parametrize("window", [0, 1, 6, 33])
def test_both_ways(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_launch, "SPAN", 32)
    shape = AttentionShape(3, 1, 20, 0.6, window, 5.0 * (window == 33), is_causal=False)
    assert check_both_ways(gpu(), shape, STEPS) < 2e-3
