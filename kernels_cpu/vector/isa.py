"""The table of instruction sets, and the choice for this process: what numba compiles for, which may be less than what
the machine has."""

import functools
import os

from llvmlite import binding

from gguf_run.formats.frozen import frozen


@frozen
class Isa:
    """One row of the table. A tile of several tokens works on `lanes` rows of `panels` panels at a time.

    The sums of a tile must stay in registers, and each activation that is loaded should meet many weights.
    """

    name: str  # for people
    needs: frozenset[str]  # names of LLVM features, all required
    dot: str  # the row of lowering.LOWERINGS
    lanes: int  # rows of a panel in a tile
    panels: int  # panels in a tile
    signed_bytes: bool  # whether dot products take signed bytes on both sides
    f16c: bool  # whether the CPU converts half floats
    fma: bool  # whether fused multiply-add is one instruction


_AVX512_VNNI = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vnni", "f16c", "fma"})
# Best first: the first row whose needs are met is chosen.
ISAS = (
    Isa("AVX-512 VNNI", _AVX512_VNNI, "vnni512", 16, 2, False, True, True),
    Isa("AVX-VNNI", frozenset({"avx2", "avxvnni", "f16c", "fma"}), "vnni256", 8, 1, False, True, True),
    Isa("AVX2", frozenset({"avx2", "f16c", "fma"}), "avx2", 8, 1, True, True, True),
    Isa("NEON dotprod", frozenset({"neon", "dotprod"}), "neon", 8, 1, True, True, True),
    Isa("generic", frozenset(), "generic", 4, 1, False, False, False),
)


def choose(features: str) -> Isa:
    """Return the best row for an LLVM feature string such as "+avx2,+fma,-avx512f"."""
    have = {word[1:] for word in features.split(",") if word.startswith("+")}
    return next(isa for isa in ISAS if isa.needs <= have)


@functools.cache
def current() -> Isa:
    """Return the row for this process. NUMBA_CPU_NAME and NUMBA_CPU_FEATURES, numba's own settings, are respected."""
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is not None:
        return choose(features)
    if "NUMBA_CPU_NAME" in os.environ:
        return ISAS[-1]  # the features of the named CPU are not known
    return choose(binding.get_host_cpu_features().flatten())
