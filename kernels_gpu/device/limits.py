"""Measures the bytes that a GPU reads per second, which bound decoding, and its f16 operations, which bound prefill."""

import time
from collections.abc import Callable
from typing import Any

import torch

_RUNS = 20


def measure_limits(device: torch.device, n_bytes: int = 1 << 30, side: int = 8192) -> tuple[float, float]:
    """Return bytes read and f16 operations, per second: the best runs over n_bytes and matrices of side x side."""
    x = torch.ones(n_bytes // 4, device=device)
    a = torch.randn(side, side, device=device).half()
    return n_bytes / _best(lambda: x.sum(), device), 2 * side**3 / _best(lambda: a @ a, device)


def _best(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of the fastest run."""
    seconds = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
