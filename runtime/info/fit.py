"""`gguf-info --fit`: which types and contexts this machine has room for, and about how fast they will run on its CPU.

Memory is exact, as the loader counts it. Speed is what the memory's and the arithmetic's, both measured now, allow at
most, times what the kernels reach of that.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile, Tensor
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.kernels_cpu.measure.limits import Limits, measure_limits
from gguf_run.kernels_cpu.panels.panels import matrix_bytes
from gguf_run.kernels_cpu.vector import isa
from gguf_run.models.architectures import EXPERTS, LAYER_SHAPES, MODEL_SHAPES
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.runtime.load.machine import available_memory, default_threads
from gguf_run.runtime.load.memory import MemoryPlan
from gguf_run.runtime.load.options import DEFAULT_N_CTX
from gguf_run.runtime.quantize.rules import FILE_TYPES, ModelFacts, choose_types, layer_order
from gguf_run.runtime.terminal.text import one_line, size_text, table

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
FEW_TYPES = ("Q8_0", "Q4_K_M", "Q2_K")
CACHES = ("f16", "q8_0")
N_PROMPT = 512
# What the kernels reach of the limits (README, "Measured"), and how many int8 operations take as long as one of floats.
DECODE_PART, PREFILL_PART, FLOAT_OPS = 0.8, 0.48, 4


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that many people run, for the table without files."""

    name: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    n_ctx: int
    tied: bool = False
    n_expert: int = 0
    n_used: int = 0

    def model(self) -> tuple[ModelConfig, list[TensorInfo]]:
        """The config, and the tensors in BF16."""
        arch = "qwen3moe" if self.n_expert else "llama"
        numbers = {
            "block_count": self.n_layer, "embedding_length": self.n_embd, "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head, "attention.head_count_kv": self.n_head_kv,
            "attention.key_length": self.head_dim, "attention.value_length": self.head_dim,
            "context_length": self.n_ctx, "attention.layer_norm_rms_epsilon": 1e-5,
        }  # fmt: skip
        if self.n_expert:
            experts = {"expert_count": self.n_expert, "expert_used_count": self.n_used}
            numbers |= {**experts, "expert_feed_forward_length": self.n_ff}
        metadata = {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in numbers.items()}
        widths = {
            "n_embd_q": self.n_head * self.head_dim, "n_embd_kv": self.n_head_kv * self.head_dim, "n_ff_exp": self.n_ff,
        } | vars(self)  # fmt: skip
        layer = ["attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output"]
        if self.n_expert:
            layer += ["attn_q_norm", "attn_k_norm", "ffn_gate_inp", *EXPERTS]
        else:
            layer += ["ffn_gate", "ffn_up", "ffn_down"]
        shapes = {f"blk.{il}.{name}.weight": LAYER_SHAPES[name] for il in range(self.n_layer) for name in layer}
        model = ("token_embd.weight", "output_norm.weight", *(() if self.tied else ("output.weight",)))
        shapes |= {name: MODEL_SHAPES[name] for name in model}
        f32, bf16 = type_by_name("F32"), type_by_name("BF16")
        tensors = [
            TensorInfo(name, tuple(widths[word] for word in words), bf16 if len(words) > 1 else f32)
            for name, words in shapes.items()
        ]
        by_name = cast(Mapping[str, Tensor], {tensor.name: tensor for tensor in tensors})
        return ModelConfig.from_metadata(metadata, by_name), tensors


# Llama 3.1 to 3.3; 14B, 32B and the mixture of experts are Qwen 3.
SHAPES = (
    Shape("1B", 16, 2048, 32, 8, 64, 8192, 128256, 131072, True),
    Shape("3B", 28, 3072, 24, 8, 128, 8192, 128256, 131072, True),
    Shape("8B", 32, 4096, 32, 8, 128, 14336, 128256, 131072),
    Shape("14B", 40, 5120, 40, 8, 128, 17408, 151936, 40960),
    Shape("30B-A3B", 48, 2048, 32, 4, 128, 768, 151936, 40960, False, 128, 8),
    Shape("32B", 64, 5120, 64, 8, 128, 25600, 151936, 40960),
    Shape("70B", 80, 8192, 64, 8, 128, 28672, 128256, 131072),
)


@dataclass(frozen=True)
class Machine:
    """available: bytes of memory that can still be taken, None: not known."""

    available: int | None
    limits: Limits

    @classmethod
    def measure(cls) -> "Machine":
        """Takes a second or two."""
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


def used_part(config: ModelConfig, name: str) -> float:
    """How much of a tensor a token needs: of experts those that it is sent to, of embeddings a row."""
    if "_exps." in name:
        return config.moe.n_used / config.n_expert
    return 0.0 if name == "token_embd.weight" else 1.0


def speeds(config: ModelConfig, tensors: Sequence[TensorInfo], limits: Limits) -> tuple[float, float]:
    """Return about how many tokens per second will be decoded, behind a short text, and prefilled.

    Decoding reads the weights that a token needs, once; a prompt of N_PROMPT tokens multiplies with those of the
    layers, and its queries with the keys and values of the positions before.
    """
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    n_bytes, n_ops = 0.0, 2.0 * FLOAT_OPS * N_PROMPT * config.n_embd_q * config.n_layer
    for tensor in tensors:
        if len(tensor.ne) > 1:
            part = 1.0 if tied and tensor.name == "token_embd.weight" else used_part(config, tensor.name)
            n_bytes += part * matrix_bytes(tensor.type.name, tensor.ne[0], tensor.n_rows)
            n_ops += 2 * part * tensor.n_elements * tensor.name.startswith("blk.")
    return DECODE_PART * limits.read_bytes / n_bytes, PREFILL_PART * limits.int8_ops / n_ops


def fit_row(name: str, config: ModelConfig, tensors: Sequence[TensorInfo], machine: Machine) -> dict[str, Any]:
    """What a model of these tensors takes on the machine. memory: with a context of n_ctx tokens; contexts: the largest
    one for each type of cache, 0: the model does not fit. Sizes in bytes, speeds in tokens per second."""
    n_bytes, n_weights = sum(tensor.nbytes for tensor in tensors), sum(tensor.n_elements for tensor in tensors)
    n_ctx = min(config.n_ctx_train, DEFAULT_N_CTX)
    plan = MemoryPlan(config, tensors, n_ctx, [CacheType("f16", "f16")] * config.n_layer)
    need = plan.needed()
    contexts = {}
    for kind in CACHES:
        largest = MemoryPlan(config, tensors, config.n_ctx_train, plan.with_type(kind).cache)
        if plan.allows(kind):
            contexts[kind] = largest.largest_context(
                lambda p: (
                    machine.available is None or need.weights + need.buffers + p.cache_bytes() <= machine.available
                )
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


def quantized(tensors: Sequence[TensorInfo], metadata: Mapping[str, Any], n_layer: int, type: str) -> list[TensorInfo]:
    """The tensors with the types that gguf-quantize would give them."""
    ordered = sorted(tensors, key=lambda tensor: layer_order(tensor.name))
    facts = ModelFacts.from_metadata(metadata, n_layer, has_imatrix=False)
    choices = choose_types(ordered, facts, FILE_TYPES[type])
    return [TensorInfo(t.name, t.ne, choice.type) for t, choice in zip(ordered, choices, strict=True)]


def fit_file(file: GGUFFile, machine: Machine) -> dict[str, Any]:
    """The file as it is, and in other types. Errors as ModelConfig.from_metadata, with the name of the file."""
    try:
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
    except GgufRunError as error:
        raise type(error)(f"{file.path}: {error}") from None
    tensors = list(file.tensors.values())
    stated = file.metadata.get("general.file_type")
    own = next((kind.name for kind in FILE_TYPES.values() if kind.id == stated and stated is not None), None)
    own = own or Counter(tensor.type.name for tensor in tensors if len(tensor.ne) > 1).most_common(1)[0][0]
    rows = [fit_row(own, config, tensors, machine)]
    for name in TYPES:
        if name != own:
            rows.append(fit_row(name, config, quantized(tensors, file.metadata, config.n_layer, name), machine))
    return {"model": str(file.path), "n_ctx_train": config.n_ctx_train, "rows": rows}


def fit_shape(shape: Shape, machine: Machine) -> dict[str, Any]:
    """A model of that shape in a few types."""
    config, tensors = shape.model()
    arch = config.arch.name
    metadata = {
        "general.architecture": arch, f"{arch}.attention.head_count": config.n_head,
        f"{arch}.attention.head_count_kv": config.n_head_kv, f"{arch}.expert_count": config.n_expert,
    }  # fmt: skip
    rows = [fit_row(name, config, quantized(tensors, metadata, config.n_layer, name), machine) for name in FEW_TYPES]
    return {"model": shape.name, "n_ctx_train": config.n_ctx_train, "rows": rows}


def fit_lines(machine: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The facts for people."""
    free = machine["available_memory"]
    yield (
        f"{'unknown' if free is None else size_text(free)} free; {machine['n_threads']} threads, "
        f"{machine['instructions']}: {machine['read_bytes_per_second'] / 1e9:.3g} GB/s, "
        f"{machine['int8_operations_per_second'] / 1e12:.3g}e12 int8 operations/s"
    )
    yield ""
    yield from table(
        ["model", "type", "bits", "file", "memory", *(f"ctx {kind}" for kind in CACHES), "decode/s", "prefill/s"],
        [
            [one_line(Path(model["model"]).name) if first else "", row["type"], f"{row['bits_per_weight']:.2f}"]
            + [f"{row['nbytes'] / 1e9:.2f}", f"{row['memory'] / 1e9:.2f}"]
            + [_context(row["contexts"].get(kind)) for kind in CACHES]
            + [_speed(row[key]) if any(row["contexts"].values()) else "-" for key in ("decode", "prefill")]
            for model in models
            for first, row in zip([True, *[False] * len(model["rows"])], model["rows"], strict=False)
        ],
        "llrrrrrrr",
    )
    yield ""
    yield f"Sizes in GB; memory with {DEFAULT_N_CTX} tokens of f16 cache. ctx: the largest context that"
    yield "fits, up to the model's own. Tokens per second are estimates."


def _context(n: int | None) -> str:
    return "-" if n is None else str(n) if n else "no room"


def _speed(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"
