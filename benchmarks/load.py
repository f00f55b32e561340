"""Compares the time to load a model with the time to read its file once.

    python benchmarks/load.py MODEL [-t 2] [-r 3] [--cold]

Read: the whole file once, front to back, into one small buffer. Load: Model.load in this process, after the kernels are
compiled. Both run in turns with the file in the page cache. --cold repeats both without the page cache (Linux).
"""

import os
import time
from pathlib import Path
from statistics import median

import click

from gguf_run.runtime import Model


def drop(path: Path) -> None:
    """Drop the file's pages from the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> float:
    buffer = memoryview(bytearray(4 << 20))
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def load(path: Path, n_threads: int) -> float:
    start = time.perf_counter()
    with Model.load(path, n_ctx=512, n_threads=n_threads):
        return time.perf_counter() - start


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("-t", "--threads", default=2, show_default=True)
@click.option("-r", "--repeat", default=3, show_default=True, type=click.IntRange(1))
@click.option("--cold", is_flag=True, help="Also with the file dropped from the page cache.")
def main(model: Path, threads: int, repeat: int, cold: bool) -> None:
    """Compare Model.load with reading the file."""
    load(model, threads)  # compiles
    for name in ("cached", "dropped") if cold else ("cached",):
        seconds: dict[str, list[float]] = {"read": [], "load": []}
        for _ in range(repeat):
            for what, times in seconds.items():
                if name == "dropped":
                    drop(model)
                times.append(read(model) if what == "read" else load(model, threads))
        reading, loading = median(seconds["read"]), median(seconds["load"])
        print(f"{model.name}, {name}: read {reading:.2f} s, load {loading:.2f} s = {loading / reading:.2f} x")


if __name__ == "__main__":
    main()
