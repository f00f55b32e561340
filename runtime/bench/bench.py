"""How fast models run, measured like llama.cpp's llama-bench, and how near that comes to the limits of this machine.

A test runs a prompt of n_prompt random tokens (pp), or n_gen random tokens one by one (tg), or first the prompt and
then the single tokens. n_depth tokens are in the context before. Tokenizing and sampling are left out.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_cpu.attention.cache_types import cache_bytes
from gguf_run.kernels_cpu.backend import CpuBackend
from gguf_run.kernels_cpu.measure.limits import Limits, measure_limits
from gguf_run.models.config import ModelConfig
from gguf_run.models.kv_cache import GROUP
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.load.cache_plan import plan_cache
from gguf_run.runtime.load.fit import gpu_sizes
from gguf_run.runtime.load.memory import MemoryPlan
from gguf_run.runtime.load.options import LoadOptions
from gguf_run.runtime.model import Model
from gguf_run.runtime.quantize.file_types import model_type

DEFAULTS = LoadOptions(n_threads=1, cache_type=("f16", "f16"))


@dataclass(frozen=True)
class Case:
    """One test: a model, how it is loaded, and the tokens that it runs."""

    name: str  # the model: a file, or hf:owner/repo[:TYPE]
    n_prompt: int  # tokens of the prompt
    n_gen: int  # tokens that are generated one by one
    n_depth: int = 0  # tokens that are in the context before
    n_batch: int = 2048  # the prompt is cut into parts of n_batch tokens, with logits at the end of each
    n_ubatch: int = 512  # tokens that run at once, at most
    options: LoadOptions = DEFAULTS  # how the model is loaded; n_ctx and n_batch follow from the fields above

    @property
    def n_ctx(self) -> int:
        """Positions that the test needs."""
        return self.n_depth + self.n_prompt + self.n_gen

    @property
    def cache_types(self) -> tuple[str, str]:
        """The types of K and V."""
        assert isinstance(self.options.cache_type, tuple)
        return self.options.cache_type

    @property
    def at_once(self) -> int:
        """Tokens that run at once, at most."""
        return min(self.n_batch, self.n_ubatch)

    def __str__(self) -> str:
        """For example pp512, tg128, pp512+tg128 @ d4096."""
        parts = [f"{kind}{n}" for kind, n in (("pp", self.n_prompt), ("tg", self.n_gen)) if n]
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")


@dataclass(frozen=True)
class BenchedModel:
    """Facts about the model of a test."""

    model_type: str  # for people: "llama 8B Q4_K - Medium"
    model_size: int  # bytes of all tensors in the file
    n_params: int  # numbers in all tensors
    layer_weights: int  # numbers in the matrices of all layers
    output_weights: int  # numbers in the matrix that makes the logits
    config: ModelConfig

    @classmethod
    def of(cls, file: GGUFFile) -> "BenchedModel":
        tensors = file.tensors
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
    """A test that has run."""

    case: Case
    model: BenchedModel
    limits: Limits  # of the machine, or of the GPU if one has run layers
    fraction: float | None  # ideal_seconds by measured seconds; None: layers ran on CPU and GPU
    test_time: str  # when the test began, UTC
    samples_ns: tuple[int, ...]  # nanoseconds of each repetition
    gpus: tuple[str, ...] = ()  # names of the GPUs that ran layers

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU ran layers."""
        return not self.gpus or self.fraction is None

    @property
    def samples_ts(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [1e9 * (self.case.n_prompt + self.case.n_gen) / ns for ns in self.samples_ns]

    @property
    def avg_ts(self) -> float:
        return fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        """Standard deviation of the population that the samples are from; 0 for a single sample."""
        return stdev(self.samples_ts) if len(self.samples_ts) > 1 else 0.0


def ideal_seconds(case: Case, model: BenchedModel, weight_bytes: int, limits: Limits) -> float:
    """Return the least seconds that a test can take on a machine with these limits.

    weight_bytes: bytes of all weights, as the backend holds them.

    A run of tokens reads all weights once, and the keys and values of the tokens before. It computes a multiplication
    and an addition for each weight and token. The slower of reading and computing counts. Attention's own products are
    not counted because they are not int8. Float weights stay far from the int8 limit.
    """
    config = model.config
    sizes = config.n_head_kv, config.head_dim, GROUP, config.layers[0].n_latent
    position_bytes = cache_bytes(*case.cache_types, *sizes) // GROUP
    seconds, position = 0.0, case.n_depth
    for n, has_logits in _steps(case):
        seen = sum(min(position, config.window - 1) if layer.window else position for layer in config.layers)
        n_bytes = weight_bytes + (seen + config.n_layer * n) * position_bytes
        n_ops = 2 * (n * model.layer_weights + has_logits * model.output_weights)
        seconds += max(n_bytes / limits.read_bytes, n_ops / limits.int8_ops)
        position += n
    return seconds


def _steps(case: Case) -> Iterator[tuple[int, bool]]:
    """Yield the number of tokens of each run, and whether logits are made after them."""
    for start in range(0, case.n_prompt, case.n_batch):
        n = min(case.n_batch, case.n_prompt - start)
        for done in range(0, n, case.at_once):
            yield min(case.at_once, n - done), done + case.at_once >= n
    yield from itertools.repeat((1, True), case.n_gen)


@dataclass(frozen=True)
class Procedure:
    """How tests run."""

    repetitions: int = 5
    warmup: bool = True  # each test runs once unmeasured before, with at most one token of tg
    delay: float = 0.0  # seconds to wait before each test
    notify: Callable[[str], None] = lambda line: None  # gets a line on what is going on


def run_cases(cases: Sequence[Case], how: Procedure) -> Iterator[Result]:
    """Return an iterator that runs the tests and yields each result.

    Successive tests share a model if they load it in the same way. The limits are measured once for each number of
    threads, before its first test. A file that cannot be opened raises at once. A file that cannot be loaded raises
    when its tests come. Errors are those of Model.load.
    """
    paths = {name: find_model(name) for name in dict.fromkeys(case.name for case in cases)}
    for path in paths.values():
        GGUFFile.open(path).close()
    return _run_all(cases, paths, how)


def _run_all(cases: Sequence[Case], paths: Mapping[str, Path], how: Procedure) -> Iterator[Result]:
    limits: dict[int, Limits] = {}
    for (name, at_once, options), group in itertools.groupby(cases, key=lambda c: (c.name, c.at_once, c.options)):
        members = list(group)
        n_threads = options.n_threads or 1
        if n_threads not in limits:
            how.notify(f"measuring the limits of this machine, threads: {n_threads}")
            limits[n_threads] = measure_limits(n_threads)
        shared = replace(options, n_ctx=max(case.n_ctx for case in members), n_batch=at_once)
        yield from _run_group(paths[name], members, shared, limits[n_threads], how)


def _run_group(
    path: Path, cases: Sequence[Case], options: LoadOptions, limits: Limits, how: Procedure
) -> Iterator[Result]:
    """Run tests that share a loaded model. Nothing of the model outlives this generator."""

    def progress(done: int, total: int) -> None:
        how.notify(f"loading {path.name}: {done / total:.0%}")

    with Model.load(path, options, progress=progress) as loaded:
        with GGUFFile.open(path) as file:
            model = BenchedModel.of(file)
            plan = MemoryPlan(model.config, [*file.tensors.values()], 1, plan_cache(model.config))
        weight_bytes = loaded.decoder.nbytes()["weights"]
        backends: list[Any] = [*dict.fromkeys(loaded.decoder.backends)]
        gpus = [backend for backend in backends if not isinstance(backend, CpuBackend)]
        if gpus:
            how.notify(f"measuring the limits of {gpus[0].name}")
            read_bytes, f16_ops = gpus[0].limits()
            limits, sizes = Limits(0, read_bytes, f16_ops, gpus[0].name), gpu_sizes(plan).weights
            weight_bytes = sum(sizes.layers) + sizes.output
        on_both = 0 < len(gpus) < len(backends)
        runner = _Runner(loaded)
        for case in cases:
            time.sleep(how.delay)
            test_time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            samples = tuple(runner.samples(case, how))
            result = Result(case, model, limits, None, test_time, samples, tuple(gpu.name for gpu in gpus))
            if not on_both:
                ideal = ideal_seconds(case, model, weight_bytes, limits)
                result = replace(result, fraction=ideal * result.avg_ts / (case.n_prompt + case.n_gen))
            yield result


class _Runner:
    """Runs tests on one model, one after the other."""

    def __init__(self, model: Model) -> None:
        self._decoder, tokenizer = model.decoder, model.tokenizer
        self._bos = tokenizer.bos if tokenizer.add_bos else None
        self._rng = np.random.default_rng(0)
        self._depth = 0

    def samples(self, case: Case, how: Procedure) -> list[int]:
        """Run a test; return the nanoseconds of each repetition."""
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
        """Run a prompt, then tokens one by one, behind the filled context; return the nanoseconds."""
        if self._decoder.rewind(self._depth) != self._depth:  # a window no longer holds the tokens
            self._fill(self._depth)
        prompt, generated = self._ids(n_prompt), self._ids(n_gen)
        start = time.perf_counter_ns()
        for at in range(0, n_prompt, case.n_batch):
            self._forward(prompt[at : at + case.n_batch])
        for id in generated:
            self._forward([id])
        return time.perf_counter_ns() - start

    def _ids(self, n: int) -> list[int]:
        """Return random tokens; the first is BOS where the model adds one."""
        ids: list[int] = self._rng.integers(0, self._decoder.config.n_vocab, n).tolist()
        return [self._bos, *ids[1:]] if ids and self._bos is not None else ids

    def _forward(self, ids: list[int], n_outputs: int = 1) -> None:
        for _ in self._decoder.forward(ids, n_outputs):
            pass
