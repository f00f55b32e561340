"""Compares decoding over pages side by side with decoding over pages in random order, in turns, at some depths.

python benchmarks/pages.py MODEL [-d 1024 -d 8192] [-n 32] [-t 2] [-r 7] [-ct f16]
"""

import random
import time
from pathlib import Path
from statistics import median

import click
import numpy as np

from gguf_run.runtime import Model


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("-d", "depths", type=int, multiple=True, default=(1024, 8192), help="tokens in the context before")
@click.option("-n", "n_gen", default=32, help="tokens of a round")
@click.option("-t", "n_threads", default=2)
@click.option("-r", "repeat", default=7, help="rounds")
@click.option("-ct", "cache_type", default="f16")
def main(model: Path, depths: tuple[int, ...], n_gen: int, n_threads: int, repeat: int, cache_type: str) -> None:
    n_ctx = max(depths) + n_gen + 1
    options = {"n_ctx": n_ctx, "n_seq": 2, "n_threads": n_threads, "device": "cpu", "cache_type": cache_type}
    with Model.load(model, **options) as loaded:  # type: ignore[arg-type]
        decoder, rng = loaded.decoder, np.random.default_rng(0)
        for depth in depths:
            for seq in (0, 1):  # the second one finds free pages in random order
                if seq:
                    for pool in decoder.cache.pools:
                        pages = list(pool.free)
                        random.Random(0).shuffle(pages)
                        pool.free.clear()
                        pool.free.update(dict.fromkeys(pages))
                ids = rng.integers(0, decoder.config.n_vocab, depth).tolist()
                for i in range(0, depth, decoder.n_batch):
                    decoder.step({seq: ids[i : i + decoder.n_batch]}, {seq: 0})
            times: tuple[list[float], list[float]] = ([], [])
            for i in range(repeat):
                for seq in (0, 1) if i % 2 else (1, 0):
                    start = time.perf_counter()
                    for _ in range(n_gen):
                        decoder.step({seq: [1]})
                    times[seq].append((time.perf_counter() - start) / n_gen)
                    decoder.rewind(depth, seq)
            print(
                f"depth {depth}: {1000 * median(times[0]):.2f} ms a token side by side, "
                f"{1000 * median(times[1]):.2f} in random order: {median(times[1]) / median(times[0]):.3f} x"
            )
            for seq in (0, 1):
                decoder.cache.clear(seq, root=depth)


if __name__ == "__main__":
    main()
