"""Environment variables of numba with which it compiles for fewer instructions than the machine has."""

from llvmlite import binding

_AVX2 = (
    "+avx,+avx2,+bmi,+bmi2,+cmov,+cx16,+f16c,+fma,+fxsr,+lzcnt,+movbe,+mmx,+popcnt,"
    "+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3,+xsave"
)
# By the name in kernels_cpu.vector.isa.ISAS: NUMBA_CPU_NAME, NUMBA_CPU_FEATURES.
LIMITED = {
    "AVX-VNNI": ("alderlake", _AVX2 + ",+avxvnni"),
    "AVX2": ("haswell", _AVX2),
    "generic": ("generic", ""),
}


def environment(isa_name: str) -> dict[str, str]:
    """Return variables for a process that compiles its kernels for one row of LIMITED."""
    name, features = LIMITED[isa_name]
    return {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}


def host_has(isa_name: str) -> bool:
    """Whether this machine can run kernels that are compiled for a row of LIMITED."""
    host = binding.get_host_cpu_features()
    wanted = LIMITED[isa_name][1].replace("+", "").split(",")
    return all(host.get(feature, False) for feature in wanted if feature)
