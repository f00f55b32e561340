"""Paired measurement: two runtimes stay loaded, each in a process of its own, and take turns (A B A B ...).

As in llama-bench, `pp N` is one prefill of N random tokens, and `tg N` is N random tokens one by one. Both begin in an
empty context, or after `depth` tokens, which are computed once for all tests of that depth.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
from engine import Engine, Ours
from peer import Peer

from gguf_run.kernels_cpu.measure.limits import Limits, measure_limits

_WARM_TOKENS = 64  # of the run before the first one that counts
_LIMIT_SECONDS = 0.002  # see measure_limits: a tenth of a second for each limit


@dataclass(frozen=True)
class Test:
    """One test of a runtime."""

    kind: str  # "pp" or "tg"
    n: int  # tokens
    depth: int = 0  # tokens in the context before

    def __str__(self) -> str:
        return f"{self.kind}{self.n}" + (f" @ {self.depth}" if self.depth else "")


@dataclass(frozen=True)
class Rounds:
    """The times of a test. Speeds are medians over the rounds."""

    test: Test
    peer: Sequence[float]  # seconds of each round
    ours: Sequence[float]  # seconds of each round
    limits: Sequence[Limits] = ()  # of the machine in each round, if measured

    @property
    def peer_speed(self) -> float:
        """Tokens per second."""
        return self.test.n / median(self.peer)

    @property
    def ours_speed(self) -> float:
        return self.test.n / median(self.ours)

    @property
    def ratio(self) -> float:
        return self.ours_speed / self.peer_speed

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest ratio of single rounds."""
        ratios = [theirs / mine for theirs, mine in zip(self.peer, self.ours, strict=True)]
        return min(ratios), max(ratios)

    @property
    def best(self) -> float:
        """The ratio of the fastest rounds, which the noise of a busy machine changes least."""
        return min(self.peer) / min(self.ours)


class _Bench:
    """The worker's side: a loaded model and how many tokens its context is filled with."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._depth = engine, 0

    def measure(self, test: Test, seed: int) -> float:
        """Return the seconds of one test."""
        engine = self._engine
        if test.depth != self._depth or engine.rewind(test.depth) != test.depth:
            engine.rewind(0)
            self._consume(self._ids(test.depth, 0))
            self._depth = test.depth
        ids = self._ids(test.n, seed)
        start = time.perf_counter()
        for part in [ids] if test.kind == "pp" else [[id] for id in ids]:
            self._consume(part)
        return time.perf_counter() - start

    def _ids(self, n: int, seed: int) -> list[int]:
        return [int(id) for id in np.random.default_rng(seed).integers(0, self._engine.n_vocab, n)]

    def _consume(self, ids: list[int]) -> None:
        """Append ids and have the logits of the last one computed."""
        for _ in self._engine.forward(ids) if ids else ():
            pass


def serve(name: str, model: Path, n_threads: int, n_ctx: int, cpu: str, cache_type: str) -> None:
    """Run the worker. It answers each line of stdin, [kind, n, depth, seed] or [] for the limits, with a line of JSON.

    "idle" is the processor time per second since the last answer, which disturbs the turn of the other runtime. It is
    measured over at least a tenth of a second, because threads spin for a moment before they sleep.
    """
    engine: Engine
    if name == "peer":
        engine = Peer(model, n_threads, n_ctx, cpu=cpu, cache_types=(cache_type, cache_type) if cache_type else None)
    else:
        engine = Ours(model, n_threads, n_ctx, cache_type=cache_type or "f16")
    bench = _Bench(engine)
    print(json.dumps({"cpu": engine.cpu, "weight_bytes": engine.weight_bytes}), flush=True)
    engine.rest()
    wall, used = time.perf_counter(), time.process_time()
    for line in sys.stdin:
        idle = (time.process_time() - used) / max(time.perf_counter() - wall, 0.1)
        request = json.loads(line)
        if request:
            *test, seed = request
            reply = {"seconds": bench.measure(Test(*test), seed), "idle": idle}
        else:
            reply = asdict(measure_limits(n_threads, seconds=_LIMIT_SECONDS))
        engine.rest()
        wall, used = time.perf_counter(), time.process_time()
        print(json.dumps(reply), flush=True)


class Worker:
    """A runtime ("peer" or "ours") in a process of its own, with a model loaded.

    cpu: llama.cpp's CPU library. The attribute `cpu` tells which one is in use.
    environment: variables added to those of this process.
    cache_type: of K and V; "": each runtime's default (f16).
    """

    def __init__(
        self,
        name: str,
        model: Path,
        n_threads: int,
        n_ctx: int,
        cpu: str = "auto",
        environment: Mapping[str, str] | None = None,
        cache_type: str = "",
    ) -> None:
        command = [sys.executable, __file__, name, str(model), str(n_threads), str(n_ctx), cpu, cache_type]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | (environment or {})
        )
        self.name = name
        hello = self._reply()
        self.cpu: str = hello["cpu"]
        self.weight_bytes: int = hello["weight_bytes"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.__exit__(None, None, None)  # closes the pipes, which it takes as a sign, and waits

    def seconds(self, test: Test, seed: int = 0) -> float:
        """Run one test there."""
        reply = self._ask([*astuple(test), seed])
        if reply["idle"] > 0.1:
            print(f"warning: {self.name} used {reply['idle']:.0%} of a core while the other ran", file=sys.stderr)
        return float(reply["seconds"])

    def limits(self) -> Limits:
        """Measure what the machine can do at most with the worker's threads and instruction set."""
        return Limits(**self._ask([]))

    def _ask(self, request: list[Any]) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker of {self.name} ended with status {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply


def compare(
    test: Test, peer: Worker, ours: Worker, repeat: int, seconds: float = math.inf, limits: bool = False
) -> Rounds:
    """Run a test in turns, for `repeat` rounds. After `seconds`, only the first two rounds still begin.

    limits: measure the machine's limits in each round, after our turn. The limits of virtual machines change from
        minute to minute, above all the bandwidth of memory.
    """
    for worker in (peer, ours):
        worker.seconds(replace(test, n=min(test.n, _WARM_TOKENS)))
    theirs: list[float] = []
    mine: list[float] = []
    found: list[Limits] = []
    end = time.perf_counter() + seconds
    while len(mine) < repeat and (len(mine) < 2 or time.perf_counter() < end):
        theirs.append(peer.seconds(test, seed=1 + len(mine)))
        mine.append(ours.seconds(test, seed=1 + len(mine)))
        found += [ours.limits()] if limits else []
    return Rounds(test, theirs, mine, found)


if __name__ == "__main__":
    _name, _model, _n_threads, _n_ctx, *_rest = sys.argv[1:]
    serve(_name, Path(_model), int(_n_threads), int(_n_ctx), *_rest)
