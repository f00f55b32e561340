"""The rotation of a checkpoint: rope_parameters of config.json as GGUF keys and tensors.

All numbers are those that transformers (modeling_rope_utils) computes with.
"""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.models.operands import RopeScaling
from gguf_run.models.rope_scaling import yarn_attention, yarn_range
from gguf_run.runtime.convert.layout import CheckpointLayout
from gguf_run.runtime.convert.stored.checkpoint import Config

Floats = NDArray[np.float32]
_LONGROPE = ("longrope", "su")
_ROPE_TYPES = ("default", "proportional", "linear", "yarn", *_LONGROPE, "llama3", "dynamic")
# Names in config.json beside rope_parameters. Only some architectures have the last two.
ROPE_NAMES = ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings")
PART_NAMES = ("partial_rotary_factor", "rope_pct")
LOCAL_NAME = "rope_local_base_freq"
# Names in rope_parameters. transformers reads the last ones for some types only, as this module does.
_SUB_NAMES = (
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "factor",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor",
    "long_factor", "low_freq_factor", "high_freq_factor", "full_attention", "sliding_attention", "finetuned",
    "mrope_section", "mrope_interleaved", "llama_4_scaling_beta", "max_position_embeddings", "alpha",
)  # fmt: skip


def rope_parameters(layout: CheckpointLayout, config: Config) -> tuple[Config, Config]:
    """Return the rotary parameters of layers that see all positions, and of those with a window.

    config.json has them in three forms. The result has the newest: rope_type, rope_theta, partial_rotary_factor ...
    """
    older, newer = _dicts(config)
    nested = next((part for part in (newer, older) if isinstance(part.get("full_attention"), dict)), None)
    window: Any = {}
    full = older or newer
    if nested is not None:
        full = {**nested["full_attention"], **({} if nested is older else older)}
        window = nested.get("sliding_attention")
    outside = {
        "rope_theta": config.get("rope_theta"),
        "rope_type": full.get("type"),
        "partial_rotary_factor": config.get(*PART_NAMES) if PART_NAMES[0] in layout.defaults else None,
        "original_max_position_embeddings": config.integer("max_position_embeddings"),
    }
    full = {**outside, **full}
    if layout.ntk_alpha and full["rope_type"] == "dynamic" and (alpha := full.get("alpha")):
        n = config.integer("head_dim")
        full |= {"rope_type": "default", "rope_theta": float(full["rope_theta"] or 1e4) * float(alpha) ** (n / (n - 2))}
    if (original := config.get("original_max_position_embeddings")) is not None:
        full["original_max_position_embeddings"] = original  # Phi-3 has it there: transformers prefers this place
    local = config.get(LOCAL_NAME) if layout.decoder.swa_rope_freq_base else None
    window = {"rope_theta": local, **(window if isinstance(window, dict) else {})}
    return Config(config.path, full), Config(config.path, window)


def _dicts(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return rope_scaling and rope_parameters, {} for what is not there."""
    values = (config.get(key) for key in ("rope_scaling", "rope_parameters"))
    older, newer = (value if isinstance(value, dict) else {} for value in values)
    return older, newer


def unknown_rope_names(layout: CheckpointLayout, config: Config) -> list[str]:
    """Return the names in rope_parameters that this module does not know."""
    found = (part.values for part in rope_parameters(layout, config))
    return [f"rope_parameters.{name}" for values in found for name in values if name not in _SUB_NAMES]


def rope_keys(layout: CheckpointLayout, config: Config) -> Iterator[tuple[str, Typed]]:
    """Yield the keys that rotary parameters tell. UnsupportedError for a rotation that the decoder does not have."""
    rope, window = rope_parameters(layout, config)
    kind = rope_type(layout, config, rope)
    n_rot = _n_rot(layout, config, rope)
    if (window.get("rope_type", "type") or "default") != "default":
        raise UnsupportedError(f"{window.wrong(('rope_type',), 'default')} in layers with a window")
    if kind == "dynamic":
        n_ctx = config.integer("max_position_embeddings")
        warnings.warn(
            f"{config.path}: dynamic rope scaling, which begins beyond {n_ctx} tokens, is left out", stacklevel=2
        )
    if kind in ("linear", "yarn"):
        yield "rope.scaling.type", Typed("string", kind)
        yield "rope.scaling.factor", Typed("f32", _factor(config, rope))
    elif kind == "longrope":
        yield "rope.scaling.type", Typed("string", "longrope")
        yield "rope.scaling.attn_factor", Typed("f32", longrope_attention(config, rope))
    elif layout.rope_type:
        yield "rope.scaling.type", Typed("string", layout.rope_type)
    if kind in ("yarn", "longrope") or layout.original_context:
        yield "rope.scaling.original_context_length", Typed("u32", rope.integer("original_max_position_embeddings"))
    if kind == "yarn":
        yield from _yarn(layout, config, rope, n_rot)
    for key, parameters in (("freq_base", rope), ("freq_base_swa", window)):
        if parameters.get("rope_theta") is not None:
            yield f"rope.{key}", Typed("f32", parameters.number("rope_theta"))
    if layout.rope_dim:
        yield "rope.dimension_count", Typed("u32", n_rot)
    if isinstance(sections := rope.get("mrope_section"), list):  # of positions of images: text has one position
        yield "rope.dimension_sections", Typed("array[i32]", (sections + [0] * 4)[:4])
    if rope.get("llama_4_scaling_beta") is not None:
        yield "attention.temperature_scale", Typed("f32", rope.number("llama_4_scaling_beta"))
        yield "attention.temperature_length", Typed("u32", rope.integer("original_max_position_embeddings"))
    if layout.ntk_alpha and rope.get("alpha"):  # config.json has the context before it was stretched
        yield "context_length", Typed("u32", 1 << 18)


def rope_type(layout: CheckpointLayout, config: Config, rope: Config) -> str:
    """Return the kind of scaling, one of _ROPE_TYPES. Old names become new ones."""
    kind = rope.get("rope_type") or "default"
    if kind not in _ROPE_TYPES:
        raise UnsupportedError(str(rope.wrong(("rope_type",), f"one of {', '.join(_ROPE_TYPES)}")))
    renamed = kind == "su" or (kind == "yarn" and rope.get("long_factor") is not None and layout.arch == "phi3")
    return "longrope" if renamed else str(kind)


def _n_rot(layout: CheckpointLayout, config: Config, rope: Config) -> int:
    if rope.get("rope_type") == "proportional":  # a part of all pairs of a head does not turn: see rope_tensors
        return 0
    part = rope.number("partial_rotary_factor", default=1.0)
    if not 0 < part <= 1 or (part != 1 and PART_NAMES[0] not in layout.defaults):
        allowed = "more than 0 and at most 1" if PART_NAMES[0] in layout.defaults else f"1 in a {layout.arch} model"
        raise rope.wrong(("partial_rotary_factor",), allowed)
    built_in = config.integer("hidden_size") // config.integer("num_attention_heads")
    return int(part * config.integer("head_dim", default=max(1, built_in)))


def _factor(config: Config, rope: Config) -> float:
    """Return the factor of the context; null stands for the ratio of the two contexts."""
    ratio = config.integer("max_position_embeddings") / rope.integer("original_max_position_embeddings")
    factor = rope.number("factor", default=ratio if "factor" in rope.values else None)
    if factor <= 0:
        raise rope.wrong(("factor",), "more than 0")
    return factor


def _yarn(layout: CheckpointLayout, config: Config, rope: Config, n_rot: int) -> Iterator[tuple[str, Typed]]:
    """Yield what YaRN has beside its factor. Values that every program assumes are left out."""
    factor = _factor(config, rope)
    built_in, m, m_all = yarn_attention(factor), rope.get("mscale"), rope.get("mscale_all_dim")
    default = built_in
    if m and m_all:
        default = yarn_attention(factor, rope.number("mscale")) / yarn_attention(factor, rope.number("mscale_all_dim"))
    attention = rope.number("attention_factor", default=default)
    if layout.yarn_log and m_all:
        yield "rope.scaling.yarn_log_multiplier", Typed("f32", layout.yarn_log * m_all)
        # A tenth: programs leave the rotated values as they are, and scale q.k instead (models/mixers/latent.py).
        built_in = built_in / yarn_attention(factor, m_all) if layout.yarn_log == 1 else 1.0
    if attention != built_in:
        yield "rope.scaling.attn_factor", Typed("f32", attention / built_in)
    betas = {name: rope.number(name, default=0.0) for name in ("beta_fast", "beta_slow")}
    for name, value in betas.items():
        if value:  # 0 stands for the default
            yield f"rope.scaling.yarn_{name}", Typed("f32", value)
    # transformers reads this one beside the parameters of the kinds of layers, if there are two kinds.
    older, newer = _dicts(config)
    truncate = bool((older or newer).get("truncate", True))
    if truncate != layout.decoder.yarn_truncate:
        yield "rope.scaling.yarn_truncate", Typed("bool", truncate)
    original, base = rope.integer("original_max_position_embeddings"), rope.number("rope_theta", default=1e4)
    given = {name: value for name, value in betas.items() if value}
    low, high = yarn_range(n_rot, base, RopeScaling("yarn", factor, original, truncate=truncate, **given))
    if low > high:
        raise rope.wrong(("beta_fast", "beta_slow"), "numbers that make a ramp: programs differ without one")


def longrope_attention(config: Config, rope: Config) -> float:
    """Return the factor on queries and keys, by Phi-3's rule if config.json has none."""
    original = rope.integer("original_max_position_embeddings", low=2)
    scale = rope.number("factor", default=config.integer("max_position_embeddings") / original)
    by_rule = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return rope.number("attention_factor", default=by_rule)


def rope_tensors(layout: CheckpointLayout, config: Config, n_pairs: int = 0) -> dict[str, Floats]:
    """Return the tensors that divide the rotation's frequencies: Llama 3.1's, or those of long and of short texts.

    n_pairs: half of the columns of a head. Of Gemma 4's, which has one factor for the turning pairs and one for others.
    """
    rope, _ = rope_parameters(layout, config)
    kind, n_rot = rope_type(layout, config, rope), _n_rot(layout, config, rope)
    if kind == "proportional":
        n_turning = int(n_pairs * rope.number("partial_rotary_factor", default=1.0))
        return {"rope_freqs.weight": np.where(np.arange(n_pairs) < n_turning, 1, 1e30).astype(np.float32)}
    if kind == "llama3":
        return _llama3_factors(rope, n_rot)
    return _longrope_factors(rope, n_rot) if kind == "longrope" else {}


@np.errstate(all="ignore")
def _llama3_factors(rope: Config, n_rot: int) -> dict[str, Floats]:
    """Slow low frequencies by `factor`, leave high ones, blend those between. Computed in f32, as in llama.cpp."""
    base = np.float32(rope.number("rope_theta", default=1e4))
    frequencies = 1 / base ** (np.arange(0, n_rot, 2, dtype=np.float32) / np.float32(n_rot))
    lengths = (np.float32(2 * math.pi) / frequencies).astype(np.float32)
    factor = np.float32(rope.number("factor", default=8.0))
    low, high = (np.float32(rope.number(f"{name}_freq_factor", default=d)) for name, d in (("low", 1.0), ("high", 4.0)))
    original = np.float32(rope.integer("original_max_position_embeddings"))
    smooth = (original / lengths - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(lengths < original / high, 1, np.where(lengths > original / low, factor, blended))
    factors = factors.astype(np.float32)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise rope.wrong(("rope_theta", "factor"), "numbers that make rotary factors above 0")
    return {"rope_freqs.weight": factors}


def _longrope_factors(rope: Config, n_rot: int) -> dict[str, Floats]:
    n = n_rot // 2
    found = {}
    for kind in ("long", "short"):
        factors = rope.get(f"{kind}_factor")
        if not isinstance(factors, list) or len(factors) != n or not all(type(f) in (int, float) for f in factors):
            raise rope.wrong((f"{kind}_factor",), f"{n} numbers")
        found[f"rope_factors_{kind}.weight"] = np.array(factors, np.float32)
    return found
