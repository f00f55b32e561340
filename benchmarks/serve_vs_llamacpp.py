"""Compares gguf-serve with llama.cpp's server, in turns, and with gguf-run's own engine in one process.

    python benchmarks/serve_vs_llamacpp.py MODEL --peer PYTHON            # all tests; PYTHON has the package xllamacpp
    python benchmarks/serve_vs_llamacpp.py MODEL --peer PYTHON gap shared # some of them
    python benchmarks/serve_vs_llamacpp.py MODEL engine                   # needs no peer

Both servers stay loaded with the same file, slots, positions, threads and cache type. `gguf-bench serve` measures them,
from a process of its own on the same machine. xllamacpp is built for AVX2: so are our kernels, unless --native. In
"engine" the same texts go to gguf-serve and to Model.engine, which a process without HTTP holds.
"""

import asyncio
import http.client
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import click
from isa_features import environment
from serving import Peer

from gguf_run.runtime import Model
from gguf_run.runtime.bench.serving import Question, Server, measure, questions
from gguf_run.runtime.bench.stream import Record
from gguf_run.runtime.engine.reply import Request
from gguf_run.runtime.load.options import LoadOptions

_TOOL = "import sys; from gguf_run.runtime.cli import start; sys.argv[0] = 'gguf'; getattr(start, sys.argv.pop(1))()"
_LOADING_S = 600.0  # that a server may take to load, and to compile its kernels


@dataclass(frozen=True)
class Test:
    """What clients ask of both servers, and the figure that counts."""

    about: str
    workload: str
    n_clients: int
    n_prompt: int
    n_output: int
    n_requests: int
    figure: str  # a field of the JSON of `gguf-bench serve`
    goal: str  # for the ratio of gguf-serve to llama.cpp
    n_slots: int
    n_ctx: int  # positions of each slot


TESTS = {
    "tokens": Test(
        "8 clients: output tokens/s", "fixed", 8, 256, 128, 16, "output_throughput", "at least 2", 8, 512
    ),
    "gap": Test(
        "longest gap of a stream while 4,000 tokens arrive, ms", "intruder", 1, 4000, 1000, 1, "max_itl_during_ms",
        "160 ms at most", 2, 5120,
    ),
    "shared": Test(
        "16 clients that share 1,000 tokens: p95 of the time to the first token, ms", "shared", 16, 1000, 64, 32,
        "p95_ttft_ms", "at most 0.5", 16, 1280,
    ),
}  # fmt: skip
_ENGINE_CLIENTS, _ENGINE_PROMPT, _ENGINE_OUTPUT = (1, 4, 16), 64, 128


def _options(path: Path, n_slots: int, n_ctx: int, n_threads: int, cache_type: str) -> LoadOptions:
    return LoadOptions(n_ctx=n_ctx, n_threads=n_threads, cache_type=cache_type, device="cpu", n_seq=n_slots)


@contextmanager
def _serving(path: Path, options: LoadOptions) -> Iterator[str]:
    """Run gguf-serve; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"port": port, "parallel": options.n_seq, "ctx-size": options.n_ctx, "threads": options.n_threads}
    values |= {"cache-type": options.cache_type, "device": "cpu"}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen([sys.executable, "-c", _TOOL, "serve", str(path), *words], stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _wait(address: str) -> None:
    """Wait until a server has answered."""
    body, end = json.dumps({"model": "m", "prompt": "a", "max_tokens": 1}), time.monotonic() + _LOADING_S
    while time.monotonic() < end:
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=_LOADING_S)
        try:
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.5)
    raise click.ClickException(f"{address} does not answer")


def _bench(address: str, test: Test, n_output: int, n_requests: int) -> Mapping[str, Any]:
    """Return the figures of `gguf-bench serve`."""
    with tempfile.TemporaryDirectory() as folder:
        values = {"workload": test.workload, "clients": test.n_clients, "prompt-tokens": test.n_prompt}
        values |= {"output-tokens": n_output, "requests": n_requests, "api": "completions", "model": "m"}
        words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-c", _TOOL, "bench", "serve", address, *words, "--json", f"{folder}/a.json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(f"{address}: {done.stderr.strip()}")
        result: dict[str, Any] = json.loads(Path(folder, "a.json").read_text())["results"][0]
    if result.get("failed"):
        raise click.ClickException(f"{address}: {result['failed']} answers failed")
    return result


def _compare(test: Test, ours: str, peer: str, repeat: int) -> str:
    """Measure both servers in turns; return a row of the table."""
    warm = min(test.n_output, 64)
    found: dict[str, list[float]] = {ours: [], peer: []}
    for address in found:
        _wait(address)
        if test.workload != "intruder":
            _bench(address, test, warm, test.n_clients)
    for _ in range(repeat):
        for address, values in found.items():
            values.append(float(_bench(address, test, test.n_output, test.n_requests)[test.figure]))
    return _row(test.about, found[ours], found[peer], test.goal)


def _row(about: str, ours: Sequence[float], other: Sequence[float], goal: str) -> str:
    ratios = sorted(a / b for a, b in zip(ours, other, strict=True))
    span = f" ({ratios[0]:.3f} to {ratios[-1]:.3f})" if len(ratios) > 1 else ""
    return f"| {about} | {median(ours):.1f} | {median(other):.1f} | {median(ratios):.3f}{span} | {goal} |"


class _InProcess:
    """The engine, asked as a server is. It lives in a process of its own, as `_held`."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, path: Path, options: LoadOptions) -> None:
        sys.setswitchinterval(0.0002)  # as gguf-serve does
        self.model = Model.load(path, options)
        self.model.engine.start()

    async def ask(self, question: Question, record: Record) -> None:
        """Answer a question, and fill in the record."""
        record.sent = self.clock()
        options = {"max_tokens": question.n_output, "ignore_eos": True}
        async for piece in self.model.engine.add(Request.of(self.model.prompt_ids(question.own), options)):
            record.parts.append(self.clock())
            record.n_output += len(piece.ids)


_held: list[_InProcess] = []


def _hold(path: Path, options: LoadOptions) -> None:
    _held.append(_InProcess(path, options))


def _engine_speed(asked: Sequence[Question], n_clients: int) -> float:
    """Return output tokens per second of the engine."""
    server = cast(Server, _held[0])
    return asyncio.run(measure(server, asked, n_clients=n_clients)).totals["output_throughput"]


def _engine(path: Path, options: LoadOptions, repeat: int) -> Iterator[str]:
    """Measure gguf-serve and the engine in turns; yield rows."""
    context = multiprocessing.get_context("spawn")
    with (
        _serving(path, options) as address,
        ProcessPoolExecutor(1, context, initializer=_hold, initargs=(path, options)) as pool,
    ):
        _wait(address)
        for n_clients in _ENGINE_CLIENTS:
            n = 3 * n_clients
            test = Test("", "fixed", n_clients, _ENGINE_PROMPT, _ENGINE_OUTPUT, n, "output_throughput", "", 0, 0)

            def served(n_output: int, test: Test = test) -> float:
                return float(_bench(address, test, n_output, test.n_requests)[test.figure])

            def bare(n_output: int, test: Test = test) -> float:
                asked = questions("fixed", test.n_requests, test.n_prompt, n_output, 0)
                return pool.submit(_engine_speed, asked, test.n_clients).result()

            turns = (served, bare)
            for turn in turns:
                turn(16)
            speeds = [[turn(_ENGINE_OUTPUT) for turn in turns] for _ in range(repeat)]
            ours, engine = ([pair[i] for pair in speeds] for i in (0, 1))
            yield _row(f"clients: {n_clients}, output tokens/s", ours, engine, "at least 0.95")


@click.command()
@click.argument("path", metavar="MODEL", type=click.Path(exists=True, path_type=Path))
@click.argument("tests", metavar="[TEST]...", nargs=-1, type=click.Choice([*TESTS, "engine"]))
@click.option("--peer", default="", help="A Python with the package xllamacpp.")
@click.option("--native", is_flag=True, help="Let our kernels use all instructions of this machine.")
@click.option("-r", "--repeat", default=1, show_default=True, type=click.IntRange(1), help="Rounds.")
@click.option("-t", "--threads", default=2, show_default=True)
@click.option("-ct", "--cache-type", default="f16", show_default=True, type=click.Choice(["f16", "q8_0"]))
def main(
    path: Path, tests: tuple[str, ...], peer: str, native: bool, repeat: int, threads: int, cache_type: str
) -> None:
    """Print a table for MODEL."""
    chosen = tests or ((*TESTS, "engine") if peer else ("engine",))
    if not peer and {*chosen} & {*TESTS}:
        raise click.UsageError(f"{', '.join(TESTS)} need --peer")
    if not native:
        os.environ.update(environment("AVX2"))  # of all processes that this one starts
    kernels = "all instructions of this machine" if native else "AVX2, as llama.cpp's"
    click.echo(
        f"{path.stem}, {threads} threads, cache {cache_type}, kernels of gguf-run: {kernels}. Clients on the same"
    )
    click.echo(f"machine; medians of {repeat} rounds in turns.\n")
    click.echo("| what | gguf-serve | llama.cpp, or the engine | ratio | goal |\n|---|---|---|---|---|")
    for name in chosen:
        if name == "engine":
            options = _options(path, max(_ENGINE_CLIENTS), 512, threads, cache_type)
            for row in _engine(path, options, repeat):
                click.echo(row)
            continue
        test = TESTS[name]
        options = _options(path, test.n_slots, test.n_ctx, threads, cache_type)
        other = Peer(peer, path, options)
        try:
            with _serving(path, options) as ours:
                click.echo(_compare(test, ours, other.address, repeat))
        finally:
            other.close()


if __name__ == "__main__":
    main()
