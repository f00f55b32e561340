"""Errors of torch and Triton become one line that says what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from gguf_run.formats.errors import GgufRunError

# Words of CUDA's and HIP's messages, and what they mean. The first row that fits counts.
_MEANINGS = (
    ("out of memory|alloc_failed", "the GPU is out of memory; use fewer --gpu-layers or a smaller --ctx-size"),
    (
        "no kernel image|unsupported toolchain|driver version is insufficient|provided ptx",
        "the GPU's driver and torch {torch} do not belong together; update the driver, or install the torch for it",
    ),
    (
        "illegal memory access|misaligned address|device-side assert|launch failure|illegal instruction",
        "a kernel failed, which is a bug: please report it; --device cpu works",
    ),
    (
        "ecc|no cuda-capable device|device.*(lost|unavailable|removed)|busy or unavailable|shutting down|nvlink|"
        "invalid device|unknown error|hardware",
        "the GPU is lost or busy; look at it with nvidia-smi, then start again, or use --device cpu",
    ),
    ("cuda error|hip error|cublas|cudnn|cuda driver error", "the GPU failed; start again, or use --device cpu"),
)


def explain(error: Exception) -> str | None:
    """Return what an error of the GPU means and what to do; None if the error is something else."""
    detail = " ".join(str(error).splitlines()[:1])[:200]
    if isinstance(error, CompilationError | OutOfResources | PTXASError):
        return f"triton {triton.__version__} cannot build a kernel ({type(error).__name__}: {detail}); use --device cpu"
    if not isinstance(error, RuntimeError):  # torch's errors are of this kind
        return None
    meaning = next((text for words, text in _MEANINGS if re.search(words, str(error), re.IGNORECASE)), None)
    of_gpu = re.search("cuda|hip|cublas|cudnn|ptx", str(error), re.IGNORECASE)
    return f"{meaning.format(torch=torch.__version__)} ({detail})" if meaning and of_gpu else None


@contextmanager
def gpu_errors() -> Iterator[None]:
    """Turn errors of the GPU into a GgufRunError. Also a decorator."""
    try:
        yield
    except (RuntimeError, CompilationError, OutOfResources, PTXASError) as error:
        meaning = explain(error)
        if meaning is None:
            raise
        raise GgufRunError(meaning) from None
