"""Speed against llama.cpp, paired: both stay loaded, each in a process of its own, and take turns (A B A B ...).

Like llama-bench: `pp N` is one prefill of N random tokens, `tg N` is N random tokens one by one, both into an empty
context or behind --depth tokens. Speeds and "ratio" are medians over the rounds, "range" is that of the ratio of single
rounds, and "best" compares the fastest round of each, which the noise of a busy machine moves least.

    python benchmarks/vs_llamacpp.py MODEL... [-t 1,2] [-p 512] [-n 128] [-d 0] [-r 5] [--cpu auto|haswell|...]
"""

import json
import subprocess
import sys
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from engine import Engine, Ours
from peer import Peer


@dataclass(frozen=True)
class Test:
    """kind: "pp" or "tg", see above."""

    kind: str
    n: int
    depth: int

    def __str__(self) -> str:
        return f"{self.kind}{self.n}" + (f" @ {self.depth}" if self.depth else "")


def measure(engine: Engine, test: Test, seed: int) -> float:
    """Return the seconds of one test."""
    ids = np.random.default_rng(seed).integers(0, engine.n_vocab, test.depth + test.n).tolist()
    before, ids = ids[: test.depth], ids[test.depth :]
    engine.clear()
    if before:
        consume(engine, before)
    start = time.perf_counter()
    for part in [ids] if test.kind == "pp" else [[id] for id in ids]:
        consume(engine, part)
    return time.perf_counter() - start


def consume(engine: Engine, ids: list[int]) -> None:
    """Append ids and have the logits of the last one computed."""
    for _ in engine.forward(ids):
        pass


def serve(name: str, model: Path, n_threads: int, n_ctx: int, cpu: str) -> None:
    """The worker: answers each line [kind, n, depth, seed] of stdin with one of JSON on stdout.

    "idle" is the processor time used since the last answer, per second: it would disturb the other one's turn.
    """
    engine: Engine = Peer(model, n_threads, n_ctx, cpu=cpu) if name == "peer" else Ours(model, n_threads, n_ctx)
    print(json.dumps({"cpu": engine.cpu}), flush=True)
    engine.rest()
    wall, used = time.perf_counter(), time.process_time()
    for line in sys.stdin:
        idle = (time.process_time() - used) / (time.perf_counter() - wall)
        *test, seed = json.loads(line)
        seconds = measure(engine, Test(*test), seed)
        engine.rest()
        wall, used = time.perf_counter(), time.process_time()
        print(json.dumps({"seconds": seconds, "idle": idle}), flush=True)


class Worker:
    """A runtime in a process of its own, with a model loaded."""

    def __init__(self, name: str, model: Path, n_threads: int, n_ctx: int, cpu: str) -> None:
        command = [sys.executable, __file__, "--worker", name, "-t", str(n_threads), "--cpu", cpu]
        self._process = subprocess.Popen(
            [*command, "--ctx-size", str(n_ctx), str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.name = name
        self.cpu: str = self._reply()["cpu"]

    def seconds(self, test: Test, seed: int) -> float:
        """Run one test there."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([*astuple(test), seed]) + "\n")
        self._process.stdin.flush()
        reply = self._reply()
        if reply["idle"] > 0.1:
            print(f"warning: {self.name} used {reply['idle']:.0%} of a core while the other ran", file=sys.stderr)
        return float(reply["seconds"])

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker of {self.name} ended with status {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def _numbers(context: click.Context, option: click.Parameter, value: str) -> list[int]:
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} must be numbers with commas between them") from None


def compare(test: Test, pair: list[Worker], repeat: int) -> str:
    """Run a test in turns; return the last five columns of the table."""
    rounds = [[worker.seconds(test, seed) for worker in pair] for seed in range(repeat + 1)][1:]  # the first warms up
    peer, ours = zip(*rounds, strict=True)
    ratios = [theirs / mine for theirs, mine in rounds]
    speeds = f"{test.n / median(peer):.1f} | {test.n / median(ours):.1f} | {median(peer) / median(ours):.2f}"
    return f"{speeds} | {min(ratios):.2f} to {max(ratios):.2f} | {min(peer) / min(ours):.2f}"


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("-t", "--threads", default="2", show_default=True, callback=_numbers, help="Numbers of threads.")
@click.option("-p", "--prefill", default="512", show_default=True, callback=_numbers, help="Lengths of pp; 0: none.")
@click.option("-n", "--decode", default="128", show_default=True, callback=_numbers, help="Lengths of tg; 0: none.")
@click.option("-d", "--depth", default="0", show_default=True, callback=_numbers, help="Tokens in the context before.")
@click.option("-r", "--repeat", default=5, show_default=True, type=click.IntRange(1), help="Pairs per test.")
@click.option("--cpu", default="auto", show_default=True, help="llama.cpp's CPU library, e.g. haswell.")
@click.option("--worker", hidden=True)
@click.option("--ctx-size", default=0, hidden=True)
def main(
    models: tuple[Path, ...],
    threads: list[int],
    prefill: list[int],
    decode: list[int],
    depth: list[int],
    repeat: int,
    cpu: str,
    worker: str | None,
    ctx_size: int,
) -> None:
    """Print a table of speeds in tokens per second, llama.cpp's and ours."""
    if worker:
        serve(worker, models[0], threads[0], ctx_size, cpu)
        return
    lengths = [("pp", n) for n in prefill if n] + [("tg", n) for n in decode if n]
    tests = [Test(kind, n, d) for d in depth for kind, n in lengths]
    n_ctx = -(-max(test.n + test.depth for test in tests) // 256) * 256
    print("| model | threads | test | llama.cpp t/s | gguf-run t/s | ratio | range | best |")
    print("|---" * 8 + "|")
    for model in models:
        for n_threads in threads:
            pair = [Worker(name, model, n_threads, n_ctx, cpu) for name in ("peer", "ours")]
            for test in tests:
                print(f"| {model.stem} | {n_threads} | {test} | {compare(test, pair, repeat)} |", flush=True)
            for process in pair:
                process.close()
    print(f"\nllama.cpp's CPU library: {pair[0].cpu}, gguf-run's kernels: {pair[1].cpu}")


if __name__ == "__main__":
    main()
