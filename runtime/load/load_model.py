"""Loads a model: makes the parts of a Model from a file and options."""

import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_run.formats.compiler.jit import compile_notice
from gguf_run.formats.errors import FormatError, GgufRunError, OptionError
from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_cpu.panels.panels import main_panel
from gguf_run.kernels_cpu.replay.team import MAX_THREADS
from gguf_run.kernels_cpu.vector.isa import Tuning, stored_tuning, tuning_path
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.runtime.load.cache_plan import cells_in, fit_cache, plan_cache
from gguf_run.runtime.load.machine import available_memory, default_threads, driver_there
from gguf_run.runtime.load.memory import MemoryPlan
from gguf_run.runtime.load.open_model import open_model
from gguf_run.runtime.load.options import CPU, DEFAULT_N_CTX, Device, LoadOptions, Placement, Wanted, cpu_only

if TYPE_CHECKING:
    from gguf_run.kernels_cpu.backend import CpuBackend
    from gguf_run.models.adapted_step import Adapters
    from gguf_run.models.decoder import Decoder
    from gguf_run.runtime.engine.session_file import SessionHeader
    from gguf_run.runtime.engine.speculation import Speculation
    from gguf_run.runtime.sampling.many import ManySampler
    from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
_CACHE_BYTES = 8 << 30  # of memory that is taken for free where nothing tells
_MEASURED_FROM = 32 << 20  # bytes of a model for which it pays to measure the machine


@frozen
class LoadedModel:
    """The parts of a Model."""

    decoder: "Decoder"
    tokenizer: "Tokenizer"
    chat_template: str | None = None
    tool_template: str | None = None  # in place of chat_template for conversations with tools; some files have both
    where: str = ""  # the number of layers on each device, for people
    about: Callable[[], str] = str  # returns the file's name, architecture, size and type, for people
    download_s: float = 0.0  # seconds that it took to find or to download the file
    identity: "Callable[[], SessionHeader] | None" = None  # makes the header of a session; None: no sessions
    many: "Callable[[], ManySampler] | None" = None  # makes what samples many rows, on the threads of the CPU
    deterministic: bool = False  # see LoadOptions
    speculation: "Speculation | None" = None  # guesses tokens
    tuning: str = ""  # how the kernels were fitted to this CPU, for people
    close: Sequence[Callable[[], None]] = ()  # called at the end, to free what the decoder does not own


def load_model(
    path: str | os.PathLike[str] | GGUFFile | None,
    options: LoadOptions,
    progress: Progress | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> LoadedModel:
    """Load a model. path, progress, report and errors: see Model.load."""
    start = time.perf_counter()
    found = path if isinstance(path, GGUFFile) else _find(None if path is None else os.fspath(path))
    download_s = time.perf_counter() - start
    file = found if isinstance(found, GGUFFile) else open_model(found, options.quantize, options.activations)
    try:
        return replace(_load(file, options, progress, report), download_s=download_s)
    except GgufRunError as error:
        file.close()
        # Nothing that _load calls knows the name of the file.
        if str(file.path) in str(error) or isinstance(error, OptionError):
            raise
        raise type(error)(f"{file.path}: {error}") from error
    except BaseException:
        file.close()
        raise


def _find(name: str | None) -> Path:
    if name is not None and not name.startswith("hf:") and Path(name).exists():
        return Path(name)
    from gguf_run.runtime.hub.find import find_model

    return find_model(name, "any")


def _load(
    file: GGUFFile, options: LoadOptions, progress: Progress | None, report: Callable[[str], None]
) -> LoadedModel:
    plan, adapters = _plan(file, options)
    placement, gpus = _place(plan, options, report)
    if CPU in placement.devices:
        replace(plan, n_gpu=placement.n_gpu, n_cpu_moe=placement.n_cpu_moe).check(available_memory())
    if plan.n_ctx > (trained := plan.config.n_ctx_train):
        warning = f"context of {plan.n_ctx} tokens: the model was trained with {trained}, beyond it answers get worse"
        warnings.warn(warning, stacklevel=4)
    n_threads, tune = tuned([(t.type.name, t.nbytes) for t in plan.tensors], options.n_threads)
    computes = CPU in (*placement.layers, *placement.experts)
    compiling = _helper(file.path, options, plan.cache, n_threads) if computes else nullcontext()
    with ThreadPoolExecutor(1) as pool, compiling, _gpu_errors(gpus):
        text = pool.submit(_load_text, file)  # beside the weights, which are repacked without the GIL
        from gguf_run.kernels_cpu.backend import CpuBackend

        backends: dict[Device, Any] = dict(gpus)
        try:
            if CPU in placement.devices:
                backends[CPU] = CpuBackend(n_threads, deterministic=options.deterministic or options.guesses)
            decoder = _decoder_class(plan.config, options)(
                plan.config,
                file.tensors,
                [backends[device] for device in placement.layers],
                plan.n_ctx,
                options.n_batch,
                n_seq=options.n_seq,
                cache_types=plan.cache,
                progress=_adding(progress, sum(tensor.nbytes for tensor in plan.tensors)) if progress else None,
                observe=options.observe,
                embedding=backends[placement.embedding],
                experts=[backends[device] for device in placement.experts],
                n_cells=plan.n_cells,
                adapters=adapters,
            )
            tokenizer, template, tool_template = text.result()
        except BaseException:
            for backend in backends.values():
                backend.close()
            raise
    closes = [*(backend.close for backend in backends.values()), file.close]
    layers = Counter(placement.layers)
    loaded = LoadedModel(
        decoder,
        tokenizer,
        template,
        tool_template,
        where=", ".join(f"{n} layer{'s' * (n > 1)} on {backends[device].name}" for device, n in layers.items()),
        about=partial(_described, "about", file),
        identity=partial(_described, "identity", file, plan.cache, placement.n_gpu, options.lora),
        deterministic=options.deterministic,
        many=partial(_many_sampler, backends.get(CPU), n_threads, plan.config.n_vocab),
        speculation=_speculation(options, plan.n_ctx, tokenizer.tokens, closes),
        close=closes,
    )
    return replace(loaded, tuning=tune(backends[CPU])) if computes else loaded


def _speculation(
    options: LoadOptions, n_ctx: int, tokens: Sequence[str], closes: list[Callable[[], None]]
) -> "Speculation | None":
    if not options.guesses:
        return None
    from gguf_run.runtime.load.draft import speculation_of  # late: it is mostly not asked for

    return speculation_of(load_model, options, n_ctx, tokens, closes)


def _decoder_class(config: ModelConfig, options: LoadOptions) -> "type[Decoder]":
    if options.embed or (config.pooling is not None and config.pooling.is_only):
        from gguf_run.models.embedder import Embedder

        return Embedder
    from gguf_run.models.decoder import Decoder

    return Decoder


def tuned(sizes: Collection[tuple[str, int]], n_threads: int | None) -> "tuple[int, Callable[[CpuBackend], str]]":
    """Return the threads that compute, and a function that gives a backend this machine's numbers (isa.Tuning).

    The function measures them if nobody has, once all else is done. It returns a line for people.
    sizes: type and bytes of each tensor.
    """
    panel = main_panel(sizes)
    path, n_cores = tuning_path(panel), min(default_threads(), MAX_THREADS)
    stored = stored_tuning(path)

    def tune(backend: "CpuBackend") -> str:
        found, how = stored or Tuning(), "measured before" if stored else "defaults"
        if stored is None and path is not None and sum(size for _, size in sizes) >= _MEASURED_FROM:
            from gguf_run.kernels_cpu.measure.tune import tune_once

            found, how = tune_once(path, panel, n_cores, available_memory())
        backend.tune(found)
        return f"{how}; " + ", ".join(f"{name} {value}" for name, value in vars(found).items())

    return n_threads or (stored and stored.n_threads) or n_cores, tune


def _plan(file: GGUFFile, options: LoadOptions) -> "tuple[MemoryPlan, Adapters | None]":
    config = ModelConfig.from_metadata(file.metadata, file.tensors)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Sequence) and len(tokens) != config.n_vocab:
        rows = f"token_embd.weight has {config.n_vocab} rows"
        raise FormatError(f"tokenizer.ggml.tokens has {len(tokens)} tokens, and {rows}: convert the model again")
    n_ctx = options.n_ctx or min(config.n_ctx_train, DEFAULT_N_CTX)
    cache = plan_cache(config, options.cache_type, options.cache_rotation, options.cache_scales)
    n_cells = None
    if options.cache_ram == "auto":
        n_bytes = (available_memory() or _CACHE_BYTES) // 4
        n_ctx, n_cells = fit_cache(n_bytes, config, cache, options.n_ctx, options.n_batch, options.n_seq)
    n_batch = options.n_batch if config.arch.is_causal else n_ctx  # see models/embedder.py
    if isinstance(options.cache_ram, int):
        n_cells = cells_in(options.cache_ram << 20, config, cache, n_ctx, n_batch, options.n_seq)
    plan = MemoryPlan(config, list(file.tensors.values()), n_ctx, cache, n_batch, options.n_seq, n_cells)
    if not options.lora:
        return plan, None
    from gguf_run.runtime.load.adapters import open_adapters  # late: few models have any

    adapters = open_adapters(file, options.lora, plan.n_seq)
    return replace(plan, tensors=[*plan.tensors, *adapters.tensors]), adapters


def tries_gpus(wanted: Wanted, root: Path = Path("/")) -> bool:
    """Whether GPUs are opened. One that nobody insists on is opened only where there is a driver."""
    return not wanted.cpu_only and (wanted.insists or driver_there(root))


def _place(
    plan: MemoryPlan, options: LoadOptions, report: Callable[[str], None]
) -> tuple[Placement, dict[Device, Any]]:
    """Return the device of each part, and the backends of the GPUs that are used."""
    wanted = options.wanted
    if not tries_gpus(wanted):
        return cpu_only(plan.config.n_layer), {}
    from gguf_run.runtime.load.devices import open_placement

    return open_placement(plan, wanted, report)


def _gpu_errors(gpus: Mapping[Device, Any]) -> AbstractContextManager[None]:
    if not gpus:
        return nullcontext()
    from gguf_run.kernels_gpu.device.errors import gpu_errors

    return gpu_errors()


def chat_template(metadata: Mapping[str, Any], key: str = "tokenizer.chat_template") -> str | None:
    """Return the file's chat template, or None if it has none."""
    template = metadata.get(key)
    if template is not None and not isinstance(template, str):
        raise FormatError(f"{key} must be a string, but is {type(template).__name__}")
    return template or None


def _many_sampler(backend: "CpuBackend | None", n_threads: int, n_vocab: int) -> "ManySampler":
    from gguf_run.kernels_cpu.replay.team import Team
    from gguf_run.runtime.sampling.many import ManySampler

    return ManySampler(backend.team if backend else Team(n_threads), n_vocab)


def _described(name: str, *values: Any) -> Any:
    from gguf_run.runtime.load import describe  # late: few commands need it

    return getattr(describe, name)(*values)


@contextmanager
def _helper(path: Path, options: LoadOptions, cache: Sequence[CacheType], n_threads: int) -> Iterator[None]:
    """Return a context in which a second process helps from the first kernel on that must be compiled."""
    with ExitStack() as stack:

        def start() -> None:
            from gguf_run.runtime.load import compile_ahead  # late: most starts compile nothing

            stack.enter_context(compile_ahead.helper(path, options, cache, n_threads))

        with compile_notice(start):
            yield


def _load_text(file: GGUFFile) -> "tuple[Tokenizer, str | None, str | None]":
    from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

    tool_template = chat_template(file.metadata, "tokenizer.chat_template.tool_use")
    return Tokenizer.from_metadata(file.metadata), chat_template(file.metadata), tool_template


def _adding(progress: Progress, total: int) -> Callable[[int], None]:
    """Return a function that is given the bytes of a tensor and calls progress with the sum so far."""
    done = 0

    def add(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress(done, total)

    return add
