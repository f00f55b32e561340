"""What gguf-info --ops shows: the ops of a token, and what each reads and computes."""

from dataclasses import asdict
from typing import Any

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_cpu.attention.cache_types import cache_bytes
from gguf_run.kernels_cpu.panels.panels import matrix_bytes
from gguf_run.models.config import ModelConfig
from gguf_run.models.op_costs import Sizes, op_costs
from gguf_run.runtime.load.cache_plan import plan_cache
from gguf_run.runtime.load.options import DEFAULT_N_CTX, LoadOptions


def ops_facts(file: GGUFFile, options: LoadOptions) -> dict[str, Any]:
    """Return the ops of a token that is the last of a full context, weights and cache as the CPU stores them.

    options: their cache types and n_ctx are used; without n_ctx, the model's, at most DEFAULT_N_CTX.

    Raises GgufRunError for a file that is no model that this program runs.
    """
    config = ModelConfig.from_metadata(file.metadata, file.tensors)
    n_ctx = options.n_ctx or min(config.n_ctx_train, DEFAULT_N_CTX)
    cache = plan_cache(config, options.cache_type, options.cache_rotation, options.cache_scales)
    costs = op_costs(config, file.tensors, cache, n_ctx, Sizes(matrix_bytes, cache_bytes))
    by_op: dict[str, dict[str, Any]] = {}
    for cost in costs:
        total = by_op.setdefault(cost.op, {"op": cost.op, "count": 0, "nbytes": 0, "operations": 0})
        total["count"] += 1
        total["nbytes"] += cost.nbytes
        total["operations"] += cost.operations
    totals = sorted(by_op.values(), key=lambda row: row["nbytes"], reverse=True)
    return {"n_ctx": n_ctx, "ops": [asdict(cost) for cost in costs], "by_op": totals}
