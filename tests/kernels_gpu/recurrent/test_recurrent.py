"""Recurrent ops on the GPU, in Triton's interpreter, against float64."""

from pathlib import Path

import hf_tiny
import pytest
import tiny
from cpu_ops import error
from gpu_ops import fast_dots, gpu, pytestmark, use_tuning
from recurrent_ops import check, delta_rule, scan, short_conv

from gguf_run.kernels_gpu import program

__all__ = ["fast_dots", "pytestmark"]
# Runs of a few tokens, which a captured graph must serve whatever they are, and of more.
BATCHES = ({0: 1}, {0: 2, 2: 1}, {1: 5, 0: 1, 2: 2}, {0: 9, 2: 1})


@pytest.mark.parametrize(
    ("n", "n_taps", "activation", "has_bias", "in_place"),
    [(70, 4, "silu", True, True), (64, 3, "identity", False, False), (9, 2, "silu", False, True)],
)
def test_short_conv(n: int, n_taps: int, activation: str, has_bias: bool, in_place: bool) -> None:
    check(gpu(), short_conv, n, n_taps, activation, has_bias, in_place, batches=(*BATCHES, {1: 65}))


@pytest.mark.parametrize(
    ("heads", "d_k", "d_v", "is_tiled", "in_place"),
    [((1, 2), 128, 32, True, True), ((2, 4), 24, 20, False, False), ((2, 4), 7, 3, True, True)],
)
def test_delta_rule(heads: tuple[int, int], d_k: int, d_v: int, is_tiled: bool, in_place: bool) -> None:
    check(gpu(), delta_rule, heads, d_k, d_v, is_tiled, in_place, batches=BATCHES)


@pytest.mark.parametrize(
    ("n_head", "head_dim", "n_group", "n_state", "in_place"),
    [(2, 32, 1, 128, True), (4, 20, 2, 19, False), (3, 1, 3, 1, True)],
)
def test_scan(n_head: int, head_dim: int, n_group: int, n_state: int, in_place: bool) -> None:
    check(gpu(), scan, n_head, head_dim, n_group, n_state, in_place, batches=BATCHES)


def test_layers_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba 2 and attention. Products of few tokens, which take the interpreter seconds, run as those of many."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(program, "FEW", 0)
    use_tuning(monkeypatch, tile=(256, 16))
    config = {
        "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "num_local_experts": 0,
        "layer_types": ["linear_attention", "full_attention"], "shared_intermediate_size": 56, "mamba_n_heads": 12,
        "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2, "residual_multiplier": 0.4,
    }  # fmt: skip
    model = tiny.make(tmp_path, "GraniteMoeHybridForCausalLM", config)
    with tiny.opened(tmp_path) as (made, tensors):
        found = tiny.logits(made, tensors, gpu(), (3, 1), tiny.IDS[:4])
    assert error(found, hf_tiny.logits(model, tiny.IDS[:4])) < 1e-5
