"""What gguf-info --ops shows: the ops of a token, and what each reads and computes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_cpu.attention.cache_types import cache_bytes
from gguf_run.kernels_cpu.panels.panels import matrix_bytes
from gguf_run.models.config import ModelConfig
from gguf_run.models.op_costs import Sizes, op_costs
from gguf_run.runtime.load.cache_plan import plan_cache
from gguf_run.runtime.load.options import DEFAULT_N_CTX, LoadOptions
from gguf_run.runtime.terminal.text import size_text, table


def ops_facts(file: GGUFFile, n_ctx: int | None, options: LoadOptions) -> dict[str, Any]:
    """Return the ops of a token that is the last of a full context, weights and cache as the CPU stores them.

    n_ctx: None for the model's, at most DEFAULT_N_CTX. options: their cache types are used.

    Raises GgufRunError for a file that is no model that this program runs.
    """
    config = ModelConfig.from_metadata(file.metadata, file.tensors)
    n_ctx = n_ctx or min(config.n_ctx_train, DEFAULT_N_CTX)
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


def ops_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The facts for people."""
    ops, totals = facts["ops"], facts["by_op"]
    every = {"op": "all", "count": len(ops)} | {key: sum(op[key] for op in ops) for key in ("nbytes", "operations")}
    yield f"ops of one token at the end of a context of {facts['n_ctx']} tokens, and what each reads and computes"
    yield ""
    yield from table(
        [f"op ({len(ops)})", "tensors", "types", "bytes read", "operations"],
        [[op["op"], _names(op["tensors"]), ", ".join(op["types"]), *_numbers(op)] for op in ops],
        "lllrr",
    )
    yield ""
    yield from table(
        ["op", "count", "bytes read", "operations"],
        [[row["op"], str(row["count"]), *_numbers(row)] for row in [*totals, every]],
        "lrrr",
    )


def _names(names: Sequence[str]) -> str:
    """blk.0.attn_q.weight, blk.0.attn_k.weight -> blk.0.attn_q, attn_k; biases are left out."""
    shown = [name.removesuffix(".weight") for name in names if not name.endswith(".bias")]
    return ", ".join([*shown[:1], *(name.split(".")[-1] for name in shown[1:])])


def _numbers(row: Mapping[str, Any]) -> list[str]:
    return [size_text(row["nbytes"]), f"{row['operations']:,}"]
