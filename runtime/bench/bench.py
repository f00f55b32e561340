"""Speed of models, measured as llama.cpp's llama-bench does, and how near it comes to the limits of this machine.

A test is a prompt of n_prompt random tokens (pp), n_gen tokens one by one (tg), or one after the other, behind n_depth
tokens that stand in the context already. Tokenizing and sampling are left out.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from gguf_run.formats.gguf.reader import GGUFFile, Tensor
from gguf_run.kernels_cpu.attention.cache_types import GROUP, cache_bytes
from gguf_run.kernels_cpu.backend import CpuBackend
from gguf_run.kernels_cpu.measure.limits import Limits, measure_limits
from gguf_run.models.config import ModelConfig
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.load.cache_plan import plan_cache
from gguf_run.runtime.load.fit import gpu_sizes
from gguf_run.runtime.load.memory import MemoryPlan
from gguf_run.runtime.model import Model
from gguf_run.runtime.quantize.file_types import model_type


@dataclass(frozen=True)
class Case:
    """One test. n_batch: tokens after each of which logits are wanted; n_ubatch: tokens that run at once, at most."""

    model: str
    n_prompt: int
    n_gen: int
    n_depth: int = 0
    n_batch: int = 2048
    n_ubatch: int = 512
    n_threads: int = 1
    type_k: str = "f16"
    type_v: str = "f16"
    rotation: bool | None = None
    device: str = "auto"
    gpu_layers: str = "auto"
    tensor_split: str | None = None
    cpu_moe: bool = False
    n_cpu_moe: int | None = None

    @property
    def n_ctx(self) -> int:
        """Positions that the test needs."""
        return self.n_depth + self.n_prompt + self.n_gen

    @property
    def cache(self) -> tuple[str, str, bool | None]:
        """How the cache is stored."""
        return self.type_k, self.type_v, self.rotation

    @property
    def placement(self) -> dict[str, Any]:
        """What runs where, as Model.load takes it."""
        names = ("device", "gpu_layers", "tensor_split", "cpu_moe", "n_cpu_moe")
        return {name: getattr(self, name) for name in names}

    @property
    def experts_on_cpu(self) -> int:
        """First layers whose experts are wanted there, -1: all."""
        return -1 if self.cpu_moe else self.n_cpu_moe or 0

    @property
    def at_once(self) -> int:
        """Tokens that run at once, at most."""
        return min(self.n_batch, self.n_ubatch)

    def __str__(self) -> str:
        """For example pp512, tg128, pp512+tg128 @ d4096."""
        parts = [f"{kind}{n}" for kind, n in (("pp", self.n_prompt), ("tg", self.n_gen)) if n]
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")


@dataclass(frozen=True)
class ModelFacts:
    """What a model is, and what running it takes. model_size: bytes of all tensors in the file. layer_weights,
    output_weights: numbers in the matrices of all layers, and in the one that makes the logits."""

    model_type: str
    model_size: int
    n_params: int
    layer_weights: int
    output_weights: int
    config: ModelConfig

    @classmethod
    def of(cls, file: GGUFFile) -> "ModelFacts":
        tensors: Mapping[str, Tensor] = file.tensors
        matrices = {name: tensor.n_elements for name, tensor in tensors.items() if len(tensor.ne) > 1}
        return cls(
            model_type=model_type(file),
            model_size=sum(tensor.nbytes for tensor in tensors.values()),
            n_params=sum(tensor.n_elements for tensor in tensors.values()),
            layer_weights=sum(n for name, n in matrices.items() if name.startswith("blk.")),
            output_weights=matrices["output.weight" if "output.weight" in matrices else "token_embd.weight"],
            config=ModelConfig.from_metadata(file.metadata, tensors),
        )


@dataclass(frozen=True)
class Result:
    """A test that has run. samples_ns: nanoseconds of each repetition; fraction: of the limit of the machine or of its
    GPU, see ideal_seconds, None if layers run on both; test_time: when it began, UTC; gpus: names of those that ran."""

    case: Case
    facts: ModelFacts
    limits: Limits
    fraction: float | None
    test_time: str
    samples_ns: tuple[int, ...]
    gpus: tuple[str, ...] = ()

    @property
    def samples_ts(self) -> list[float]:
        """Tokens per second of each repetition."""
        return _speeds(self.case, self.samples_ns)

    @property
    def avg_ts(self) -> float:
        return fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        return _deviation(self.samples_ts)

    @property
    def avg_ns(self) -> int:
        return int(fmean(self.samples_ns))

    @property
    def stddev_ns(self) -> int:
        return int(_deviation(self.samples_ns))


def _speeds(case: Case, samples_ns: Sequence[int]) -> list[float]:
    return [1e9 * (case.n_prompt + case.n_gen) / ns for ns in samples_ns]


def _deviation(samples: Sequence[float]) -> float:
    """Standard deviation of the population that the samples are from; 0 for a single one."""
    return stdev(samples) if len(samples) > 1 else 0.0


def ideal_seconds(case: Case, facts: ModelFacts, weight_bytes: int, limits: Limits) -> float:
    """Return the seconds that a test cannot undercut on a machine with these limits.

    Tokens that run at once must read all weights (weight_bytes: as the backend holds them) and the cached keys and
    values before them, and do a multiplication and an addition per weight and token; the slower of the two counts.
    Decoding is bounded by the first, a long prompt by the second. The products of attention, which are not int8, are
    left out; so models of float weights stay far from the int8 limit.
    """
    config = facts.config
    position_bytes = cache_bytes(case.type_k, case.type_v, config.n_head_kv, config.head_dim, GROUP) // GROUP
    seconds, position = 0.0, case.n_depth
    for n, has_logits in _steps(case):
        seen = sum(min(position, config.window - 1) if is_swa else position for is_swa in config.is_swa)
        n_bytes = weight_bytes + (seen + config.n_layer * n) * position_bytes
        n_ops = 2 * (n * facts.layer_weights + has_logits * facts.output_weights)
        seconds += max(n_bytes / limits.read_bytes, n_ops / limits.int8_ops)
        position += n
    return seconds


def _steps(case: Case) -> Iterator[tuple[int, bool]]:
    """The tokens that run at once, and whether logits are made after them."""
    for start in range(0, case.n_prompt, case.n_batch):
        n = min(case.n_batch, case.n_prompt - start)
        for done in range(0, n, case.at_once):
            yield min(case.at_once, n - done), done + case.at_once >= n
    yield from itertools.repeat((1, True), case.n_gen)


@dataclass(frozen=True)
class Procedure:
    """How tests run. warmup: each runs once unmeasured (of tg, one token). delay: seconds to wait before each test.
    notify: is told what is going on."""

    repetitions: int = 5
    warmup: bool = True
    delay: float = 0.0
    notify: Callable[[str], None] = lambda line: None


def run_cases(cases: Sequence[Case], how: Procedure) -> Iterator[Result]:
    """Return an iterator that runs tests and yields each result when it is there.

    Neighbours that load the same model in the same way share it. The limits are measured once for each number of
    threads, before its first test. A file that cannot be opened raises now, one that cannot be loaded when it is its
    turn; for the errors see Model.load.
    """
    paths = {name: find_model(name) for name in dict.fromkeys(case.model for case in cases)}
    for path in paths.values():
        GGUFFile.open(path).close()
    return _run_all(cases, paths, how)


def _run_all(cases: Sequence[Case], paths: Mapping[str, Path], how: Procedure) -> Iterator[Result]:
    limits: dict[int, Limits] = {}
    for _, group in itertools.groupby(cases, key=lambda c: (c.model, c.placement, c.at_once, c.cache, c.n_threads)):
        members = list(group)
        n_threads = members[0].n_threads
        if n_threads not in limits:
            how.notify(f"measuring the limits of this machine, threads: {n_threads}")
            limits[n_threads] = measure_limits(n_threads)
        yield from _run_group(paths[members[0].model], members, limits[n_threads], how)


def _run_group(path: Path, cases: Sequence[Case], limits: Limits, how: Procedure) -> Iterator[Result]:
    """Run tests that share a loaded model. A generator of its own, so that nothing of the model outlives it."""
    with Model.load(
        path,
        n_ctx=max(case.n_ctx for case in cases),
        n_threads=cases[0].n_threads,
        n_batch=cases[0].at_once,
        cache_type=(cases[0].type_k, cases[0].type_v),
        cache_rotation=cases[0].rotation,
        **cases[0].placement,
        progress=lambda done, total: how.notify(f"loading {path.name}: {done / total:.0%}"),
    ) as model:
        with GGUFFile.open(path) as file:
            facts = ModelFacts.of(file)
            plan = MemoryPlan(facts.config, [*file.tensors.values()], 1, plan_cache(facts.config))
            sizes = gpu_sizes(plan).weights
        weight_bytes = model.decoder.nbytes()["weights"]
        backends: list[Any] = [*dict.fromkeys(model.decoder.backends)]
        gpus = [backend for backend in backends if not isinstance(backend, CpuBackend)]
        if gpus:
            how.notify(f"measuring the limits of {gpus[0].name}")
            read_bytes, f16_ops = gpus[0].limits()
            limits, weight_bytes = Limits(0, read_bytes, f16_ops, gpus[0].name), sum(sizes.layers) + sizes.output
        both = 0 < len(gpus) < len(backends)
        runner = _Runner(model)
        for case in cases:
            time.sleep(how.delay)
            test_time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            samples = runner.samples(case, how)
            ideal = ideal_seconds(case, facts, weight_bytes, limits)
            fraction = ideal * fmean(_speeds(case, samples)) / (case.n_prompt + case.n_gen)
            names = tuple(gpu.name for gpu in gpus)
            yield Result(case, facts, limits, None if both else fraction, test_time, tuple(samples), names)


class _Runner:
    """Runs tests on one model, one after the other."""

    def __init__(self, model: Model) -> None:
        self._decoder, tokenizer = model.decoder, model.tokenizer
        self._bos = tokenizer.bos if tokenizer.add_bos else None
        self._rng = np.random.default_rng(0)
        self._depth = 0

    def samples(self, case: Case, how: Procedure) -> list[int]:
        """Nanoseconds of each repetition."""
        if case.n_depth != self._depth:
            how.notify(f"{case}: filling the context")
            self._fill(case.n_depth)
        if how.warmup:
            how.notify(f"{case}: warming up")
            self._run(case, case.n_prompt, min(1, case.n_gen))
        samples = []
        for i in range(how.repetitions):
            how.notify(f"{case}: run {i + 1} of {how.repetitions}")
            samples.append(self._run(case, case.n_prompt, case.n_gen))
        return samples

    def _fill(self, n_depth: int) -> None:
        self._decoder.rewind(0)
        self._forward(self._ids(n_depth), 0)
        self._depth = n_depth

    def _run(self, case: Case, n_prompt: int, n_gen: int) -> int:
        """Nanoseconds of one run behind the tokens that fill the context."""
        if self._decoder.rewind(self._depth) != self._depth:  # a window has moved on
            self._fill(self._depth)
        prompt, generated = self._ids(n_prompt), self._ids(n_gen)
        start = time.perf_counter_ns()
        for at in range(0, n_prompt, case.n_batch):
            self._forward(prompt[at : at + case.n_batch])
        for id in generated:
            self._forward([id])
        return time.perf_counter_ns() - start

    def _ids(self, n: int) -> list[int]:
        """Random tokens; the first is BOS where the model wants one."""
        ids: list[int] = self._rng.integers(0, self._decoder.config.n_vocab, n).tolist()
        return [self._bos, *ids[1:]] if ids and self._bos is not None else ids

    def _forward(self, ids: list[int], n_outputs: int = 1) -> None:
        for _ in self._decoder.forward(ids, n_outputs):
            pass
