"""Which instruction set the kernels are written for: what numba will compile for, not merely what the machine has."""

import functools
import os
from dataclasses import dataclass

from llvmlite import binding


@dataclass(frozen=True)
class Isa:
    """One row of the table. name: for people. needs: LLVM feature names, all required. dot: see lowering.py.

    lanes, panels: rows of a panel, and panels, that a tile of several tokens works on at a time; its sums must stay in
    registers, and each activation that is loaded should meet many weights.
    signed_bytes: dot products take signed bytes on both sides. f16c: the CPU converts halves itself. fma: fused
    multiply-add is one instruction.
    """

    name: str
    needs: frozenset[str]
    dot: str
    lanes: int
    panels: int
    signed_bytes: bool
    f16c: bool
    fma: bool


# Best first; the first row whose needs are met is taken.
ISAS = (
    Isa(
        "AVX-512 VNNI",
        frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vnni", "f16c", "fma"}),
        "vnni512",
        lanes=16,
        panels=2,
        signed_bytes=False,
        f16c=True,
        fma=True,
    ),
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
    """Return the row for this process, NUMBA_CPU_NAME and NUMBA_CPU_FEATURES (numba's own settings) respected."""
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is not None:
        return choose(features)
    if "NUMBA_CPU_NAME" in os.environ:
        return ISAS[-1]  # a named CPU without a feature list: nothing is known about it
    return choose(binding.get_host_cpu_features().flatten())
