"""Recurrent ops on the GPU, in Triton's interpreter, against float64."""

import pytest
from gpu_ops import fast_dots, gpu, pytestmark
from recurrent_ops import check, delta_rule, scan, short_conv

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
