"""The GPU backend's kernels compiled for targets that this machine need not have: what the machine code looks like."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from gguf_run.kernels_gpu.device.tuning import DEFAULT
from gguf_run.kernels_gpu.panels.panels import PANELS

FULL = "90"
TARGETS = (FULL, "80", "86", "89", "100")
AMD = ("gfx942", "gfx1100")
SHARED_BYTES = {"80": 166912, "86": 101376, "89": 101376, "90": 232448, "100": 232448}
KERNELS = ("matmul_decode", "dequantize", "append", "attend", "add_up", "norm")
KERNELS += ("expert_gate_up", "expert_down", "expert_tile", "short_conv", "delta_rule", "scan")
MMA = {"90": "wgmma.mma", "100": "tcgen05.mma", "gfx942": "v_mfma", "gfx1100": "v_wmma"}  # else mma.sync
# Instructions per weight of the loop for one token: more would keep an H200 from streaming weights at two thirds of its
# bandwidth. Those of the types with a codebook are at what they need now.
BUDGET = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q4_K"), 2.8),
    **dict.fromkeys(("Q5_0", "Q5_1", "Q5_K"), 3.5),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS", "MXFP4"), 3.3),
    **{"Q2_K": 1.7, "Q3_K": 2.2, "Q6_K": 4.2, "Q8_0": 5.4, "F16": 8.0},
}


def compile_for(*targets: str) -> dict[str, list[dict[str, Any]]]:
    script = Path(__file__).parents[1] / "helpers/gpu_compile.py"
    env = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, *targets], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[str, Future[dict[str, list[dict[str, Any]]]]]]:
    """Kernels by target, made by two processes."""
    with ThreadPoolExecutor(2) as pool:
        first, second = (FULL, "gfx942"), ("80", "86", "89", "100", "gfx1100")
        made = {part: pool.submit(compile_for, *part) for part in (first, second)}
        yield {target: future for part, future in made.items() for target in part}


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills_or_needs_too_much_shared_memory(target: str, compiled: Any) -> None:
    kernels = compiled[target].result()[target]
    assert {kernel["kernel"] for kernel in kernels} >= {*KERNELS, "matmul_mma"}
    for kernel in kernels:
        assert kernel["stack"] == kernel["local"] == kernel.get("spills", 0) == 0, kernel
        assert kernel["shared"] <= SHARED_BYTES[target], kernel


def test_decode_kernels(compiled: Any) -> None:
    """Whole vectors of quants, dot products in hardware, nothing but arithmetic in the loop, within the budget."""
    kernels = compiled[FULL].result()[FULL]
    cases = {kernel["case"]: kernel for kernel in kernels if kernel["kernel"] in ("matmul_decode", "matmul_float")}
    n_row = dict(DEFAULT.rows)[1]
    for name, budget in BUDGET.items():
        kernel = cases[f"few {name} 1"]
        assert kernel["loop"] > 50, kernel
        assert kernel["loop"] / (n_row * PANELS[name].unit) <= budget, kernel
        assert kernel["vector_loads"] >= n_row, kernel
        assert kernel["in_loop"] == [], kernel
        assert (kernel["dp4a"] >= 4 * n_row) == (name != "F16"), kernel
    assert cases["few Q4_K 1 gated"]["loop"] <= 1.1 * cases["few Q4_K 1"]["loop"]
    of_experts = [kernel for kernel in kernels if kernel["kernel"] in ("expert_gate_up", "expert_down")]
    assert len(of_experts) == 4
    for kernel in of_experts:
        own = {"expert_gate_up": "Q4_K", "expert_down": "Q6_K"}[kernel["kernel"]]
        name = "MXFP4" if "MXFP4" in kernel["case"] else own
        assert 50 < kernel["loop"] <= BUDGET[name] * n_row * PANELS[name].unit, kernel
        assert kernel["dp4a"] == 8 * n_row, kernel
        assert kernel["in_loop"] == [], kernel


# Instructions per weight of matmul_mma's loop, by type and tokens of a program: those of now and 10 %. On an H200,
# 4.4 would let Q4_K stream at its bandwidth; tensor cores need longer than the memory from about 40 tokens on.
MMA_BUDGET = {"Q4_K 16": 3.54, "Q4_K 64": 5.08, "Q6_K 16": 4.21, "Q8_0 16 silu": 3.3}


def test_tensor_core_products(compiled: Any) -> None:
    """Whole vectors, no shared memory and no barrier in the loop, within the budget."""
    kernels = compiled[FULL].result()[FULL]
    cases = {kernel["case"].removeprefix("many "): kernel for kernel in kernels if kernel["kernel"] == "matmul_mma"}
    for case, budget in MMA_BUDGET.items():
        m = int(case.split()[1])
        tiles = DEFAULT.mma_tiles(m)[0]
        assert cases[case]["in_loop"] == [], case
        assert cases[case]["vector_loads"] >= 4 * (m // 8) + 2 * tiles, case
        assert cases[case]["mma_in_loop"] == 8 * tiles * (m // 8), case
        assert cases[case]["loop"] / (64 * tiles) <= budget, case


@pytest.mark.parametrize("target", TARGETS)
def test_element_i_is_in_thread_i(target: str, compiled: Any) -> None:
    """matmul_mma gives each thread its part of a tensor core's operands by the number of the element."""
    found = [kernel["in_order"] for kernel in compiled[target].result()[target] if kernel["kernel"] == "matmul_mma"]
    assert found
    assert all(found)


@pytest.mark.parametrize("target", TARGETS)
def test_a_last_program_reads_what_the_others_stored(target: str, compiled: Any) -> None:
    """Stores, a barrier of the program, the count, which releases them and acquires those of others, a barrier; then
    what is read comes from the second level's cache."""
    handed = [k["memory"] for k in compiled[target].result()[target] if any("atom" in op for op in k.get("memory", ()))]
    assert len(handed) > 1
    for ops in handed:
        at = ops.index("atom.global.gpu.acq_rel.add.u32")
        assert ops[at - 2 : at + 2] == ["st.global", "bar.sync", "atom.global.gpu.acq_rel.add.u32", "bar.sync"]
        assert "ld.global.cg" in ops[at:]
        assert "ld.global.cg" not in ops[:at]


def test_products_are_rounded_before_they_become_int8(compiled: Any) -> None:
    """As on the CPU: not fused with the addition of 1.5 * 2^23 that leaves the nearest integer."""
    names = ("quantize", "norm", "matmul_decode")
    assert {k["fused"] for k in compiled[FULL].result()[FULL] if k["kernel"] in names} == {False}


@pytest.mark.parametrize("target", [*TARGETS, *AMD])
def test_tensor_cores(target: str, compiled: Any) -> None:
    many = ("attention q8_0 q8_0 128 64", "attention f16 f16 128 64")
    kernels = compiled[target].result()[target]
    tiles = [kernel for kernel in kernels if kernel["kernel"] == "expert_tile"]
    tiles += [kernel for kernel in kernels if kernel["kernel"] == "attend" and kernel["case"] in many]
    assert {kernel["kernel"] for kernel in tiles} == {"expert_tile", "attend"}
    for kernel in tiles:
        assert MMA.get(target, "mma.sync") in kernel["mma"], kernel
    assert all(kernel["mma"] for kernel in kernels if kernel["kernel"] == "attend")


def test_attention_of_one_token(compiled: Any) -> None:
    """Instructions per element of keys and values: at 8.3 an H200 would decode q8_0 as fast as it can be read."""
    found = [kernel for kernel in compiled[FULL].result()[FULL] if kernel["kernel"] == "attend"]
    loops = {kernel["case"]: kernel["loop"] / (2 * 64 * 128 / 128) for kernel in found}
    assert 3 < loops["attention q8_0 q8_0 128 1"] < 6.2
    assert 2 < loops["attention f16 f16 128 1"] < 3.3
    assert 3 < loops["attention q4_0 q4_0 128 1"] < 6
    assert 3 < loops["attention iq4_nl q4_1 128 1"] < 7.2


@pytest.mark.parametrize("target", AMD)
def test_amd_targets(target: str, compiled: Any) -> None:
    """No instruction of one maker only: everything compiles for the other one's targets, with fallbacks."""
    assert {kernel["kernel"] for kernel in compiled[target].result()[target]} >= set(KERNELS)
