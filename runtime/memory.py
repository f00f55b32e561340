"""Memory that a model will need, and the memory there is: a model that cannot fit is refused before it is loaded."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.formats.reader import Tensor
from gguf_run.kernels_cpu.panels import matrix_bytes
from gguf_run.models.config import ModelConfig
from gguf_run.runtime import cgroup

# Bytes of one value in the KV cache.
CACHE_TYPES: Mapping[str, int] = {"f16": 2, "f32": 4}


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes a model will hold. weights: in the CPU's panels, for some types wider than the file's blocks."""

    weights: int
    cache: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.buffers


def memory_needed(
    config: ModelConfig, tensors: Iterable[Tensor], n_ctx: int, cache_type: str = "f16", n_batch: int = 512
) -> MemoryNeed:
    """Estimate what running a model takes, in bytes. OptionError for an unknown cache type."""
    if cache_type not in CACHE_TYPES:
        raise OptionError(f"cache_type is {cache_type!r}; allowed: {', '.join(CACHE_TYPES)}")
    n_outputs = 64
    widths = 3 * config.n_embd + 2 * config.n_embd_q + 2 * config.n_embd_kv + 2 * config.n_ff
    return MemoryNeed(
        weights=sum(
            matrix_bytes(tensor.type.name, tensor.ne[0], tensor.n_rows) if len(tensor.ne) > 1 else tensor.nbytes
            for tensor in tensors
        ),
        cache=config.n_layer * n_ctx * 2 * config.n_embd_kv * CACHE_TYPES[cache_type],
        buffers=4 * (min(n_batch, n_ctx) * widths + n_outputs * config.n_vocab),
    )


def check_memory(need: MemoryNeed, available: int | None) -> None:
    """GgufRunError if `need` is more than the available bytes (None: not known)."""
    if available is not None and need.total > available:
        raise GgufRunError(
            f"out of memory: {_gb(need.total)} needed (weights {_gb(need.weights)}, KV cache {_gb(need.cache)}), "
            f"{_gb(available)} available: choose a smaller context (--ctx-size) or a smaller model"
        )


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes this process can still take without others being killed, swap included; None if not known."""
    meminfo = dict(re.findall(r"^(\w+): +(\d+) kB$", cgroup.read(root / "proc/meminfo"), re.MULTILINE))
    if "MemAvailable" not in meminfo:
        return None
    left = [1024 * (int(meminfo["MemAvailable"]) + int(meminfo.get("SwapFree", 0)))]
    for group in cgroup.levels("memory", root):
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = cgroup.read(group / limit_file), cgroup.read(group / used_file)
            if limit.isdigit() and used.isdigit():
                # Cached file pages count as used, but are given up when memory is needed.
                # (v1 counts the groups below in lines of their own, "total_...").
                cached = re.findall(
                    r"^(?:total_)?inactive_file (\d+)$", cgroup.read(group / "memory.stat"), re.MULTILINE
                )
                left.append(int(limit) - int(used) + max(map(int, cached), default=0))
    return max(0, min(left))


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
