"""Opens the GPUs that a user wants, or says in one line why there are none. torch is imported only where one is."""

from collections.abc import Callable, Mapping
from typing import Any

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.load.fit import holds_all, place, plan_lines
from gguf_run.runtime.load.memory import MemoryPlan
from gguf_run.runtime.load.options import Device, Placement, Wanted


def open_gpus(wanted: Wanted, report: Callable[[str], None]) -> dict[Device, Any]:
    """Return a kernels_gpu.backend.GpuBackend for each GPU that is named or, if none is, for all that are usable.

    If no GPU is usable and none is insisted on, the result is empty and report gets the reason.
    """
    found, errors = {}, []
    for device in wanted.devices or [Device("cuda", i) for i in range(n_gpus())]:
        try:
            found[device] = open_gpu(device)
        except GgufRunError as error:
            if wanted.devices:
                raise
            errors.append(error)
    if not found and wanted.insists:
        raise errors[0]
    if not found:
        report(f"all on the CPU: {errors[0]}")
    return found


def n_gpus() -> int:
    """Return the number of GPUs, at least 1: open_gpu says why there is none."""
    try:
        from gguf_run.kernels_gpu.device.device import n_devices
    except (ImportError, AttributeError, OSError):
        return 1
    return max(1, n_devices())


def open_placement(
    plan: MemoryPlan, wanted: Wanted, report: Callable[[str], None]
) -> tuple[Placement, dict[Device, Any]]:
    """Return the device of each part, and the backends of the GPUs that are used. report gets lines with the plan."""
    gpus = open_gpus(wanted, report)
    free = _free_memory(gpus, plan, wanted) if gpus else {}
    placement = place(plan, wanted, free)
    if gpus and not placement.n_gpu:
        report("all on the CPU: not one layer fits into the free memory of the GPU")
    elif gpus:
        for line in plan_lines(plan, placement, free):
            report(line)
    return placement, {device: gpus[device] for device in placement.devices if device in gpus}


def _free_memory(gpus: Mapping[Device, Any], plan: MemoryPlan, wanted: Wanted) -> dict[Device, int]:
    """Return the free bytes of each GPU. The question takes memory of a GPU: ask no more GPUs than are needed."""
    from gguf_run.kernels_gpu.device.errors import gpu_errors

    free: dict[Device, int] = {}
    with gpu_errors():
        for device, gpu in gpus.items():
            free[device] = gpu.free_memory()
            if not wanted.devices and holds_all(plan, wanted, free):
                break
    return free


def open_gpu(device: Device) -> Any:
    """Return a kernels_gpu.backend.GpuBackend. GgufRunError if the GPU, or what runs it, is missing."""
    try:
        from gguf_run.kernels_gpu.backend import GpuBackend
        from gguf_run.kernels_gpu.device.device import open_device
    except ModuleNotFoundError as error:
        raise GgufRunError(
            f"--device {device}: {error.name} is not installed; install it with: pip install 'gguf-run[gpu]'"
        ) from None
    except (ImportError, AttributeError, OSError) as error:  # a library that does not load, or of another version
        raise GgufRunError(
            f"--device {device}: torch and triton do not work here ({error}); install versions that belong together: "
            "pip install --force-reinstall 'gguf-run[gpu]'"
        ) from None
    return GpuBackend(open_device(device.index))
