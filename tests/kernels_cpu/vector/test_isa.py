"""Kernels for other instruction sets than this machine's best: the same tests in processes where numba knows less.

The processes run side by side, as most of their time goes into compiling.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numba
import pytest
from isa_features import LIMITED, environment, host_has
from llvmlite import binding
from numba import from_dtype, types

from gguf_run.formats.compiler.machine_code import host_features, with_arm_features
from gguf_run.formats.compiler.resolve import resolved
from gguf_run.kernels_cpu.matmul.matmul import matmul
from gguf_run.kernels_cpu.panels.panels import PANEL_OF, panel_id
from gguf_run.kernels_cpu.replay.op import TapeOp
from gguf_run.kernels_cpu.vector.isa import Tuning, choose, current, stored_tuning, tuning_path

FOLDER = Path(__file__).parents[1]


def types_of(*names: str) -> tuple[str, ...]:
    return tuple(f"matmul/test_matmul.py::test_every_type[{name}]" for name in names)


INSTRUCTIONS_USED = "vector/test_isa.py::test_instructions"
OTHERS = (
    *types_of("F16"),
    "rows/test_rows.py::test_activations_are_quantized",
    "rows/test_rows.py::test_gated",
    "rows/test_rows.py::test_gated_at_extremes",
    "attention/test_attention.py::test_cache_can_be_filled_to_its_end[17-f16]",
    "attention/test_attention.py::test_split_positions[3 heads, 1 kv, 20 wide, window 0-3]",
    "attention/test_attention.py::test_split_positions[4 heads, 1 kv, 32 wide, window 511-2]",
    "attention/test_cache.py::test_attention_over_what_is_stored[q8_0-q4_0]",
)
# AVX-VNNI differs from AVX2 in the integer dot product only; on AVX2 that differs from one width of quants to the next.
# MXFP4 has a codebook, NF4 two.
TESTS = {
    "AVX-VNNI": (INSTRUCTIONS_USED, *types_of("Q5_K", "Q8_0")),
    "AVX2": (
        INSTRUCTIONS_USED,
        *types_of("Q2_K", "Q3_K", "Q4_0", "Q5_K", "Q6_K", "Q8_0", "IQ2_XXS", "MXFP4", "NF4"),
        *OTHERS,
    ),
    "generic": (INSTRUCTIONS_USED, *types_of("Q8_0", "MXFP4"), *OTHERS),
}
CODE = """
import sys, pytest
from gguf_run.kernels_cpu.vector.isa import current
assert current().name == sys.argv[1], f"kernels are for {current().name}"
sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[2:]]))
"""

# By instruction set: what the assembly of a matmul over a panel of 4 bits must hold, and what it must not.
INSTRUCTIONS = {
    "AVX-512 VNNI": (("vpdpbusd", "zmm", "vfmadd"), ("vpmaddubsw",)),
    "AVX-VNNI": (("vpdpbusd", "ymm", "vfmadd", "vcvtph2ps"), ("zmm", "vpmaddubsw")),
    "AVX2": (("vpmaddubsw", "ymm", "vfmadd", "vcvtph2ps"), ("zmm", "vpdpbusd")),
    "NEON dotprod": (("sdot", "fmla"), ()),
    "generic": ((), ("ymm", "zmm", "vpdpbusd", "pmaddubsw", "vfmadd", "vcvtph2ps")),
}


def assembly(op: TapeOp) -> str:
    """Compile once more, as what comes from the cache on disk has no assembly."""
    signature = types.intp(types.CPointer(from_dtype(op.fields)), types.intp, types.intp, types.intp)
    return str(numba.cfunc(signature, error_model="numpy", **op.options)(resolved(op.function))._library.get_asm_str())


def test_instructions() -> None:
    code = assembly(matmul(panel_id(PANEL_OF["Q4_0"])))
    wanted, unwanted = INSTRUCTIONS[current().name]
    assert [word for word in wanted if word not in code] == []
    assert [word for word in unwanted if word in code] == []
    assert "fmaf" not in code, "a call for each multiplication"


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Started together, so that two cores have something to do."""
    running = {}
    for name in LIMITED:
        if host_has(name):
            command = [sys.executable, "-c", CODE, name, *(str(FOLDER / test) for test in TESTS[name])]
            running[name] = subprocess.Popen(
                command,
                cwd=FOLDER.parents[1],
                env=os.environ | environment(name),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
    yield running
    for process in running.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", LIMITED)
def test_kernels_for(name: str, processes: dict[str, subprocess.Popen[str]]) -> None:
    if name not in processes:
        pytest.skip(f"this machine does not have {name}")
    output, _ = processes[name].communicate(timeout=900)
    assert processes[name].returncode == 0, output[-5000:]
    assert " passed in " in output
    assert "skipped" not in output


def test_numbers_of_this_machine_are_read_or_none(tmp_path: Path) -> None:
    path, good = tmp_path / "tuning.json", vars(Tuning(ahead=-1, n_threads=3))
    assert stored_tuning(None) is stored_tuning(path) is stored_tuning(tmp_path) is None
    path.write_text(json.dumps(good))
    assert stored_tuning(path) == Tuning(**good)
    changes: list[tuple[str, object]] = [("ahead", -2), ("ahead", 1 << 20), ("ahead", 0.0), ("ahead", True)]
    changes += [("ahead", None), ("tile_tokens", 6), ("piece_bytes", 0), ("n_threads", 65), ("n_threads", [2])]
    for name, value in changes:
        path.write_text(json.dumps(good | {name: value}))
        assert stored_tuning(path) is None, (name, value)
    for text in (b"", b"\xff\xfe", b"null", b"[]", b"{}", b"[" * 100_000, json.dumps(good).encode()[:-1]):
        path.write_bytes(text)
        assert stored_tuning(path) is None, text[:20]


def test_each_cpu_has_a_file_of_its_own(tmp_path: Path) -> None:
    """The speed that a CPU runs at just now does not count; nor must /proc/cpuinfo exist."""
    texts = [
        "model name\t: A\ncpu MHz\t\t: 2100.000\n",
        "model name\t: B\ncpu MHz\t\t: 2100.000\n",
        "CPU implementer\t: 0x41\nCPU part\t: 0xd0c\n",
        "CPU implementer\t: 0x41\nCPU part\t: 0xd4f\n",
    ]
    paths = []
    for i, text in enumerate(texts):
        (tmp_path / str(i)).write_text(text)
        paths.append(tuning_path(0, tmp_path / str(i)))
    (tmp_path / "0").write_text(texts[0].replace("2100", "800"))
    assert tuning_path(0, tmp_path / "0") == paths[0]
    paths += [tuning_path(1, tmp_path / "0"), tuning_path(0, tmp_path / "none")]
    assert None not in paths
    assert len(set(paths)) == 6


@pytest.mark.parametrize(
    ("named", "arm_bits", "is_apple", "isa"),
    [
        ("", 0, False, "generic"),
        ("", 1 << 1, False, "generic"),  # Cortex-A53: vectors without dot products
        ("", 1 << 1 | 1 << 20, False, "NEON dotprod"),
        ("+neon,+crc", 1 << 1 | 1 << 20, False, "NEON dotprod"),
        ("+neon,+dotprod", 1 << 1 | 1 << 20, False, "NEON dotprod"),
        ("", 0, True, "NEON dotprod"),
        ("+avx2,+f16c,+fma", 0, False, "AVX2"),
        ("+neon,-dotprod", 1 << 1 | 1 << 20, False, "generic"),  # LLVM has looked, and knows better
    ],
)
def test_features_that_llvm_does_not_name(named: str, arm_bits: int, is_apple: bool, isa: str) -> None:
    features = with_arm_features(named, arm_bits, is_apple)
    assert choose(features).name == isa
    assert features.startswith(named)
    assert len({word[1:] for word in features.split(",")}) == len(features.split(","))


def test_features_of_this_machine() -> None:
    """Only ARM CPUs have features that LLVM may not name."""
    named = binding.get_host_cpu_features().flatten()
    assert host_features().startswith(named)
    assert host_features() == named or platform.machine() in ("aarch64", "arm64")
