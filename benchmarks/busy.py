"""Compares decode speed on an idle machine with that while another process holds one core, for llama.cpp and for us.

    python benchmarks/busy.py MODEL... [-t 2] [-n 64] [-r 5] [--unpinned]

Each round measures both runtimes on the idle machine, then both on the busy one. The other process computes without
touching memory. It stays on one core (unless --unpinned), so that the system cannot move it out of the way. "kept" is
the median speed on the busy machine divided by that on the idle one.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import click
from pair import Test, Worker


@contextmanager
def held_core(pinned: bool) -> Iterator[None]:
    """Let another process compute without a pause."""
    core = max(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        if pinned:
            os.sched_setaffinity(process.pid, {core})
        try:
            time.sleep(0.2)
            yield
        finally:
            process.kill()


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("-t", "--threads", "n_threads", default=2, show_default=True, type=click.IntRange(1))
@click.option("-n", "--decode", default=64, show_default=True, type=click.IntRange(1), help="Tokens of a run.")
@click.option("-r", "--repeat", default=5, show_default=True, type=click.IntRange(1), help="Rounds.")
@click.option("--unpinned", is_flag=True, help="Leave it to the system on which core the other process runs.")
def main(models: tuple[Path, ...], n_threads: int, decode: int, repeat: int, unpinned: bool) -> None:
    """Print a table of decode speeds in tokens per second."""
    print("| model | runtime | idle | busy | kept | worst round |\n" + "|---" * 6 + "|")
    test = Test("tg", decode)
    n_ctx = -(-decode // 256) * 256
    for model in models:
        with Worker("peer", model, n_threads, n_ctx) as peer, Worker("ours", model, n_threads, n_ctx) as ours:
            pair = (peer, ours)
            speeds: dict[str, list[tuple[float, float]]] = {peer.name: [], ours.name: []}
            for seed in range(repeat + 1):
                idle = [decode / worker.seconds(test, seed) for worker in pair]
                with held_core(pinned=not unpinned):
                    busy = [decode / worker.seconds(test, seed) for worker in pair]
                if seed:  # the first warms up
                    for worker, *both in zip(pair, idle, busy, strict=True):
                        speeds[worker.name].append((both[0], both[1]))
        for name, found in speeds.items():
            idle, busy = ([each[i] for each in found] for i in (0, 1))
            kept, worst = median(busy) / median(idle), min(b / a for a, b in found)
            label = "llama.cpp" if name == "peer" else "gguf-run"
            print(f"| {model.stem} | {label} | {median(idle):.1f} | {median(busy):.1f} | {kept:.0%} | {worst:.0%} |")


if __name__ == "__main__":
    main()
