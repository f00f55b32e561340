"""Measures what many users see of the engine: gaps of a stream, shared prompts, the speed of several answers together.

    python benchmarks/streams.py MODEL [-t 2] [-p 4000] [--shared 2048] [-r 1]

"gap" is the longest time between two tokens of a running answer, before and while a prompt arrives. "first token" is
the newcomer's wait, and its ratio to the wait alone. "share" is the time to all first tokens of 8 prompts with a common
start, and its ratio to that of one. "together" is the tokens per second of n answers, and their ratio to one answer's.
"""

import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from gguf_run.runtime import Model, SamplingParams
from gguf_run.runtime.engine.reply import Request
from gguf_run.runtime.engine.sequence import Sequence


class _Streams:
    """Requests of random tokens, run step by step."""

    def __init__(self, model: Model) -> None:
        self.engine, self._rng = model.engine, np.random.default_rng(0)
        self._n_vocab = model.decoder.config.n_vocab

    def ids(self, n: int) -> list[int]:
        found: list[int] = self._rng.integers(0, self._n_vocab, n).tolist()
        return found

    def add(self, ids: list[int], max_tokens: int) -> Sequence:
        options: dict[str, Any] = {"temperature": 0.8, "seed": 1, "ignore_eos": True}
        return self.engine.add(Request(ids, SamplingParams(**options), max_tokens))

    def first(self, *sequences: Sequence) -> float:
        """Return the seconds until all have their first token."""
        start = time.perf_counter()
        while not all(sequence.job.n_chosen for sequence in sequences):
            self.engine.step()
        return time.perf_counter() - start

    def gaps(self, until: Sequence | None, n: int, stream: Sequence) -> list[float]:
        """Run n steps, or until a sequence has its first token; return the seconds between tokens of the stream."""
        found, last, n_tokens = [], time.perf_counter(), stream.job.n_chosen
        while n if until is None else not until.job.n_chosen:
            self.engine.step()
            n -= 1
            if stream.job.n_chosen > n_tokens:
                now = time.perf_counter()
                found.append(now - last)
                last, n_tokens = now, stream.job.n_chosen
        return found

    def reset(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            sequence.close()
        self.engine.step()
        self.engine.rows.forget()


def _arrival(streams: _Streams, n_prompt: int) -> None:
    prompt = streams.ids(n_prompt)
    alone = streams.add(prompt, 1)
    wait = streams.first(alone)
    streams.reset(alone)
    stream = streams.add(streams.ids(50), 3000)
    streams.first(stream)
    before = streams.gaps(None, 30, stream)
    newcomer, start = streams.add(prompt, 1), time.perf_counter()
    gaps = streams.gaps(newcomer, 0, stream)
    ratio = (time.perf_counter() - start) / wait
    click.echo(
        f"a prompt of {n_prompt} tokens arrives: gap {1000 * max(gaps):.0f} ms, median {1000 * np.median(gaps):.0f}, "
        f"before {1000 * max(before):.0f}; first token after {ratio * wait:.2f} s, alone {wait:.2f} s ({ratio:.2f} x)"
    )
    streams.reset(stream, newcomer)


def _shared(streams: _Streams, n_shared: int) -> None:
    start = streams.ids(n_shared)
    one = streams.add([*start, 5], 1)
    wait = streams.first(one)
    streams.reset(one)
    many = [streams.add([*start, 5 + i], 1) for i in range(8)]
    waits = streams.first(*many)
    click.echo(f"8 prompts share {n_shared} tokens: {waits:.2f} s, one {wait:.2f} s, ratio {waits / wait:.2f}")
    streams.reset(*many)


def _together(streams: _Streams, n_steps: int = 40) -> None:
    one = 0.0
    for n in (1, 8, 16):
        sequences = [streams.add(streams.ids(40), 500) for _ in range(n)]
        streams.first(*sequences)
        streams.gaps(None, 5, sequences[0])
        speed = n / float(np.mean(streams.gaps(None, n_steps, sequences[0])))
        one = one or speed
        click.echo(f"{n} answers together: {speed:.1f} tokens/s, {speed / one:.2f} x one")
        streams.reset(*sequences)


@click.command()
@click.argument("path", metavar="MODEL", type=click.Path(exists=True, path_type=Path))
@click.option("-p", "--prompt", default=4000, show_default=True, help="Tokens of the prompt that arrives; 0: none.")
@click.option("--shared", default=2048, show_default=True, help="Tokens that prompts share; 0: no such prompts.")
@click.option("-t", "--threads", default=2, show_default=True)
@click.option("-r", "--repeat", default=1, show_default=True, help="Rounds.")
def main(path: Path, prompt: int, shared: int, threads: int, repeat: int) -> None:
    """Measure MODEL."""
    with Model.load(path, n_ctx=8192, n_seq=16, n_threads=threads, device="cpu", cache_type="q8_0") as model:
        streams = _Streams(model)
        for _ in range(repeat):
            _together(streams)
            if shared:
                _shared(streams, shared)
            if prompt:
                _arrival(streams, prompt)


if __name__ == "__main__":
    main()
