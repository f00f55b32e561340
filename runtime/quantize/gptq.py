"""The method gptq: rounding that lets later columns of a matrix make up for the errors of earlier ones.

formats/quantizers/feedback.py does it, for one matrix. Here: which matrices, with which second moments, and when these
are factorized.
"""

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import OptionError
from gguf_run.formats.gguf.moments import Moments
from gguf_run.formats.quantizers.feedback import round_rows
from gguf_run.formats.quantizers.metric import Metric, make_metric, memory_for
from gguf_run.runtime.quantize.item import Change, Item
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

    def __init__(self, moments: Moments, changes: Mapping[str, Change], options: GptqOptions) -> None:
        """changes: to the columns of the matrices that read an input, by its name."""
        self._moments, self._changes, self._options = moments, changes, options
        self._lock = threading.Lock()
        self._metric = functools.lru_cache(_KEPT)(self._make_metric)

    def _make_metric(self, group: str, expert: int, block: int) -> Metric:
        h = self._moments.mean(group, expert)
        if group in self._changes:
            h = self._changes[group].moments(h, expert)
        return make_metric(h, block, self._options.rho, bool(self._options.order))

    def __call__(self, item: Item, x: NDArray[np.float32], first: int) -> NDArray[np.uint8]:
        group, type = self._moments.group(item.source.name), item.target.type
        assert group is not None
        with self._lock:  # a second thread waits for the first one's factor
            metric = self._metric(group, item.expert(first), type.block_size)
        return round_rows(x, type, metric, self._options.sweeps, bool(self._options.refit))


def with_gptq(plan: Plan, moments: Moments, options: GptqOptions, available: int | None = None) -> Plan:
    """Return the plan with this method for each matrix whose second moments are known. A note names the others.

    available: bytes of memory; None: not known.
    FormatError for moments that are not finite. OptionError if the method fits no matrix or if memory is too small.
    """
    rounded = [item for item in plan.items if item.target.type.is_quantized and not item.is_copy]
    groups = {item.target.name: group for item in rounded if (group := moments.group(item.source.name))}
    if not groups:
        raise OptionError("--method gptq: no matrix becomes quantized and has second moments: choose another type")
    for group in {*groups.values()}:
        moments.sums(group)
    n = max(item.source.ne[0] for item in rounded if item.target.name in groups)
    needed = memory_for(n)
    if available is not None and needed > available:
        raise OptionError(
            f"--method gptq: matrices of {n} columns need {needed / 1e6:.0f} MB of memory, "
            f"{available / 1e6:.0f} MB are available: take a machine with more memory"
        )
    changes = {groups[item.target.name]: item.change for item in rounded if item.target.name in groups and item.change}
    rounding = Gptq(moments, changes, options)
    items = [replace(item, rounding=rounding) if item.target.name in groups else item for item in plan.items]
    others = [item.target.name for item in rounded if item.target.name not in groups]
    notes = [f"rounded without gptq, for lack of second moments: {' '.join(others)}"] if others else []
    return replace(plan, items=items, notes=[*plan.notes, *notes])
