"""Memory that a model will need, and the memory there is: a model that cannot fit is refused before it is loaded."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.reader import Tensor
from gguf_run.kernels_cpu.cache_types import CACHE_FORMATS
from gguf_run.kernels_cpu.panels import matrix_bytes
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.runtime import cgroup
from gguf_run.runtime.cache_plan import describe_plan, plan_bytes
from gguf_run.runtime.text_table import size_text

_CTX_STEP = 256  # to which the context that would fit is rounded down
_ADVISED = ("q8_0", "int8", "q4_0")  # smaller types to advise, best first


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes a model will hold. weights: in the CPU's panels, for some types wider than the file's blocks."""

    weights: int
    cache: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.buffers


@dataclass(frozen=True)
class MemoryPlan:
    """What is to be loaded: n_ctx positions of n_seq sequences, a cache type for each layer, n_batch tokens at once."""

    config: ModelConfig
    tensors: Sequence[Tensor]
    n_ctx: int
    cache: Sequence[CacheType]
    n_batch: int = 512
    n_seq: int = 1

    def needed(self) -> MemoryNeed:
        """What it takes, in bytes: the weights and the cache exactly, the rest about."""
        config, n_outputs = self.config, 64
        widths = 3 * config.n_embd + 2 * config.n_embd_q + 2 * config.n_embd_kv + 2 * config.n_ff
        widths += config.moe.n_used * config.n_ff_exp
        return MemoryNeed(
            weights=sum(
                matrix_bytes(tensor.type.name, tensor.ne[0], tensor.n_rows) if len(tensor.ne) > 1 else tensor.nbytes
                for tensor in self.tensors
            ),
            cache=self.cache_bytes(),
            buffers=4 * (min(self.n_batch, self.n_ctx) * widths + n_outputs * config.n_vocab),
        )

    def cache_bytes(self) -> int:
        return plan_bytes(self.config, self.cache, self.n_ctx, self.n_batch, self.n_seq)

    def with_type(self, name: str) -> "MemoryPlan":
        """The same with another type for K and V of all layers."""
        return replace(self, cache=[CacheType(name, name)] * self.config.n_layer)

    def check(self, available: int | None) -> None:
        """GgufRunError, which says what would fit, if more than the available bytes are needed (None: not known)."""
        need = self.needed()
        if available is not None and need.total > available:
            raise GgufRunError(
                f"out of memory: {size_text(need.total)} needed (weights {size_text(need.weights)}, KV cache of "
                f"{self.n_ctx} tokens as {describe_plan(self.cache)} {size_text(need.cache)}), {size_text(available)} "
                f"available: {self._advice(available)}"
            )

    def _advice(self, available: int) -> str:
        fits = []
        low, high = 0, self.n_ctx // _CTX_STEP + 1  # in steps: low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            fit = replace(self, n_ctx=middle * _CTX_STEP).needed().total <= available
            low, high = (middle, high) if fit else (low, middle)
        if low:
            fits.append(f"--ctx-size {low * _CTX_STEP}")
        for name in _ADVISED:
            need = self.with_type(name).needed()
            if self.allows(name) and need.total <= available and need.cache < self.cache_bytes():
                fits.append(f"--cache-type {name}")
                break
        return f"{' or '.join(fits)} would fit" if fits else "choose a smaller context (--ctx-size) or a smaller model"

    def allows(self, name: str) -> bool:
        """Do the model's heads allow this cache type?"""
        return all(CACHE_FORMATS[name].allows(self.config.attention(il).head_dim) for il in range(self.config.n_layer))


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
