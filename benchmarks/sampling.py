"""Times the sampling of 1, 8 and 64 rows together, in milliseconds for all rows.

    python benchmarks/sampling.py [--threads 2] [--n-vocab 262144]

Logits fall with the logarithm of a token's rank, as those of language models do. `flat` are normally distributed: some
thousand tokens are likely, which is the hardest case of top-p. `python` is what Python spends on 64 rows of 64 tokens.
"""

import time
from collections.abc import Sequence

import click
import numpy as np
from numpy.typing import NDArray

from gguf_run.kernels_cpu.replay.team import Team
from gguf_run.runtime.sampling.many import ManySampler, Row
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.sampling.sampler import Sampler

OFF = SamplingParams(top_k=0, top_p=1.0, min_p=0.0, temperature=1.0)
OPTIONS = {
    "default": SamplingParams(),
    "greedy": SamplingParams(temperature=0),
    "top_p": SamplingParams(top_k=0, min_p=0.0, temperature=1.0),
    "no filter": OFF,
    "penalties": SamplingParams(repeat_penalty=1.1),
    "logprobs": SamplingParams(logprobs=5),
    "mask": SamplingParams(),
}


def milliseconds(many: ManySampler, rows: Sequence[Row], logits: NDArray[np.float32]) -> float:
    """Return the median of several calls."""
    times = []
    for _ in range(12):
        start = time.perf_counter()
        many.sample(rows, logits)
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times[2:]))


def made_rows(params: SamplingParams, n: int, n_vocab: int, is_masked: bool) -> list[Row]:
    """Return rows whose texts have 100 tokens."""
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2**32, (n_vocab + 31) // 32, np.uint32) if is_masked else None
    rows = [Row(Sampler(params), mask=mask) for _ in range(n)]
    for row in rows:
        row.sampler.accept(rng.integers(0, n_vocab, 100).tolist())
    return rows


@click.command()
@click.option("--threads", default=2, show_default=True)
@click.option("--n-vocab", "sizes", multiple=True, type=int, default=(32_000, 128_256, 262_144), show_default=True)
def main(threads: int, sizes: Sequence[int]) -> None:
    """Print a table."""
    team, rng = Team(threads), np.random.default_rng(0)
    small = np.zeros((64, 64), np.float32)
    rows = made_rows(OPTIONS["default"], 64, 64, False)
    print(f"python: {milliseconds(ManySampler(team, 64), rows, small):.3f} ms")
    for n_vocab in sizes:
        many, ranks = ManySampler(team, n_vocab), np.arange(1, n_vocab + 1)
        falling = np.stack([rng.permutation(-1.5 * np.log(ranks)) for _ in range(64)]).astype(np.float32)
        flat = rng.standard_normal((64, n_vocab), np.float32) * np.float32(2.5)
        for name, params in [*OPTIONS.items(), ("flat, top_p", OPTIONS["top_p"])]:
            logits = flat if name.startswith("flat") else falling
            rows = made_rows(params, 64, n_vocab, name == "mask")
            times = [milliseconds(many, rows[:n], logits[:n]) for n in (1, 8, 64)]
            print(f"{n_vocab:>8} {name:<12}" + "".join(f" {ms:>8.2f}" for ms in times))


if __name__ == "__main__":
    main()
