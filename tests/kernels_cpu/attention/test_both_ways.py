"""Attention of the CPU backend that sees later tokens of its step, with a window to both sides and without one."""

import pytest
from both_ways import check_both_ways
from cpu_ops import cpu

from gguf_run.models.operands import AttentionShape

# Runs (sequence, n_past, n_tokens) of steps: a text, one token, several texts, tokens behind a prefix.
STEPS = ([(0, 0, 70)], [(1, 0, 1)], [(0, 0, 3), (2, 0, 129), (1, 0, 40)], [(0, 3, 200), (1, 40, 2)])


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("window", [0, 1, 2, 6, 33, 64, 100])
@pytest.mark.parametrize(("n_head", "n_head_kv", "head_dim"), [(1, 1, 8), (3, 3, 20), (8, 1, 64), (40, 1, 24)])
def test_both_ways(n_head: int, n_head_kv: int, head_dim: int, window: int, n_threads: int) -> None:
    shape = AttentionShape(n_head, n_head_kv, head_dim, 0.6, window, 5.0 * (window == 33), is_causal=False)
    assert check_both_ways(cpu(n_threads), shape, STEPS) < 1e-5
