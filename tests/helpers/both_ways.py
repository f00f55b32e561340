"""Attention that sees later tokens too, of any backend, against a dense float64 softmax."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from cpu_ops import Step, error, new_cache
from numpy_backend import attend

from gguf_run.models.backend import Run
from gguf_run.models.operands import AttentionShape
from gguf_run.models.ops import Attend


def check_both_ways(backend: Any, shape: AttentionShape, steps: Sequence[Sequence[tuple[int, int, int]]]) -> float:
    """Run steps of runs (sequence, n_past, n_tokens) with a cache of f32. Return the largest error of a step."""
    n_seq, n_batch = 3, max(sum(n for _, _, n in step) for step in steps)
    n_ctx, rng = max(n_past + n for step in steps for _, n_past, n in step), np.random.default_rng(5)
    widths = [n * shape.head_dim for n in (shape.n_head, shape.n_head_kv, shape.n_head_kv)]
    values = rng.standard_normal((n_seq * n_ctx, sum(widths))).astype(np.float32)  # row seq * n_ctx + position
    step, at = Step(backend, n_batch), np.cumsum([0, *widths])
    qkv = step.input(values)
    parts = [qkv.columns(int(at[i]), widths[i]) for i in range(3)]
    out = step.buffer(shape.n_head * shape.head_dim)
    cache = new_cache(backend, shape, n_ctx, n_seq, "f32")
    step.add(Attend(*parts, cache, shape, out))
    step.finish(out)
    worst = 0.0
    for runs in steps:
        rows = [seq * n_ctx + n_past + np.arange(n) for seq, n_past, n in runs]
        ids = np.concatenate(rows).astype(np.int32)
        found = step.program.run(ids, [Run(*run) for run in runs], range(len(ids))).values.copy()
        expected = []
        for (seq, n_past, n), own in zip(runs, rows, strict=True):
            held = values[seq * n_ctx : seq * n_ctx + n_past + n].astype(np.float64)
            q, k, v = (x.reshape(len(x), -1, shape.head_dim) for x in (
                values[own, : at[1]].astype(np.float64), held[:, at[1] : at[2]], held[:, at[2] :]
            ))  # fmt: skip
            limits = shape.scale, shape.window, shape.softcap, None, False, False
            expected.append(attend(q, k, v, n_past + np.arange(n), *limits).reshape(n, -1))
        worst = max(worst, error(found, np.concatenate(expected)))
    return worst
