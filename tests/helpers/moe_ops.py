"""A mixture of experts as one op, for the tests of both backends."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from cpu_ops import MemoryTensor, Step, f32_tensor, random_tensor, weights_of

from gguf_run.models.rare_ops import Moe
from gguf_run.models.routing import Mixture

N_TOKENS = 40


@dataclass(frozen=True)
class Case:
    """A mixture of experts to test."""

    types: tuple[str, str]  # tensor type of gate and up, tensor type of down
    n_embd: int
    n_ff: int
    n_expert: int
    moe: Mixture
    biases: bool = False
    n_threads: int = 2
    form: str = "gate and up"  # "fused": one tensor of both; "up": there is no gate
    bias: float = 0.0  # size of the router's bias
    factors: bool = False  # of the experts' results
    accumulate: bool = True


def experts(type_name: str, n_expert: int, n_out: int, n_in: int, seed: int) -> MemoryTensor:
    return replace(random_tensor(type_name, n_expert * n_out, n_in, seed), ne=(n_in, n_out, n_expert))


def program(case: Case, backend: Any, *, observe: bool = False, scores: np.ndarray | None = None) -> tuple[Step, Any]:
    """Return a program of out += moe(x), with products of about 1, and its observed sums. scores: the logits."""
    rng = np.random.default_rng(1)
    widths = {"gate and up": [case.n_ff] * 2, "fused": [2 * case.n_ff], "up": [case.n_ff]}[case.form]
    shapes = [(case.types[0], width, case.n_embd) for width in widths]
    tensors = [
        experts(type_name, case.n_expert, n_out, n_in, seed)
        for seed, (type_name, n_out, n_in) in enumerate([*shapes, (case.types[1], case.n_embd, case.n_ff)])
    ]
    scale = 2 / np.sqrt((weights_of(tensors[:1]) ** 2).mean() * case.n_embd)
    if case.factors:
        tensors[-1] = replace(tensors[-1], scales=tuple(rng.uniform(0.5, 2, case.n_expert).tolist()))
    if case.biases:
        tensors += [f32_tensor(rng.standard_normal((case.n_expert, t.ne[1])).astype(np.float32)) for t in tensors]
    step = Step(backend, N_TOKENS)
    x, logits, out = (
        step.input((rng.standard_normal((N_TOKENS, width)) * factor).astype(np.float32))
        for width, factor in ((case.n_embd, scale), (case.n_expert, 2), (case.n_embd, 1))
    )
    if scores is not None:
        logits = step.input(scores)
    squares = (
        (backend.squares(case.n_embd, case.n_expert), backend.squares(case.n_ff, case.n_expert)) if observe else None
    )
    bias = rng.standard_normal(case.n_expert) * case.bias
    shift = backend.vector([f32_tensor(bias[None])]) if case.bias else None
    step.add(Moe(x, logits, backend.experts(tensors), case.moe, out, squares, shift, case.accumulate))
    return step.finish(out), squares
