"""Writes small GGUF models of awkward shapes, with random weights and a small real vocabulary.

The gguf package writes the files. It or libgguf quantizes them, so that no code of this project is involved.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MERGES = (
    "t h",
    "th e",
    "Ġ the",
    "Ġ t",
    "i n",
    "Ġ a",
    "a n",
    "an d",
    "Ġ and",
    "e r",
    "o n",
    "r e",
    "Ġ o",
    "o u",
    "ou r",
)
_SPM_WORDS = ("▁t", "he", "▁the", "in", "er", "an", "▁a", "▁and", "nd", "on", "re", "ou", "▁o", "▁of")
_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6


@dataclass(frozen=True)
class Tiny:
    """A model to write. Sizes have ggml's names."""

    arch: str = "llama"
    n_layer: int = 2
    n_embd: int = 96
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 32
    n_ff: int = 160
    n_ctx: int = 128
    rms_eps: float = 1e-5
    rope_freq_base: float = 1e4
    window: int = 0
    tied: bool = True
    biases: Sequence[str] = ()  # matrices that have a bias
    rope_freqs: Sequence[float] | None = None  # factors of rope_freqs.weight
    type: str = "F32"  # tensor type of all other matrices
    types: Mapping[str, str] = field(default_factory=dict)  # tensor types by the last part of the name ("attn_v")
    vocab: str = "bpe"
    pre: str = "gpt-2"
    extra_tokens: int = 5  # unused tokens at the end of the vocabulary
    seed: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)  # keys without prefix; None leaves a key out
    tensors: Mapping[str, np.ndarray | None] = field(default_factory=dict)  # more tensors; None leaves a tensor out


QKV = ("attn_q", "attn_k", "attn_v")
ALL_BIASES = (*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
# All that can vary in a llama file at once; and a gemma3 whose window is shorter than its texts. Six layers: 5 + 1.
AWKWARD_LLAMA = Tiny(biases=ALL_BIASES, tied=False, rope_freqs=tuple(1 + 0.5 * i for i in range(16)), rms_eps=1e-3)
TINY_GEMMA3 = Tiny(
    arch="gemma3", n_layer=6, n_embd=64, n_head=4, n_head_kv=1, n_ff=96, window=7, rope_freq_base=1e6, vocab="spm"
)
# Rows of a multiple of 256, as K-quants need.
WIDE_LLAMA = Tiny(n_embd=256, n_head=4, n_head_kv=2, head_dim=64, n_ff=512)


def tiny_moe(n_layer: int, type: str = "F32") -> Tiny:
    """Return a qwen2moe of five experts, two for each token, and one that all tokens use. type: of the experts too."""
    rng, n_embd, n_ff, n_expert = np.random.default_rng(1), 64, 32, 5
    shapes = {
        "ffn_gate_inp": (n_expert, n_embd), "ffn_gate_exps": (n_expert, n_ff, n_embd),
        "ffn_up_exps": (n_expert, n_ff, n_embd), "ffn_down_exps": (n_expert, n_embd, n_ff),
        "ffn_gate_inp_shexp": (n_embd,), "ffn_gate_shexp": (n_ff, n_embd), "ffn_up_shexp": (n_ff, n_embd),
        "ffn_down_shexp": (n_embd, n_ff), "ffn_gate": None, "ffn_up": None, "ffn_down": None,
    }  # fmt: skip
    tensors = {
        f"blk.{il}.{name}.weight": shape and (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
        for il in range(n_layer)
        for name, shape in shapes.items()
    }
    metadata = {"expert_count": n_expert, "expert_used_count": 2, "expert_feed_forward_length": n_ff}
    metadata |= {"expert_shared_feed_forward_length": n_ff}
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": 2, "n_head_kv": 1, "n_ff": n_ff, "type": type}
    return Tiny(arch="qwen2moe", types={"ffn_gate_inp": "F32"}, biases=QKV, metadata=metadata, tensors=tensors, **sizes)


def byte_tokens() -> list[str]:
    """GPT-2's printable character for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    chars = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [chars[b] for b in range(256)]


def vocabulary(tiny: Tiny) -> dict[str, Any]:
    """The tokenizer.ggml keys. Control tokens come first, unused ones last."""
    unused = [f"<unused{i}>" for i in range(tiny.extra_tokens)]
    keys: dict[str, Any]
    if tiny.vocab == "bpe":
        control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        normal = [*byte_tokens(), *(merge.replace(" ", "") for merge in _MERGES)]
        types = [_CONTROL] * 3 + [_NORMAL] * len(normal)
        keys = {"model": "gpt2", "pre": tiny.pre, "merges": list(_MERGES), "add_bos_token": False}
        keys |= {"bos_token_id": 1, "eos_token_id": 2}
    else:
        control = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *(f"<0x{b:02X}>" for b in range(256))]
        letters = [chr(c) for c in range(33, 127)]
        normal = [*_SPM_WORDS, "▁", *letters]
        types = [_UNKNOWN] + [_CONTROL] * 4 + [_BYTE] * 256 + [_NORMAL] * len(normal)
        scores = [0.0] * len(control) + [-float(i) for i in range(len(normal))] + [-1e3] * len(unused)
        keys = {"model": "llama", "scores": scores, "add_bos_token": True, "add_space_prefix": True}
        keys |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    tokens = [*control, *normal, *unused]
    return keys | {"tokens": tokens, "token_type": types + [_UNUSED] * len(unused)}


def tensor_shapes(tiny: Tiny, n_vocab: int) -> dict[str, tuple[int, ...]]:
    """numpy order: [n_out, n_in]."""
    n_embd, n_q, n_kv, n_ff = tiny.n_embd, tiny.n_head * tiny.head_dim, tiny.n_head_kv * tiny.head_dim, tiny.n_ff
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (n_embd,), "attn_q": (n_q, n_embd), "attn_k": (n_kv, n_embd), "attn_v": (n_kv, n_embd),
        "attn_output": (n_embd, n_q), "ffn_norm": (n_embd,), "ffn_gate": (n_ff, n_embd), "ffn_up": (n_ff, n_embd),
        "ffn_down": (n_embd, n_ff),
    }  # fmt: skip
    if tiny.arch == "gemma3":
        layer |= {"attn_q_norm": (tiny.head_dim,), "attn_k_norm": (tiny.head_dim,)}
        layer |= {"post_attention_norm": (n_embd,), "post_ffw_norm": (n_embd,)}
    shapes = {"token_embd.weight": (n_vocab, n_embd), "output_norm.weight": (n_embd,)}
    if not tiny.tied:
        shapes["output.weight"] = (n_vocab, n_embd)
    for il in range(tiny.n_layer):
        shapes |= {f"blk.{il}.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"blk.{il}.{name}.bias": layer[name][:1] for name in tiny.biases}
    return shapes


def random_weights(tiny: Tiny, n_vocab: int) -> dict[str, np.ndarray]:
    """Return weights that keep activations near 1 and attention sharp, so that a wrong position or window shows."""
    rng = np.random.default_rng(tiny.seed)
    weights = {}
    for name, shape in tensor_shapes(tiny, n_vocab).items():
        values = rng.standard_normal(shape)
        if len(shape) == 1:
            values = values * 0.2 + (0 if name.endswith("bias") else 1)
        elif "attn_q" in name or "attn_k" in name:
            values *= 1.6 / math.sqrt(shape[1])
        else:
            values /= math.sqrt(shape[1])
        weights[name] = values.astype(np.float32)
    if tiny.rope_freqs is not None:
        weights["rope_freqs.weight"] = np.asarray(tiny.rope_freqs, np.float32)
    return weights


def quantize(values: np.ndarray, type_name: str) -> np.ndarray:
    """Return the blocks of a tensor, uint8[n_rows, row_bytes], or the values for types of one weight a block."""
    qtype = gguf.GGMLQuantizationType[type_name]
    if type_name in ("F32", "F16"):
        return values.astype({"F32": np.float32, "F16": np.float16}[type_name])
    if type_name == "BF16":
        return gguf.quants.quantize(values, qtype)
    return libgguf.quantize_rows(np.ascontiguousarray(values, np.float32), qtype)


def metadata_of(tiny: Tiny) -> dict[str, Any]:
    """The architecture's keys, without its prefix."""
    keys: dict[str, Any] = {
        "block_count": tiny.n_layer, "context_length": tiny.n_ctx, "embedding_length": tiny.n_embd,
        "feed_forward_length": tiny.n_ff, "attention.head_count": tiny.n_head,
        "attention.head_count_kv": tiny.n_head_kv, "attention.key_length": tiny.head_dim,
        "attention.value_length": tiny.head_dim, "attention.layer_norm_rms_epsilon": tiny.rms_eps,
        "rope.freq_base": tiny.rope_freq_base,
    }  # fmt: skip
    if tiny.window:
        keys["attention.sliding_window"] = tiny.window
    return {key: value for key, value in (keys | dict(tiny.metadata)).items() if value is not None}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a metadata value. An int is stored as uint32, int32 if negative, uint64 if large; a float as float32."""
    if isinstance(value, int) and not isinstance(value, bool):
        large, negative = abs(value) > 0xFFFFFFFF, value < 0
        {(0, 0): writer.add_uint32, (0, 1): writer.add_int32, (1, 0): writer.add_uint64, (1, 1): writer.add_int64}[
            large, negative
        ](key, value)
    elif isinstance(value, list | np.ndarray):
        writer.add_array(key, list(value))
    else:
        {bool: writer.add_bool, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)


def write_tiny(path: Path, tiny: Tiny | None = None) -> dict[str, np.ndarray]:
    """Write the model and return its weights as the file has them, dequantized by libgguf: float32, by tensor name."""
    tiny = tiny or Tiny()
    vocab = vocabulary(tiny)
    writer = gguf.GGUFWriter(path, tiny.arch)
    for key, value in metadata_of(tiny).items():
        _add(writer, f"{tiny.arch}.{key}", value)
    for key, value in vocab.items():
        _add(writer, f"tokenizer.ggml.{key}", value)
    writer.add_chat_template(CHAT_TEMPLATE)
    weights = random_weights(tiny, len(vocab["tokens"])) | dict(tiny.tensors)
    stored = {}
    for name, values in weights.items():
        if values is None:
            continue
        is_matrix = values.ndim > 1
        type_name = tiny.types.get(name.removesuffix(".weight").split(".")[-1], tiny.type) if is_matrix else "F32"
        blocks = quantize(values, type_name)
        qtype = gguf.GGMLQuantizationType[type_name]
        writer.add_tensor(name, blocks, raw_dtype=None if type_name in ("F32", "F16") else qtype)
        is_float = type_name in ("F32", "F16", "BF16")
        stored[name] = gguf.quants.dequantize(blocks, qtype) if is_float else libgguf.dequantize_rows(blocks, qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: values.astype(np.float32) for name, values in stored.items()}
