"""Tiny checkpoints of every architecture that gguf-convert knows, with random weights, written by transformers.

Sizes are awkward on purpose: the heads' widths do not add up to n_embd, and no block divides the rows. Norms and biases
are random too, so that a missing one, or one that is off by one, shows in the logits.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

N_VOCAB = 300
TEXT = "The quick brown fox jumps over the lazy dog. 12 345 don't, it's a test of words, wordy words and worlds. " * 3

# head_dim x n_head is not n_embd, where the architecture allows it.
_FREE = {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
_TIED = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
_COMMON = {
    "vocab_size": N_VOCAB, "num_hidden_layers": 2, "intermediate_size": 104, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
    "tie_word_embeddings": False, "attn_implementation": "eager",
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16}
_LLAMA31 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# gpt-oss says "truncate": false, of which llama.cpp knows nothing: the ramp ends at pair 2 either way here.
_YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 0.5175821,
    "truncate": False, "original_max_position_embeddings": 64,
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7], "original_max_position_embeddings": 256,
}  # fmt: skip

# name -> (transformers' model class, config beyond _COMMON)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**_FREE, "attention_bias": True}),
    "llama31": ("LlamaForCausalLM", {**_TIED, "tie_word_embeddings": True, "rope_parameters": _LLAMA31}),
    "mistral": ("MistralForCausalLM", {**_FREE, "sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", {**_FREE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2ForCausalLM", {**_TIED}),
    "qwen2moe": ("Qwen2MoeForCausalLM", {**_TIED, **_MOE, "shared_expert_intermediate_size": 56}),
    "qwen3": ("Qwen3ForCausalLM", {**_FREE}),
    "qwen3moe": ("Qwen3MoeForCausalLM", {**_FREE, **_MOE, "norm_topk_prob": True}),
    "olmoe": ("OlmoeForCausalLM", {**_TIED, "num_experts": 4, "num_experts_per_tok": 2}),
    "gemma": ("GemmaForCausalLM", {**_FREE, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", {**_FREE, **_WINDOWED, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3ForCausalLM", {**_FREE, **_WINDOWED, "tie_word_embeddings": True}),
    "phi3": ("Phi3ForCausalLM", {**_TIED}),
    "phi3-longrope": (
        "Phi3ForCausalLM",
        {**_TIED, "max_position_embeddings": 1024, "original_max_position_embeddings": 256,
         "rope_parameters": _LONGROPE},
    ),
    "smollm3": ("SmolLM3ForCausalLM", {**_TIED, "num_hidden_layers": 4, "tie_word_embeddings": True}),
    "granite": (
        "GraniteForCausalLM",
        {**_TIED, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7,
         "attention_multiplier": 0.2},
    ),
    "olmo2": ("Olmo2ForCausalLM", {**_TIED}),
    "stablelm": ("StableLmForCausalLM", {**_TIED, "use_qkv_bias": True, "qk_layernorm": True}),
    "stablelm-parallel": ("StableLmForCausalLM", {**_TIED, "use_parallel_residual": True}),
    "starcoder2": ("Starcoder2ForCausalLM", {**_TIED, "sliding_window": None}),
    "internlm2": ("LlamaForCausalLM", {**_TIED}),
    "deepseek": (
        "Qwen2MoeForCausalLM",
        {**_TIED, **_MOE, "shared_expert_intermediate_size": 80, "mlp_only_layers": [0], "norm_topk_prob": False},
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        {**_FREE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
         "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": _YARN},
    ),
}  # fmt: skip


def make(name: str, directory: Path, dtype: str = "float32", **config: Any) -> Any:
    """Write the checkpoint, with a tokenizer, into the directory; return transformers' model of it in float32.

    config: replaces values of the model's config. dtype: of the stored weights.
    """
    import torch

    model = _model(name, tuple(sorted(config.items(), key=str)) if config else ())
    directory.mkdir(parents=True, exist_ok=True)
    if dtype != "float32":
        model = model.to(getattr(torch, dtype))
    model.save_pretrained(directory)
    model = model.float()
    _TO_OTHERS.get(name, lambda model, directory: None)(model, directory)
    write_tokenizer(directory)
    return model


def _model(name: str, config: Sequence[tuple[str, Any]]) -> Any:
    import torch
    import transformers

    class_name, own = TINY[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(len(name))
    model = cls(cls.config_class(**{**_COMMON, **own, **dict(config)})).eval()
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if tensor.ndim == 1 or key.endswith("bias"):
                tensor.add_(torch.randn_like(tensor) * 0.2)
            elif "experts" in key or "norm" in key:  # which not all classes initialize
                tensor.normal_(0.0, 0.2)
        if name == "deepseek":  # no bias, and a shared expert that counts fully
            for layer in model.model.layers:
                for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                    module.bias.zero_()
            model.model.layers[1].mlp.shared_expert_gate = _Open()
    return model


def _Open() -> Any:
    """A gate whose sigmoid is 1."""
    import torch

    class Open(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.full((*x.shape[:-1], 1), 100.0, dtype=x.dtype)

    return Open()


def logits(model: Any, ids: Sequence[int]) -> NDArray[np.float32]:
    """Return transformers' logits f32[len(ids), n_vocab]."""
    import torch

    with torch.no_grad():
        out: NDArray[np.float32] = model(torch.tensor([list(ids)])).logits[0].float().numpy()
    return out


@functools.cache
def _tokenizer() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB,
        special_tokens=["<|endoftext|>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    assert tokenizer.get_vocab_size() == N_VOCAB
    text: str = tokenizer.to_str()
    return text


def write_tokenizer(directory: Path) -> None:
    """Write a byte-level BPE of N_VOCAB tokens."""
    (directory / "tokenizer.json").write_text(_tokenizer())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def rewrite(directory: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Let `change` edit the tensors, by name, and the config of a checkpoint in one file."""
    from safetensors.torch import load_file, save_file

    tensors, config = load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())
    change(tensors, config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))


def _to_internlm2(model: Any, directory: Path) -> None:
    """Rename llama's weights as InternLM2 does. q, k and v of a group of heads become neighbours in one tensor."""
    import torch

    names = {
        "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
        "self_attn.o_proj": "attention.wo", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
    }  # fmt: skip

    def change(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        n_kv, head_dim = config["num_key_value_heads"], config["head_dim"]
        for il in range(config["num_hidden_layers"]):
            parts = [tensors.pop(f"model.layers.{il}.self_attn.{name}_proj.weight") for name in "qkv"]
            groups = [part.reshape(n_kv, -1, head_dim, part.shape[-1]) for part in parts]
            wqkv = torch.cat(groups, dim=1)
            tensors[f"model.layers.{il}.attention.wqkv.weight"] = wqkv.reshape(-1, wqkv.shape[-1])
        for name in list(tensors):
            new = functools.reduce(lambda text, pair: text.replace(*pair), names.items(), name)
            tensors[new] = tensors.pop(name)
        config.update(architectures=["InternLM2ForCausalLM"], model_type="internlm2")
        del config["head_dim"]

    rewrite(directory, change)


def _to_deepseek(model: Any, directory: Path) -> None:
    """Rename Qwen2-MoE's weights as DeepSeek's first models do."""

    def change(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        for name in list(tensors):
            tensor = tensors.pop(name)
            if not name.endswith(".bias"):
                tensors[name.replace("shared_expert.", "shared_experts.")] = tensor
        config.update(architectures=["DeepseekForCausalLM"], model_type="deepseek", first_k_dense_replace=1)
        config.update(n_shared_experts=2, n_routed_experts=config.pop("num_experts", None) or 4)
        others = ("shared_expert_intermediate_size", "num_local_experts", "mlp_only_layers", "decoder_sparse_step")
        for key in (*others, "max_window_layers", "layer_types", "qkv_bias", "sliding_window"):
            config.pop(key, None)

    rewrite(directory, change)


_TO_OTHERS: dict[str, Callable[[Any, Path], None]] = {"internlm2": _to_internlm2, "deepseek": _to_deepseek}


def plain_llama(directory: Path, dtype: str = "BF16", seed: int = 1, **config: Any) -> dict[str, tuple[str, Any]]:
    """Write a llama checkpoint without torch. K-quants can hold its rows.

    config: replaces values of config.json.

    Returns the tensors as write_safetensors takes them, for tests that change some and write them again.
    """
    from quantpack import write_safetensors

    n_embd, n_ff, n_kv = 256, 512, 128
    shapes = {"model.embed_tokens": (N_VOCAB, n_embd), "model.norm": (n_embd,)}
    for il in range(2):
        shapes |= {
            f"model.layers.{il}.{name}": shape
            for name, shape in {
                "input_layernorm": (n_embd,), "post_attention_layernorm": (n_embd,), "self_attn.q_proj": (256, n_embd),
                "self_attn.k_proj": (n_kv, n_embd), "self_attn.v_proj": (n_kv, n_embd),
                "self_attn.o_proj": (n_embd, 256), "mlp.gate_proj": (n_ff, n_embd), "mlp.up_proj": (n_ff, n_embd),
                "mlp.down_proj": (n_embd, n_ff),
            }.items()
        }  # fmt: skip
    rng = np.random.default_rng(seed)
    tensors: dict[str, tuple[str, Any]] = {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape).astype(np.float32) * 0.1 + (len(shape) == 1)
        bits = (x.view(np.uint32) + 0x8000 >> 16).astype(np.uint16)
        tensors[f"{name}.weight"] = dtype, bits if dtype == "BF16" else x
    values = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": N_VOCAB, "hidden_size": n_embd,
        "intermediate_size": n_ff, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values | config))
    write_tokenizer(directory)
    write_safetensors(directory / "model.safetensors", tensors)
    return tensors
