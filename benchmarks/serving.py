"""Measures the engine with many sequences: alone, and in turns with llama.cpp's server.

    python benchmarks/serving.py MODEL one [--depth 8192]     Model.generate beside the bare decoder
    python benchmarks/serving.py MODEL gap [-s 1,3]           running streams while a prompt of 4,000 tokens arrives
    python benchmarks/serving.py MODEL shared [-s 8]          sequences that share a prompt of 2,048 tokens
    python benchmarks/serving.py MODEL decode [-s 8,16]       sequences that decode, beside one of them

--peer PYTHON: also llama.cpp's server, of the package xllamacpp of that Python. The server is a process of its own, and
this script is its client, by plain sockets. The engine runs in this process, as a thread, and asyncio reads it. Both
get the same ids, which are random, and sample as they do by default. A token counts when its event has come.
"""

import asyncio
import itertools
import json
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Protocol, cast

import click
import numpy as np

from gguf_run.runtime import Model
from gguf_run.runtime.engine.engine import Engine
from gguf_run.runtime.engine.reply import Reply, Request
from gguf_run.runtime.load.load_model import load_model
from gguf_run.runtime.load.options import LoadOptions
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.sampling.sampler import Sampler
from gguf_run.runtime.tokenizers.tokenizer import TokenStream

_PEER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, (params.n_parallel, n_ctx, n_threads) = sys.argv[1], map(int, sys.argv[2:5])
params.n_ctx = params.n_parallel * n_ctx
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
params.port, params.n_gpu_layers, params.fit_params = 0, 0, False
kinds = {"f16": xllamacpp.ggml_type.GGML_TYPE_F16, "q8_0": xllamacpp.ggml_type.GGML_TYPE_Q8_0}
params.cache_type_k = params.cache_type_v = kinds[sys.argv[5]]
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
_FIRST_IDS, _LAST_IDS = 1000, 40000  # random ids are between them: plain tokens of most models
_rng = np.random.default_rng(int(time.time()))  # other texts in each run: no cache knows them


class Source(Protocol):
    """What answers: the engine or a server."""

    name: str

    def stream(self, ids: Sequence[int], n: int) -> AsyncIterator[int]:
        """Yield the number of tokens of each event of an answer of n tokens. A dropped iterator ends the answer."""


class Ours:
    """The engine."""

    name = "gguf-run"

    def __init__(self, path: Path, options: LoadOptions) -> None:
        self._parts = load_model(path, options, None, lambda line: None)
        self.decoder = self._parts.decoder
        self.engine = Engine(self.decoder, self._reply, many=self._parts.many)
        self.engine.start()

    @staticmethod
    def _reply(request: Request) -> Reply:
        tokenizer: Any = SimpleNamespace(piece=lambda id, skip_special: b" a")  # each token is an event, as there
        return Reply(
            request.ids, Sampler(request.sampling), TokenStream(tokenizer, True), None, frozenset(), request.max_tokens
        )

    async def stream(self, ids: Sequence[int], n: int) -> AsyncIterator[int]:
        async for piece in self.engine.add(Request(ids, SamplingParams(seed=1), n)):
            yield len(piece.ids)

    def close(self) -> None:
        self.engine.close(self.decoder.close)
        for close in self._parts.close:
            close()


class Peer:
    """llama.cpp's server."""

    name = "llama.cpp"

    def __init__(self, python: str, path: Path, options: LoadOptions) -> None:
        sizes = [options.n_seq, cast(int, options.n_ctx), cast(int, options.n_threads)]
        command = [python, "-c", _PEER, str(path), *map(str, sizes), str(options.cache_type)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
        address = self._process.stdout.readline()
        if not address:
            raise click.ClickException(f"{python} cannot start llama.cpp's server: it needs the package xllamacpp")
        self.address = address.strip()
        self._host, self._port = self.address.removeprefix("http://").split(":")

    async def stream(self, ids: Sequence[int], n: int) -> AsyncIterator[int]:
        body = json.dumps({"prompt": list(ids), "n_predict": n, "stream": True, "ignore_eos": True, "seed": 1}).encode()
        head = f"POST /completion HTTP/1.1\r\nHost: {self._host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        reader, writer = await asyncio.open_connection(self._host, int(self._port))
        try:
            writer.write(head + body)
            n_seen = 0
            while n_seen < n and (line := await reader.readline()):
                if line.startswith(b"data: ") and (tokens := json.loads(line[6:])["tokens"]):
                    n_seen += len(tokens)
                    yield len(tokens)
        finally:
            writer.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def _random(n: int) -> list[int]:
    return _rng.integers(_FIRST_IDS, _LAST_IDS, n).tolist()


async def _times(source: Source, ids: Sequence[int], n: int, to: list[float]) -> list[float]:
    """Append to `to` the time at which each token of an answer comes."""
    async for n_tokens in source.stream(ids, n):
        to += [time.perf_counter()] * n_tokens
    return to


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def _first(source: Source, ids: Sequence[int]) -> float:
    """Return the seconds to the first token of an answer."""
    start = time.perf_counter()
    return (await _times(source, ids, 1, []))[0] - start


async def _gap(source: Source, n_streams: int, n_prompt: int) -> str:
    """Measure the gaps of streams while a prompt comes, and how long its first token takes."""
    alone = await _first(source, _random(n_prompt))
    times: list[list[float]] = [[] for _ in range(n_streams)]
    streams = [asyncio.create_task(_times(source, _random(32), 1000, to)) for to in times]
    await _until(lambda: all(len(to) > 16 for to in times))
    before = [b - a for to in times for a, b in itertools.pairwise(to)]
    start = time.perf_counter()
    first = await _first(source, _random(n_prompt))
    end, n_seen = start + first, [len(to) for to in times]
    await _until(lambda: all(len(to) > n for to, n in zip(times, n_seen, strict=True)))
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    gaps = [1000 * (b - a) for to in times for a, b in itertools.pairwise(to) if b > start and a < end]
    return (
        f"{n_streams} running, prompt of {n_prompt}: gap longest {max(gaps):.0f} ms, p95 {np.percentile(gaps, 95):.0f}"
        f" ms, median {median(gaps):.0f} ms (before: {1000 * median(before):.0f} ms); first token {first:.2f} s, alone"
        f" {alone:.2f} s, ratio {first / alone:.2f}"
    )


async def _shared(source: Source, n_seq: int, n_prompt: int) -> str:
    """Measure the time to all first tokens of sequences that share a prompt, and that of one sequence."""
    alone = await _first(source, _random(n_prompt) + _random(8))
    prompt, start = _random(n_prompt), time.perf_counter()
    firsts = await asyncio.gather(*(_times(source, prompt + _random(8), 1, []) for _ in range(n_seq)))
    all_of = max(to[0] for to in firsts) - start
    return (
        f"{n_seq} that share {n_prompt} tokens: all first tokens after {all_of:.2f} s, one alone {alone:.2f} s, "
        f"ratio {all_of / alone:.2f}"
    )


async def _decode_speed(source: Source, n_seq: int, n: int) -> float:
    """Return the tokens per second that sequences decode together, from the last first token on."""
    times: list[list[float]] = [[] for _ in range(n_seq)]
    await asyncio.gather(*(_times(source, _random(32), n + 4 * n_seq, to) for to in times))
    start, end = max(to[0] for to in times), min(to[-1] for to in times)
    return sum(start < at <= end for to in times for at in to) / (end - start)


def _bare_speed(ours: Ours, n_seq: int, n: int) -> float:
    """Return the tokens per second of the decoder alone."""
    decoder = ours.decoder
    rows = [dict(enumerate([id] for id in _random(n_seq))) for _ in range(n + 1)]
    with ours.engine.working():
        for seq in range(n_seq):
            decoder.cache.clear(seq)
            decoder.step({seq: _random(32)})
        decoder.step(rows.pop())
        start = time.perf_counter()
        for row in rows:
            decoder.step(row)
        return n * n_seq / (time.perf_counter() - start)


async def _decode(source: Source, numbers: Sequence[int], n: int, repeat: int) -> str:
    """Measure some sequences that decode beside one, in turns."""
    found: dict[str, list[float]] = {}
    for _ in range(repeat):
        for n_seq in (1, *numbers):
            found.setdefault(f"{n_seq}", []).append(await _decode_speed(source, n_seq, n))
            if isinstance(source, Ours):
                found.setdefault(f"{n_seq} bare", []).append(_bare_speed(source, n_seq, n))
    return "decode, tokens/s: " + ", ".join(
        f"{name}: {median(speeds):.1f}"
        + (f" (x {median(s / o for s, o in zip(speeds, found[one], strict=True)):.2f})" if name != one else "")
        for name, speeds in found.items()
        for one in ["1 bare" if name.endswith("bare") else "1"]
    )


def _one(path: Path, options: LoadOptions, depth: int, n_prompt: int, n: int, repeat: int) -> None:
    """Print the speed of Model.generate beside that of the decoder, in turns."""
    with Model.load(path, options) as model:
        decoder, past = model.decoder, _random(depth)

        def bare(ids: list[int]) -> tuple[float, float]:
            decoder.rewind(min(depth, decoder.n_past))
            marks = [time.perf_counter()]
            for part in (ids, *([id] for id in _random(n))):
                for _ in decoder.forward(part):
                    pass
                marks.append(time.perf_counter())
            return marks[1] - marks[0], marks[-1] - marks[1]

        def engine(ids: list[int]) -> tuple[float, float]:
            model.complete(past + ids, max_tokens=n + 1, ignore_eos=True)
            if model.stats.n_prompt - model.stats.n_reused != n_prompt:
                raise click.ClickException(f"{model.stats.n_reused} tokens were reused instead of {depth}")
            return model.stats.prefill_s, model.stats.decode_s

        if depth:
            model.complete(past, max_tokens=1)
        rounds = [(bare(_random(n_prompt)), engine(_random(n_prompt))) for _ in range(repeat + 1)][1:]
    for i, (kind, n_tokens) in enumerate([("prefill", n_prompt), ("decode", n)]):
        ratios = sorted(without[i] / with_it[i] for without, with_it in rounds)
        speeds = [n_tokens / median(pair[j][i] for pair in rounds) for j in (0, 1)]
        click.echo(
            f"{kind} at depth {depth}, tokens/s: decoder {speeds[0]:.1f}, Model.generate {speeds[1]:.1f}, ratio "
            f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


@click.command()
@click.argument("path", metavar="MODEL", type=click.Path(exists=True, path_type=Path))
@click.argument("test", type=click.Choice(["one", "gap", "shared", "decode"]))
@click.option("-s", "--sequences", default="", help="Numbers of sequences.  [default: 1,3; 8; 8,16]")
@click.option("-p", "--prompt", default=0, help="Tokens of the prompt.  [default: 512, 4000, 2048]")
@click.option("-n", "--tokens", default=48, show_default=True, help="Tokens that are decoded.")
@click.option("--depth", default=0, show_default=True, help="Tokens in the context before.")
@click.option("-r", "--repeat", default=1, show_default=True, help="Rounds.")
@click.option("-t", "--threads", default=2, show_default=True)
@click.option("-ct", "--cache-type", default="f16", show_default=True, type=click.Choice(["f16", "q8_0"]))
@click.option("--peer", default="", help="A Python with xllamacpp.")
@click.option("--ours/--no-ours", default=True, help="Measure gguf-run.")
def main(
    path: Path, test: str, sequences: str, prompt: int, tokens: int, depth: int, repeat: int, threads: int,
    cache_type: str, peer: str, ours: bool,
) -> None:  # fmt: skip
    """Measure MODEL."""
    numbers = [
        int(part) for part in (sequences or {"gap": "1,3", "shared": "8", "decode": "8,16"}.get(test, "1")).split(",")
    ]
    n_prompt = prompt or {"gap": 4000, "shared": 2048}.get(test, 512)
    n_more = {"one": depth, "gap": 1064, "shared": 72, "decode": 64 + 4 * max(numbers)}[test]
    options = LoadOptions(
        n_ctx=-(-(n_more + n_prompt + tokens + 8) // 256) * 256, n_threads=threads, cache_type=cache_type, device="cpu",
        n_seq=max(numbers) + (test == "gap"),
    )  # fmt: skip
    if test == "one":
        return _one(path, options, depth, n_prompt, tokens, repeat)
    makers: list[Callable[[], Ours | Peer]] = [lambda: Ours(path, options)] if ours else []
    sources = [make() for make in [*makers, *([lambda: Peer(peer, path, options)] if peer else [])]]
    tests: dict[str, Callable[[Source, int], Coroutine[Any, Any, str]]] = {
        "gap": lambda source, n_seq: _gap(source, n_seq, n_prompt),
        "shared": lambda source, n_seq: _shared(source, n_seq, n_prompt),
        "decode": lambda source, _: _decode(source, numbers, tokens, repeat),
    }
    for n_seq in numbers[: 1 if test == "decode" else None]:
        for _ in range(1 if test == "decode" else repeat):
            for source in sources:
                click.echo(f"{source.name}: {asyncio.run(tests[test](source, n_seq))}")
    for source in sources:
        source.close()


if __name__ == "__main__":
    main()
