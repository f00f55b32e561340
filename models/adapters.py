"""LoRA adapters in GGUF files: pairs of matrices of low rank that are added to a model's matrices.

    out = W x + scale * alpha / rank * B (A x)

The tensors are `<tensor of the model>.lora_a`, [n_in, rank], and `.lora_b`, [rank, n_out], as llama.cpp has them. Hu et
al., 2021, arXiv:2106.09685.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.reader import GGUFFile, Tensor
from gguf_run.models.adapter_scales import MOST

ENDS = (".lora_a", ".lora_b")


@frozen
class Pair:
    """What an adapter adds to one tensor of the model: factor * b @ a."""

    a: Tensor  # [n_in, rank]
    b: Tensor  # [rank, n_out]
    factor: float  # alpha / rank; 1 if the file has no alpha


@frozen
class Adapter:
    """One adapter file that fits the model."""

    name: str
    pairs: Mapping[str, Pair]  # by the name of the model's tensor


def adapter_kind(file: GGUFFile) -> tuple[str, float]:
    """Return the architecture that an adapter is for, and its alpha (0: none).

    Raises FormatError and UnsupportedError for a file that holds no LoRA adapter.
    """
    keys: Mapping[str, Any] = file.metadata
    names = ("general.type", "general.architecture", "adapter.type")
    kind, arch, type_ = (str(keys.get(name, "not given")) for name in names)  # damaged files have arrays here
    if kind != "adapter":
        raise FormatError(f"{file.path}: is not an adapter: its general.type is {quoted(kind)}")
    if type_ != "lora" or "adapter.alora.invocation_tokens" in keys:
        raise UnsupportedError(f"{file.path}: is an adapter of the type {quoted(type_)}: only plain lora is known")
    alpha = keys.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= MOST:
        allowed = f"a number from {-MOST:g} to {MOST:g}"
        raise FormatError(f"{file.path}: adapter.lora.alpha is {quoted(str(alpha))}, must be {allowed}")
    return arch, float(alpha)


def read_adapter(name: str, file: GGUFFile, arch: str, tensors: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter in a file under a name. arch, tensors: those of the model.

    Raises FormatError for an adapter of another model or a damaged one, UnsupportedError for tensors that cannot be
    adapted.
    """
    wanted, alpha = adapter_kind(file)
    if wanted != arch:
        raise FormatError(f"{file.path}: is an adapter for the architecture {quoted(wanted)}, the model is {arch}")
    if strange := [found for found in file.tensors if not found.endswith(ENDS)]:
        raise UnsupportedError(f"{file.path}: tensor {quoted(strange[0])} is neither a .lora_a nor a .lora_b")
    names = list(dict.fromkeys(found.rpartition(".")[0] for found in file.tensors))
    if not names:
        raise FormatError(f"{file.path}: is an adapter without tensors")
    return Adapter(name, {base: _pair(file, base, tensors.get(base), alpha) for base in names})


def _pair(file: GGUFFile, name: str, base: Tensor | None, alpha: float) -> Pair:
    """Return the pair for one tensor of the model, which is `base`."""
    a, b = (file.tensors.get(name + end) for end in ENDS)
    if a is None or b is None:
        raise FormatError(f"{file.path}: {quoted(name)} has only one of {' and '.join(ENDS)}")
    if base is None:
        raise FormatError(f"{file.path}: the model has no tensor {quoted(name)}: it is an adapter for another model")
    if len(base.ne) != 2 or name.endswith("token_embd.weight"):
        what = "only matrices that are multiplied can be adapted, no experts, embeddings or norms"
        raise UnsupportedError(f"{file.path}: adapts {quoted(name)}: {what}")
    rank = b.ne[0]
    if rank < 1 or not a.same_shape((base.ne[0], rank)) or not b.same_shape((rank, base.ne[1])):
        found = f"{list(a.ne)} and {list(b.ne)}"
        wanted = f"[{base.ne[0]}, R] and [R, {base.ne[1]}] with R from 1"
        raise FormatError(f"{file.path}: the halves for {quoted(name)} are {found}, must be {wanted}")
    for tensor in (a, b):
        if not np.isfinite(dequantize(tensor.blocks(), tensor.type)).all():
            raise FormatError(f"{file.path}: tensor {quoted(tensor.name)} has values that are not finite")
    return Pair(a, b, alpha / rank if alpha else 1.0)
