"""What depends on the CPU: the table of instruction sets, and numbers that are measured on the machine.

The choice for this process is what numba compiles for, which may be less than what the machine has.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from llvmlite import binding

from gguf_run.formats.compiler.jit import kernel_cache_dir
from gguf_run.formats.compiler.machine_code import host_features
from gguf_run.formats.frozen import frozen


@frozen
class Isa:
    """One row of the table. A tile of several tokens works on `lanes` rows of a panel at a time.

    The sums of a tile must stay in registers, and weights that are unpacked should meet many tokens.
    """

    name: str  # for people
    needs: frozenset[str]  # names of LLVM features, all required
    dot: str  # the row of lowering.LOWERINGS
    lanes: int  # rows of a panel in a tile
    tokens: int  # of the largest tile, at most panels.TOKENS
    signed_bytes: bool  # whether dot products take signed bytes on both sides, in the place of unsigned ones
    f16c: bool  # whether the CPU converts half floats
    fma: bool  # whether fused multiply-add is one instruction
    by_lane: bool  # whether products take one lane of a vector with all of another


_AVX512_VNNI = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vnni", "f16c", "fma"})
# Best first: the first row whose needs are met is chosen.
ISAS = (
    Isa("AVX-512 VNNI", _AVX512_VNNI, "vnni512", 16, 8, False, True, True, False),
    Isa("AVX-VNNI", frozenset({"avx2", "avxvnni", "f16c", "fma"}), "vnni256", 8, 4, False, True, True, False),
    Isa("AVX2", frozenset({"avx2", "f16c", "fma"}), "avx2", 8, 4, True, True, True, False),
    Isa("NEON dotprod", frozenset({"neon", "dotprod"}), "neon", 8, 4, True, True, True, True),
    Isa("generic", frozenset(), "generic", 4, 4, False, False, False, False),
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
    return choose(host_features())


@frozen
class Tuning:
    """Numbers that depend on the machine. measure/tune.py finds them. The defaults are safe on every machine."""

    ahead: int = 0  # one token: bytes between what a tile reads and what it prefetches; -1: it prefetches nothing
    piece_bytes: int = 16384  # one token: bytes of weights that a thread takes at a time, or more
    tile_tokens: int = 4  # a large batch: tokens of a tile, 4 (with two panels, if registers allow) or 8 (with one)
    n_threads: int = 0  # threads that compute; 0: one for each core


_ALLOWED: Mapping[str, Sequence[int]] = {
    "ahead": range(-1, 1 << 16),
    "piece_bytes": range(1 << 12, 1 << 20),
    "tile_tokens": (4, 8),
    "n_threads": range(65),
}


def tuning_path(panel: int, cpuinfo: Path = Path("/proc/cpuinfo")) -> Path | None:
    """Return the file that keeps the numbers for models of one kind of panel: a name for each CPU and set of cores.

    None if there is no folder for compiled kernels. Its name tells versions of the kernels apart.
    """
    folder = kernel_cache_dir()
    model = ""
    with suppress(OSError), cpuinfo.open(errors="replace") as file:
        model = file.read(1024)  # of the first CPU. Some lines say how fast it runs just now
    stable = [line for line in model.splitlines() if line.startswith(("model name", "CPU part", "CPU implementer"))]
    n_cpu = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    key = repr((panel, current().name, binding.get_host_cpu_name(), stable, n_cpu, os.cpu_count()))
    return folder / f"tuning-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json" if folder else None


def stored_tuning(path: Path | None) -> Tuning | None:
    """Read a file of tuning_path. None if there is none, or if it does not hold numbers that are allowed."""
    try:
        found = json.loads(path.read_bytes()) if path else {}
        values = {field.name: found[field.name] for field in fields(Tuning)}
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    usable = all(type(value) is int and value in _ALLOWED[name] for name, value in values.items())
    return Tuning(**values) if usable else None
