"""A second process that helps to compile a model's kernels: within one process, numba compiles one at a time.

The second process compiles the kernels of a step from the last to the first and writes them to the cache on disk. The
process that loads the model compiles from the first to the last, until it meets kernels that are ready.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path

from gguf_run.formats.compiler.jit import kernel_cache_dir
from gguf_run.models.backend import CacheType


@contextmanager
def helper(path: Path, quantize: str | None, cache: Sequence[CacheType], n_threads: int) -> Iterator[None]:
    """Return a context in which the second process runs. Without a cache on disk, or for one thread, there is none."""
    if n_threads == 1 or not sys.executable or kernel_cache_dir() is None:
        yield
        return
    arguments = [os.fspath(path), quantize or "", json.dumps([*map(astuple, cache)])]
    command, quiet = [sys.executable, "-P", "-m", __name__, *arguments], subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """What the second process does. Arguments: path, type to quantize to, types of each layer's KV cache."""
    from gguf_run.kernels_cpu.backend import KernelCompiler
    from gguf_run.models.config import ModelConfig
    from gguf_run.models.decoder import Decoder
    from gguf_run.runtime.load.open_model import open_model

    path, quantize, cache = sys.argv[1], sys.argv[2], [CacheType(*fields) for fields in json.loads(sys.argv[3])]
    with open_model(Path(path), quantize or None) as file:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        backend = KernelCompiler()
        Decoder(config, file.tensors, [backend] * config.n_layer, n_ctx=1, cache_types=cache)


if __name__ == "__main__":
    main()
