"""What a GGUF file holds, as facts that JSON can hold: metadata, sizes, tensors, the memory and the ops of its model.

All sizes are in bytes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.strings import StringArray
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS, cache_bytes
from gguf_run.kernels_cpu.panels.panels import matrix_bytes
from gguf_run.models.adapters import ENDS
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.op_costs import Sizes, op_costs
from gguf_run.runtime.info.tensors import reported, tensor_statistics
from gguf_run.runtime.load.cache_plan import plan_cache
from gguf_run.runtime.load.describe import describe_plan
from gguf_run.runtime.load.fit import place, plan_lines
from gguf_run.runtime.load.memory import MemoryPlan
from gguf_run.runtime.load.options import DEFAULT_N_CTX, Device, LoadOptions

SHOWN_ITEMS = 8  # items of an array


def file_facts(file: GGUFFile) -> dict[str, Any]:
    """Return sizes, metadata and the tensor types of a file. JSON shows these as they are."""
    tensors = list(file.tensors.values())
    types = [t.type.name for t in tensors]
    by_type = [{"type": name} | _sums([t for t in tensors if t.type.name == name]) for name in dict.fromkeys(types)]
    return {
        "path": str(file.path),
        "n_parts": file.n_parts,
        "version": file.version,
        "byte_order": {"<": "little", ">": "big"}[file.byte_order],
        "alignment": file.alignment,
        "nbytes": file.nbytes,
        "metadata": {
            key: {"type": file.metadata.type_name(key)} | value_facts(value) for key, value in file.metadata.items()
        },
        "total": _sums(tensors),
        "types": sorted(by_type, key=lambda row: row["nbytes"], reverse=True),
    }


def _sums(tensors: Sequence[Tensor]) -> dict[str, Any]:
    n_elements, nbytes = sum(t.n_elements for t in tensors), 0
    for t in tensors:  # types that GGUF does not have: the bytes in memory
        nbytes += matrix_bytes(t.type.name, t.ne[0], t.n_rows) if t.type.id is None else t.nbytes
    bits = round(8 * nbytes / n_elements, 3) if n_elements else None
    return {"n_tensors": len(tensors), "n_parameters": n_elements, "nbytes": nbytes, "bits_per_weight": bits}


def value_facts(value: Any, start: int = 0) -> dict[str, Any]:
    """Return a metadata value as JSON can hold it: of an array the length and SHOWN_ITEMS items from `start` on."""
    if isinstance(value, np.ndarray | StringArray | list):
        items = value[start : start + SHOWN_ITEMS]
        shown = items.tolist() if isinstance(items, np.ndarray) else items
        return {"length": len(value)} | ({"from": start} if start else {}) | {"value": [_plain(item) for item in shown]}
    return {"value": _plain(value)}


def _plain(value: Any) -> Any:
    """Return an item as JSON can hold it: infinities as text, an inner array as its length."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Typed):
        value = value.value
    return f"array of {len(value)}" if isinstance(value, np.ndarray | StringArray | list) else value


def tensor_facts(tensor: Tensor) -> dict[str, Any]:
    """Return name, type and shape of a tensor."""
    return {"name": tensor.name, "type": tensor.type.name, "ne": list(tensor.ne)}


def listed_tensors(
    tensors: Sequence[Tensor], with_statistics: bool, progress: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Return name, type, shape and size of each tensor, and its TensorStatistics if they are wanted.

    progress: see `reported`.
    """
    return [
        tensor_facts(tensor)
        | {"nbytes": tensor.nbytes}
        | (asdict(tensor_statistics(tensor)) if with_statistics else {})
        for tensor in reported(tensors, progress)
    ]


def adapter_facts(file: GGUFFile) -> dict[str, Any]:
    """Return how many tensors an adapter changes, and the ranks of the changes."""
    ranks = [tensor.ne[0] for name, tensor in file.tensors.items() if name.endswith(ENDS[1])]
    return {"ranks": sorted({*ranks}), "n_adapted": len(ranks)}


def memory_facts(file: GGUFFile, options: LoadOptions, gpus: Sequence[int]) -> dict[str, Any]:
    """Return the bytes that the model needs, or {"unknown": reason} for a file that does not hold a model.

    gpus: free bytes of each GPU. With GPUs, "placement" has lines that say what goes where.
    "cache_types" has the bytes of the KV cache for every type that the model's heads allow.
    OptionError for a cache type that they do not allow, GgufRunError for GPUs that are too small.
    """
    try:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
    except GgufRunError as error:
        return {"unknown": str(error)}
    n_ctx, kinds = _context(config, options)
    plan = MemoryPlan(config, list(file.tensors.values()), n_ctx, kinds)
    need = plan.needed()
    placement = {}
    if gpus:
        free = {Device("cuda", i): nbytes for i, nbytes in enumerate(gpus)}
        placement["placement"] = [*plan_lines(plan, place(plan, options.wanted, free), free)]
    return placement | {
        "n_ctx": n_ctx,
        "cache_type": describe_plan(kinds),
        "weights": need.weights,
        "cache": need.cache,
        "buffers": need.buffers,
        "total": need.total,
        "cache_types": {name: plan.with_type(name).cache_bytes() for name in CACHE_FORMATS if plan.allows(name)},
    }


def ops_facts(file: GGUFFile, options: LoadOptions) -> dict[str, Any]:
    """Return the ops of the last token of a full context, and what each reads and computes on the CPU.

    options: n_ctx and the types of the KV cache are used.
    GgufRunError for a file without a model that this program runs.
    """
    config = ModelConfig.from_metadata(file.metadata, file.tensors)
    n_ctx, cache = _context(config, options)
    costs = op_costs(config, file.tensors, cache, n_ctx, Sizes(matrix_bytes, cache_bytes))
    by_op: dict[str, dict[str, Any]] = {}
    for cost in costs:
        total = by_op.setdefault(cost.op, {"op": cost.op, "count": 0, "nbytes": 0, "operations": 0})
        total["count"] += 1
        total["nbytes"] += cost.nbytes
        total["operations"] += cost.operations
    totals = sorted(by_op.values(), key=lambda row: row["nbytes"], reverse=True)
    return {"n_ctx": n_ctx, "ops": [asdict(cost) for cost in costs], "by_op": totals}


def _context(config: ModelConfig, options: LoadOptions) -> tuple[int, tuple[CacheType, ...]]:
    """Return n_ctx, at most DEFAULT_N_CTX unless it is given, and the cache type of each layer."""
    n_ctx = options.n_ctx or min(config.n_ctx_train, DEFAULT_N_CTX)
    return n_ctx, plan_cache(config, options.cache_type, options.cache_rotation, options.cache_scales)
