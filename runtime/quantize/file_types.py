"""Kinds of GGUF file: their numbers, their names for gguf-quantize, and how llama.cpp describes a model of each."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from gguf_run.formats.blocks.types import CHECKPOINT_TYPES, TensorType, type_by_name
from gguf_run.formats.errors import OptionError, did_you_mean
from gguf_run.formats.gguf.reader import GGUFFile

# Tensor types that can be written. The others of ggml can only be read or copied.
WRITABLE = ("F32", "F16", "BF16", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0",
            "Q5_1", "Q5_K", "Q6_K", "Q8_0", "TQ1_0", "TQ2_0")  # fmt: skip


@dataclass(frozen=True)
class FileType:
    """A kind of file: one type for all matrices, or a mixture."""

    id: int | None  # general.file_type; None: the number of the input stays
    name: str  # as llama-quantize knows it
    default: str  # the tensor type of most matrices
    label: str = ""  # what llama.cpp shows; "": the name

    @property
    def is_writable(self) -> bool:
        """Whether gguf-quantize can make such a file."""
        return self.default in WRITABLE


# Numbers from llama.h, labels from src/llama-model-loader.cpp of llama.cpp.
# fmt: off
FILE_TYPES: Mapping[str, FileType] = {row[1]: FileType(*row) for row in (
    (0, "F32", "F32", "all F32"), (1, "F16", "F16"), (32, "BF16", "BF16"),
    (2, "Q4_0", "Q4_0"), (3, "Q4_1", "Q4_1"), (8, "Q5_0", "Q5_0"), (9, "Q5_1", "Q5_1"), (7, "Q8_0", "Q8_0"),
    (10, "Q2_K", "Q2_K", "Q2_K - Medium"), (21, "Q2_K_S", "Q2_K", "Q2_K - Small"),
    (11, "Q3_K_S", "Q3_K", "Q3_K - Small"), (12, "Q3_K_M", "Q3_K", "Q3_K - Medium"),
    (13, "Q3_K_L", "Q3_K", "Q3_K - Large"),
    (14, "Q4_K_S", "Q4_K", "Q4_K - Small"), (15, "Q4_K_M", "Q4_K", "Q4_K - Medium"),
    (16, "Q5_K_S", "Q5_K", "Q5_K - Small"), (17, "Q5_K_M", "Q5_K", "Q5_K - Medium"), (18, "Q6_K", "Q6_K"),
    (25, "IQ4_NL", "IQ4_NL", "IQ4_NL - 4.5 bpw"), (30, "IQ4_XS", "IQ4_XS", "IQ4_XS - 4.25 bpw"),
    (36, "TQ1_0", "TQ1_0", "TQ1_0 - 1.69 bpw ternary"), (37, "TQ2_0", "TQ2_0", "TQ2_0 - 2.06 bpw ternary"),
    (38, "MXFP4_MOE", "MXFP4", "MXFP4 MoE"), (39, "NVFP4", "NVFP4"), (None, "COPY", "F32"),
    # Files that this program reads and does not write.
    (24, "IQ1_S", "IQ1_S", "IQ1_S - 1.5625 bpw"), (31, "IQ1_M", "IQ1_M", "IQ1_M - 1.75 bpw"),
    (19, "IQ2_XXS", "IQ2_XXS", "IQ2_XXS - 2.0625 bpw"), (20, "IQ2_XS", "IQ2_XS", "IQ2_XS - 2.3125 bpw"),
    (28, "IQ2_S", "IQ2_XS", "IQ2_S - 2.5 bpw"), (29, "IQ2_M", "IQ2_S", "IQ2_M - 2.7 bpw"),
    (23, "IQ3_XXS", "IQ3_XXS", "IQ3_XXS - 3.0625 bpw"), (22, "IQ3_XS", "IQ3_S", "IQ3_XS - 3.3 bpw"),
    (26, "IQ3_S", "IQ3_S", "IQ3_S - 3.4375 bpw"), (27, "IQ3_M", "IQ3_S", "IQ3_S mix - 3.66 bpw"),
    (40, "Q1_0", "Q1_0"), (41, "Q2_0", "Q2_0"),
)}
# fmt: on
WRITABLE_FILES = tuple(kind.name for kind in FILE_TYPES.values() if kind.is_writable)
# What weights can be quantized to while they are loaded, and GGUF has no type for, or a mixture under the same name.
IN_MEMORY: Mapping[str, FileType] = {
    name: FileType(None, name, default)
    for name, default in (("FP8", "FP8_E4M3"), ("INT8", "INT8"), ("NF4", "NF4"), ("MXFP4", "MXFP4"))
}
LOADABLE = (*IN_MEMORY, *WRITABLE_FILES)
# Every matrix keeps its type, except that F32 becomes F16. The name is not for users: gguf-convert chooses this kind.
KEEP = FileType(None, "KEEP", "F16")
ALIASES: Mapping[str, str] = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}
_BY_ID: Mapping[int, FileType] = {kind.id: kind for kind in FILE_TYPES.values() if kind.id is not None}


def file_type(text: str, in_memory: bool = False) -> FileType:
    """Return the writable file type of that name, alias or number, or one of IN_MEMORY. OptionError lists the names."""
    if in_memory and text.upper() in IN_MEMORY:
        return IN_MEMORY[text.upper()]
    name = ALIASES.get(text.upper(), text.upper())
    kind = _BY_ID.get(int(name)) if len(name) < 20 and name.isdecimal() else FILE_TYPES.get(name)
    if kind is None or not kind.is_writable:
        names = LOADABLE if in_memory else WRITABLE_FILES
        allowed = f"{did_you_mean(text, names)}allowed are {', '.join(names)}"
        raise OptionError(f'TYPE is "{text}": {allowed}, or the number of a file type')
    return kind


def writable_type(text: str, option: str) -> TensorType:
    """Return the tensor type of that name, if it can be written. OptionError names the option."""
    if text.upper() not in WRITABLE:
        raise OptionError(f'{option}: "{text}" is not a type that can be written: allowed are {", ".join(WRITABLE)}')
    return type_by_name(text)


def stated_file_type(file: GGUFFile) -> FileType | None:
    """Return the file type that general.file_type states. None if the number is missing or unknown."""
    number = file.metadata.get("general.file_type")
    return _BY_ID.get(number) if isinstance(number, int) else None


def model_type(file: GGUFFile) -> str:
    """Return architecture, size and quantization of a model, as llama.cpp shows them: "llama 8B Q4_K - Medium".

    The size is general.size_label. Without a label it is the number of parameters in millions or billions. The
    quantization is general.file_type. Without a known one it is the tensor type that holds most weights.
    """
    size, kind = file.metadata.get("general.size_label"), stated_file_type(file)
    if not (isinstance(size, str) and re.fullmatch(r"[\w.]{1,16}", size)):
        size = _size_label(sum(tensor.n_elements for tensor in file.tensors.values()))
    weights: Counter[str] = Counter()
    for tensor in file.tensors.values():
        weights[tensor.type.name] += tensor.n_elements
    most = max(weights, key=weights.__getitem__, default="no weights")
    is_ours = any(most == row.name for row in CHECKPOINT_TYPES)
    quantization = (kind.label or kind.name) if kind and not is_ours else most
    return f"{file.metadata.get('general.architecture')} {size} {quantization}"


def _size_label(n_params: int) -> str:
    """Return a number of parameters as 135M, 1.5B or 70B."""
    if n_params < 999_500_000:
        return f"{n_params / 1e6:.0f}M"
    return f"{n_params / 1e9:.1f}".removesuffix(".0") + "B" if n_params < 9_950_000_000 else f"{n_params / 1e9:.0f}B"
