"""What tests of the GPU backend share, and NumPy twins of panels.

Kernels run in Triton's interpreter on torch's CPU tensors, or on a GPU. conftest.py turns the interpreter on for the
whole process, before triton is imported. A module that imports this one is skipped if torch or Triton is missing.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")
pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from gguf_run.kernels_gpu import backend  # noqa: E402
from gguf_run.kernels_gpu.backend import GpuBackend  # noqa: E402
from gguf_run.kernels_gpu.device.tuning import DEFAULT, Tuning  # noqa: E402
from gguf_run.kernels_gpu.matmul import decode as matmul_decode  # noqa: E402
from gguf_run.kernels_gpu.matmul import mma as matmul_mma  # noqa: E402
from gguf_run.kernels_gpu.panels import halves, units  # noqa: E402
from gguf_run.kernels_gpu.panels.memory import WeightPart  # noqa: E402
from gguf_run.kernels_gpu.panels.panels import IntPanel  # noqa: E402

INTERPRETED = os.environ["TRITON_INTERPRET"] != "0"
DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="looks into the interpreter")
torch.set_num_threads(1)
pytestmark = [  # for all modules that run kernels
    pytest.mark.usefixtures("fast_dots"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # rows that only fill up may hold anything
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # the interpreter's own
]


def gpu() -> GpuBackend:
    return GpuBackend(DEVICE)


def use_tuning(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Give GpuBackend a Tuning. Tests choose large tiles: the interpreter takes no longer for them.

    It takes long for matmul_mma. So more tokens than FEW go through memory, if `small` is not given.
    """
    interpreted: dict[str, Any] = {"small": 0, "dense": (1024, 32)} if INTERPRETED else {}
    monkeypatch.setattr(backend, "DEFAULT", Tuning(**interpreted | options))


def _bytes(word: Any) -> np.ndarray:
    return np.ascontiguousarray(word.handle.data, np.int32)[..., None].view(np.int8).astype(np.int32)


def _tensor(values: np.ndarray, like: Any) -> Any:
    return tl.tensor(interpreter.TensorHandle(values.astype(np.int32), tl.int32), like.type)


def dp4a(a: Any, b: Any, c: Any) -> Any:
    """Do what kernels_gpu.panels.dots.dp4a does, in one operation instead of twenty."""
    return _tensor(c.handle.data + (_bytes(a) * _bytes(b)).sum(-1), c)


def look_up(word: Any, BOOK: Any) -> tuple[Any, Any]:
    """Do what kernels_gpu.panels.dots.look_up does."""
    book, codes = np.array([int(part) for part in BOOK], np.int32).view(np.int8), _bytes(word)
    return tuple(_tensor(book[c & 15].view(np.int32)[..., 0], word) for c in (codes, codes >> 4))


def fma(_builder: Any, x: Any, y: Any, z: Any) -> Any:
    """Round once, as a GPU does. The interpreter's own fma rounds the product, too."""
    dtype = z.data.dtype
    result = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return interpreter.TensorHandle(result.astype(dtype), z.dtype.scalar)


def scaled_bytes(word: Any, scale: Any, minimum: Any, OFFSET: Any) -> tuple[Any, Any]:
    """Do what kernels_gpu.panels.halves.scaled_bytes does."""
    codes = (_bytes(word) & 255) - int(OFFSET)
    s, m = (factor.handle.data.view(np.float16)[::2, None].astype(np.float32) for factor in (scale, minimum))
    values = (codes.astype(np.float32) * s + m).astype(np.float16).view(np.int32)
    return _tensor(values[:, 0], word), _tensor(values[:, 1], word)


def _halves(*words: Any) -> np.ndarray:
    """f32[warps, 8, 4 * len(words) * 2]: the f16 in words of each thread; 8 rows of 4 threads."""
    values = np.stack([word.handle.data for word in words], 1).view(np.float16)
    return values.astype(np.float32).reshape(-1, 8, 8 * len(words))


def mma(a: Any, b: Any, c: Any) -> tuple[Any, ...]:
    """Do what kernels_gpu.panels.halves.mma does."""
    columns = _halves(*b).swapaxes(1, 2)
    low, high = ((_halves(*rows) @ columns).reshape(-1, 2) for rows in ((a[0], a[2]), (a[1], a[3])))
    sums = (low[:, 0], low[:, 1], high[:, 0], high[:, 1])
    return tuple(
        tl.tensor(interpreter.TensorHandle(old.handle.data + new, tl.float32), old.type)
        for old, new in zip(c, sums, strict=True)
    )


@pytest.fixture
def fast_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        speed_up(monkeypatch.setattr)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)
    if gpu().tuning is DEFAULT:  # else the test has chosen already
        use_tuning(monkeypatch)


def speed_up(replace: Callable[[Any, str, Any], None]) -> None:
    """Make the interpreter faster.

    It takes 40 us for each operation on tensors, and dp4a's fallback has most of the operations: twins replace them.
    It also puts its operations into triton.language anew for every function that a kernel calls: now it does so once.
    """
    replace(matmul_decode, "dp4a", dp4a)
    replace(units, "look_up", look_up)
    replace(halves, "scaled_bytes", scaled_bytes)
    replace(matmul_mma, "mma", mma)
    call, seen = interpreter.InterpretedFunction.__call__, set()

    def call_function(function: Any, *args: Any, **options: Any) -> Any:
        if function.fn.__module__.startswith("triton") and function.fn not in seen:
            seen.add(function.fn)
            return call(function, *args, **options)
        return function.rewrite()(*args, **options)

    replace(interpreter.InterpretedFunction, "__call__", call_function)


def _bits(plane: np.ndarray, at: np.ndarray, bit: np.ndarray, n: int) -> np.ndarray:
    """Return n bits, from `bit` on, of the bytes number `at` of each unit. plane: uint8[n_out, n_unit, bytes]."""
    return (plane[..., at] >> bit) & (1 << n) - 1


def unpack_part(part: WeightPart) -> np.ndarray:
    """Return the numbers of a panel (kernels_gpu/panels/panels.py), f32[n_out, n_in], with its roundings."""
    panel, n_in = part.panel, part.n_in
    planes = {name: getattr(part, name) for name in ("qs", "high", "scale", "d")}
    planes = {name: plane.cpu().numpy() for name, plane in planes.items() if plane is not None}
    if not isinstance(panel, IntPanel):
        if panel.scales == "BF16":
            return (planes["qs"].view(np.uint16).astype(np.uint32) << 16).view(np.float32)[:, :n_in]
        return planes["qs"].view({"F32": np.float32, "F16": np.float16}[panel.scales]).astype(np.float32)[:, :n_in]
    n_out, n_unit, unit = part.n_out, part.n_unit, panel.unit
    f, b = np.divmod(np.arange(unit), 16)
    if panel.bits == 8:
        u = planes["qs"].view(np.int8).reshape(n_out, 2, n_unit, 16)[:, f, :, b].transpose(1, 2, 0).astype(np.int32)
    else:
        u = _bits(planes["qs"].reshape(n_out, n_unit, 16), b, panel.bits * f, panel.bits).astype(np.int32)
    if panel.high == 2:
        u |= _bits(planes["high"].reshape(n_out, n_unit, 8), 4 * f + b % 4, b // 4 * 2, 2).astype(np.int32) << 4
    elif panel.high:
        at, bit = (b % 4, 4 * f + b // 4) if panel.bits == 4 else (4 * (f // 2) + b % 4, f % 2 * 4 + b // 4)
        plane = planes["high"].reshape(n_out, n_unit, unit // 8)
        u |= _bits(plane, at, bit, 1).astype(np.int32) << panel.bits
    values = np.array(panel.book)[u] if panel.book else u - panel.offset
    q = values.reshape(n_out, -1, panel.group).astype(np.float32)
    scale, minimum = _scales(panel, planes, n_out)
    weights = scale[..., None] * q
    return (weights if minimum is None else weights + minimum[..., None]).reshape(n_out, n_in)


def _scales(panel: IntPanel, planes: dict[str, np.ndarray], n_out: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return scales and minimums, f32[n_out, n_in / group] each."""
    scale = planes["scale"]
    halves = scale.view(np.float16).astype(np.float32) if panel.scales in ("f16", "f16m") else None
    if halves is not None:
        return (halves, None) if panel.scales == "f16" else (halves[:, ::2], halves[:, 1::2])
    if panel.scales == "e8m0":
        return np.ldexp(np.float32(1), scale.astype(np.int32) - 128).astype(np.float32), None
    d = planes["d"].view(np.float16).astype(np.float32).reshape(n_out, -1, panel.d_bytes // 2)
    per = 256 // panel.group
    one, two = (np.repeat(d[..., i], per, axis=1) for i in (0, -1))
    if panel.scales == "k8":
        return one * scale.view(np.int8).astype(np.float32), None
    s, m = (scale & 15, scale >> 4) if panel.scales == "k4" else (scale[:, ::2], scale[:, 1::2])
    return one * s.astype(np.float32), -two * m.astype(np.float32)
