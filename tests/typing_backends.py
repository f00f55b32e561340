"""What mypy must see: it checks this file, and complains of a `type: ignore` that hides no error."""

from gguf_run.kernels_cpu.backend import CpuBackend
from gguf_run.kernels_cpu.cache import CpuCache
from gguf_run.kernels_cpu.int8_forms import CpuOp, CpuVector
from gguf_run.kernels_cpu.memory import CpuTable, CpuWeight
from gguf_run.kernels_cpu.moe import CpuExperts
from gguf_run.kernels_cpu.observe import CpuSquares
from gguf_run.models.backend import Backend
from gguf_run.models.operands import Buffer
from gguf_run.models.ops import Embed, Matmul, RmsNorm


def cpu_keeps_the_contract(
    cpu: CpuBackend,
) -> Backend[CpuTable, CpuWeight, CpuVector, CpuCache, CpuExperts, CpuSquares]:
    return cpu


def ops_take_handles_of_their_kind(x: Buffer, weight: CpuWeight, table: CpuTable, vector: CpuVector) -> list[CpuOp]:
    return [
        Embed(table, x),
        Matmul(x, weight, x, vector),
        Matmul(x, table, x),  # type: ignore[arg-type]
        Embed(weight, x),  # type: ignore[arg-type]
        RmsNorm(x, weight, x, 1e-5),  # type: ignore[arg-type]
    ]
