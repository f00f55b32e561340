"""Which type each tensor gets, so that a file of a given size is nearest to the original.

The KL divergences of single tensors about add up, and the divergence of one tensor grows with the squared error of its
weights. So one probe of a tensor (runtime/evaluate/sensitivity.py) tells what each type costs: divergence per error of
the probe, times the error of the type. The types of least total cost that fit into the size are then found.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

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
    (256, ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"), "Q3_K"),
    (32, ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), "IQ4_NL"),
)
_N_SAMPLE = 128  # rows of a tensor that tell the errors of all
_N_UNITS = 1 << 17  # the most units in which sizes are counted


def is_place(item: Item) -> bool:
    """Whether the type of an item may be chosen. Its plan was made for one quantized type, `pure`."""
    return item.choice.is_free and item.target.type.is_quantized


def probe_type(item: Item) -> TensorType:
    """Return the type with which a place is probed."""
    return type_by_name(next(probe for n, _, probe in _LADDERS if item.source.ne[0] % n == 0))


def _types(item: Item) -> list[TensorType]:
    """Return the types that a place may get. The last one keeps its weights, or all that F16 holds of F32."""
    names = next(names for n, names, _ in _LADDERS if item.source.ne[0] % n == 0)
    return [*map(type_by_name, names), type_by_name("F16") if item.source.type.name == "F32" else item.source.type]


def with_type(item: Item, type: TensorType) -> Item:
    """Return the item with another type in the output."""
    return replace(item, target=replace(item.target, type=type), choice=Choice(type))


def relative_errors(item: Item, types: Sequence[TensorType]) -> list[float]:
    """Return the squared errors of the weights in each type, as shares of the squared weights, both by importance.

    Some rows, evenly spaced, stand for all. FormatError if weights are NaN or infinite.
    """
    source, n = item.source, item.source.ne[1]
    step = max(1, source.n_rows // _N_SAMPLE)
    errors, power = np.zeros(len(types)), 0.0
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
    alignment, fixed, sizes = alignment_of(plan.metadata), len(_header(plan)), []
    for item in plan.items:
        types = _types(item) if is_place(item) else [item.target.type]
        own = np.array([padded(replace(item.target, type=type).nbytes, alignment) for type in types])
        if is_place(item):
            sizes.append(own)
        else:
            fixed += int(own[0])
    return fixed, sizes


def check_size(plan: Plan, size: int) -> None:
    """OptionError if no types make a file of `size` bytes."""
    fixed, sizes = _sizes(plan)
    low, high = (fixed + sum(int(end(own)) for own in sizes) for end in (np.min, np.max))
    if not low <= size <= high:
        raise OptionError(f"the target is {size} bytes: the types for this model make files of {low} to {high} bytes")


def allocate(plan: Plan, costs: Mapping[str, float], size: int, n_threads: int) -> tuple[Plan, float]:
    """Return the plan with types that make a file of at most `size` bytes, and the KL divergence that is expected.

    costs: of each place, by the name in the input: KL divergence in nats / relative squared error of the weights.
    size: has passed check_size.
    """
    places = [item for item in plan.items if is_place(item)]
    fixed, sizes = _sizes(plan)
    with ThreadPoolExecutor(n_threads) as pool:
        errors = list(pool.map(relative_errors, places, map(_types, places)))
    kls = [costs[item.source.name] * np.array(error) for item, error in zip(places, errors, strict=True)]
    picks = cheapest(sizes, kls, size - fixed)
    expected = sum(float(kl[pick]) for kl, pick in zip(kls, picks, strict=True))
    chosen = {item.source.name: _types(item)[pick] for item, pick in zip(places, picks, strict=True)}
    items = [with_type(i, chosen[i.source.name]) if is_place(i) else i for i in plan.items]
    weights: Counter[str] = Counter()
    for item in items:
        weights[item.target.type.name] += item.target.n_elements
    kind = file_type(weights.most_common(1)[0][0]).id  # as llama.cpp names a file of a mixture that it does not know
    return replace(plan, items=items, metadata={**plan.metadata, "general.file_type": Typed("u32", kind)}), expected
