"""What to do where a model does not fit: a shorter context, or a smaller cache type."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.load.describe import describe_plan
from gguf_run.runtime.terminal.text import size_text

_CTX_STEP = 256  # a context that is advised is a multiple of this
_ADVISED = ("q8_0", "int8", "q4_0")  # smaller cache types to advise, best first


def does_not_fit(plan: Any, need: Any, available: int) -> GgufRunError:
    """Return the error that a plan needs more than the available bytes. plan: a MemoryPlan. need: its MemoryNeed."""
    return GgufRunError(
        f"out of memory: {size_text(need.total)} needed (weights {size_text(need.weights)}, KV cache of "
        f"{plan.n_ctx} tokens as {describe_plan(plan.cache)} {size_text(need.cache)}), {size_text(available)} "
        f"available: {advice(plan, available)}"
    )


def advice(plan: Any, available: int) -> str:
    """Return what would fit into the available bytes. plan: a MemoryPlan."""
    n_ctx = largest_context(plan, lambda other: other.needed().total <= available)
    advice = [f"--ctx-size {n_ctx}"] if n_ctx else []
    for name in filter(plan.allows, _ADVISED):
        need = plan.with_type(name).needed()
        if need.total <= available and need.cache < plan.cache_bytes():
            advice.append(f"--cache-type {name}")
            break
    if not advice:
        return "choose a smaller context (--ctx-size) or a smaller model"
    return f"{' or '.join(advice)} would fit"


def largest_context(plan: Any, fits: Callable[[Any], bool]) -> int:
    """Return the largest multiple of _CTX_STEP up to n_ctx with which the plan fits; 0 if there is none."""
    low, high = 0, plan.n_ctx // _CTX_STEP + 1  # in steps: low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(replace(plan, n_ctx=middle * _CTX_STEP)) else (low, middle)
    return low * _CTX_STEP
