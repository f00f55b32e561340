"""config.json and generation_config.json for the model in a GGUF file: metadata.py and architectures.py backwards."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.keys import Keys
from gguf_run.models.rope import make_rope
from gguf_run.models.rope_scaling import read_scaling, yarn_attention
from gguf_run.runtime.convert.architectures import BY_ARCH
from gguf_run.runtime.convert.layout import CheckpointLayout
from gguf_run.runtime.convert.metadata import sizes
from gguf_run.runtime.convert.rope import longrope_attention, rope_tensors
from gguf_run.runtime.convert.shared import BASE_KEYS
from gguf_run.runtime.convert.stored.checkpoint import Config
from gguf_run.runtime.convert.stored.sources import same_values

Json = dict[str, Any]

_TORCH_DTYPES: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_NONE_IF_ZERO = ("expert_count", "expert_used_count")
_LLAMA31_CONTEXTS = (8192, *(1 << n for n in range(4, 20)))


def layout_of_file(file: GGUFFile) -> CheckpointLayout:
    """Return the layout of the file's architecture. UnsupportedError if there is none."""
    name = file.metadata.get("general.architecture")
    rows = [row for row in BY_ARCH.get(name, ()) if row.goes_back] if isinstance(name, str) else []
    if not rows:
        known = ", ".join(sorted(arch for arch, rows in BY_ARCH.items() if any(row.goes_back for row in rows)))
        raise UnsupportedError(f"{file.path}: architecture {quoted(str(name))} cannot be exported; these can: {known}")
    if _get(file, "expert_count"):
        return rows[-1]
    return rows[1] if len(rows) > 1 and _get(file, "attention.sliding_window") else rows[0]


def model_config(layout: CheckpointLayout, file: GGUFFile, dtype: str) -> Json:
    """Return config.json.

    dtype: a key of _TORCH_DTYPES. FormatError for a number that is missing. UnsupportedError for a value that
    config.json has no place for.
    """
    token_embd = file.tensors.get("token_embd.weight")
    if token_embd is None or len(token_embd.ne) != 2:
        raise FormatError(f"{file.path}: there is no matrix token_embd.weight: not a whole model")
    name, model_type = next(iter(layout.classes.items()))
    values: Json = {
        "architectures": [name],
        "model_type": model_type,
        "torch_dtype": _TORCH_DTYPES[dtype],
        **_token_ids(file.metadata),
    }
    for key, _, names in layout.all_keys():
        value = _get(file, key)
        if value is not None and (value or key not in _NONE_IF_ZERO):
            values[names[0]] = value or None if "softcapping" in key else value
    if missing := [names[0] for _, _, names in BASE_KEYS[:3] if names[0] not in values]:
        raise FormatError(f"{file.path}: {layout.arch}.{missing[0]} is missing: config.json needs it")
    values["vocab_size"] = token_embd.ne[1]
    if (head_dim := _get(file, "attention.key_length")) is not None:
        values["head_dim"] = head_dim
    config = Config(file.path, values)
    numbers = sizes(config)
    values.update(_fixed(layout, file, values, numbers))
    values.update(_windows(layout, file, values["num_hidden_layers"]))
    values.update(_rope(layout, file, config, numbers["head_dim"]))
    values.update(_from_tensors(layout, file))
    return values


def generation_config(metadata: Mapping[str, Any]) -> Json:
    """Return generation_config.json. Several tokens that end an answer become a list."""
    ids = _token_ids(metadata)
    more = metadata.get("tokenizer.ggml.eos_token_ids", ())
    others = [*(metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eot", "eom")), *map(int, more)]
    ends = list(dict.fromkeys(id for id in (ids["eos_token_id"], *others) if isinstance(id, int)))
    if ids["eos_token_id"] is not None and len(ends) > 1:
        ids["eos_token_id"] = ends
    return {key: id for key, id in ids.items() if id is not None}


def _get(file: GGUFFile, key: str) -> Any:
    """Return a number of the architecture, or None. A float is the shortest decimal that is the same f32."""
    full = f"{file.metadata['general.architecture']}.{key}"
    value = file.metadata.get(full)
    if value is not None and not isinstance(value, bool | int | float):
        raise UnsupportedError(f"{file.path}: {full} is no single number: config.json has no place for it")
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _token_ids(metadata: Mapping[str, Any]) -> Json:
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    found = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    return {name: id if isinstance(id, int) and 0 <= id < 1 << 31 else None for name, id in found.items()}


def _fixed(layout: CheckpointLayout, file: GGUFFile, values: Json, numbers: Mapping[str, int]) -> Json:
    """Return the values that all models of this architecture share, or for which a GGUF file needs no key."""
    found = {key: allowed[0] for key, allowed in layout.fixed.items()}
    if "norm_topk_prob" in layout.defaults:
        norm = file.metadata.get(f"{layout.arch}.expert_weights_norm")
        found["norm_topk_prob"] = layout.decoder.expert_norm if norm is None else bool(norm)
    if "query_pre_attn_scalar" in layout.defaults:
        by_width = values["num_hidden_layers"] in layout.decoder.n_embd_scale_n_layer
        built_in = numbers["n_embd"] // numbers["n_head"] if by_width else numbers["head_dim"]
        scale = _get(file, "attention.scale")
        found["query_pre_attn_scalar"] = round(scale**-2) if scale else built_in  # transformers takes whole numbers
    return found


def _windows(layout: CheckpointLayout, file: GGUFFile, n_layer: int) -> Json:
    """Return the window, and which layers have it."""
    window = _get(file, "attention.sliding_window") if layout.windows else None
    found: Json = {"use_sliding_window": bool(window)} if layout.switch else {}
    if not window:
        types = {"layer_types": ["full_attention"] * n_layer} if "sliding_window_pattern" in layout.defaults else {}
        return found | types | ({"sliding_window": None} if "sliding_window" in layout.defaults else {})
    if layout.windows != "all":
        found["layer_types"] = _layer_types(layout, file, n_layer)
    return found | {"sliding_window": window}


def _rope(layout: CheckpointLayout, file: GGUFFile, config: Config, head_dim: int) -> Json:
    """Return rotary parameters twice: in the form of transformers 5, and in the one before."""
    rope: Json = {"rope_type": "default", "rope_theta": _get(file, "rope.freq_base") or 10000.0}
    kind = file.metadata.get(f"{layout.arch}.rope.scaling.type")
    original = _get(file, "rope.scaling.original_context_length")
    found: Json = {}
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": _get(file, "rope.scaling.factor")}
    if kind == "yarn":
        scaling = read_scaling(Keys(file.metadata, layout.arch), original or 1, layout.decoder.yarn_truncate)
        attention = make_rope("", 2, 1e4, scaling).scale
        rope |= {"original_max_position_embeddings": original, "truncate": scaling.truncate}
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if abs(attention - yarn_attention(scaling.factor)) > 1e-6:
            rope["attention_factor"] = attention
    elif original is not None:
        found["original_max_position_embeddings"] = original
    n_rot = _get(file, "rope.dimension_count") or head_dim
    if n_rot != head_dim or "partial_rotary_factor" in layout.defaults:
        part = n_rot / head_dim
        part = part if int(part * head_dim) == n_rot else math.nextafter(part, 2.0)
        rope["partial_rotary_factor"] = found["partial_rotary_factor"] = part
    rope |= _factors(layout, file, config, rope)
    if rope["rope_type"] == "longrope":
        rope["original_max_position_embeddings"] = original
        attention = _get(file, "rope.scaling.attn_factor") or 1.0
        if abs(attention - longrope_attention(config, Config(file.path, rope))) > 1e-6:
            rope["attention_factor"] = attention
    found["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        found["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        found["rope_scaling"]["type"] = rope["rope_type"]
    if layout.decoder.swa_rope_freq_base:
        local = _get(file, "rope.freq_base_swa") or layout.decoder.swa_rope_freq_base
        found["rope_local_base_freq"] = local
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    return found | {"rope_parameters": rope}


def _factors(layout: CheckpointLayout, file: GGUFFile, config: Config, rope: Json) -> Json:
    """Return the parameters that make the tensors of rotary factors. Those of Llama 3.1 are found by trial."""
    long, short, freqs = (_floats(file, name) for name in ("rope_factors_long", "rope_factors_short", "rope_freqs"))
    if long is not None and short is not None:
        return {"rope_type": "longrope", "long_factor": long, "short_factor": short}
    if freqs is None or all(factor == 1.0 for factor in freqs):
        return {}
    for n_ctx in _LLAMA31_CONTEXTS:
        tried = {"rope_type": "llama3", "factor": max(freqs), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": n_ctx}  # fmt: skip
        values = {**config.values, "rope_parameters": rope | tried}
        again = rope_tensors(layout, Config(config.path, values))["rope_freqs.weight"]
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


def _from_tensors(layout: CheckpointLayout, file: GGUFFile) -> Json:
    """Return what follows from the tensors: which biases and norms there are, and whether the output is tied."""
    found: Json = {"tie_word_embeddings": _is_tied(file)}
    if layout.bias_key:
        found[layout.bias_key] = "blk.0.attn_q.bias" in file.tensors
    if layout.bias_key == "attention_bias" and "blk.0.ffn_up.bias" in file.tensors:
        found["mlp_bias"] = True
    if "attn_q_norm" in layout.decoder.optional_norms:
        found["qk_layernorm"] = "blk.0.attn_q_norm.weight" in file.tensors
    return found


def _layer_types(layout: CheckpointLayout, file: GGUFFile, n_layer: int) -> list[str]:
    """Return for each layer whether it has the window."""
    pattern = file.metadata.get(f"{layout.arch}.attention.sliding_window_pattern")
    given = list(pattern) if isinstance(pattern, list | tuple | np.ndarray) else []
    if given and len(given) != n_layer:
        raise FormatError(f"{file.path}: sliding_window_pattern has {len(given)} entries for {n_layer} layers")
    windows = given or [(il + 1) % layout.decoder.swa_period != 0 for il in range(n_layer)]
    return ["sliding_attention" if window else "full_attention" for window in windows]


def _is_tied(file: GGUFFile) -> bool:
    """Tell whether there is no output matrix, or one with the values of the embeddings."""
    output = file.tensors.get("output.weight")
    return output is None or same_values(output, file.tensors["token_embd.weight"])
