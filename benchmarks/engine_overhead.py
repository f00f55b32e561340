"""Measures the Python between two steps: an engine over a decoder that takes no time, answers of one token a step.

    python benchmarks/engine_overhead.py [-n 1,16,64] [-r 300] [--profile]

"engine" is all Python of a step without sampling and decoder, in microseconds; "pages" is what the real cache takes.
"""

import cProfile
import pstats
import time
from collections.abc import Mapping, Sequence
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import click
import numpy as np
from numpy.typing import NDArray

from gguf_run.models.backend import Results
from gguf_run.models.decoder import Decoder
from gguf_run.models.kv_cache import CacheLayer, KvCache
from gguf_run.models.pages import PageTable
from gguf_run.runtime.engine.engine import Engine
from gguf_run.runtime.engine.reply import Reply, Request
from gguf_run.runtime.sampling.many import ManySampler, Row
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.sampling.sampler import Sampler
from gguf_run.runtime.tokenizers.tokenizer import TokenStream

N_VOCAB = 1000


class _Decoder:
    """Runs nothing; only the pages are counted. `seconds` is what its own Python takes."""

    def __init__(self, n_seq: int, n_ctx: int) -> None:
        tables = [PageTable.new(0, n_ctx, 512, n_seq)]
        layers: list[CacheLayer[Any, Any]] = [CacheLayer(None, 0, None)]
        self.cache, self.n_ctx, self.n_batch = KvCache(layers, tables, n_ctx), n_ctx, 512
        self.config, self.adapters, self.seconds, self.n_top = SimpleNamespace(n_vocab=N_VOCAB), None, 0.0, 0
        self._logits = np.zeros((n_seq, N_VOCAB), np.float32)
        self._logits[:, 7] = 1

    def top(self, batch: Mapping[int, Sequence[int]], rows: Mapping[int, int], tops: Sequence[None]) -> Results:
        start = time.perf_counter()
        runs = self.cache.begin({seq: len(ids) for seq, ids in batch.items()})
        self.cache.end(runs, [id for ids in batch.values() for id in ids])
        self.seconds += time.perf_counter() - start
        return Results(self._logits[: sum(rows.values())])


class _Many:
    """Chooses token 7 for all."""

    def sample(self, rows: Sequence[Row], logits: NDArray[np.float32]) -> list[int]:
        return [7] * len(rows)


class _Tokenizer:
    def piece(self, id: int, *, skip_special: bool) -> bytes:
        return b" the"


def _reply(request: Request) -> Reply:
    stream = TokenStream(cast(Any, _Tokenizer()), True)
    return Reply(request.ids, Sampler(request.sampling), stream, None, frozenset([0]), request.max_tokens)


def _measure(n_seq: int, repeat: int, profile: bool) -> tuple[float, float]:
    """Return microseconds of a step's Python: of the engine, and of the cache's pages in the decoder."""
    decoder = _Decoder(n_seq, repeat + 600)
    engine = Engine(cast(Decoder, decoder), _reply, many=lambda: cast(ManySampler, _Many()))
    held = [engine.add(Request([i, 1, 2], SamplingParams(temperature=0), repeat + 500)) for i in range(n_seq)]
    for _ in range(100):
        engine.step()
    times, pages = [], []
    profiler = cProfile.Profile()
    for _ in range(repeat):
        decoder.seconds, start = 0.0, time.perf_counter()
        if profile:
            profiler.runcall(engine.step)
        else:
            engine.step()
        times.append(1e6 * (time.perf_counter() - start - decoder.seconds))
        pages.append(1e6 * decoder.seconds)
        for sequence in held:
            sequence.job.pieces.clear()
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    return median(times), median(pages)


@click.command()
@click.option("-n", "--sequences", default="1,16,64", show_default=True)
@click.option("-r", "--repeat", default=300, show_default=True, help="Steps.")
@click.option("--profile", is_flag=True, help="Show where the time goes.")
def main(sequences: str, repeat: int, profile: bool) -> None:
    """Print microseconds per step."""
    for n_seq in map(int, sequences.split(",")):
        engine, pages = _measure(n_seq, repeat, profile)
        click.echo(f"{n_seq} sequences: engine {engine:.0f} us, pages in the decoder {pages:.0f} us a step")


if __name__ == "__main__":
    main()
