"""Chooses which device runs which part of a model: pure functions of options and sizes, tested without any device.

The last N layers and the output run on GPUs, the embeddings and the first layers on the CPU. So the hidden state moves
from one device to the other once, and the output, which is the largest matrix, is on the faster device. An embedding is
one copied row, which needs no GPU: the embeddings are beside the first layer if there is room. Each of several GPUs
gets consecutive layers.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.kernels_gpu.panels.panels import matrix_bytes
from gguf_run.kernels_gpu.sizes import cache_bytes, program_bytes
from gguf_run.models.config import ModelConfig
from gguf_run.models.pages import pages_stored
from gguf_run.runtime.load.advice import largest_context
from gguf_run.runtime.load.cache_plan import state_bytes
from gguf_run.runtime.load.memory import N_OUTPUTS, MemoryNeed, MemoryPlan, WeightSizes
from gguf_run.runtime.load.options import CPU, Device, Placement, Wanted, cpu_only
from gguf_run.runtime.terminal.text import size_text

# Bytes of a GPU that stay free: for compiled kernels, captured graphs, libraries and what the allocator rounds up.
MARGIN = 500_000_000


@dataclass(frozen=True)
class GpuSizes:
    """Bytes that the parts of a model take on a GPU. They are the same for every placement."""

    weights: WeightSizes  # without the experts that stay on the CPU
    caches: tuple[int, ...]  # of each layer
    buffers: int  # of each GPU
    n_bound: int = 0  # the last layers that must be on one device: they read each other's keys and values
    is_mapped: bool = False  # embeddings are read from the file, beside the CPU


def gpu_sizes(plan: MemoryPlan) -> GpuSizes:
    """Return the bytes that a model takes on GPUs. Weights and caches are exact, buffers are an upper bound."""
    weights = plan.weights(matrix_bytes)
    layers = list(weights.layers)
    for il in range(plan.n_cpu_moe):
        layers[il] -= weights.experts[il]
    caches = [
        cache_bytes(shape, kind, pages_stored(shape.window, plan.n_ctx, plan.n_rows, plan.n_seq, plan.n_cells))
        + state_bytes(plan.config, il, plan.n_seq)
        if plan.config.layers[il].kv_layer == il
        else 0
        for il, kind in enumerate(plan.cache)
        for shape in [plan.config.attention(il)]
    ]
    n_outputs = max(min(N_OUTPUTS, plan.n_rows), plan.n_seq)
    buffers = program_bytes(plan.config, plan.tensors, plan.n_rows, n_outputs, plan.widths)
    weights = replace(weights, layers=tuple(layers))
    return GpuSizes(weights, tuple(caches), buffers, n_bound(plan.config), plan.config.has_ple)


def n_bound(config: ModelConfig) -> int:
    """Return how many layers, from the last on, must be on one device, because one reads another's keys and values."""
    read = (layer.kv_layer for il, layer in enumerate(config.layers) if layer.kv_layer != il)
    return config.n_layer - min(read, default=config.n_layer)


def needed(placement: Placement, device: Device, sizes: GpuSizes) -> MemoryNeed:
    """Return the bytes that a placement takes on one GPU."""
    weights, here = sizes.weights, [il for il, place in enumerate(placement.layers) if place == device]
    total = sum(weights.layers[il] for il in here)
    has_output, has_embedding = placement.layers[-1] == device, placement.embedding == device
    total += weights.output if has_output else 0
    total += weights.embedding if has_embedding and not (has_output and weights.tied) else 0
    return MemoryNeed(total, sum(sizes.caches[il] for il in here), sizes.buffers)


def fits(placement: Placement, sizes: GpuSizes, free: Mapping[Device, int]) -> bool:
    """Whether every GPU has room for its part of a placement. free: bytes of each GPU."""
    used = (device for device in placement.devices if device != CPU)
    return all(needed(placement, device, sizes).total + MARGIN <= free[device] for device in used)


def _candidates(n_gpu: int, sizes: GpuSizes, free: Mapping[Device, int], split: Sequence[float]) -> Iterator[Placement]:
    """Yield placements of the last n_gpu layers, the better one first."""
    weights, n_layer = sizes.weights, len(sizes.caches)
    layers = [CPU] * (n_layer - n_gpu)
    if 0 < n_gpu < sizes.n_bound:
        return
    if n_gpu:
        each = [weights.layers[il] + sizes.caches[il] for il in range(n_layer - n_gpu, n_layer)]
        each[-1] += weights.output
        shares = list(split or (max(0, size - MARGIN - sizes.buffers) for size in free.values()))
        shares = shares if any(shares) else [1.0] * len(shares)
        total, at = sum(each), 0.0
        ends = [total * sum(shares[: i + 1]) / sum(shares) for i in range(len(shares))]
        for size in each:  # the GPU in whose share the layer's middle is gets the layer
            middle = at + size / 2
            layers.append(next(gpu for gpu, end in zip(free, ends, strict=True) if middle < end))
            at += size
    layers[n_layer - sizes.n_bound :] = layers[-1:] * sizes.n_bound
    if layers[0] != CPU and not sizes.is_mapped:
        yield Placement(layers[0], tuple(layers))
    yield Placement(CPU, tuple(layers))


def place(plan: MemoryPlan, wanted: Wanted, free: Mapping[Device, int]) -> Placement:
    """Return the device of each part of a model.

    free: the free bytes of each GPU, in the order in which GPUs get layers; may be empty.
    OptionError for --gpu-layers out of range; GgufRunError, which says what would fit, if there is not enough memory.
    """
    n_layer = plan.config.n_layer
    if wanted.n_gpu is not None and wanted.n_gpu > n_layer:
        raise OptionError(f"--gpu-layers {wanted.n_gpu}: allowed are 0 to {n_layer}, the model's layers, all and auto")
    bound = n_bound(plan.config)
    if wanted.n_gpu is not None and 0 < wanted.n_gpu < bound:
        raise OptionError(
            f"--gpu-layers {wanted.n_gpu}: allowed are 0 and {bound} to {n_layer}: the last {bound} layers "
            "share keys and values, and must be on one device"
        )
    if not free:
        return cpu_only(n_layer)
    n_gpu = n_layer if wanted.n_gpu == -1 else wanted.n_gpu
    numbers = range(n_layer, -1, -1) if n_gpu is None else range(n_gpu, n_gpu + 1)
    found, plan = _search(with_experts_on_cpu(plan, wanted), numbers, wanted, free)
    if found is None or (not found.n_gpu and n_gpu != 0 and wanted.insists):
        raise GgufRunError(_too_small(plan, n_gpu or max(1, bound), wanted.split, free))
    return replace(found, n_cpu_moe=plan.n_cpu_moe if found.n_gpu else 0)


def _search(
    plan: MemoryPlan, numbers: range, wanted: Wanted, free: Mapping[Device, int]
) -> tuple[Placement | None, MemoryPlan]:
    """Return a placement for the first of these numbers of layers that fits on GPUs, and the plan for it.

    Experts are most of a model's bytes, and a token needs a few of them. So where the choice is free, experts are moved
    to the CPU before layers are.
    """
    found = fit(gpu_sizes(plan), numbers, wanted.split, free, fewest=not wanted.devices)
    n_layer, is_free = plan.config.n_layer, wanted.n_gpu is None and wanted.n_cpu_moe is None
    if not is_free or not plan.config.n_expert or (found and found.n_gpu == numbers[0]):
        return found, plan
    for n in range(1, n_layer + 1):
        plan = replace(plan, n_cpu_moe=n)
        tried = numbers if n == n_layer else numbers[:1]
        if found := fit(gpu_sizes(plan), tried, wanted.split, free, fewest=not wanted.devices):
            break
    return found, plan


def with_experts_on_cpu(plan: MemoryPlan, wanted: Wanted) -> MemoryPlan:
    """Return the plan with the experts on the CPU that --cpu-moe and --n-cpu-moe ask for."""
    n, n_layer = wanted.n_cpu_moe or 0, plan.config.n_layer
    if n > n_layer:
        raise OptionError(f"--n-cpu-moe {n}: allowed are 0 to {n_layer}, the model's layers")
    return replace(plan, n_cpu_moe=0 if not plan.config.n_expert else n_layer if n == -1 else n)


def holds_all(plan: MemoryPlan, wanted: Wanted, free: Mapping[Device, int]) -> bool:
    """Whether these GPUs have room for all layers that the user wants."""
    n_gpu = plan.config.n_layer if wanted.n_gpu in (None, -1) else wanted.n_gpu
    plan = with_experts_on_cpu(plan, wanted)
    return fit(gpu_sizes(plan), (n_gpu or 0,), wanted.split, free) is not None


def fit(
    sizes: GpuSizes,
    numbers: Sequence[int],
    split: Sequence[float],
    free: Mapping[Device, int],
    fewest: bool = False,
) -> Placement | None:
    """Return a placement for the first of these numbers of layers that fits on GPUs; None if none does.

    fewest: try one GPU, then the first two, the first three, ...
    """
    groups: list[Mapping[Device, int]] = [free]
    if fewest and len(free) > 1:
        groups = [{device: size} for device, size in free.items()]
        groups += [dict(itertools.islice(free.items(), n)) for n in range(2, len(free) + 1)]
    for n_gpu in numbers:
        for group in groups:
            for placement in _candidates(n_gpu, sizes, group, split):
                if fits(placement, sizes, group):
                    return placement
    return None


def _too_small(plan: MemoryPlan, n_gpu: int, split: Sequence[float], free: Mapping[Device, int]) -> str:
    sizes = gpu_sizes(plan)
    *_, placement = _candidates(n_gpu, sizes, free, split)
    needs = {device: needed(placement, device, sizes) for device in placement.devices if device != CPU}
    device, need = next((d, n) for d, n in needs.items() if n.total + MARGIN > free[d])
    fewer = fit(sizes, range(n_gpu - 1, 0, -1), split, free)
    n_ctx = largest_context(plan, lambda other: fit(gpu_sizes(other), (n_gpu,), split, free) is not None)
    advice = [f"--gpu-layers {fewer.n_gpu}"] if fewer else []
    without = replace(plan, n_cpu_moe=plan.config.n_layer)
    if plan.config.n_expert and fit(gpu_sizes(without), (n_gpu,), split, free):
        advice.append("--cpu-moe")
    advice += [f"--ctx-size {n_ctx}"] if n_ctx else []
    return (
        f"--gpu-layers {n_gpu}: out of memory on {device}: {size_text(need.total)} needed (weights "
        f"{size_text(need.weights)}, KV cache of {plan.n_ctx} tokens {size_text(need.cache)}, buffers "
        f"{size_text(need.buffers)}) and {size_text(MARGIN)} to spare, {size_text(free[device])} free: "
        + (f"{' or '.join(advice)} would fit" if advice else "use a smaller context (--ctx-size) or --device cpu")
    )


def plan_lines(plan: MemoryPlan, placement: Placement, free: Mapping[Device, int]) -> Iterator[str]:
    """Yield a line for each device: what runs there, and its memory."""
    plan = replace(plan, n_gpu=placement.n_gpu, n_cpu_moe=placement.n_cpu_moe)
    sizes = gpu_sizes(plan)
    first = plan.config.n_layer - placement.n_gpu  # on a GPU
    for device in placement.devices:
        here = [il for il, place in enumerate(placement.layers) if place == device]
        parts = ["embeddings"] if placement.embedding == device else []
        parts += [_span(here)] if here else []
        parts += ["output"] if placement.layers[-1] == device else []
        if device == CPU:
            if placement.n_cpu_moe > first:
                parts.append(f"experts of {_span(range(first, placement.n_cpu_moe))}")
            need, end = plan.needed(), ""
        else:
            need = needed(placement, device, sizes)
            end = f", of {size_text(free[device])} free ({size_text(MARGIN)} to spare)"
        yield (
            f"{device}: {', '.join(parts)}: {size_text(need.total)} (weights {size_text(need.weights)}, "
            f"KV cache {size_text(need.cache)}, buffers {size_text(need.buffers)}){end}"
        )


def _span(layers: Sequence[int]) -> str:
    return f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
