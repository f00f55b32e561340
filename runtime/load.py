"""Loading a model: its configuration, the memory it will take, weights and text beside each other."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from gguf_run.formats.errors import FormatError
from gguf_run.formats.reader import GGUFFile
from gguf_run.models.backend import CacheType

if TYPE_CHECKING:
    from gguf_run.runtime.session_file import SessionHeader
    from gguf_run.runtime.tokenizer import Tokenizer

DEFAULT_N_CTX = 4096


def load_parts(
    file: GGUFFile,
    *,
    n_ctx: int | None,
    n_threads: int,
    device: str,
    n_batch: int,
    n_seq: int,
    cache: Mapping[str, Any],
    progress: Callable[[int, int], None] | None,
    observe: bool,
    quantize: str | None,
) -> dict[str, Any]:
    """What Model is made of; the file belongs to it. n_ctx: None for the model's own, at most DEFAULT_N_CTX. cache:
    the options of plan_cache. The others are Model.load's."""
    from gguf_run.models.config import ModelConfig
    from gguf_run.runtime import compile_ahead
    from gguf_run.runtime.cache_plan import plan_cache
    from gguf_run.runtime.memory import MemoryPlan, available_memory
    from gguf_run.runtime.placement import open_gpu, place_layers

    config = ModelConfig.from_metadata(file.metadata, file.tensors)
    n_ctx = n_ctx or min(config.n_ctx_train, DEFAULT_N_CTX)
    places = place_layers(config.n_layer, device)
    tensors = list(file.tensors.values())
    plan = plan_cache(config, **cache)
    gpu = open_gpu(places[0]) if places[0].kind == "cuda" else None
    if gpu is None:
        MemoryPlan(config, tensors, n_ctx, plan, n_batch, n_seq).check(available_memory())
    if n_ctx > config.n_ctx_train:
        warnings.warn(
            f"context of {n_ctx} tokens: the model was trained with {config.n_ctx_train}, beyond it answers get worse",
            stacklevel=3,
        )
    # What text needs is made beside the weights: they are repacked without the GIL.
    compiling = nullcontext() if gpu else compile_ahead.helper(file.path, quantize, plan, n_threads)
    with ThreadPoolExecutor(1) as pool, compiling:
        text = pool.submit(_load_text, file)

        from gguf_run.kernels_cpu.backend import CpuBackend
        from gguf_run.models.decoder import Decoder

        backend = gpu or CpuBackend(n_threads)
        try:
            report = _reporter(progress, sum(tensor.nbytes for tensor in tensors))
            backends = [backend for _ in places]
            decoder = Decoder(
                config,
                file.tensors,
                backends,
                n_ctx,
                n_batch,
                n_seq=n_seq,
                cache_types=plan,
                progress=report,
                observe=observe,
            )
            tokenizer, template, tool_template = text.result()
            return {
                "decoder": decoder,
                "tokenizer": tokenizer,
                "chat_template": template,
                "tool_template": tool_template,
                "where": f"{config.n_layer} layers on {backend.name}",
                "identity": partial(_identity, file, plan),
                "close": [backend.close, file.close],
            }
        except BaseException:
            backend.close()
            raise


def chat_template(metadata: Mapping[str, Any], key: str = "tokenizer.chat_template") -> str | None:
    """Return the file's chat template, or None: it has none, prompts are used as they are."""
    template = metadata.get(key)
    if template is not None and not isinstance(template, str):
        raise FormatError(f"{key} must be a string, but is {type(template).__name__}")
    return template or None


def _identity(file: GGUFFile, plan: Sequence[CacheType]) -> "SessionHeader":
    from gguf_run.runtime.cache_plan import describe_plan
    from gguf_run.runtime.session_file import SessionHeader, hash_model

    return SessionHeader(hash_model(file), file.path.name, describe_plan(plan), ids=())


def _load_text(file: GGUFFile) -> "tuple[Tokenizer, str | None, str | None]":
    from gguf_run.runtime.tokenizer import Tokenizer

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
