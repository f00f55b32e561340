"""What can go wrong with a GPU: one line that says what to do, and the exit code; without a GPU, by replacing parts."""

import builtins
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
from click.testing import CliRunner
from gpu_ops import gpu
from tinymodel import Tiny, write_tiny

from gguf_run.kernels_gpu.backend import GpuBackend
from gguf_run.kernels_gpu.device.device import open_device
from gguf_run.kernels_gpu.program import Launches
from gguf_run.runtime.cli.run import main
from gguf_run.runtime.load import devices, load_model
from gguf_run.runtime.load.fit import MARGIN

Patch = pytest.MonkeyPatch


def cards(cuda: str | None, available: bool = True, capability: tuple[int, int] = (9, 0)) -> Callable[[Patch], None]:
    """What torch says: two GPUs."""

    def change(patch: Patch) -> None:
        patch.setattr(torch.version, "cuda", cuda)
        patch.setattr(torch.version, "hip", None)
        answers = {"is_available": available, "device_count": 2, "get_device_capability": capability}
        for name, answer in (answers | {"get_device_name": "a card"}).items():
            patch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)

    return change


def imports(error: Exception) -> Callable[[Patch], None]:
    """The GPU backend cannot be imported."""
    real = builtins.__import__

    def load(name: str, *args: Any, **options: Any) -> Any:
        if name == "gguf_run.kernels_gpu.backend":
            raise error
        return real(name, *args, **options)

    return lambda patch: patch.setattr(builtins, "__import__", load)


def runs(error: Exception | None = None, free: int = 1 << 40) -> Callable[[Patch], None]:
    """A GPU with so much memory that fails when it runs."""

    def fail(*_: Any) -> None:
        assert error is not None
        raise error

    def change(patch: Patch) -> None:
        patch.setattr(devices, "open_gpu", lambda device: gpu())
        patch.setattr(GpuBackend, "free_memory", lambda self: free)
        patch.setattr(Launches, "run", fail)

    return change


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation")
# what is wrong, options, exit code, the line
CASES: dict[str, tuple[Callable[[Patch], None], str, int, str]] = {
    "torch for CPUs": (cards(None), "-dev cuda", 1, r"--device cuda:0: this torch \(.*\) is built for CPUs only"),
    "no driver": (cards("13.0", False), "-ngl 1", 1, "--device cuda:0: torch .* finds no usable GPU; check the driver"),
    "old": (cards("13.0", True, (7, 5)), "-dev cuda:1", 1, "a card has compute capability 7.5, at least 8.0 is needed"),
    "no such GPU": (cards("13.0"), "-dev cuda:2", 1, "--device cuda:2: this machine has 2 GPUs, numbered from 0 on"),
    "no triton": (
        imports(ModuleNotFoundError("x", name="triton")), "-dev cuda", 1,
        r"--device cuda:0: triton is not installed; install it with: pip install 'gguf-run\[gpu\]'",
    ),
    "versions": (
        imports(ImportError("undefined symbol: abc")), "-dev cuda:1", 1,
        r"--device cuda:1: torch and triton do not work here \(undefined symbol: abc\); install versions that belong",
    ),
    "too many layers": (runs(), "-ngl 4", 2, "--gpu-layers 4: allowed are 0 to 3, the model's layers, all and auto"),
    "little memory": (
        runs(free=MARGIN + 9_600_000), "-ngl all -c 4096", 1,
        r"--gpu-layers 3: out of memory on cuda:0: .* needed \(weights .*\) .*: --gpu-layers 2 or --ctx-size 2.* fit",
    ),
    "no memory": (
        runs(free=MARGIN), "-dev cuda", 1, r"out of memory .*: use a smaller context \(--ctx-size\) or --device cpu",
    ),
    "memory gone": (runs(NO_MEMORY), "", 1, "the GPU is out of memory; use fewer --gpu-layers or a smaller --ctx-size"),
    "lost": (
        runs(torch.AcceleratorError("CUDA error: device is lost\nCUDA kernel errors ...")), "-ngl 2", 1,
        r"the GPU is lost or busy; look at it with nvidia-smi, then start again, or use --device cpu \(CUDA error",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_one_line_and_the_exit_code(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, options, code, words = CASES[what]
    write_tiny(tmp_path / "m.gguf", Tiny(n_layer=3, n_ctx=4096))
    monkeypatch.setattr(load_model, "driver_there", lambda root: True)
    change(monkeypatch)
    done = CliRunner().invoke(main, [str(tmp_path / "m.gguf"), "--raw", "-p", "the", "-n", "2", *options.split()])
    *plan, line = done.stderr.splitlines()
    assert (done.exit_code, done.stdout) == (code, "")
    assert re.fullmatch(f"error: (.*m.gguf: )?.*{words}.*", line), line
    assert all(re.match("cpu: |cuda:0: |compiling", other) for other in plan), plan


def test_a_gpu_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    cards("13.0", True, (8, 0))(monkeypatch)
    assert open_device(1) == torch.device("cuda", 1)
