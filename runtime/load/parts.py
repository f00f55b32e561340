"""Loading a model: its configuration, the memory it will take, weights and text beside each other."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from gguf_run.formats.errors import FormatError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.backend import CacheType

if TYPE_CHECKING:
    from gguf_run.runtime.engine.session_file import SessionHeader
    from gguf_run.runtime.load.placement import Device, Wanted
    from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

DEFAULT_N_CTX = 4096


def load_parts(
    file: GGUFFile,
    *,
    n_ctx: int | None,
    n_threads: int,
    wanted: "Wanted",
    n_batch: int,
    n_seq: int,
    cache: Mapping[str, Any],
    progress: Callable[[int, int], None] | None,
    observe: bool,
    quantize: str | None,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """What Model is made of; the file belongs to it. n_ctx: None for the model's own, at most DEFAULT_N_CTX. cache:
    the options of plan_cache. report: gets lines on what runs where. The others are Model.load's."""
    from gguf_run.models.config import ModelConfig
    from gguf_run.runtime.load import compile_ahead
    from gguf_run.runtime.load.cache_plan import plan_cache
    from gguf_run.runtime.load.devices import gpu_errors, open_placement
    from gguf_run.runtime.load.memory import MemoryPlan, available_memory
    from gguf_run.runtime.load.placement import CPU

    config = ModelConfig.from_metadata(file.metadata, file.tensors)
    n_ctx = n_ctx or min(config.n_ctx_train, DEFAULT_N_CTX)
    tensors = list(file.tensors.values())
    kinds = plan_cache(config, **cache)
    plan = MemoryPlan(config, tensors, n_ctx, kinds, n_batch, n_seq)
    placement, gpus = open_placement(plan, wanted, report)
    if CPU in placement.devices:
        plan.on_cpu(placement.n_gpu, placement.n_cpu_moe).check(available_memory())
    if n_ctx > config.n_ctx_train:
        warnings.warn(
            f"context of {n_ctx} tokens: the model was trained with {config.n_ctx_train}, beyond it answers get worse",
            stacklevel=3,
        )
    # What text needs is made beside the weights: they are repacked without the GIL.
    on_cpu = CPU in (*placement.layers, *placement.experts)
    compiling = compile_ahead.helper(file.path, quantize, kinds, n_threads) if on_cpu else nullcontext()
    with ThreadPoolExecutor(1) as pool, compiling, gpu_errors(gpus):
        text = pool.submit(_load_text, file)

        from gguf_run.kernels_cpu.backend import CpuBackend
        from gguf_run.models.decoder import Decoder

        backends: dict[Device, Any] = dict(gpus)

        try:
            if CPU in placement.devices:
                backends[CPU] = CpuBackend(n_threads)
            decoder = Decoder(
                config,
                file.tensors,
                [backends[device] for device in placement.layers],
                n_ctx,
                n_batch,
                n_seq=n_seq,
                cache_types=kinds,
                progress=_reporter(progress, sum(tensor.nbytes for tensor in tensors)),
                observe=observe,
                embedding=backends[placement.embedding],
                experts=[backends[device] for device in placement.experts],
            )
            tokenizer, template, tool_template = text.result()
            return {
                "decoder": decoder,
                "tokenizer": tokenizer,
                "chat_template": template,
                "tool_template": tool_template,
                "where": ", ".join(
                    f"{n} layer{'s' * (n > 1)} on {backends[device].name}"
                    for device, n in Counter(placement.layers).items()
                ),
                "identity": partial(_identity, file, kinds, placement.n_gpu),
                "close": [*(backend.close for backend in backends.values()), file.close],
            }
        except BaseException:
            for backend in backends.values():
                backend.close()
            raise


def chat_template(metadata: Mapping[str, Any], key: str = "tokenizer.chat_template") -> str | None:
    """Return the file's chat template, or None: it has none, prompts are used as they are."""
    template = metadata.get(key)
    if template is not None and not isinstance(template, str):
        raise FormatError(f"{key} must be a string, but is {type(template).__name__}")
    return template or None


def _identity(file: GGUFFile, plan: Sequence[CacheType], n_gpu: int) -> "SessionHeader":
    from gguf_run.runtime.engine.session_file import SessionHeader, hash_model
    from gguf_run.runtime.load.cache_plan import describe_plan

    # The bytes of a cache are laid out as its device likes.
    cache = describe_plan(plan) + (f", the last {n_gpu} layers' on a GPU" if n_gpu else "")
    return SessionHeader(hash_model(file), file.path.name, cache, ids=())


def _load_text(file: GGUFFile) -> "tuple[Tokenizer, str | None, str | None]":
    from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

    tool_template = chat_template(file.metadata, "tokenizer.chat_template.tool_use")
    return Tokenizer.from_metadata(file.metadata), chat_template(file.metadata), tool_template


def _reporter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def add(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress(done, total)

    return add
