"""A second process that helps to compile a model's kernels: numba keeps other threads waiting while it compiles.

It takes the kernels of a step from the last to the first and leaves them in the cache on disk. The process that loads
the model takes them from the first to the last, and finds those that are ready.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

from gguf_run.formats.jit import compile_notice, kernel_cache_dir
from gguf_run.models.backend import CacheType

_CODE = "from gguf_run.runtime.compile_ahead import main; main()"


@contextmanager
def helper(path: Path, quantize: str | None, cache: Sequence[CacheType], n_threads: int) -> Iterator[None]:
    """Have help from when the first kernel must be compiled, if there is a second CPU to do it."""
    helpers: list[Any] = []

    def start() -> None:
        import subprocess

        command = [
            sys.executable,
            "-P",
            "-c",
            _CODE,
            os.fspath(path),
            quantize or "",
            json.dumps([*map(astuple, cache)]),
        ]
        quiet = subprocess.DEVNULL
        helpers.append(subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet))

    if n_threads == 1 or not sys.executable or kernel_cache_dir() is None:
        yield
        return
    with compile_notice(start):
        try:
            yield
        finally:
            for process in helpers:
                process.kill()
                process.wait()


def main() -> None:
    """What the second process does. Arguments: path, type to quantize to, types of each layer's KV cache."""
    from gguf_run.kernels_cpu.backend import KernelCompiler
    from gguf_run.models.config import ModelConfig
    from gguf_run.models.decoder import Decoder
    from gguf_run.runtime.open_model import open_model

    path, quantize, cache = sys.argv[1], sys.argv[2], [CacheType(*fields) for fields in json.loads(sys.argv[3])]
    with open_model(Path(path), quantize or None) as file:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        backend = KernelCompiler()
        Decoder(config, file.tensors, [backend] * config.n_layer, n_ctx=1, cache_types=cache)
