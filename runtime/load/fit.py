"""Chooses which device runs which part of a model: pure functions of options and sizes, tested without any device.

The last N layers and the output run on GPUs, the embeddings and the first layers on the CPU. So the hidden state
crosses over once, the output, the largest matrix, is on the faster device, and logits are made where the last layer
is. Looking up embeddings is a copy of one row, for which no GPU is needed: they follow the first layer if there is
room. Several GPUs have consecutive layers each.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.kernels_gpu.attention.cache_types import cache_format
from gguf_run.runtime.load.memory import GpuSizes, MemoryPlan
from gguf_run.runtime.load.options import Wanted
from gguf_run.runtime.load.placement import CPU, Device, Placement, cpu_only
from gguf_run.runtime.terminal.text import size_text

# Bytes of a GPU that stay free: for compiled kernels, captured graphs, libraries and what the allocator rounds up.
MARGIN = 500_000_000


def needed(placement: Placement, device: Device, sizes: GpuSizes) -> tuple[int, int, int]:
    """Return the bytes of weights, cache and buffers that a placement takes on a GPU."""
    weights, here = sizes.weights, [il for il, place in enumerate(placement.layers) if place == device]
    total = sum(weights.layers[il] for il in here)
    has_output, has_embedding = placement.layers[-1] == device, placement.embedding == device
    total += weights.output if has_output else 0
    total += weights.embedding if has_embedding and not (has_output and weights.tied) else 0
    return total, sum(sizes.caches[il] for il in here), sizes.buffers


def fits(placement: Placement, sizes: GpuSizes, free: Mapping[Device, int]) -> bool:
    """Whether every GPU has room for its part of a placement. free: bytes of each GPU."""
    used = (device for device in placement.devices if device != CPU)
    return all(sum(needed(placement, device, sizes)) + MARGIN <= free[device] for device in used)


def _candidates(n_gpu: int, sizes: GpuSizes, free: Mapping[Device, int], split: Sequence[float]) -> Iterator[Placement]:
    """Placements of the last n_gpu layers, the better one first."""
    weights, n_layer = sizes.weights, len(sizes.caches)
    layers = [CPU] * (n_layer - n_gpu)
    if n_gpu:
        each = [weights.layers[il] + sizes.caches[il] for il in range(n_layer - n_gpu, n_layer)]
        each[-1] += weights.output
        shares = list(split or (max(0, size - MARGIN - sizes.buffers) for size in free.values()))
        shares = shares if any(shares) else [1.0] * len(shares)
        total, at = sum(each), 0.0
        ends = [total * sum(shares[: i + 1]) / sum(shares) for i in range(len(shares))]
        for size in each:  # a layer belongs to the GPU in whose share its middle is
            middle = at + size / 2
            layers.append(next(gpu for gpu, end in zip(free, ends, strict=True) if middle < end))
            at += size
    if layers[0] != CPU:
        yield Placement(layers[0], tuple(layers))
    yield Placement(CPU, tuple(layers))


def place(plan: MemoryPlan, wanted: Wanted, free: Mapping[Device, int]) -> Placement:
    """Where everything goes. free: bytes of each GPU, in the order in which they get layers; none: all on the CPU.

    OptionError for --gpu-layers out of range and for a cache type that GPUs do not have; GgufRunError, which says what
    would fit, if there is not enough memory.
    """
    n_layer = plan.config.n_layer
    if wanted.n_gpu is not None and wanted.n_gpu > n_layer:
        raise OptionError(f"--gpu-layers {wanted.n_gpu}: allowed are 0 to {n_layer}, the model's layers, all and auto")
    if not free:
        return cpu_only(n_layer)
    n_gpu, (most, lacking) = n_layer if wanted.n_gpu == -1 else wanted.n_gpu, most_layers(plan)
    if wanted.insists and (n_gpu or 1) > most:
        raise OptionError(lacking)
    numbers = range(most, -1, -1) if n_gpu is None else (n_gpu,)
    plan = with_experts_on_cpu(plan, wanted)
    found = fit(plan.gpu_sizes(), numbers, wanted.split, free, fewest=not wanted.devices)
    if n_gpu is None and wanted.n_cpu_moe is None and plan.config.n_expert and (not found or found.n_gpu < most):
        # Experts are most of a model, of which a token needs a few: all else is better off on a GPU.
        for n in range(1, n_layer + 1):
            plan = replace(plan, n_cpu_moe=n)
            last = numbers if n == n_layer else (most,)
            found = fit(plan.gpu_sizes(), last, wanted.split, free, fewest=not wanted.devices)
            if found is not None:
                break
    found = found and replace(found, n_cpu_moe=plan.n_cpu_moe if found.n_gpu else 0)
    if found is not None and (found.n_gpu or n_gpu == 0 or not wanted.insists):
        return found
    raise GgufRunError(_too_small(plan, n_gpu or 1, wanted.split, free))


def with_experts_on_cpu(plan: MemoryPlan, wanted: Wanted) -> MemoryPlan:
    """The plan as --cpu-moe and --n-cpu-moe have it."""
    n, n_layer = wanted.n_cpu_moe or 0, plan.config.n_layer
    if n > n_layer:
        raise OptionError(f"--n-cpu-moe {n}: allowed are 0 to {n_layer}, the model's layers")
    return replace(plan, n_cpu_moe=0 if not plan.config.n_expert else n_layer if n == -1 else n)


def holds_all(plan: MemoryPlan, wanted: Wanted, free: Mapping[Device, int]) -> bool:
    """Whether GPUs hold all layers that are wanted and that GPUs can have."""
    n_gpu = plan.config.n_layer if wanted.n_gpu in (None, -1) else wanted.n_gpu
    plan = with_experts_on_cpu(plan, wanted)
    return fit(plan.gpu_sizes(), (min(n_gpu or 0, most_layers(plan)[0]),), wanted.split, free) is not None


def most_layers(plan: MemoryPlan) -> tuple[int, str]:
    """How many of the last layers GPUs can have, whatever their size, and why not more."""
    for n_gpu, il in enumerate(reversed(range(plan.config.n_layer))):
        try:
            for name in (plan.cache[il].k, plan.cache[il].v):
                cache_format(name, plan.config.attention(il).head_dim)
        except OptionError as error:
            return n_gpu, str(error)
    return plan.config.n_layer, ""


def fit(
    sizes: GpuSizes,
    numbers: Sequence[int],
    split: Sequence[float],
    free: Mapping[Device, int],
    fewest: bool = False,
) -> Placement | None:
    """The first of these numbers of layers on GPUs that fits. fewest: on one GPU, else on the first two, three ..."""
    groups = [free]
    if fewest and len(free) > 1:
        groups = [*({device: size} for device, size in free.items()), *_first_ones(free)]
    for n_gpu in numbers:
        for group in groups:
            for placement in _candidates(n_gpu, sizes, group, split):
                if fits(placement, sizes, group):
                    return placement
    return None


def _first_ones(free: Mapping[Device, int]) -> Iterator[Mapping[Device, int]]:
    for n in range(2, len(free) + 1):
        yield dict(itertools.islice(free.items(), n))


def _too_small(plan: MemoryPlan, n_gpu: int, split: Sequence[float], free: Mapping[Device, int]) -> str:
    sizes = plan.gpu_sizes()
    *_, placement = _candidates(n_gpu, sizes, free, split)
    needs = {device: needed(placement, device, sizes) for device in placement.devices if device != CPU}
    device, need = next((d, n) for d, n in needs.items() if sum(n) + MARGIN > free[d])
    fewer = fit(sizes, range(n_gpu - 1, 0, -1), split, free)
    n_ctx = plan.largest_context(lambda other: fit(other.gpu_sizes(), (n_gpu,), split, free) is not None)
    advice = [f"--gpu-layers {fewer.n_gpu}"] if fewer else []
    without = replace(plan, n_cpu_moe=plan.config.n_layer)
    if plan.config.n_expert and fit(without.gpu_sizes(), (n_gpu,), split, free):
        advice.append("--cpu-moe")
    advice += [f"--ctx-size {n_ctx}"] if n_ctx else []
    total, weights, cache, buffers = map(size_text, (sum(need), *need))
    return (
        f"--gpu-layers {n_gpu}: out of memory on {device}: {total} needed (weights {weights}, KV cache of {plan.n_ctx} "
        f"tokens {cache}, buffers {buffers}) and {size_text(MARGIN)} to spare, {size_text(free[device])} free: "
        + (f"{' or '.join(advice)} would fit" if advice else "use a smaller context (--ctx-size) or --device cpu")
    )


def _span(layers: Sequence[int]) -> str:
    return f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"


def plan_lines(plan: MemoryPlan, placement: Placement, free: Mapping[Device, int]) -> Iterator[str]:
    """What runs where, a line for each device."""
    plan = plan.on_cpu(placement.n_gpu, placement.n_cpu_moe)
    sizes = plan.gpu_sizes()
    first = plan.config.n_layer - placement.n_gpu  # on a GPU
    for device in placement.devices:
        here = [il for il, place in enumerate(placement.layers) if place == device]
        parts = ["embeddings"] if placement.embedding == device else []
        parts += [_span(here)] if here else []
        parts += ["output"] if placement.layers[-1] == device else []
        if device == CPU:
            if placement.n_cpu_moe > first:
                parts += [f"experts of {_span(range(first, placement.n_cpu_moe))}"]
            need = plan.needed()
            numbers, end = (need.weights, need.cache, need.buffers), ""
        else:
            numbers = needed(placement, device, sizes)
            end = f", of {size_text(free[device])} free ({size_text(MARGIN)} to spare)"
        weights, cache, buffers = map(size_text, numbers)
        yield (
            f"{device}: {', '.join(parts)}: {size_text(sum(numbers))} (weights {weights}, KV cache {cache}, buffers "
            f"{buffers}){end}"
        )
