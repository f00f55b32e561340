"""Writes a model with random weights, for measuring speed: any tensor type or mix, as fast as the disk takes it.

    python benchmarks/make_model.py llama-1b Q4_K_M [-o FILE] [--vocab MODEL.gguf] [--seed 0]

Norms are 1, weights have mean 0 and a standard deviation of about 0.02 (random_blocks.py). The vocabulary is that of a
real model, cut or filled up to the shape's size. The model writes nonsense.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from random_blocks import FLOATS, RandomBlocks

from gguf_run.formats.blocks.types import TENSOR_TYPES, type_by_name
from gguf_run.formats.errors import OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.writer import GGUFWriter, TensorInfo, Typed
from gguf_run.runtime.cli.common import Command
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.quantize import rules as quantize_rules
from gguf_run.runtime.quantize.file_types import FILE_TYPES, WRITABLE_FILES

_CHUNK = 4 << 20  # bytes drawn at a time
_NORMAL = 1  # type of a token
LATENT, LATENT_VALUE, LATENT_DENSE = (512, 64), 128, 10944  # a row of the cache, a value, the ffn of the first layer


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, in ggml's names."""

    size_label: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int  # of one expert, if there are experts
    n_vocab: int
    n_ctx: int
    rope_freq_base: float
    tied: bool  # the embeddings are the output matrix too
    arch: str = "llama"
    n_expert: int = 0  # experts in place of the ffn; 0: none
    n_expert_used: int = 0  # experts of a token

    @property
    def keys(self) -> Mapping[str, tuple[str, Any]]:
        """Type and value of metadata beyond sizes_of, without the architecture's name."""
        return {}

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and ne (row length first) of every tensor."""
        n_embd, n_q, n_kv, n_ff = self.n_embd, self.n_head * self.head_dim, self.n_head_kv * self.head_dim, self.n_ff
        layer = {
            "attn_norm": (n_embd,), "attn_q": (n_embd, n_q), "attn_k": (n_embd, n_kv), "attn_v": (n_embd, n_kv),
            "attn_output": (n_q, n_embd), "ffn_norm": (n_embd,), "ffn_gate": (n_embd, n_ff), "ffn_up": (n_embd, n_ff),
            "ffn_down": (n_ff, n_embd),
        }  # fmt: skip
        if self.n_expert:
            layer |= {"ffn_gate_inp": (n_embd, self.n_expert)}
            layer |= {f"{name}_exps": (*layer.pop(name), self.n_expert) for name in ("ffn_gate", "ffn_up", "ffn_down")}
        dense: dict[str, tuple[int, ...]] = {}  # of the first layer, if it differs
        if self.arch == "deepseek2":
            row, n_nope, n_value = sum(LATENT), self.head_dim - LATENT[1], LATENT_VALUE
            layer = {name: ne for name, ne in layer.items() if name not in ("attn_k", "attn_v")} | {
                "attn_kv_a_mqa": (n_embd, row), "attn_kv_a_norm": (LATENT[0],),
                "attn_k_b": (n_nope, LATENT[0], self.n_head), "attn_v_b": (LATENT[0], n_value, self.n_head),
                "attn_output": (self.n_head * n_value, n_embd), "ffn_gate_shexp": (n_embd, 2 * n_ff),
                "ffn_up_shexp": (n_embd, 2 * n_ff), "ffn_down_shexp": (2 * n_ff, n_embd),
            }  # fmt: skip
            wide = LATENT_DENSE
            dense = {name: ne for name, ne in layer.items() if not name.endswith(("exps", "shexp", "inp"))}
            dense |= {"ffn_gate": (n_embd, wide), "ffn_up": (n_embd, wide), "ffn_down": (wide, n_embd)}
        if self.arch.startswith("qwen3"):
            layer |= {"attn_q_norm": (self.head_dim,), "attn_k_norm": (self.head_dim,)}
        yield "token_embd.weight", (n_embd, self.n_vocab)
        for il in range(self.n_layer):
            names = dense if dense and il == 0 else layer
            yield from ((f"blk.{il}.{name}.weight", ne) for name, ne in names.items())
        yield "output_norm.weight", (n_embd,)
        if not self.tied:
            yield "output.weight", (n_embd, self.n_vocab)


@dataclass(frozen=True)
class Qwen35(Shape):
    """Three layers of Gated DeltaNet, one of gated attention, and so on."""

    n_state_head: int = 16  # heads of k and of v of a state
    d_state: int = 128  # columns of a head
    n_taps: int = 4

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        n_embd, n, n_head = self.n_embd, self.n_state_head * self.d_state, self.n_state_head
        state = {
            "attn_qkv.weight": (n_embd, 3 * n), "attn_gate.weight": (n_embd, n), "ssm_alpha.weight": (n_embd, n_head),
            "ssm_beta.weight": (n_embd, n_head), "ssm_a": (n_head,), "ssm_conv1d.weight": (self.n_taps, 3 * n),
            "ssm_dt.bias": (n_head,), "ssm_norm.weight": (self.d_state,), "ssm_out.weight": (n, n_embd),
        }  # fmt: skip
        for name, ne in super().tensors():
            block, _, tensor = name.removesuffix(".weight").rpartition(".")
            if tensor == "attn_norm" and (int(block[4:]) + 1) % 4:
                yield from ((f"{block}.{part}", size) for part, size in state.items())
            if tensor in ("attn_norm", "ffn_norm") or not tensor.startswith("attn") or (int(block[4:]) + 1) % 4 == 0:
                ne = (n_embd, 2 * ne[1]) if tensor == "attn_q" else ne
                yield name.replace("ffn_norm", "post_attention_norm"), ne

    @property
    def keys(self) -> Mapping[str, tuple[str, Any]]:
        n_rot, n_head = self.head_dim // 4, self.n_state_head
        sizes = {"conv_kernel": self.n_taps, "state_size": self.d_state, "group_count": n_head}
        sizes |= {"time_step_rank": n_head, "inner_size": n_head * self.d_state}
        return {f"ssm.{name}": ("u32", n) for name, n in sizes.items()} | {
            "rope.dimension_count": ("u32", n_rot),
            "rope.dimension_sections": ("array[i32]", [11, 11, 10, 0]),
            "full_attention_interval": ("u32", 4),
        }


@dataclass(frozen=True)
class Gemma4(Shape):
    """Four layers with a window, one with wider heads, and so on. The last n_shared layers have no keys and values."""

    n_shared: int = 0
    n_ple: int = 256
    full_dim: int = 512  # columns of a head in layers without a window

    @property
    def windows(self) -> list[bool]:
        return [il % 5 != 4 for il in range(self.n_layer)]

    @property
    def n_ffs(self) -> list[int]:
        return [self.n_ff * (1 + (il >= self.n_layer - self.n_shared)) for il in range(self.n_layer)]

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        n_embd, n_all = self.n_embd, self.n_ple * self.n_layer
        yield from [
            ("token_embd.weight", (n_embd, self.n_vocab)),
            ("per_layer_token_embd.weight", (n_all, self.n_vocab)),
        ]
        yield from [("per_layer_model_proj.weight", (n_embd, n_all)), ("per_layer_proj_norm.weight", (self.n_ple,))]
        yield from [("rope_freqs.weight", (self.full_dim // 2,)), ("output_norm.weight", (n_embd,))]
        for il, (window, n_ff) in enumerate(zip(self.windows, self.n_ffs, strict=True)):
            dim = self.head_dim if window else self.full_dim
            n_q, n_kv = self.n_head * dim, self.n_head_kv * dim
            norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "post_norm")
            layer: dict[str, tuple[int, ...]] = dict.fromkeys(norms, (n_embd,))
            layer |= {"layer_output_scale": (1,)}
            layer |= {"attn_q": (n_embd, n_q), "attn_q_norm": (dim,), "attn_output": (n_q, n_embd)}
            if il < self.n_layer - self.n_shared:
                layer |= {"attn_k": (n_embd, n_kv), "attn_v": (n_embd, n_kv), "attn_k_norm": (dim,)}
            layer |= {"ffn_gate": (n_embd, n_ff), "ffn_up": (n_embd, n_ff), "ffn_down": (n_ff, n_embd)}
            layer |= {"inp_gate": (n_embd, self.n_ple), "proj": (self.n_ple, n_embd)}
            yield from ((f"blk.{il}.{name}.weight", ne) for name, ne in layer.items())

    @property
    def keys(self) -> Mapping[str, tuple[str, Any]]:
        ends = [(end, n) for end, n in (("", self.full_dim), ("_swa", self.head_dim))]
        names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
        return {f"{name}{end}": ("u32", n) for name in names for end, n in ends} | {
            "feed_forward_length": ("array[i32]", self.n_ffs),
            "attention.sliding_window_pattern": ("array[bool]", self.windows),
            "attention.sliding_window": ("u32", 512),
            "attention.shared_kv_layers": ("u32", self.n_shared),
            "embedding_length_per_layer_input": ("u32", self.n_ple),
            "rope.freq_base_swa": ("f32", 1e4),
            "final_logit_softcapping": ("f32", 30.0),
        }


SHAPES: Mapping[str, Shape] = {
    "llama-135m": Shape("135M", 30, 576, 9, 3, 64, 1536, 49152, 8192, 1e5, True),  # SmolLM2-135M
    "llama-1b": Shape("1B", 16, 2048, 32, 8, 64, 8192, 128256, 131072, 5e5, True),  # Llama-3.2-1B
    "llama-8b": Shape("8B", 32, 4096, 32, 8, 128, 14336, 128256, 131072, 5e5, False),  # Llama-3.1-8B
    # Layers of Qwen3-30B-A3B and Mixtral 8x7B, fewer of them, with fewer or smaller experts.
    "qwen3moe-2b": Shape("2B", 12, 2048, 32, 4, 128, 768, 49152, 40960, 1e6, True, "qwen3moe", 32, 8),
    # Layers of Qwen3.5-2B, fewer of them, with a smaller vocabulary.
    "qwen35-1b": Qwen35("1B", 16, 2048, 8, 2, 256, 6144, 151936, 262144, 1e7, True, "qwen35"),
    # Layers of Gemma 4 E2B, 25 of 35, with a smaller vocabulary.
    "gemma4-e2b": Gemma4("2B", 25, 1536, 8, 1, 256, 6144, 49152, 32768, 1e6, True, "gemma4", n_shared=15),
    # Layers of DeepSeek-V2-Lite, fewer of them, with fewer experts.
    "deepseek2-1b": Shape("1B", 8, 2048, 16, 1, 192, 1408, 49152, 163840, 1e4, True, "deepseek2", 16, 6),
    "mixtral-2b": Shape("2B", 8, 2048, 32, 8, 64, 4096, 49152, 32768, 1e6, True, "llama", 8, 2),
}


PURE = (*FLOATS, *(row.name for row in TENSOR_TYPES if row.is_quantized and row.name not in ("Q8_1", "Q8_K")))
MIXES = tuple(name for name in WRITABLE_FILES if name not in (*PURE, "COPY"))


@dataclass(frozen=True)
class Mix:
    """A mixture of llama-quantize, or one type for all matrices."""

    name: str
    file_type: int  # general.file_type


def mix_of(name: str) -> Mix:
    """Return the mix of that name, or a tensor type as a mix of one. Raises OptionError for other names."""
    name = name.upper()
    if name not in MIXES and name not in PURE:
        raise OptionError(f"type {name!r}: allowed are the mixes {', '.join(MIXES)} and the types {', '.join(PURE)}")
    kind = FILE_TYPES.get(name) or next(kind for kind in FILE_TYPES.values() if kind.default == name)
    assert kind.id is not None
    return Mix(name, kind.id)


def tensors_of(shape: Shape, mix: Mix) -> list[TensorInfo]:
    """Return all tensors with their types. Norms are F32."""
    tensors = [TensorInfo(name, ne, type_by_name("F32")) for name, ne in shape.tensors()]
    if mix.name in PURE:
        wanted = type_by_name(mix.name)
        is_f32 = [len(t.ne) == 1 or "ffn_gate_inp" in t.name or t.ne[0] < 32 for t in tensors]
        types = [
            t.type if f32 else quantize_rules.fallback(wanted, t.ne[0]) for t, f32 in zip(tensors, is_f32, strict=True)
        ]
    else:
        facts = quantize_rules.MixtureFacts(
            shape.arch, shape.n_layer, shape.n_head // shape.n_head_kv, n_expert=shape.n_expert
        )
        kind = FILE_TYPES[mix.name]
        types = [choice.type for choice in quantize_rules.choose_types(tensors, facts, kind)]
    return [TensorInfo(t.name, t.ne, type) for t, type in zip(tensors, types, strict=True)]


def vocabulary(file: GGUFFile, n_vocab: int) -> dict[str, tuple[str, Any]]:
    """Return type and value of the tokenizer keys of a model, for n_vocab tokens.

    If tokens are missing, others are added, of which each has a text: streams are measured by what they show. If there
    are too many, the last ones are left out, with the merges and special tokens that need them.
    """
    keys = {
        key: (file.metadata.type_name(key), value)
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.")
    }
    prefix = "tokenizer.ggml."
    if f"{prefix}tokens" not in keys:
        raise OptionError(f"--vocab {file.path}: the file has no vocabulary (tokenizer.ggml.tokens)")
    tokens = list(keys[f"{prefix}tokens"][1])[:n_vocab]
    n_real = len(tokens)
    tokens += [f"[PAD{i}]" for i in range(n_real, n_vocab)]
    for name, type, values in (
        ("tokens", "string", tokens),
        ("token_type", "i32", [_NORMAL] * n_vocab),
        ("scores", "f32", [-1e4] * n_vocab),
    ):
        known = keys.get(prefix + name)
        if known is not None and name != "tokens":
            values[:n_real] = known[1][:n_real].tolist()
        if known is not None or name != "scores":
            keys[prefix + name] = f"array[{type}]", values
    if f"{prefix}merges" in keys:
        there = set(tokens)
        merges = [m for m in keys[f"{prefix}merges"][1] if there.issuperset([*m.split(" "), m.replace(" ", "")])]
        keys[f"{prefix}merges"] = "array[string]", merges
    return {
        key: (type, value)
        for key, (type, value) in keys.items()
        if not (key.endswith("_token_id") and isinstance(value, int) and value >= n_real)
    }


def sizes_of(shape: Shape) -> dict[str, int | float]:
    """The metadata's numbers, which the decoder needs."""
    sizes: dict[str, int | float] = {
        "block_count": shape.n_layer, "context_length": shape.n_ctx, "embedding_length": shape.n_embd,
        "feed_forward_length": shape.n_ff, "vocab_size": shape.n_vocab, "attention.head_count": shape.n_head,
        "attention.head_count_kv": shape.n_head_kv, "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": shape.head_dim, "rope.freq_base": shape.rope_freq_base,
    }  # fmt: skip
    if shape.n_expert:
        sizes |= {"expert_count": shape.n_expert, "expert_used_count": shape.n_expert_used}
        sizes |= {"expert_feed_forward_length": shape.n_ff}
    if shape.arch == "deepseek2":
        sizes |= {
            "attention.key_length": sum(LATENT), "attention.value_length": LATENT[0],
            "attention.key_length_mla": shape.head_dim, "attention.value_length_mla": LATENT_VALUE,
            "attention.kv_lora_rank": LATENT[0], "rope.dimension_count": LATENT[1], "expert_shared_count": 2,
            "leading_dense_block_count": 1, "feed_forward_length": LATENT_DENSE, "expert_gating_func": 1,
            "expert_weights_scale": 1.0,
        }  # fmt: skip
    return {f"{shape.arch}.{key}": value for key, value in sizes.items()}


def typed_sizes(shape: Shape) -> dict[str, tuple[str, Any]]:
    """The metadata's numbers, with their types. Those of the shape itself go first."""
    plain = {key: ("f32" if isinstance(value, float) else "u32", value) for key, value in sizes_of(shape).items()}
    return plain | {f"{shape.arch}.{key}": value for key, value in shape.keys.items()}


def write_model(path: Path, shape: Shape, mix: Mix, vocab: GGUFFile, seed: int = 0) -> None:
    """Write the model."""
    keys: list[tuple[str, str, Any]] = [
        ("general.architecture", "string", shape.arch),
        ("general.name", "string", f"random {shape.arch} {shape.size_label}"),
        ("general.size_label", "string", shape.size_label),
        ("general.file_type", "u32", mix.file_type),
        ("general.quantization_version", "u32", 2),
        *((key, *value) for key, value in typed_sizes(shape).items()),
        *((key, type, value) for key, (type, value) in vocabulary(vocab, shape.n_vocab).items()),
    ]
    tensors = tensors_of(shape, mix)
    rng = np.random.Generator(np.random.SFC64(seed))
    sources = {tensor.type.name: RandomBlocks(tensor.type, rng) for tensor in tensors}
    with GGUFWriter(path, {key: Typed(type, value) for key, type, value in keys}, tensors) as writer:
        for tensor in tensors:
            _write_tensor(writer, tensor, sources[tensor.type.name])


def _write_tensor(writer: GGUFWriter, tensor: TensorInfo, source: RandomBlocks) -> None:
    """Write random blocks, the ones of a norm, or the rates of a state, which are below 0."""
    if len(tensor.ne) == 1:
        writer.write(tensor.name, np.full(tensor.ne, -1 if "ssm_a" in tensor.name else 1, np.float32).view(np.uint8))
        return
    n_blocks, per_chunk = tensor.n_elements // tensor.type.block_size, _CHUNK // tensor.type.type_size
    for start in range(0, n_blocks, per_chunk):
        writer.write(tensor.name, source.draw(min(per_chunk, n_blocks - start)))


@click.command(cls=Command)
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.argument("type")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: SHAPE-TYPE.gguf]")
@click.option("--vocab", help="GGUF file whose vocabulary to take.  [default: SmolLM2's, fetched once]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
def main(shape: str, type: str, output: Path | None, vocab: str | None, seed: int) -> None:
    """Write a model of SHAPE with random weights of TYPE: a tensor type, or a mix such as Q4_K_M."""
    mix = mix_of(type)
    path = output or Path(f"{shape}-{type.upper()}.gguf")
    with GGUFFile.open(find_model(vocab)) as file:
        write_model(path, SHAPES[shape], mix, file, seed)
    click.echo(f"{path}: {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
