"""Which device runs which part of a model: pure functions of options and sizes, tested without any device.

The last N layers and the output run on GPUs, the embeddings and the first layers on the CPU. So the hidden state
crosses over once, the output, the largest matrix, is on the faster device, and logits are made where the last layer
is. Looking up embeddings is a copy of one row, for which no GPU is needed: they follow the first layer if there is
room. Several GPUs have consecutive layers each.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.kernels_gpu.attention.cache_types import cache_format
from gguf_run.runtime.load.memory import GpuSizes, MemoryPlan
from gguf_run.runtime.terminal.text import size_text

# Bytes of a GPU that stay free: for compiled kernels, captured graphs, libraries and what the allocator rounds up.
MARGIN = 500_000_000


@dataclass(frozen=True)
class Device:
    """kind: "cpu" or "cuda"; index: which one of several."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


CPU = Device("cpu")


@dataclass(frozen=True)
class Wanted:
    """The options: devices (none: as few GPUs as hold it, if there are any), n_gpu layers on them (None: as many as
    fit, -1: all), split: parts of the layers for each GPU (none: by free memory). n_cpu_moe: first layers whose experts
    are on the CPU in any case, -1: all layers' are; None: as many as it takes for all layers to be on GPUs, if n_gpu is
    None too."""

    devices: tuple[Device, ...] = ()
    n_gpu: int | None = None
    split: tuple[float, ...] = ()
    n_cpu_moe: int | None = None

    @property
    def cpu_only(self) -> bool:
        return self.devices == (CPU,) or self.n_gpu == 0

    @property
    def insists(self) -> bool:
        """Whether going without a GPU is an error."""
        return not self.cpu_only and (bool(self.devices) or self.n_gpu is not None)


def parse_device(text: str) -> Device | None:
    """Return the device that one part of `--device` names, None for "auto". OptionError for anything else."""
    if text == "auto":
        return None
    match = re.fullmatch(r"(cpu|cuda)(?::([0-9]{1,3}))?", text, re.ASCII)
    if match is None or (match[1] == "cpu" and match[2]):
        raise OptionError(f"--device {text!r}: allowed are cpu, cuda, cuda:0, cuda:1, ..., cuda:0,cuda:1 and auto")
    return Device(match[1], int(match[2] or 0))


def parse_wanted(
    device: str = "auto",
    gpu_layers: str | int | None = None,
    tensor_split: str | None = None,
    cpu_moe: bool = False,
    n_cpu_moe: int | None = None,
) -> Wanted:
    """What --device, --gpu-layers, --tensor-split, --cpu-moe and --n-cpu-moe ask for; OptionError for what they cannot
    mean."""
    if n_cpu_moe is not None and (cpu_moe or n_cpu_moe < 0):
        raise OptionError(f"--n-cpu-moe {n_cpu_moe}: must be a number of layers from 0, without --cpu-moe")
    names = device.split(",")
    devices = tuple(found for name in names if (found := parse_device(name)))
    if len(names) > 1 and (len({*devices}) < len(names) or CPU in devices):
        raise OptionError(f"--device {device}: several devices must be different GPUs, such as cuda:0,cuda:1")
    text = "auto" if gpu_layers is None else str(gpu_layers)
    if not re.fullmatch("auto|all|[0-9]{1,9}", text, re.ASCII):
        raise OptionError(f"--gpu-layers {text}: allowed are a number of layers from 0, all and auto")
    n_gpu = {"auto": None, "all": -1}[text] if text in ("auto", "all") else int(text)
    if devices == (CPU,) and n_gpu:
        raise OptionError(f"--gpu-layers {text} with --device cpu: name a GPU, such as --device cuda")
    split = _parse_split(tensor_split) if tensor_split else ()
    if split and len(split) != max(len(devices), 1):
        raise OptionError(f"--tensor-split {tensor_split} has {len(split)} parts, --device {device} {len(names)}")
    return Wanted(devices, n_gpu, split if len(split) > 1 else (), -1 if cpu_moe else n_cpu_moe)


def _parse_split(text: str) -> tuple[float, ...]:
    parts = text.split(",")
    if not all(re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", part, re.ASCII) for part in parts) or not any(
        float(part) for part in parts
    ):
        raise OptionError(f"--tensor-split {text}: must be a number for each GPU, not all 0, such as 3,1")
    return tuple(map(float, parts))


@dataclass(frozen=True)
class Placement:
    """embedding, layers: the device of each; the output is with the last layer. n_cpu_moe: first layers whose experts
    are on the CPU in any case."""

    embedding: Device
    layers: tuple[Device, ...]
    n_cpu_moe: int = 0

    @property
    def n_gpu(self) -> int:
        return sum(device != CPU for device in self.layers)

    @property
    def devices(self) -> tuple[Device, ...]:
        return tuple(dict.fromkeys((self.embedding, *self.layers, *self.experts)))

    @property
    def experts(self) -> tuple[Device, ...]:
        """The device of each layer's experts, if it has any."""
        return tuple(CPU if il < self.n_cpu_moe else device for il, device in enumerate(self.layers))

    def needed(self, device: Device, sizes: GpuSizes) -> tuple[int, int, int]:
        """Bytes of weights, cache and buffers on a GPU."""
        weights, here = sizes.weights, [il for il, place in enumerate(self.layers) if place == device]
        total = sum(weights.layers[il] for il in here)
        has_output, has_embedding = self.layers[-1] == device, self.embedding == device
        total += weights.output if has_output else 0
        total += weights.embedding if has_embedding and not (has_output and weights.tied) else 0
        return total, sum(sizes.caches[il] for il in here), sizes.buffers

    def fits(self, sizes: GpuSizes, free: Mapping[Device, int]) -> bool:
        """free: bytes of each GPU."""
        used = (device for device in self.devices if device != CPU)
        return all(sum(self.needed(device, sizes)) + MARGIN <= free[device] for device in used)


def cpu_only(n_layer: int) -> Placement:
    return Placement(CPU, (CPU,) * n_layer)


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
                if placement.fits(sizes, group):
                    return placement
    return None


def _first_ones(free: Mapping[Device, int]) -> Iterator[Mapping[Device, int]]:
    for n in range(2, len(free) + 1):
        yield dict(itertools.islice(free.items(), n))


def _too_small(plan: MemoryPlan, n_gpu: int, split: Sequence[float], free: Mapping[Device, int]) -> str:
    sizes = plan.gpu_sizes()
    *_, placement = _candidates(n_gpu, sizes, free, split)
    needs = {device: placement.needed(device, sizes) for device in placement.devices if device != CPU}
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
            numbers = placement.needed(device, sizes)
            end = f", of {size_text(free[device])} free ({size_text(MARGIN)} to spare)"
        weights, cache, buffers = map(size_text, numbers)
        yield (
            f"{device}: {', '.join(parts)}: {size_text(sum(numbers))} (weights {weights}, KV cache {cache}, buffers "
            f"{buffers}){end}"
        )
