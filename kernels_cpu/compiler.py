"""A backend that compiles kernels ahead of their use."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.gguf.reader import Tensor
from gguf_run.kernels_cpu.backend import CpuBackend
from gguf_run.kernels_cpu.replay.op import TapeOp


class KernelCompiler(CpuBackend):
    """Compiles the kernels of its programs, from the last to the first. Weights stay empty: no program must run."""

    def __init__(self) -> None:
        super().__init__(1)

    def _repack(self, tensors: list[Tensor], to: NDArray[np.uint8]) -> None:
        pass

    def _compile(self, kernels: Sequence[TapeOp]) -> None:
        super()._compile(kernels[::-1])
