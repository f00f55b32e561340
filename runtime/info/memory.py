"""What gguf-info says of the memory that a model needs, and of the KV cache in every type."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS
from gguf_run.models.config import ModelConfig
from gguf_run.runtime.load.cache_plan import describe_plan, plan_cache
from gguf_run.runtime.load.fit import place, plan_lines
from gguf_run.runtime.load.memory import MemoryPlan
from gguf_run.runtime.load.options import DEFAULT_N_CTX, LoadOptions, Wanted
from gguf_run.runtime.load.placement import Device
from gguf_run.runtime.terminal.text import one_line, size_text, table


def memory_facts(
    file: GGUFFile, n_ctx: int | None, options: LoadOptions, wanted: Wanted | None = None, gpus: Sequence[int] = ()
) -> dict[str, Any]:
    """Bytes needed to run the model, or why that cannot be told: gguf-info shows any GGUF file, not only models.

    options: those of the cache are read. gpus: free bytes of GPUs, on which layers go as `wanted` says. cache_types:
    bytes of the cache if all of it has one type. OptionError for a type that the model's heads do not allow,
    GgufRunError for GPUs that are too small.
    """
    try:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
    except GgufRunError as error:
        return {"unknown": one_line(str(error))}
    n_ctx = n_ctx or min(config.n_ctx_train, DEFAULT_N_CTX)
    kinds = plan_cache(config, options.cache_type, options.cache_rotation, options.cache_scales)
    plan = MemoryPlan(config, list(file.tensors.values()), n_ctx, kinds)
    need = plan.needed()
    alike = {name: plan.with_type(name).cache_bytes() for name in CACHE_FORMATS if plan.allows(name)}
    placement = {}
    if wanted is not None:
        free = {Device("cuda", i): size for i, size in enumerate(gpus)}
        placement["placement"] = [*plan_lines(plan, place(plan, wanted, free), free)]
    return placement | {
        "n_ctx": n_ctx,
        "cache_type": describe_plan(kinds),
        "weights": need.weights,
        "cache": need.cache,
        "buffers": need.buffers,
        "total": need.total,
        "cache_types": alike,
    }


def memory_lines(facts: Mapping[str, Any], all_types: bool) -> Iterator[str]:
    """The facts for people. all_types: with a table of the cache in every type."""
    if "unknown" in facts:
        yield f"memory needed: unknown ({facts['unknown']})"
        return
    yield (
        f"memory needed: {size_text(facts['total'])} with a context of {facts['n_ctx']} tokens: weights "
        f"{size_text(facts['weights'])}, KV cache ({facts['cache_type']}) {size_text(facts['cache'])}, buffers "
        f"{size_text(facts['buffers'])}"
    )
    yield from facts.get("placement", ())
    if all_types:
        rest, f16 = facts["total"] - facts["cache"], facts["cache_types"]["f16"]
        yield ""
        yield from table(
            ["cache type", "KV cache", "of f16", "memory needed"],
            [
                [name, size_text(nbytes), f"{nbytes / f16:.2f}", size_text(rest + nbytes)]
                for name, nbytes in facts["cache_types"].items()
            ],
            "lrrr",
        )
