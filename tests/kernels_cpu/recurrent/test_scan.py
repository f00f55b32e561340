"""The state space of Mamba 2 on the CPU, against float64."""

import pytest
from cpu_ops import cpu
from recurrent_ops import check, scan


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("n_head", "head_dim", "n_group", "n_state"), [(4, 32, 2, 128), (6, 20, 3, 19), (2, 80, 1, 33), (3, 1, 3, 1)]
)
def test_scan(n_head: int, head_dim: int, n_group: int, n_state: int, in_place: bool) -> None:
    """Heads of whole blocks of 16 columns, with a narrower one behind them, and of only that."""
    for n_threads in (1, 3):
        check(cpu(n_threads), scan, n_head, head_dim, n_group, n_state, in_place)


def test_scan_stays_exact() -> None:
    """Slow decays remember thousands of tokens."""
    check(cpu(2), scan, 2, 16, 1, 16, False, bound=1e-3, batches=[{0: 500}] * 20)
