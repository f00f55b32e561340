"""config.json and generation_config.json for the model in a GGUF file: convert_architectures.py read backwards."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.convert.architectures import ARCHITECTURES, BASE_KEYS, Architecture
from gguf_run.runtime.convert.metadata import YARN, rope_tensors, sizes
from gguf_run.runtime.convert.stored.checkpoint import Config

Json = dict[str, Any]

# The name in config.json where BASE_KEYS has several and this architecture does not use the first.
_OWN_NAMES: Mapping[tuple[str, str], str] = MappingProxyType({
    ("starcoder2", "attention.layer_norm_epsilon"): "norm_epsilon", ("qwen2moe", "expert_count"): "num_experts",
    ("qwen3moe", "expert_count"): "num_experts", ("deepseek", "expert_count"): "n_routed_experts",
})  # fmt: skip
# What config.json calls it if q has a bias. "": all models of the architecture have it.
_BIAS_NAMES = MappingProxyType({
    "stablelm": "use_qkv_bias", "starcoder2": "use_bias", "qwen2": "", "qwen2moe": "", "phi3": "", "internlm2": "bias",
})  # fmt: skip
# Models whose attention is scaled as if heads made up the width of the model: (architecture, layers).
_SCALED_BY_WIDTH = frozenset({("gemma2", 46), ("gemma3", 62)})
_NONE_IF_ZERO = ("expert_count", "expert_used_count", "attention.sliding_window")
_YARN_NAMES = MappingProxyType({key: name for name, key in reversed(YARN)})
_LLAMA31_CONTEXTS = (8192, *(1 << n for n in range(4, 20)))


def by_architecture(file: GGUFFile) -> Architecture:
    """Return the entry of the file's architecture; UnsupportedError if it cannot be exported."""
    name = file.metadata.get("general.architecture")
    entries = {entry.arch: entry for entry in ARCHITECTURES.values()}
    if not isinstance(name, str) or name not in entries:
        known = ", ".join(sorted(entries))
        raise UnsupportedError(f"{file.path}: architecture {quoted(str(name))} cannot be exported; these can: {known}")
    return entries[name]


def model_config(entry: Architecture, file: GGUFFile, dtype: str) -> Json:
    """Return config.json. FormatError for a number that is missing, UnsupportedError for what it has no place for."""
    token_embd = file.tensors.get("token_embd.weight")
    if token_embd is None or len(token_embd.ne) != 2:
        raise FormatError(f"{file.path}: there is no matrix token_embd.weight: not a whole model")
    mixtral = entry.arch == "llama" and _get(entry, file, "expert_count")
    values: Json = {
        "architectures": ["MixtralForCausalLM" if mixtral else entry.classes[0]],
        "model_type": "mixtral" if mixtral else entry.model_types[0],
        "torch_dtype": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype],
        **_token_ids(file.metadata),
    }
    for key, _, names in (*BASE_KEYS, *entry.keys):
        value = _get(entry, file, key)
        if value is not None and (value or key not in _NONE_IF_ZERO):
            values[_OWN_NAMES.get((entry.arch, key), names[0])] = value
    if missing := [names[0] for _, _, names in BASE_KEYS[:3] if names[0] not in values]:
        raise FormatError(f"{file.path}: {entry.arch}.{missing[0]} is missing: config.json needs it")
    values["vocab_size"] = token_embd.ne[1]
    if (head_dim := _get(entry, file, "attention.key_length")) is not None:
        values["head_dim"] = head_dim
    config = Config(file.path, values)
    numbers = sizes(config)
    values.update(_fixed(entry, values, numbers))
    values.update(_rope(entry, file, config, numbers["head_dim"]))
    values.update(_parts(entry, file, values))
    return values


def generation_config(metadata: Mapping[str, Any]) -> Json:
    """Return generation_config.json: the tokens that end an answer are a list if there are several."""
    ids = _token_ids(metadata)
    other = metadata.get("tokenizer.ggml.eot_token_id")
    if isinstance(other, int) and ids["eos_token_id"] not in (None, other):
        ids["eos_token_id"] = [ids["eos_token_id"], other]
    return {key: id for key, id in ids.items() if id is not None}


def _get(entry: Architecture, file: GGUFFile, key: str) -> Any:
    """Return a value: of floats the shortest decimal that is the same f32."""
    value = file.metadata.get(f"{entry.arch}.{key}")
    if value is not None and not isinstance(value, bool | int | float):
        raise UnsupportedError(f"{file.path}: {entry.arch}.{key} is no single number: config.json has no place for it")
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _token_ids(metadata: Mapping[str, Any]) -> Json:
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    found = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    return {name: id if isinstance(id, int) and 0 <= id < 1 << 31 else None for name, id in found.items()}


def _fixed(entry: Architecture, values: Json, numbers: Mapping[str, int]) -> Json:
    """What a file of this architecture says without a key."""
    found = {key: allowed[0] for key, allowed in entry.expected.items()}
    if "query_pre_attn_scalar" in found:
        by_width = (entry.arch, values["num_hidden_layers"]) in _SCALED_BY_WIDTH
        found["query_pre_attn_scalar"] = numbers["n_embd"] // numbers["n_head"] if by_width else numbers["head_dim"]
    return found


def _rope(entry: Architecture, file: GGUFFile, config: Config, head_dim: int) -> Json:
    """Rotary parameters: in the form of transformers 5, and in that of before."""
    rope: Json = {"rope_type": "default", "rope_theta": _get(entry, file, "rope.freq_base") or 10000.0}
    kind = file.metadata.get(f"{entry.arch}.rope.scaling.type")
    original = _get(entry, file, "rope.scaling.original_context_length")
    found: Json = {}
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": _get(entry, file, "rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = original
        for key, name in _YARN_NAMES.items():
            if (value := _get(entry, file, f"rope.scaling.{key}")) is not None:
                rope[name] = value
        if entry.arch == "gpt-oss":
            rope["truncate"] = False
    elif original is not None:
        found["original_max_position_embeddings"] = original
    n_rot = _get(entry, file, "rope.dimension_count") or head_dim
    if n_rot != head_dim or "partial_rotary_factor" in entry.defaults:
        part = n_rot / head_dim
        part = part if int(part * head_dim) == n_rot else math.nextafter(part, 2.0)
        rope["partial_rotary_factor"] = found["partial_rotary_factor"] = part
    rope |= _factors(file, config, rope)
    if rope["rope_type"] == "longrope":
        rope["original_max_position_embeddings"] = original
    found["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        found["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        found["rope_scaling"]["type"] = rope["rope_type"]
    local = _get(entry, file, "rope.freq_base_swa")
    if entry.arch == "gemma3":
        found["rope_local_base_freq"] = local = local or 10000.0
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    return found | {"rope_parameters": rope}


def _factors(file: GGUFFile, config: Config, rope: Json) -> Json:
    """What made the tensors of rotary factors: lists of them, or the numbers of Llama 3.1, found by trying."""
    tensors = {name: _floats(file, name) for name in ("rope_freqs", "rope_factors_long", "rope_factors_short")}
    long, short, freqs = tensors["rope_factors_long"], tensors["rope_factors_short"], tensors["rope_freqs"]
    if long is not None and short is not None:
        return {"rope_type": "longrope", "long_factor": long, "short_factor": short}
    if freqs is None or all(factor == 1.0 for factor in freqs):
        return {}
    for n_ctx in _LLAMA31_CONTEXTS:
        tried = {"rope_type": "llama3", "factor": max(freqs), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": n_ctx}  # fmt: skip
        values = {**config.values, "rope_parameters": rope | tried}
        again = rope_tensors(next(iter(ARCHITECTURES.values())), Config(config.path, values))["rope_freqs.weight"]
        if len(again) == len(freqs) and np.allclose(again, freqs, rtol=1e-5):
            return tried
    raise UnsupportedError(f"{file.path}: rope_freqs.weight is not as Llama 3.1's: config.json has no place for it")


def _floats(file: GGUFFile, name: str) -> list[float] | None:
    tensor = file.tensors.get(f"{name}.weight")
    if tensor is None:
        return None
    if tensor.type.name != "F32":
        raise FormatError(f"{file.path}: {name}.weight has the type {tensor.type.name}, must be F32")
    return [float(str(value)) for value in tensor.blocks().view(np.float32).reshape(-1)]


def _parts(entry: Architecture, file: GGUFFile, values: Json) -> Json:
    """What the tensors themselves tell, and which layers have a window."""
    found: Json = {"tie_word_embeddings": _is_tied(file)}
    name = _BIAS_NAMES.get(entry.arch, "attention_bias")
    if name:
        found[name] = "blk.0.attn_q.bias" in file.tensors
    if "blk.0.ffn_up.bias" in file.tensors and entry.arch in ("llama", "granite", "smollm3"):
        found["mlp_bias"] = True
    if entry.arch == "stablelm":
        found["qk_layernorm"] = "blk.0.attn_q_norm.weight" in file.tensors
    if entry.swa_period and values.get("sliding_window"):
        n_layer = values["num_hidden_layers"]
        pattern = file.metadata.get(f"{entry.arch}.attention.sliding_window_pattern")
        given = list(pattern) if isinstance(pattern, list | tuple | np.ndarray) else []
        if given and len(given) != n_layer:
            raise FormatError(f"{file.path}: sliding_window_pattern has {len(given)} entries for {n_layer} layers")
        windows = given or [(il + 1) % entry.swa_period != 0 for il in range(n_layer)]
        found["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    return found


def _is_tied(file: GGUFFile) -> bool:
    """Whether there is no output matrix, or one that is the embeddings once more."""
    output, token_embd = file.tensors.get("output.weight"), file.tensors["token_embd.weight"]
    if output is None:
        return True
    if (output.ne, output.type) != (token_embd.ne, token_embd.type):
        return False
    step = max(1, (1 << 24) // output.type.row_bytes(output.ne[0]))
    ranges = ((first, min(first + step, output.n_rows)) for first in range(0, output.n_rows, step))
    return all(np.array_equal(output.blocks(*part), token_embd.blocks(*part)) for part in ranges)
