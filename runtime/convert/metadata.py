"""The numbers of a model: config.json as GGUF metadata, and what is computed from it (shapes, rotary factors)."""

import math
import warnings
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.models.architectures import LAYER_SHAPES, MODEL_SHAPES
from gguf_run.runtime.convert.architectures import BY_CLASS, BY_MODEL_TYPE, CheckpointLayout, Key
from gguf_run.runtime.convert.stored.checkpoint import Config

Floats = NDArray[np.float32]
# YaRN: config.json's name -> key under rope.scaling.
YARN = (
    ("extrapolation_factor", "yarn_ext_factor"),
    ("attention_factor", "yarn_attn_factor"),
    ("attn_factor", "yarn_attn_factor"),
    ("beta_fast", "yarn_beta_fast"),
    ("beta_slow", "yarn_beta_slow"),
)
_LONGROPE = ("longrope", "su")
_ROPE_TYPES = ("default", "linear", "yarn", *_LONGROPE, "llama3", "dynamic")
_NEEDED = ("block_count", "context_length", "embedding_length", "attention.head_count")
_N_BEFORE_ROPE = 6  # so many keys stand before those of the rotation


def layout_of(config: Config) -> tuple[CheckpointLayout, Config]:
    """Return the layout of a checkpoint, and its config.json with the defaults of that layout.

    UnsupportedError for an architecture that is not known, and for a value that a GGUF file cannot tell.
    """
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    model_type = config.get("model_type")
    layout = BY_CLASS.get(name) if isinstance(name, str) else None
    if layout is None and name is None and isinstance(model_type, str):
        layout = BY_MODEL_TYPE.get(model_type)
    if layout is None:
        shown = config.wrong(("architectures",), f"one of {', '.join(sorted(BY_CLASS))}")
        raise UnsupportedError(f"{shown}: only these can be converted")
    given = {key: value for key, value in config.values.items() if value is not None}
    config = Config(config.path, {**layout.defaults, **given})
    _check_expected(layout, config)
    return layout, config


def _check_expected(layout: CheckpointLayout, config: Config) -> None:
    wrong = []
    for key, allowed in layout.expected.items():
        value = config.get(key)
        known = [config.get(a[1:]) if isinstance(a, str) and a.startswith("=") else a for a in allowed]
        if value is not None and value not in known:
            wrong.append(config.wrong((key,), " or ".join(map(str, known))))
    period, pattern = layout.decoder.no_rope_period, config.get("no_rope_layers")
    n = len(pattern) if isinstance(pattern, list) else 1
    if period and pattern is not None and pattern != [int((i + 1) % period > 0) for i in range(n)]:
        each = f"0 for every layer whose number is a multiple of {period}, else 1"
        wrong.append(config.wrong(("no_rope_layers",), each))
    if wrong:
        raise UnsupportedError(f"{wrong[0]}: a GGUF file of a {layout.arch} model has no place for another value")


def sizes(config: Config) -> dict[str, int]:
    """Return the sizes of a model by ggml's names, which shapes in models/architectures.py use."""
    n_head = config.integer("num_attention_heads")
    n_head_kv = config.integer("num_key_value_heads", default=n_head)
    n_embd = config.integer("hidden_size")
    head_dim = config.integer("head_dim", default=max(1, n_embd // n_head))
    n_ff = config.integer("intermediate_size")
    n_ff_exp = config.integer("moe_intermediate_size", default=n_ff)
    n_shared = config.integer("n_shared_experts", default=1)
    return {
        "n_layer": config.integer("num_hidden_layers"),
        "n_vocab": config.integer("vocab_size"),
        "n_embd": n_embd,
        "n_head": n_head,
        "n_head_kv": n_head_kv,
        "head_dim": head_dim,
        "n_embd_q": n_head * head_dim,
        "n_embd_kv": n_head_kv * head_dim,
        "n_ff": n_ff,
        "n_expert": config.integer("num_local_experts", "num_experts", "n_routed_experts", default=1),
        "n_ff_exp": n_ff_exp,
        "n_ff_shexp": config.integer("shared_expert_intermediate_size", default=n_ff_exp * n_shared),
    }


def shape(layout: CheckpointLayout, name: str, numbers: Mapping[str, int]) -> tuple[int, ...]:
    """Return ne of the tensor `name` ("blk.3.attn_q.weight"). A bias has one value for each row of its matrix."""
    base, kind = name.split(".")[-2:]
    words = MODEL_SHAPES.get(f"{base}.weight") or layout.decoder.shapes.get(base) or LAYER_SHAPES[base]
    ne = tuple(sum(numbers[part] for part in word.split("+")) for word in words)
    return ne[1:] if kind == "bias" and len(ne) > 1 else ne


def hyperparameters(layout: CheckpointLayout, config: Config) -> dict[str, Typed]:
    """Return the keys of the architecture, in the order of llama.cpp's converter."""
    found: dict[str, Typed] = {}
    for i, key in enumerate(layout.all_keys()):
        if i == _N_BEFORE_ROPE:
            found.setdefault("attention.head_count_kv", found.get("attention.head_count", Typed("u32", 1)))
            found.update(_rope(layout, config))
        _put(found, config, key)
    numbers = sizes(config)
    if numbers["head_dim"] != numbers["n_embd"] // numbers["n_head"]:  # which is what a missing key means
        found["attention.key_length"] = found["attention.value_length"] = Typed("u32", numbers["head_dim"])
    types, period = config.get("layer_types"), layout.decoder.swa_period
    if period and isinstance(types, list):
        pattern = [kind == "sliding_attention" for kind in types]
        if pattern != [(i + 1) % period != 0 for i in range(len(types))]:
            found["attention.sliding_window_pattern"] = Typed("array[bool]", pattern)
    return {f"{layout.arch}.{key}": value for key, value in found.items()}


def _put(found: dict[str, Typed], config: Config, key: Key) -> None:
    name, kind, names = key
    value = config.get(*names)
    if value is None and name not in _NEEDED:
        return
    if kind == "bool":
        if not isinstance(value, bool):
            raise config.wrong(names, "true or false")
        found[name] = Typed(kind, value)
    else:
        found[name] = Typed(kind, config.integer(*names, low=0) if kind == "u32" else config.number(*names))


def _rope_parameters(config: Config) -> tuple[Config, Config]:
    """Return the rotary parameters of layers that see all positions, and of those with a window.

    config.json has them in three forms. The result has the newest: rope_type, rope_theta, partial_rotary_factor ...
    """
    given = config.get("rope_parameters", "rope_scaling")
    given = given if isinstance(given, dict) else {}
    full, window = (given.get(kind) for kind in ("full_attention", "sliding_attention"))
    if isinstance(full, dict):
        return Config(config.path, full), Config(config.path, window if isinstance(window, dict) else {})
    older = {
        "rope_theta": config.get("rope_theta"),
        "rope_type": given.get("type"),
        "partial_rotary_factor": config.get("rope_pct", "partial_rotary_factor"),
        "original_max_position_embeddings": config.get("original_max_position_embeddings"),
    }
    local = config.get("rope_local_base_freq")
    return Config(config.path, {**older, **given}), Config(config.path, {"rope_theta": local})


def _rope(layout: CheckpointLayout, config: Config) -> Iterator[tuple[str, Typed]]:
    rope, window = _rope_parameters(config)
    kind = rope.get("rope_type") or "default"
    if kind not in _ROPE_TYPES:
        raise UnsupportedError(str(rope.wrong(("rope_type",), f"one of {', '.join(_ROPE_TYPES)}")))
    if kind == "dynamic":
        n_ctx = config.integer("max_position_embeddings")
        warnings.warn(
            f"{config.path}: dynamic rope scaling, which begins beyond {n_ctx} tokens, is left out", stacklevel=2
        )
    if kind in ("linear", "yarn"):
        yield "rope.scaling.type", Typed("string", kind)
        yield "rope.scaling.factor", Typed("f32", rope.number("factor"))
    elif kind in _LONGROPE:
        yield "rope.scaling.type", Typed("string", "longrope")
        yield "rope.scaling.attn_factor", Typed("f32", _longrope_attention(config, rope))
    elif layout.rope_type:
        yield "rope.scaling.type", Typed("string", layout.rope_type)
    if kind == "yarn" or (layout.original_context and rope.get("original_max_position_embeddings")):
        yield "rope.scaling.original_context_length", Typed("u32", rope.integer("original_max_position_embeddings"))
    for name, key in YARN if kind == "yarn" else ():
        if rope.get(name) is not None:
            yield f"rope.scaling.{key}", Typed("f32", rope.number(name))
    for key, parameters in (("freq_base", rope), ("freq_base_swa", window)):
        if parameters.get("rope_theta") is not None:
            yield f"rope.{key}", Typed("f32", parameters.number("rope_theta"))
    if layout.rope_dim:
        yield "rope.dimension_count", Typed("u32", _n_rot(config, rope))


def _n_rot(config: Config, rope: Config) -> int:
    part = rope.number("partial_rotary_factor", default=1.0)
    if not 0 < part <= 1:
        raise rope.wrong(("partial_rotary_factor",), "more than 0 and at most 1")
    return int(part * sizes(config)["head_dim"])


def _longrope_attention(config: Config, rope: Config) -> float:
    """Return the factor on queries and keys that Phi-3's code applies."""
    original = rope.integer("original_max_position_embeddings", low=2)
    scale = config.integer("max_position_embeddings") / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def rope_tensors(config: Config) -> dict[str, Floats]:
    """Return the tensors that divide the rotation's frequencies: Llama 3.1's, or those of long and of short texts."""
    rope, _ = _rope_parameters(config)
    kind = rope.get("rope_type")
    if kind == "llama3":
        return _llama3_factors(config, rope)
    return _longrope_factors(config, rope) if kind in _LONGROPE else {}


@np.errstate(all="ignore")
def _llama3_factors(config: Config, rope: Config) -> dict[str, Floats]:
    """Slow low frequencies by `factor`, leave high ones, blend those between. Computed in f32, as in llama.cpp."""
    n_rot = _n_rot(config, rope)
    base = np.float32(rope.number("rope_theta", default=1e4))
    frequencies = 1 / base ** (np.arange(0, n_rot, 2, dtype=np.float32) / np.float32(n_rot))
    lengths = (np.float32(2 * math.pi) / frequencies).astype(np.float32)
    factor = np.float32(rope.number("factor", default=8.0))
    low, high = (np.float32(rope.number(f"{name}_freq_factor", default=d)) for name, d in (("low", 1.0), ("high", 4.0)))
    original = np.float32(rope.integer("original_max_position_embeddings", default=8192))
    smooth = (original / lengths - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(lengths < original / high, 1, np.where(lengths > original / low, factor, blended))
    factors = factors.astype(np.float32)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise rope.wrong(("rope_theta", "factor"), "numbers that make rotary factors above 0")
    return {"rope_freqs.weight": factors}


def _longrope_factors(config: Config, rope: Config) -> dict[str, Floats]:
    n = _n_rot(config, rope) // 2
    found = {}
    for kind in ("long", "short"):
        factors = rope.get(f"{kind}_factor")
        if not isinstance(factors, list) or len(factors) != n or not all(type(f) in (int, float) for f in factors):
            raise rope.wrong((f"{kind}_factor",), f"{n} numbers")
        found[f"rope_factors_{kind}.weight"] = np.array(factors, np.float32)
    return found
