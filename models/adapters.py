"""LoRA adapters in GGUF files: pairs of matrices of low rank that are added to a model's matrices.

    out = W x + scale * alpha / rank * B (A x)

The tensors are `<tensor of the model>.lora_a`, [n_in, rank], and `.lora_b`, [rank, n_out], as llama.cpp has them. Hu et
al., 2021, arXiv:2106.09685.
"""

from collections.abc import Mapping

import numpy as np

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.reader import GGUFFile, Tensor
from gguf_run.models.adapter_scales import MOST
from gguf_run.models.keys import Keys

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


def read_adapter(name: str, file: GGUFFile, arch: str, tensors: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter in a file under a name. arch, tensors: those of the model.

    Raises FormatError for an adapter of another model or a damaged one, UnsupportedError for tensors that cannot be
    adapted. They do not name the file.
    """
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", arch)):
        if (found := str(file.metadata.get(key, "missing"))) != wanted:  # damaged files have arrays
            raise FormatError(f"{key} is {quoted(found)}, an adapter (LoRA) for this model has {quoted(wanted)}")
    alpha = Keys(file.metadata, "adapter").number("lora.alpha", 0.0, -MOST, MOST)
    strange = [key for key in file.metadata if key.startswith("adapter.alora.")]
    if strange := [*strange, *(full for full in file.tensors if not full.endswith(ENDS))]:
        raise UnsupportedError(f"{quoted(strange[0])} is no part of a plain LoRA adapter")
    names = dict.fromkeys(full.rpartition(".")[0] for full in file.tensors)
    if not names:
        raise FormatError("there are no tensors")
    return Adapter(name, {full: _pair(file, full, tensors.get(full), alpha) for full in names})


def _pair(file: GGUFFile, name: str, base: Tensor | None, alpha: float) -> Pair:
    """Return the pair for one tensor of the model, which is `base`."""
    if base is None:
        raise FormatError(f"the model has no tensor {quoted(name)}: it is an adapter for another model")
    if len(base.ne) != 2 or name.endswith("token_embd.weight"):
        what = "only matrices that are multiplied can be adapted, no experts, embeddings or norms"
        raise UnsupportedError(f"adapts {quoted(name)}: {what}")
    a, b = halves = [file.tensors.get(name + end) for end in ENDS]
    rank = b.ne[0] if b is not None else 0
    if (
        a is None
        or b is None
        or rank < 1
        or not (a.same_shape((base.ne[0], rank)) and b.same_shape((rank, base.ne[1])))
    ):
        found = " and ".join("missing" if half is None else str([*half.ne]) for half in halves)
        wanted = f"[{base.ne[0]}, R] and [R, {base.ne[1]}] with R from 1"
        raise FormatError(f"{' and '.join(ENDS)} for {quoted(name)} are {found}, must be {wanted}")
    for tensor in (a, b):
        if not np.isfinite(dequantize(tensor.blocks(), tensor.type)).all():
            raise FormatError(f"tensor {quoted(tensor.name)} has values that are not finite")
    return Pair(a, b, alpha / rank if alpha else 1.0)
