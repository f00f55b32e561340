"""Which device runs which layer: a pure function of the options, tested without any device."""

import re
from dataclasses import dataclass
from typing import Any

from gguf_run.formats.errors import GgufRunError, OptionError


@dataclass(frozen=True)
class Device:
    """kind: "cpu" or "cuda"; index: which one of several."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


def parse_device(text: str) -> Device | None:
    """Return the device that `--device` names, None for "auto". OptionError for anything else."""
    if text == "auto":
        return None
    match = re.fullmatch(r"(cpu|cuda)(?::([0-9]{1,3}))?", text)
    if match is None or (match[1] == "cpu" and match[2]):
        raise OptionError(f"--device {text!r}: allowed are cpu, cuda, cuda:0, cuda:1, ... and auto")
    return Device(match[1], int(match[2] or 0))


def place_layers(n_layer: int, device: str) -> tuple[Device, ...]:
    """Return the device of each layer for the option `device`."""
    return (parse_device(device) or Device("cpu"),) * n_layer


def open_gpu(device: Device) -> Any:
    """A kernels_gpu.backend.GpuBackend. GgufRunError if the GPU, or what runs it, is missing."""
    try:
        from gguf_run.kernels_gpu.backend import GpuBackend
        from gguf_run.kernels_gpu.device import open_device
    except ModuleNotFoundError as error:
        raise GgufRunError(
            f"--device {device}: {error.name} is not installed; install it with: pip install 'gguf-run[gpu]'"
        ) from None
    return GpuBackend(open_device(device.index))
