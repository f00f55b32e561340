"""Compares the time to load a model with the time to read its file once.

    python benchmarks/load.py MODEL [-t 2] [-r 3] [--cold]

Read: the whole file once, front to back, into one small buffer. Touch: as much new memory is written once, by as many
threads: no load that repacks can do without. Load: Model.load in this process, after the kernels are compiled. All run
in turns with the file in the page cache. --cold repeats them without the page cache (Linux).
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import click
import numpy as np

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


def touch(path: Path, n_threads: int) -> float:
    start = time.perf_counter()
    memory = np.empty(path.stat().st_size, np.uint8)
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(lambda part: part.fill(0), (part[::4096] for part in np.array_split(memory, n_threads))))
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
        runs = {
            "read": lambda: read(model),
            "touch": lambda: touch(model, threads),
            "load": lambda: load(model, threads),
        }
        seconds: dict[str, list[float]] = {what: [] for what in runs}
        for _ in range(repeat):
            for what, run in runs.items():
                if name == "dropped":
                    drop(model)
                seconds[what].append(run())
        reading, touching, loading = (median(times) for times in seconds.values())
        print(
            f"{model.name}, {name}: read {reading:.2f} s, touch {touching:.2f} s, load {loading:.2f} s: "
            f"{loading / reading:.2f} x read, {loading / (reading + touching):.2f} x read and touch"
        )


if __name__ == "__main__":
    main()
