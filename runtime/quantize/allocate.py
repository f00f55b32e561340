"""Which type each tensor gets, so that a file of a given size is nearest to the original.

The KL divergences of single tensors about add up, and the divergence of one tensor grows with the squared error of its
weights. So one probe of a tensor (runtime/evaluate/sensitivity.py) tells what each type costs: divergence per error of
the probe, times the error of the type. The types of least total cost that fit into the size are then found.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import TensorType, type_by_name
from gguf_run.formats.errors import OptionError
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.writer import alignment_of, encode_header, padded
from gguf_run.formats.quantizers.quantizer import quantize
from gguf_run.runtime.quantize.file_types import file_type
from gguf_run.runtime.quantize.item import Item
from gguf_run.runtime.quantize.plan import Plan
from gguf_run.runtime.quantize.rules import Choice

# The types that are tried, and the one that is probed: the first row whose number divides the rows of a tensor.
_LADDERS = (
    (256, ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"), "Q4_K"),
    (32, ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), "IQ4_NL"),
)
_N_SAMPLE = 128  # rows of a tensor that tell the errors of all
_N_UNITS = 1 << 17  # the most units in which sizes are counted


def places(plan: Plan) -> list[list[Item]]:
    """Return the items whose types may be chosen; those of a list share a type, as Backend.experts needs it.

    The plan was made for one quantized type, `pure`.
    """
    found: dict[str, list[Item]] = {}
    for item in plan.items:
        if item.choice.is_free and item.target.type.is_quantized:
            found.setdefault(item.source.name.replace("ffn_gate_exps", "ffn_up_exps"), []).append(item)
    return list(found.values())


def name_of(place: Sequence[Item]) -> str:
    """Return the name by which a place is known."""
    return place[0].source.name


def probe_type(place: Sequence[Item]) -> TensorType:
    """Return the type with which a place is probed."""
    return type_by_name(next(probe for n, _, probe in _LADDERS if place[0].source.ne[0] % n == 0))


def _types(place: Sequence[Item]) -> list[TensorType]:
    """Return the types that a place may get. The last one keeps its weights, or all that F16 holds of F32."""
    source = place[0].source
    names = next(names for n, names, _ in _LADDERS if source.ne[0] % n == 0)
    return [*map(type_by_name, names), type_by_name("F16") if source.type.name == "F32" else source.type]


def with_type(item: Item, type: TensorType) -> Item:
    """Return the item with another type in the output."""
    return replace(item, target=replace(item.target, type=type), choice=Choice(type))


def relative_errors(place: Sequence[Item], types: Sequence[TensorType]) -> list[float]:
    """Return the squared errors of the weights in each type, as shares of the squared weights, both by importance.

    Some rows, evenly spaced, stand for all. FormatError if weights are NaN or infinite.
    """
    errors, power = np.zeros(len(types)), 0.0
    for item in place:
        source, n = item.source, item.source.ne[1]
        step = max(1, source.n_rows // _N_SAMPLE)
        for first in range(0, source.n_rows, n):  # an expert at a time: each has its own importance
            rows = [source.blocks(row, row + 1) for row in range(first, first + n, step)]
            x, importance = dequantize(np.concatenate(rows), source.type), item.importance_at(first)
            weights = np.ones(x.shape[1]) if importance is None else importance.astype(np.float64)
            power += float((x * x).sum(axis=0) @ weights)
            for i, type in enumerate(types):
                error = dequantize(quantize(x, type, importance, n_threads=1), type) - x
                errors[i] += float((error * error).sum(axis=0) @ weights)
    return (errors / power if power else errors).tolist()


def cheapest(sizes: Sequence[NDArray[np.int64]], costs: Sequence[NDArray[np.float64]], budget: int) -> list[int]:
    """Return one option of each place, so that their costs are least and their sizes at most `budget` together.

    sizes, costs: of each place i64[n] and f64[n], one for each of its options. The smallest options fit.
    The choice is the best there is. But sizes above _N_UNITS bytes are counted in larger units, and rounded up.
    """
    left = budget - sum(int(size.min()) for size in sizes)
    unit = max(1, -(-left // _N_UNITS))
    steps = [-(-(size - size.min()) // unit) for size in sizes]
    best, picks = np.zeros(left // unit + 1), []  # best[n]: the least cost of the places so far in n units
    for step, cost in zip(steps, costs, strict=True):
        total = np.full((len(step), len(best)), np.inf)
        for i, n in enumerate(step):
            total[i, n:] = best[: max(0, len(best) - n)] + cost[i]
        picks.append(total.argmin(axis=0).astype(np.uint8))
        best = total.min(axis=0)
    chosen, at = [], len(best) - 1
    for step, pick in zip(reversed(steps), reversed(picks), strict=True):
        chosen.append(int(pick[at]))
        at -= int(step[chosen[-1]])
    return chosen[::-1]


def size_at(plan: Plan, bits: float) -> int:
    """Return the bytes of a file of the plan's tensors with so many bits per weight."""
    return len(_header(plan)) + math.ceil(bits * sum(item.target.n_elements for item in plan.items) / 8)


def _header(plan: Plan) -> bytes:
    """Return the header of the planned file. Its length does not depend on types."""
    return encode_header(plan.metadata, [item.target for item in plan.items], "<", alignment_of(plan.metadata))


def _sizes(plan: Plan) -> tuple[int, list[NDArray[np.int64]]]:
    """Return the bytes that do not depend on the choice, and of each place i64[n], the bytes in each of its types."""
    alignment = alignment_of(plan.metadata)

    def n_bytes(items: Iterable[Item]) -> int:
        return sum(padded(item.target.nbytes, alignment) for item in items)

    sizes = [
        np.array([n_bytes(with_type(item, type) for item in place) for type in _types(place)]) for place in places(plan)
    ]
    free = n_bytes(item for place in places(plan) for item in place)
    return len(_header(plan)) + n_bytes(plan.items) - free, sizes


def check_size(plan: Plan, size: int) -> None:
    """OptionError if no types make a file of `size` bytes."""
    fixed, sizes = _sizes(plan)
    low, high = (fixed + sum(int(end(own)) for own in sizes) for end in (np.min, np.max))
    if not low <= size <= high:
        raise OptionError(f"the target is {size} bytes: the types for this model make files of {low} to {high} bytes")


def steadied(costs: Mapping[str, float]) -> dict[str, float]:
    """Return the geometric mean of each cost and the mean cost of the same matrix in all layers.

    Few tokens are read for a probe, and a single tensor can look as if it cost nothing, or all.
    """
    of_kind: dict[str, list[float]] = {}
    for name, cost in costs.items():
        of_kind.setdefault(_kind(name), []).append(cost)
    return {name: math.sqrt(cost * fmean(of_kind[_kind(name)])) for name, cost in costs.items()}


def _kind(name: str) -> str:
    """Return what a tensor is called in all layers."""
    return name.split(".", 2)[-1] if name.startswith("blk.") else name


def allocate(plan: Plan, costs: Mapping[str, float], size: int, n_threads: int) -> tuple[Plan, float]:
    """Return the plan with types that make a file of at most `size` bytes, and the KL divergence that is expected.

    costs: of each place, by name_of: KL divergence in nats / relative squared error of the weights.
    size: has passed check_size.
    """
    free, (fixed, sizes) = places(plan), _sizes(plan)
    with ThreadPoolExecutor(n_threads) as pool:
        errors = list(pool.map(relative_errors, free, map(_types, free)))
    costs = steadied({name_of(place): costs[name_of(place)] for place in free})
    kls = [costs[name_of(place)] * np.array(error) for place, error in zip(free, errors, strict=True)]
    picks = cheapest(sizes, kls, size - fixed)
    expected = sum(float(kl[pick]) for kl, pick in zip(kls, picks, strict=True))
    chosen = {item.target.name: _types(place)[pick] for place, pick in zip(free, picks, strict=True) for item in place}
    items = [with_type(item, chosen.get(item.target.name, item.target.type)) for item in plan.items]
    weights: Counter[str] = Counter()
    for item in items:
        weights[item.target.type.name] += item.target.n_elements
    kind = file_type(weights.most_common(1)[0][0]).id  # as llama.cpp names a file of a mixture that it does not know
    return replace(plan, items=items, metadata={**plan.metadata, "general.file_type": Typed("u32", kind)}), expected
