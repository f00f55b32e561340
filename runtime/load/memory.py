"""The memory that a model will need: a model that cannot fit is refused before it is loaded."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS
from gguf_run.kernels_cpu.panels.panels import matrix_bytes
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.runtime.load.cache_plan import layer_bytes

N_OUTPUTS = 64  # rows of logits that are held at once


@frozen
class MemoryNeed:
    """Bytes that one device holds."""

    weights: int  # in the device's panels, for some types wider than the file's blocks
    cache: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.buffers


@frozen
class WeightSizes:
    """Bytes of all weights in one kind of device's panels."""

    layers: tuple[int, ...]  # of each layer, its experts included
    embedding: int
    output: int  # the output matrix and its norm
    tied: bool  # the output matrix is the embedding's
    experts: tuple[int, ...] = ()  # of each layer


@frozen
class MemoryPlan:
    """A model to load, and which part of it the CPU's memory holds."""

    config: ModelConfig
    tensors: Sequence[TensorInfo]
    n_ctx: int  # positions of each sequence
    cache: Sequence[CacheType]  # of each layer
    n_batch: int = 512  # tokens at once
    n_seq: int = 1
    n_cells: int | None = None  # positions of all sequences together; None: n_ctx for each
    n_gpu: int = 0  # the last n_gpu layers are on GPUs, and with them the output
    n_cpu_moe: int = 0  # the experts of the first n_cpu_moe layers are on the CPU, wherever the layer is

    @property
    def n_rows(self) -> int:
        """The most tokens of a step."""
        return max(min(self.n_batch, self.n_ctx), self.n_seq)

    @property
    def widths(self) -> int:
        """Columns of all buffers of a token together."""
        config = self.config
        widths = 3 * config.n_embd + 2 * config.n_embd_q + 2 * config.n_embd_kv + 2 * config.n_ff
        mixer = [config.mixer.tensors(il) for il in range(config.n_layer)] if config.mixer is not None else []
        made = [[n for n_in, *out in shapes.values() if n_in == config.n_embd for n in out] for shapes, _ in mixer]
        widths += (config.moe.n_used * config.n_ff_exp if config.moe else 0) + 2 * config.n_ple * config.n_layer
        return widths + max(map(sum, made), default=0)

    def needed(self) -> MemoryNeed:
        """Return the bytes that the CPU's part takes. Weights and cache are exact, buffers are an estimate."""
        weights, n_cpu = self.weights(matrix_bytes), self.config.n_layer - self.n_gpu
        held = sum(weights.layers[:n_cpu]) + sum(weights.experts[n_cpu : self.n_cpu_moe])
        n_outputs = 0
        if not self.n_gpu:
            held += weights.output + (0 if weights.tied else weights.embedding)
            n_outputs = N_OUTPUTS
        buffers = 4 * (self.n_rows * self.widths + n_outputs * self.config.n_vocab)
        return MemoryNeed(held, self.cache_bytes(), buffers)

    def cache_bytes(self) -> int:
        """Return the bytes of the KV caches in the CPU's memory."""
        sizes = layer_bytes(self.config, self.cache, self.n_ctx, self.n_batch, self.n_seq, self.n_cells)
        return sum(sizes[: self.config.n_layer - self.n_gpu])

    def weights(self, matrix_bytes: Callable[[str, int, int], int]) -> WeightSizes:
        """Return the sizes of all weights.

        matrix_bytes: a backend's function of a type, the length of a row and the number of rows.
        """
        layers, experts = [0] * self.config.n_layer, [0] * self.config.n_layer
        others: Counter[str] = Counter()
        for tensor in self.tensors:
            size = matrix_bytes(tensor.type.name, tensor.ne[0], tensor.n_rows) if len(tensor.ne) > 1 else tensor.nbytes
            block = re.match(r"blk\.(\d+)\.", tensor.name)
            if tensor.name == "per_layer_token_embd.weight":
                continue  # no device holds it: rows are read from the file
            if block is None:
                others["embedding" if tensor.name == "token_embd.weight" else tensor.name] += size
            elif int(block[1]) < len(layers):
                layers[int(block[1])] += size
                experts[int(block[1])] += size if "_exps." in tensor.name else 0
        embedding, tied = others.pop("embedding"), "output.weight" not in others
        output = others.total() + (embedding if tied else 0)
        return WeightSizes(tuple(layers), embedding, output, tied, tuple(experts))

    def with_type(self, name: str) -> "MemoryPlan":
        """Return the same plan with another type for the keys and values of all layers."""
        return replace(self, cache=[CacheType(name, name)] * self.config.n_layer)

    def allows(self, name: str) -> bool:
        """Whether the model's heads allow this cache type."""
        return all(CACHE_FORMATS[name].allows(self.config.attention(il).head_dim) for il in range(self.config.n_layer))

    def check(self, available: int | None) -> None:
        """GgufRunError, which says what would fit, if more than the available bytes are needed (None: not known)."""
        need = self.needed()
        if available is not None and need.total > available:
            from gguf_run.runtime.load.advice import does_not_fit

            raise does_not_fit(self, need, available)
