"""Which types and contexts of a model this machine has room for, and how fast they will run on its CPU.

Memory is exact: it is what the loader counts. Speed is an estimate: the limits of the machine's memory and arithmetic,
measured now, times the part of these limits that the kernels reach.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile, Tensor
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.kernels_cpu.measure.limits import Limits, measure_limits
from gguf_run.kernels_cpu.panels.panels import matrix_bytes
from gguf_run.kernels_cpu.vector import isa
from gguf_run.models.architectures import architecture
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig, read_sizes
from gguf_run.models.keys import Keys
from gguf_run.models.tensor_check import tensor_shapes
from gguf_run.runtime.load.advice import largest_context
from gguf_run.runtime.load.machine import available_memory, default_threads
from gguf_run.runtime.load.memory import MemoryPlan
from gguf_run.runtime.load.options import DEFAULT_N_CTX
from gguf_run.runtime.quantize.file_types import FILE_TYPES, stated_file_type
from gguf_run.runtime.quantize.rules import MixtureFacts, choose_types, layer_order

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")  # for files
FEW_TYPES = ("Q8_0", "Q4_K_M", "Q2_K")  # for the table of usual sizes
CACHES = ("f16", "q8_0")  # types of the KV cache
N_PROMPT = 512  # tokens of the prompt whose speed is estimated
# The part of the limits that the kernels reach (docs/measured.md).
DECODE_PART, PREFILL_PART = 0.8, 0.48
FLOAT_OPS = 4  # int8 operations in the time of one float operation


@dataclass(frozen=True)
class UsualModel:
    """The sizes of a model that many people run. --fit shows them where no file is given."""

    name: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int  # of one expert, if there are experts
    n_vocab: int
    n_ctx: int  # of the training
    tied: bool = False  # the embeddings make the logits too
    n_expert: int = 0
    n_used: int = 0  # experts that a token is sent to

    def tensors(self) -> tuple[ModelConfig, list[TensorInfo]]:
        """Return the config, and the tensors in BF16."""
        arch, bf16, f32 = "qwen3moe" if self.n_expert else "llama", type_by_name("BF16"), type_by_name("F32")
        numbers = {
            "block_count": self.n_layer, "embedding_length": self.n_embd, "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head, "attention.head_count_kv": self.n_head_kv,
            "attention.key_length": self.head_dim, "attention.value_length": self.head_dim,
            "context_length": self.n_ctx, "attention.layer_norm_rms_epsilon": 1e-5, "expert_count": self.n_expert,
            "expert_used_count": self.n_used, "expert_feed_forward_length": self.n_ff,
        }  # fmt: skip
        embeddings = TensorInfo("token_embd.weight", (self.n_embd, self.n_vocab), bf16)
        keys = Keys({f"{arch}.{key}": n for key, n in numbers.items()}, arch)
        config = read_sizes(architecture(arch), keys, {embeddings.name: cast(Tensor, embeddings)})
        shapes, optional = tensor_shapes(config, {})
        shapes |= {} if self.tied else {"output.weight": optional["output.weight"]}
        return config, [TensorInfo(name, ne, bf16 if len(ne) > 1 else f32) for name, ne in shapes.items()]


# Llama 3.1 to 3.3; 14B, 32B and the mixture of experts are Qwen 3.
USUAL_MODELS = (
    UsualModel("1B", 16, 2048, 32, 8, 64, 8192, 128256, 131072, True),
    UsualModel("3B", 28, 3072, 24, 8, 128, 8192, 128256, 131072, True),
    UsualModel("8B", 32, 4096, 32, 8, 128, 14336, 128256, 131072),
    UsualModel("14B", 40, 5120, 40, 8, 128, 17408, 151936, 40960),
    UsualModel("30B-A3B", 48, 2048, 32, 4, 128, 768, 151936, 40960, False, 128, 8),
    UsualModel("32B", 64, 5120, 64, 8, 128, 25600, 151936, 40960),
    UsualModel("70B", 80, 8192, 64, 8, 128, 28672, 128256, 131072),
)


@dataclass(frozen=True)
class Machine:
    """What this machine has."""

    available: int | None  # bytes of memory that can still be taken, None: not known
    limits: Limits

    @classmethod
    def measure(cls) -> "Machine":
        """Measure this machine, in a second or two."""
        available = available_memory()  # before the measurement takes some
        return cls(available, measure_limits(default_threads()))

    def facts(self) -> dict[str, Any]:
        return {
            "available_memory": self.available,
            "n_threads": self.limits.n_threads,
            "instructions": isa.current().name,
            "read_bytes_per_second": round(self.limits.read_bytes),
            "int8_operations_per_second": round(self.limits.int8_ops),
        }


def speeds(config: ModelConfig, tensors: Sequence[TensorInfo], limits: Limits) -> tuple[float, float]:
    """Return estimates of decoded and of prefilled tokens per second.

    Decoding reads the weights of a token once. Experts count in part: a token is sent to n_used of them. Embeddings
    count only if they make the logits too. Prefilling multiplies N_PROMPT tokens with the weights of the layers, and
    their queries with the keys and values before them.
    """
    has_output = any(tensor.name == "output.weight" for tensor in tensors)
    n_bytes, n_ops = 0.0, 2.0 * FLOAT_OPS * N_PROMPT * config.n_embd_q * config.n_layer
    for tensor in tensors:
        if len(tensor.ne) > 1 and not (has_output and tensor.name == "token_embd.weight"):
            part = config.moe.n_used / config.n_expert if config.moe and "_exps." in tensor.name else 1.0
            n_bytes += part * matrix_bytes(tensor.type.name, tensor.ne[0], tensor.n_rows)
            n_ops += 2 * part * tensor.n_elements * tensor.name.startswith("blk.")
    return DECODE_PART * limits.read_bytes / n_bytes, PREFILL_PART * limits.int8_ops / n_ops


def fit_row(name: str, config: ModelConfig, tensors: Sequence[TensorInfo], machine: Machine) -> dict[str, Any]:
    """Return what a model of these tensors takes on the machine. Sizes are in bytes, speeds in tokens per second.

    memory: with a context of n_ctx tokens.
    contexts: the largest context for each type of cache, 0 if the model does not fit.
    """
    n_bytes, n_weights = sum(tensor.nbytes for tensor in tensors), sum(tensor.n_elements for tensor in tensors)
    n_ctx = min(config.n_ctx_train, DEFAULT_N_CTX)
    plan = MemoryPlan(config, tensors, n_ctx, [CacheType("f16", "f16")] * config.n_layer)
    need = plan.needed()
    rest = need.weights + need.buffers
    contexts = {}
    for kind in CACHES:
        if plan.allows(kind):
            largest = MemoryPlan(config, tensors, config.n_ctx_train, plan.with_type(kind).cache)
            contexts[kind] = largest_context(
                largest, lambda p: machine.available is None or rest + p.cache_bytes() <= machine.available
            )
    decode, prefill = speeds(config, tensors, machine.limits)
    return {
        "type": name,
        "nbytes": n_bytes,
        "bits_per_weight": round(8 * n_bytes / n_weights, 3),
        "n_ctx": n_ctx,
        "memory": need.total,
        "contexts": contexts,
        "decode": round(decode, 2),
        "prefill": round(prefill, 1),
    }


def quantized(tensors: Sequence[TensorInfo], config: ModelConfig, kind: str) -> list[TensorInfo]:
    """Return the tensors with the types that gguf-quantize would give them."""
    ordered = sorted(tensors, key=lambda tensor: layer_order(tensor.name))
    facts = MixtureFacts(config.arch.name, config.n_layer, config.n_head // config.n_head_kv, config.n_expert)
    choices = choose_types(ordered, facts, FILE_TYPES[kind])
    return [TensorInfo(t.name, t.ne, choice.type) for t, choice in zip(ordered, choices, strict=True)]


def fit_file(file: GGUFFile, machine: Machine) -> dict[str, Any]:
    """Return the rows of a file as it is, and in other types. Errors as from ModelConfig, with the name of the file."""
    try:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
    except GgufRunError as error:
        raise type(error)(f"{file.path}: {error}") from None
    tensors, kind = list(file.tensors.values()), stated_file_type(file)
    matrices = Counter(tensor.type.name for tensor in tensors if len(tensor.ne) > 1)
    own = kind.name if kind else max(matrices, key=matrices.__getitem__, default="-")
    rows = [fit_row(own, config, tensors, machine)]
    rows += [fit_row(name, config, quantized(tensors, config, name), machine) for name in TYPES if name != own]
    return {"model": str(file.path), "n_ctx_train": config.n_ctx_train, "rows": rows}


def fit_usual(model: UsualModel, machine: Machine) -> dict[str, Any]:
    """Return the rows of a model of usual size in a few types."""
    config, tensors = model.tensors()
    rows = [fit_row(name, config, quantized(tensors, config, name), machine) for name in FEW_TYPES]
    return {"model": model.name, "n_ctx_train": config.n_ctx_train, "rows": rows}
