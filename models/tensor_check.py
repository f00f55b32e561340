"""Compares the tensors of a file with those of its model: none may be missing, or be left out silently."""

import warnings
from collections.abc import Mapping, Sequence

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.keys import Keys, show

Ne = tuple[int, ...]

# Tensors that nobody reads: those that old converters wrote, and the scales of activations for NVFP4 products.
_UNUSED_SUFFIXES = (".attn_rot_embd.weight", ".rope_freqs.weight", ".input_scale")
# How the names of tensors begin that only images and sound need.
TOWERS = ("v.", "a.", "mm.")


def shape_of(tensor: Tensor | None) -> str:
    """Return the shape as a part of a sentence."""
    return "is missing" if tensor is None else f"has {' x '.join(map(str, tensor.ne))} values"


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
