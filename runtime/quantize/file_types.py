"""How llama.cpp describes a model in a few words: "llama 8B Q4_K - Medium"."""

import re
from collections import Counter
from types import MappingProxyType

from gguf_run.formats.gguf.reader import GGUFFile

# general.file_type, as llama.cpp's converter and quantizer write it (llama.h), and the names it shows for them.
FILE_TYPES = MappingProxyType(
    {
        0: "all F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K - Medium",
        11: "Q3_K - Small", 12: "Q3_K - Medium", 13: "Q3_K - Large", 14: "Q4_K - Small", 15: "Q4_K - Medium",
        16: "Q5_K - Small", 17: "Q5_K - Medium", 18: "Q6_K", 19: "IQ2_XXS - 2.0625 bpw", 20: "IQ2_XS - 2.3125 bpw",
        21: "Q2_K - Small", 22: "IQ3_XS - 3.3 bpw", 23: "IQ3_XXS - 3.0625 bpw", 24: "IQ1_S - 1.5625 bpw",
        25: "IQ4_NL - 4.5 bpw", 26: "IQ3_S - 3.4375 bpw", 27: "IQ3_S mix - 3.66 bpw", 28: "IQ2_S - 2.5 bpw",
        29: "IQ2_M - 2.7 bpw", 30: "IQ4_XS - 4.25 bpw", 31: "IQ1_M - 1.75 bpw", 32: "BF16",
        36: "TQ1_0 - 1.69 bpw ternary", 37: "TQ2_0 - 2.06 bpw ternary", 38: "MXFP4 MoE", 39: "NVFP4", 40: "Q1_0",
        41: "Q2_0",
    }
)  # fmt: skip


def model_type(file: GGUFFile) -> str:
    """Return architecture, size and quantization of a model.

    The size is the one that the file states, else its parameters in millions or billions; the quantization is
    general.file_type, else the tensor type that holds most weights.
    """
    metadata = file.metadata
    label, kind = metadata.get("general.size_label"), metadata.get("general.file_type")
    if not (isinstance(label, str) and re.fullmatch(r"[\w.]{1,16}", label)):
        label = _size_label(sum(tensor.n_elements for tensor in file.tensors.values()))
    weights: Counter[str] = Counter()
    for tensor in file.tensors.values():
        weights[tensor.type.name] += tensor.n_elements
    quantization = FILE_TYPES.get(kind) if isinstance(kind, int) else None
    return f"{metadata.get('general.architecture')} {label} {quantization or weights.most_common(1)[0][0]}"


def _size_label(n_params: int) -> str:
    """135M, 1.5B, 70B."""
    if n_params < 999_500_000:
        return f"{n_params / 1e6:.0f}M"
    return f"{n_params / 1e9:.1f}".removesuffix(".0") + "B" if n_params < 9_950_000_000 else f"{n_params / 1e9:.0f}B"
