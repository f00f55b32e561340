"""The method gptq: rounding that lets later columns of a matrix make up for the errors of earlier ones.

formats/quantizers/feedback.py does it, for one matrix. Here: which matrices, with which second moments, and when these
are factorized.
"""

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.gguf.moments import Moments
from gguf_run.formats.quantizers.feedback import Metric, make_metric, round_rows
from gguf_run.runtime.quantize.item import Item
from gguf_run.runtime.quantize.plan import Plan

_KEPT = 3  # factorized inputs in memory: the matrices of one input are near each other in a file


@dataclass(frozen=True)
class GptqOptions:
    """The stages of the method. docs/quantizing.md says what each of them gains."""

    rho: float = 0.5  # second moments are shrunk by so much to their diagonal
    order: int = 1  # 1: blocks of columns with large inputs come first
    sweeps: int = 2  # times that codes are improved one by one
    refit: int = 1  # 1: scales are improved, too


class Gptq:
    """The rounding of all matrices of a model."""

    def __init__(self, moments: Moments, options: GptqOptions) -> None:
        self._moments, self._options = moments, options
        self._lock = threading.Lock()
        self._metric = functools.lru_cache(_KEPT)(self._make_metric)

    def _make_metric(self, group: str, expert: int, block: int) -> Metric:
        return make_metric(self._moments.mean(group, expert), block, self._options.rho, bool(self._options.order))

    def __call__(self, item: Item, x: NDArray[np.float32], first: int) -> NDArray[np.uint8]:
        group = self._moments.group(item.source.name)
        assert group is not None
        expert = first // item.source.ne[1] if len(item.source.ne) > 2 else 0
        type = item.target.type
        with self._lock:  # a second thread waits for the first one's factor
            metric = self._metric(group, expert, type.block_size)
        return round_rows(x, type, metric, self._options.sweeps, bool(self._options.refit))


def with_gptq(plan: Plan, moments: Moments, options: GptqOptions) -> Plan:
    """Return the plan with this method for each matrix whose second moments are known. A note names the others."""
    rounding = Gptq(moments, options)
    items = [replace(item, rounding=rounding) if _is_known(item, moments) else item for item in plan.items]
    return replace(plan, items=items, metadata={**plan.metadata, "quantize.method": "gptq"})


def _is_known(item: Item, moments: Moments) -> bool:
    is_rounded = item.target.type.is_quantized and not item.is_copy
    return is_rounded and item.importance is not None and moments.group(item.source.name) is not None
