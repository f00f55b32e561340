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
from typing import TYPE_CHECKING, Any

from gguf_run.formats.compiler.jit import kernel_cache_dir
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.runtime.load.open_model import open_model
from gguf_run.runtime.load.options import LoadOptions

if TYPE_CHECKING:
    from gguf_run.kernels_cpu.compiler import KernelCompiler


@contextmanager
def helper(path: Path, options: LoadOptions, cache: Sequence[CacheType], n_threads: int) -> Iterator[None]:
    """Return a context in which the second process runs. Without a cache on disk, or for one thread, there is none."""
    if n_threads == 1 or not sys.executable or kernel_cache_dir() is None:
        yield
        return
    arguments = [os.fspath(path), options.quantize or "", options.activations, json.dumps([*map(astuple, cache)])]
    command, quiet = [sys.executable, "-P", "-m", __name__, *arguments], subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def missing_kernels(path: Path, options: LoadOptions) -> list[Path]:
    """Return the files of the kernels that a model's step needs and the cache lacks. Nothing is compiled."""
    from gguf_run.formats.compiler.jit import njit
    from gguf_run.kernels_cpu.compiler import KernelCompiler
    from gguf_run.kernels_cpu.lower import lower
    from gguf_run.kernels_cpu.tape import Tape
    from gguf_run.runtime.load.cache_plan import plan_cache

    folder, files = kernel_cache_dir(), dict[Path, None]()

    class Lister(KernelCompiler):
        def program(self, parts: Any, after: Any, result: Any, n_batch: int, n_outputs: int) -> Any:
            tape = Tape(self.n_threads, n_batch, n_outputs)
            for part in (*parts, after):
                lower(tape, part)
            for op in tape.kernels:
                kernel = njit(op.function, **op.options)
                files[(folder or Path()) / kernel.file_name((op.fields, "i8", "i8", "i8"))] = None

    with open_model(path, options.quantize, options.activations) as file:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        cache = plan_cache(config, options.cache_type, options.cache_rotation, options.cache_scales)
        _make_step(Lister(), file, config, cache)
    return [file for file in files if not file.is_file()]


def main() -> None:
    """What the second process does. Arguments: path, type to quantize to, activations, each layer's types of cache."""
    from gguf_run.kernels_cpu.compiler import KernelCompiler

    path, quantize, activations, kinds = sys.argv[1:5]
    cache = [CacheType(*fields) for fields in json.loads(kinds)]
    with open_model(Path(path), quantize or None, activations) as file:
        _make_step(KernelCompiler(), file, ModelConfig.from_metadata(file.metadata, file.tensors), cache)


def _make_step(backend: "KernelCompiler", file: GGUFFile, config: ModelConfig, cache: Sequence[CacheType]) -> None:
    from gguf_run.models.decoder import Decoder

    try:
        Decoder(config, file.tensors, [backend] * config.n_layer, n_ctx=1, cache_types=cache)
    finally:
        backend.close()


if __name__ == "__main__":
    main()
