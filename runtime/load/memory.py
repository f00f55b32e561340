"""The memory that a model will need: a model that cannot fit is refused before it is loaded."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS
from gguf_run.kernels_cpu.panels.panels import matrix_bytes as cpu_matrix_bytes
from gguf_run.kernels_gpu.attention import cache_types as cache_formats
from gguf_run.kernels_gpu.panels.panels import matrix_bytes as gpu_matrix_bytes
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.runtime.load.cache_plan import describe_plan, layer_bytes
from gguf_run.runtime.terminal.text import size_text

N_OUTPUTS = 64  # rows of logits that are held at once
_CTX_STEP = 256  # to which the context that would fit is rounded down
_ATTENTION_PARTS = 264  # kernels_gpu.matmul.launch.Tuning.programs: rows of partial sums, at most
_F16_WEIGHTS = 1 << 26  # kernels_gpu.matmul.launch.SCRATCH
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
class WeightSizes:
    """Bytes of weights on one kind of device. output: with its norm; tied: its matrix is that of the embeddings.
    experts: those of layers."""

    layers: tuple[int, ...]
    embedding: int
    output: int
    tied: bool
    experts: tuple[int, ...] = ()


@dataclass(frozen=True)
class GpuSizes:
    """Bytes on GPUs. caches: of each layer. buffers: of each GPU."""

    weights: WeightSizes
    caches: tuple[int, ...]
    buffers: int


@dataclass(frozen=True)
class MemoryPlan:
    """What is to be loaded: n_ctx positions of n_seq sequences, a cache type for each layer, n_batch tokens at once.
    n_gpu: so many of the last layers, and with them the output, are not in the CPU's memory, but for the experts of the
    first n_cpu_moe layers."""

    config: ModelConfig
    tensors: Sequence[TensorInfo]
    n_ctx: int
    cache: Sequence[CacheType]
    n_batch: int = 512
    n_seq: int = 1
    n_gpu: int = 0
    n_cpu_moe: int = 0

    def needed(self) -> MemoryNeed:
        """What it takes, in bytes: the weights and the cache exactly, the rest about."""
        weights = self.weights(cpu_matrix_bytes)
        output = weights.output + (0 if weights.tied else weights.embedding)
        n_outputs = 0 if self.n_gpu else N_OUTPUTS
        return MemoryNeed(
            weights=sum(weights.layers[: self._n_cpu])
            + sum(weights.experts[self._n_cpu : self.n_cpu_moe])
            + (0 if self.n_gpu else output),
            cache=self.cache_bytes(),
            buffers=4 * (self.n_rows * self._widths() + n_outputs * self.config.n_vocab),
        )

    @property
    def _n_cpu(self) -> int:
        return self.config.n_layer - self.n_gpu

    @property
    def n_rows(self) -> int:
        """Tokens of a step, at most."""
        return max(min(self.n_batch, self.n_ctx), self.n_seq)

    def _widths(self) -> int:
        config = self.config
        widths = 3 * config.n_embd + 2 * config.n_embd_q + 2 * config.n_embd_kv + 2 * config.n_ff
        return widths + config.moe.n_used * config.n_ff_exp

    def weights(self, matrix_bytes: Callable[[str, int, int], int]) -> WeightSizes:
        """matrix_bytes: a backend's, of a tensor type, a row's length and the number of rows."""
        layers, experts = [0] * self.config.n_layer, [0] * self.config.n_layer
        others: Counter[str] = Counter()
        for tensor in self.tensors:
            size = matrix_bytes(tensor.type.name, tensor.ne[0], tensor.n_rows) if len(tensor.ne) > 1 else tensor.nbytes
            block = re.match(r"blk\.(\d+)\.", tensor.name)
            if block is None:
                others["embedding" if tensor.name == "token_embd.weight" else tensor.name] += size
            elif int(block[1]) < len(layers):
                layers[int(block[1])] += size
                experts[int(block[1])] += size if "_exps." in tensor.name else 0
        embedding, tied = others.pop("embedding"), "output.weight" not in others
        total = others.total() + (embedding if tied else 0)
        return WeightSizes(tuple(layers), embedding, total, tied, tuple(experts))

    def gpu_sizes(self) -> GpuSizes:
        """Weights in the GPU's panels, and the caches, exactly; the buffers of one GPU about, but not less."""
        weights = self.weights(gpu_matrix_bytes)
        there = zip(weights.layers, weights.experts, strict=True)
        layers = tuple(size - (away if il < self.n_cpu_moe else 0) for il, (size, away) in enumerate(there))
        return GpuSizes(replace(weights, layers=layers), self._gpu_caches(), self._gpu_buffers())

    def _gpu_caches(self) -> tuple[int, ...]:
        sizes = []
        for il, kind in enumerate(self.cache):
            shape = self.config.attention(il)
            n_rows = self.n_seq * cache_formats.rows_stored(self.n_ctx, self.n_rows, shape.window)
            sizes.append(cache_formats.cache_bytes(kind.k, kind.v, shape.n_head_kv, shape.head_dim, n_rows))
        return tuple(sizes)

    def _gpu_buffers(self) -> int:
        """What a kernels_gpu.recorder makes: rows of numbers, their int8 or f16 forms, angles, the parts of attention,
        results of products, also of pairs of tokens and experts, and weights that are f16 for a while."""
        config, n_outputs = self.config, max(min(N_OUTPUTS, self.n_rows), self.n_seq)
        n_rows, n_outputs = (-(-n // 32) * 32 for n in (self.n_rows, n_outputs))
        matrices = [tensor for tensor in self.tensors if len(tensor.ne) > 1]
        inner = max(tensor.ne[1] * (2 if "ffn_" in tensor.name else 1) for tensor in matrices if "blk." in tensor.name)
        sums = max(n_rows, _ATTENTION_PARTS) * config.n_head * (config.head_dim + 2)
        pairs = config.moe.n_used * (max(2 * config.n_ff_exp, config.n_embd) + 4) + 2 * config.n_expert
        rows = (n_rows + n_outputs) * (self._widths() + inner + 2 * config.n_rot + pairs) + n_outputs * config.n_vocab
        result = max(n_rows * inner, n_outputs * config.n_vocab)
        scratch = min(_F16_WEIGHTS, max(tensor.ne[0] * tensor.ne[1] for tensor in matrices))
        return 4 * (rows + result + sums) + 2 * scratch

    def cache_bytes(self) -> int:
        return sum(layer_bytes(self.config, self.cache, self.n_ctx, self.n_batch, self.n_seq)[: self._n_cpu])

    def on_cpu(self, n_gpu: int, n_cpu_moe: int = 0) -> "MemoryPlan":
        """The same with so many layers on GPUs: what is left for the CPU."""
        return replace(self, n_gpu=n_gpu, n_cpu_moe=n_cpu_moe)

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
        n_ctx = self.largest_context(lambda plan: plan.needed().total <= available)
        fits = [f"--ctx-size {n_ctx}"] if n_ctx else []
        for name in _ADVISED:
            need = self.with_type(name).needed()
            if self.allows(name) and need.total <= available and need.cache < self.cache_bytes():
                fits.append(f"--cache-type {name}")
                break
        return f"{' or '.join(fits)} would fit" if fits else "choose a smaller context (--ctx-size) or a smaller model"

    def largest_context(self, fits: Callable[["MemoryPlan"], bool]) -> int:
        """The largest context up to n_ctx, in steps of _CTX_STEP, with which the plan fits; 0: none."""
        low, high = 0, self.n_ctx // _CTX_STEP + 1  # in steps: low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(replace(self, n_ctx=middle * _CTX_STEP)) else (low, middle)
        return low * _CTX_STEP

    def allows(self, name: str) -> bool:
        """Do the model's heads allow this cache type?"""
        return all(CACHE_FORMATS[name].allows(self.config.attention(il).head_dim) for il in range(self.config.n_layer))
