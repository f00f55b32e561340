"""What a GPU can do at most: bytes read from its memory and f16 operations, each per second.

As kernels_cpu.measure.limits for the CPU: decoding is bounded by the first, a long prompt by the second.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

_RUNS = 20


def measure_limits(device: torch.device, n_bytes: int = 1 << 30, side: int = 8192) -> tuple[float, float]:
    """Read n_bytes, multiply matrices of side x side; each is the best of some runs."""
    x = torch.ones(n_bytes // 4, device=device)
    a = torch.randn(side, side, device=device).half()
    return n_bytes / _best(lambda: x.sum(), device), 2 * side**3 / _best(lambda: a @ a, device)


def _best(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds."""
    seconds = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
