"""Opens a GPU, or says in one line why it cannot be used. Measures how fast the GPU is."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from gguf_run.formats.errors import GgufRunError

MIN_CAPABILITY = 80  # below, tensor cores lack what the kernels need
_RUNS = 20  # of a measurement


def open_device(index: int) -> torch.device:
    """Return the GPU number `index`. GgufRunError if torch, its driver or the GPU cannot run the kernels."""
    name = f"--device cuda:{index}"
    if torch.version.cuda is None and torch.version.hip is None:
        raise GgufRunError(f"{name}: this torch ({torch.__version__}) is built for CPUs only; install one with CUDA")
    if not torch.cuda.is_available():
        raise GgufRunError(f"{name}: torch {torch.__version__} finds no usable GPU; check the driver with nvidia-smi")
    count = torch.cuda.device_count()
    if index >= count:
        raise GgufRunError(f"{name}: this machine has {count} GPU{'s' * (count > 1)}, numbered from 0 on")
    device = torch.device("cuda", index)
    if torch.version.cuda is not None and capability(device) < MIN_CAPABILITY:
        raise GgufRunError(
            f"{name}: {torch.cuda.get_device_name(device)} has compute capability {capability(device) / 10}, at least "
            f"{MIN_CAPABILITY / 10} is needed; use --device cpu"
        )
    return device


def n_devices() -> int:
    return torch.cuda.device_count()


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` torch's current device, on which Triton launches kernels and events are recorded."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capability(device: torch.device) -> int:
    """Return the compute capability, for example 90 for 9.0; 0 for a device that is no NVIDIA GPU."""
    if device.type != "cuda" or torch.version.cuda is None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def registers(n: int) -> dict[str, int]:
    """Return the launch option that allows each thread n registers.

    Without it NVIDIA's assembler may spill registers, to run more programs on a multiprocessor. AMD's Triton has no
    such option.
    """
    return {} if torch.version.hip else {"maxnreg": n}


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
