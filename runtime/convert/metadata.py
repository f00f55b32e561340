"""The numbers of a model: config.json as GGUF metadata."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.runtime.convert.architectures import BY_CLASS, BY_MODEL_TYPE
from gguf_run.runtime.convert.known import check_keys
from gguf_run.runtime.convert.layout import CheckpointLayout
from gguf_run.runtime.convert.rope import rope_keys
from gguf_run.runtime.convert.shared import Key
from gguf_run.runtime.convert.stored.checkpoint import Config

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
        near = get_close_matches(str(name), BY_CLASS, 3, 0.0)
        allowed = f"one of {len(BY_CLASS)} that can be converted: {', '.join(near)} have the nearest names"
        raise UnsupportedError(str(config.wrong(("architectures",), allowed)))
    # Only for this key null means that it is not there.
    given = {key: value for key, value in config.values.items() if value is not None or key != "rope_parameters"}
    given = {layout.aliases.get(key, key): value for key, value in given.items()}
    if layout.decoder.moe == "no" and given.get("num_experts") == 1:  # a network of Hunyuan that is no mixture
        del given["num_experts"]
    config = Config(config.path, {**layout.defaults, **given})
    if layout.read is not None:
        layout, config = layout.read(layout, config)
    check_keys(layout, config)
    return layout, config


def sizes(config: Config) -> dict[str, int]:
    """Return the sizes of a model by ggml's names."""
    n_head = config.integer("num_attention_heads")
    n_head_kv = config.integer("num_key_value_heads", default=n_head)
    n_embd = config.integer("hidden_size")
    head_dim = config.integer("head_dim", default=max(1, n_embd // n_head))
    n_ff = config.integer("intermediate_size") if type(config.get("intermediate_size")) is not list else 1  # Gemma 3n
    return {
        "n_layer": config.integer("num_hidden_layers"),
        "n_embd": n_embd,
        "n_head": n_head,
        "n_head_kv": n_head_kv,
        "head_dim": head_dim,
        "n_ff_exp": config.integer("moe_intermediate_size", default=n_ff),
    }


def hyperparameters(layout: CheckpointLayout, config: Config) -> dict[str, Typed]:
    """Return the keys of the architecture, in the order of llama.cpp's converter."""
    found: dict[str, Typed] = {}
    has_rms = not layout.decoder.layer_norm or config.get("rms_norm_eps") is not None  # Phi-3.5-MoE's layer norms too
    norm = "attention.layer_norm_rms_epsilon" if has_rms else "attention.layer_norm_epsilon"
    for i, key in enumerate(layout.all_keys()):
        if i == _N_BEFORE_ROPE:
            found.setdefault("attention.head_count_kv", found.get("attention.head_count", Typed("u32", 1)))
            found.update(rope_keys(layout, config))
        needed = (*_NEEDED, norm, *(("expert_used_count",) if found.get("expert_count") else ()))
        _put(layout, found, config, key, key[0] in needed)
    numbers = sizes(config)
    if numbers["head_dim"] != numbers["n_embd"] // numbers["n_head"]:  # which is what a missing key means
        for kind in ("key", "value"):
            found.setdefault(f"attention.{kind}_length", Typed("u32", numbers["head_dim"]))
    found.update(_windows(layout, config))
    found.update(_not_built_in(layout, config, numbers))
    if layout.more_keys is not None:
        found.update(layout.more_keys(config, _window_layers(layout, config)))
    return {f"{layout.arch}.{key}": value for key, value in found.items()}


def _put(layout: CheckpointLayout, found: dict[str, Typed], config: Config, key: Key, needed: bool) -> None:
    name, kind, names = key
    value = config.get(*names)
    if value is None and names[0] in layout.defaults:
        found[name] = Typed(kind, 0)  # null where transformers has a default: the model has none
    elif kind == "bool" and value is not None:
        if not isinstance(value, bool):
            raise config.wrong(names, "true or false")
        found[name] = Typed(kind, value)
    elif value is not None and kind.startswith("array"):
        found[name] = Typed(kind, value)  # of CheckpointLayout.read
    elif value is not None or needed:
        found[name] = Typed(kind, config.integer(*names, low=0) if kind == "u32" else config.number(*names))


def _not_built_in(layout: CheckpointLayout, config: Config, numbers: Mapping[str, int]) -> Iterator[tuple[str, Typed]]:
    """Yield keys for values that other programs know by the architecture, where a checkpoint has another value."""
    arch = layout.decoder
    if "norm_topk_prob" in layout.defaults and (norm := bool(config.get("norm_topk_prob"))) != arch.expert_norm:
        yield "expert_weights_norm", Typed("bool", norm)
    if arch.gating == "sigmoid" and arch.router_bias == "yes":
        yield "expert_gating_func", Typed("u32", 2)
    if "query_pre_attn_scalar" in layout.defaults:
        by_width = numbers["n_layer"] in arch.n_embd_scale_n_layer
        built_in = numbers["n_embd"] // numbers["n_head"] if by_width else numbers["head_dim"]
        scalar = config.number("query_pre_attn_scalar")
        if scalar <= 0:
            raise config.wrong(("query_pre_attn_scalar",), "a number above 0")
        if scalar != built_in:
            yield "attention.scale", Typed("f32", scalar**-0.5)


def _windows(layout: CheckpointLayout, config: Config) -> Iterator[tuple[str, Typed]]:
    """Yield the width of the window, and which layers have it if that is not what the decoder assumes."""
    is_on = bool(layout.windows) and (not layout.switch or config.get("use_sliding_window") is True)
    window = config.integer("sliding_window", default=0, low=0) if is_on else 0
    pattern = _window_layers(layout, config) if window else []
    if any(pattern):
        period = layout.decoder.swa_period
        yield "attention.sliding_window", Typed("u32", window)
        if pattern != [not period or (i + 1) % period != 0 for i in range(len(pattern))]:
            yield "attention.sliding_window_pattern", Typed("array[bool]", pattern)
    elif layout.defaults.get("sliding_window") == 0:
        yield "attention.sliding_window", Typed("u32", 0)


def _window_layers(layout: CheckpointLayout, config: Config) -> list[bool]:
    """Return for each layer whether it has the window, by layer_types or as the class in transformers makes them."""
    layers = range(config.integer("num_hidden_layers"))
    if layout.windows == "all":
        return [True for _ in layers]
    if (types := config.get("layer_types")) is not None:
        kinds = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) < len(layers) or any(kind not in kinds for kind in types):
            raise UnsupportedError(str(config.wrong(("layer_types",), f"{len(layers)} of {' or '.join(kinds)}")))
        return [types[i] == kinds[1] for i in layers]
    if layout.windows == "unrotated":
        return [(i + 1) % layout.decoder.no_rope_period == 0 for i in layers]
    if layout.windows == "period":
        period = config.integer("sliding_window_pattern", default=layout.decoder.swa_period)
        return [(i + 1) % period != 0 for i in layers]
    border = config.integer("max_window_layers", low=0)
    return [i >= border if layout.windows == "last" else i < border and i % 2 == 0 for i in layers]
