"""The tensors of a model, and those of a file: none may be missing, or be left out silently."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.architectures import LAYER_SHAPES, MODEL_SHAPES, QK, QKV, ROPE_FACTORS, qkv_of
from gguf_run.models.keys import Keys, show

Ne = tuple[int, ...]

# Tensors that nobody reads: those that old converters wrote, and the scales of activations for NVFP4 products.
_UNUSED_SUFFIXES = (".attn_rot_embd.weight", ".rope_freqs.weight", ".input_scale")
# How the names of tensors begin that only images and sound need.
TOWERS = ("v.", "a.", "mm.")


def shape_of(tensor: Tensor | None) -> str:
    """Return the shape as a part of a sentence."""
    return "is missing" if tensor is None else f"has {' x '.join(map(str, tensor.ne))} values"


def tensor_shapes(config: Any, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Ne], dict[str, Ne]]:
    """Return ne of the tensors that a file must have, and of those that a file may leave out. config: a ModelConfig."""
    arch, shapes = config.arch, {**LAYER_SHAPES, **config.arch.shapes}
    if config.n_expert:
        from gguf_run.models.experts import EXPERT_SHAPES, experts_of  # late: most models have none

        shapes = {**EXPERT_SHAPES, **shapes}
    model = {name: tuple(config.size(0, word) for word in words) for name, words in MODEL_SHAPES.items()}
    required = {"token_embd.weight": model["token_embd.weight"], f"{arch.output_norm}.weight": (config.n_embd,)}
    norm_bias = ("output_norm.bias",) if arch.layer_norm else ()
    optional = {name: model[name] for name in ("output.weight", "output.bias", *norm_bias)}
    optional |= dict.fromkeys(ROPE_FACTORS, (config.n_rope_freqs,))
    for il, layer in enumerate(config.layers):
        qkv = qkv_of(arch, f"blk.{il}.", tensors) if layer.n_head else ()
        matrices = [*qkv, *(["attn_output"] if qkv else []), *config.ffn(il)]
        if layer.has_experts:
            matrices += ["ffn_gate_inp", *experts_of(arch, f"blk.{il}.", tensors)]
            matrices += ["ffn_gate_inp_shexp"] if arch.shared_gate else []
        norms = [name for name in arch.norms if layer.n_head or name not in QK]
        for name in (*norms, *matrices, *(["attn_sinks"] if arch.sinks else [])):
            ne = tuple(config.size(il, word) for word in shapes[name])
            (optional if name in arch.optional_norms else required)[f"blk.{il}.{name}.weight"] = ne
            if arch.layer_norm or name in matrices:
                optional[f"blk.{il}.{name}.bias"] = ne[1:] or ne
        if layer.has_experts and arch.router_bias != "no":
            known = required if arch.router_bias == "yes" else optional
            known[f"blk.{il}.exp_probs_b.bias"] = (config.n_expert,)
        if qkv == ("attn_qkv",) and f"blk.{il}.attn_qkv.bias" not in tensors:
            optional |= {f"blk.{il}.{name}.bias": (config.size(il, shapes[name][1]),) for name in QKV}
        if config.mixer is not None:
            for known, more in zip((required, optional), config.mixer.tensors(il), strict=True):
                known |= {f"blk.{il}.{name}": ne for name, ne in more.items()}
    optional |= config.pooling.tensors if config.pooling is not None else {}
    if arch.more:
        from gguf_run.models.per_layer import add_more

        add_more(config, tensors, required, optional)
    return required, optional


def check_tensors(
    keys: Keys,
    tensors: Mapping[str, Tensor],
    required: Mapping[str, Ne],
    optional: Mapping[str, Ne],
    groups: Sequence[Sequence[Sequence[str]]],
) -> None:
    """Raise an error if a tensor is missing, has a wrong shape, or would silently be left out.

    required: ne of the tensors that the file must have. optional: of those that it may leave out. A file may leave out
        the ".weight" of a name.
    groups: for each layer, the names of matrices whose rows become one matrix: all of them have a bias, or none has.
    """
    drafts = tuple(f"blk.{il}." for il in range(len(groups), keys.integer("block_count")))
    if drafts and any(name.startswith(drafts) for name in tensors) and not any(n.startswith("blk.0.") for n in tensors):
        raise UnsupportedError(
            f"the file has only those blocks of a {keys.prefix} model that draft tokens ({drafts[0]}*, MTP): open the "
            "file that has its layers"
        )
    for name, ne in {**required, **{name: ne for name, ne in optional.items() if name in tensors}}.items():
        tensor = tensors.get(name) or tensors.get(name.removesuffix(".weight"))
        if tensor is None or not tensor.same_shape(ne):
            expected = f"{' x '.join(map(str, ne))} in this {keys.prefix} model"
            raise FormatError(f"tensor {name} {shape_of(tensor)}, must have {expected}")
    if towers := [name for name in tensors if name.startswith(TOWERS)]:
        what = f"{len(towers)} tensors such as {show(towers[0])} are for images or sound: they are left out"
        warnings.warn(f"{what}, and the {keys.prefix} model runs with text", stacklevel=2)
    unread = (*drafts, *TOWERS)
    for name in tensors:
        known = any(full in required or full in optional for full in (name, f"{name}.weight"))
        known = known or name.endswith(_UNUSED_SUFFIXES) or name.startswith(unread)
        if not known and not _is_factor(name, tensors):
            raise UnsupportedError(
                f"tensor {show(name)} is not a part of a {keys.prefix} model of {len(groups)} layers as this "
                "program knows it; without it the results would be wrong"
            )
    for il, layer in enumerate(groups):
        for group in layer:
            missing = [name for name in group if f"blk.{il}.{name}.bias" not in tensors]
            if 0 < len(missing) < len(group):
                name = f"blk.{il}.{missing[0]}.bias"
                raise UnsupportedError(f"tensor {name} is missing, though other biases of its kind are there")


def _is_factor(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor has the factors of an NVFP4 matrix, or of the results of experts."""
    weight = tensors.get(f"{name.removesuffix('.scale')}.weight")
    is_of_experts = name.endswith(".ffn_down_exps.scale")
    return name.endswith(".scale") and weight is not None and (weight.type.name == "NVFP4" or is_of_experts)
