"""Errors that mypy must find: mypy checks this file, and reports each `type: ignore` that hides no error."""

from torch import Tensor as Array

from gguf_run.kernels_cpu.attention.cache import CpuCache
from gguf_run.kernels_cpu.backend import CpuBackend
from gguf_run.kernels_cpu.int8_forms import CpuOp, CpuVector
from gguf_run.kernels_cpu.matmul.moe import CpuExperts
from gguf_run.kernels_cpu.panels.memory import CpuTable, CpuWeight
from gguf_run.kernels_cpu.recurrent.state import CpuState
from gguf_run.kernels_cpu.rows.observe import CpuSquares
from gguf_run.kernels_gpu.attention.cache import GpuCache
from gguf_run.kernels_gpu.backend import GpuBackend, GpuOp
from gguf_run.kernels_gpu.panels.memory import GpuExperts, GpuSquares, GpuWeight, WeightPart
from gguf_run.kernels_gpu.recurrent.state import GpuState
from gguf_run.models.operands import AttentionShape, Buffer
from gguf_run.models.ops import Attend, Embed, Matmul, RmsNorm
from gguf_run.models.protocol import Backend


def cpu_keeps_the_contract(
    cpu: CpuBackend,
) -> Backend[CpuTable, CpuWeight, CpuVector, CpuCache, CpuExperts, CpuSquares, CpuState]:
    return cpu


def gpu_keeps_the_contract(
    gpu: GpuBackend,
) -> Backend[WeightPart, GpuWeight, Array, GpuCache, GpuExperts, GpuSquares, GpuState]:
    return gpu


def ops_take_handles_of_their_kind(x: Buffer, weight: CpuWeight, table: CpuTable, vector: CpuVector) -> list[CpuOp]:
    return [
        Embed(table, x),
        Matmul(x, weight, x, vector),
        Matmul(x, table, x),  # type: ignore[arg-type]
        Embed(weight, x),  # type: ignore[arg-type]
        RmsNorm(x, weight, x, 1e-5),  # type: ignore[arg-type]
    ]


def a_gpu_takes_no_handles_of_the_cpu(
    x: Buffer, shape: AttentionShape, gpu: GpuBackend, ours: GpuWeight, weight: CpuWeight, cache: CpuCache
) -> None:
    gpu.program([[Matmul(x, ours, x)]], [], x, 1, 1)
    gpu.program([[Matmul(x, weight, x)]], [], x, 1, 1)  # type: ignore[arg-type]
    step: list[GpuOp] = []
    step.append(Matmul(x, weight, x))  # type: ignore[arg-type]
    step.append(Attend(x, x, x, cache, shape, x))  # type: ignore[arg-type]
