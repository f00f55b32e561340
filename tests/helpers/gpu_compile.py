"""Compiles the GPU backend's kernels for any target, present or not, and prints facts of the code as JSON.

    python tests/helpers/gpu_compile.py 90 80 gfx942       (or: 86, 89, 100, gfx1100)

For the target FULL it compiles every kind of kernel and looks at the instructions. For other targets it compiles each
kernel at least once.

The backend runs as always, on tensors in CPU memory, but a launch only compiles its kernel. So kernels are specialized
for the arguments that they really get. The script is a process of its own: the tests' process has the interpreter on.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import recurrent_ops
import torch
import triton.backends.nvidia
from cpu_ops import Step
from numpy_backend import ACTIVATIONS
from paged import mixed_table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gguf_run.kernels_gpu import backend
from gguf_run.kernels_gpu.backend import GpuBackend
from gguf_run.kernels_gpu.device.tuning import AMD, DEFAULT
from gguf_run.kernels_gpu.panels.memory import GpuExperts, GpuWeight, empty
from gguf_run.kernels_gpu.panels.panels import PANELS, IntPanel
from gguf_run.models.adapter_scales import AdapterScales
from gguf_run.models.backend import CacheType, Run, Top
from gguf_run.models.operands import AttentionShape, Rotation
from gguf_run.models.ops import Attend, Embed, Gated, Matmul, MatmulGated, Observe, RmsNorm, Rope
from gguf_run.models.rare_ops import AddPositions, MatchRms, Mix, Moe, ScaleAdapters, Threshold, Xielu
from gguf_run.models.routing import Mixture

CUOBJDUMP = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "cuobjdump")
CPU = torch.device("cpu")
N_IN, N_OUT = 4096, 256
FULL = "90"
MMA = r"(?:mma\.sync|wgmma\.mma|tcgen05\.mma|v_wmma|v_mfma)"  # in assembler
# K, V, head_dim, tokens
ATTENTION = (
    ("q8_0", "q8_0", 128, 1),
    ("q8_0", "q8_0", 128, 64),
    ("q5_1", "q5_1", 128, 64),
    ("iq4_nl", "q4_1", 128, 1),
    ("f16", "f16", 128, 1),
    ("f16", "f16", 128, 64),
    ("q4_0", "q4_0", 128, 1),
    ("bf16", "bf16", 128, 64),
    ("int8", "fp8_e4m3", 256, 1),
    ("fp8_e5m2", "int8", 64, 64),
    ("q8_0", "q8_0", 512, 1),
)


MEMORY = r"(st\.global|bar\.sync|bar\.warp\.sync|atom[\w.]+|ld\.global\.cg)"


def use_target(name: str) -> None:
    backend.DEFAULT = DEFAULT if name.isdigit() else AMD
    wave = 32 if name.isdigit() or name.startswith("gfx11") else 64
    target = GPUTarget("cuda", int(name), 32) if name.isdigit() else GPUTarget("hip", name, wave)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: name,  # Triton keeps the kernels of each device
            get_current_stream=lambda device=None: 0,
        )
    )


def loops(sass: list[tuple[str, str]], labels: dict[str, int]) -> list[list[str]]:
    """Return the instructions of every loop: those between a label and a branch back to the label."""
    found = []
    for i, (op, arguments) in enumerate(sass):
        target = re.search(r"(0x[0-9a-f]+|\.L_x_\d+)", arguments) if op.startswith("BRA") else None
        if target and labels.get(target[1], len(sass)) < i - 3:
            found.append([op for op, _ in sass[labels[target[1]] : i + 1]])
    return found


def usage(kernel: Any, *options: str) -> tuple[dict[str, Any], str]:
    """Return the registers and memory that a kernel for NVIDIA takes, and the whole text of cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", *options, file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}, text


def inspect(kernel: Any) -> dict[str, Any]:
    """Return `usage` and counts of instructions of a kernel. It takes much longer than `usage` alone."""
    facts, text = usage(kernel, "-sass")
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", text)
    labels = {f"0x{int(at, 16):x}": i for i, (at, _, _) in enumerate(lines)}
    body = max(loops([(op, rest) for _, op, rest in lines], labels), key=len, default=[])
    ops = [op for _, op, _ in lines]
    return facts | {
        "spills": sum(op.startswith(("STL", "LDL")) for op in ops),
        "vector_loads": sum(op.startswith("LDG.E") and ".128" in op for op in ops),
        "dp4a": sum(op.startswith("IDP.4A") for op in ops),
        "loop": len(body),
        "mma_in_loop": sum(op.startswith("HMMA") for op in body),
        "in_loop": sorted({op.split(".")[0] for op in body} & {"BAR", "LDS", "STS", "STL", "LDL"}),
    }


def is_in_order(ttgir: str) -> bool:
    """Return whether element i is in thread i, wherever assembler takes or returns tensors."""
    simple = r"^(#\w+) = #ttg\.blocked<\{sizePerThread = \[1\], threadsPerWarp = \[32\], warpsPerCTA = \[\d+\], order"
    used = re.findall(r"elementwise_inline_asm .*-> tensor<(.*?)>", ttgir)
    sizes, layouts = ({kind.split(", ")[i] for kind in used} for i in (0, 1))
    is_one_each = sizes == {"128xi32", "128xf32"} and layouts == set(re.findall(simple, ttgir, re.M))
    return is_one_each and "convert_layout" not in ttgir


def weight(name: str, n_in: int, n_out: int) -> GpuWeight:
    return GpuWeight(n_in, (empty(PANELS[name], n_in, n_out, CPU),))


def run(step: Step, n: int, rows: Sequence[int] = (), tops: Sequence[Top] = ()) -> None:
    step.program.run(np.zeros(n, np.int32), [Run(0, 0, n)], rows, tops=tops)


def product(name: str, n: int, activation: str | None = None) -> None:
    step = Step(GpuBackend(CPU), 129)
    x, w = step.buffer(N_IN), weight(name, N_IN, N_OUT)
    if activation is None:
        step.add(Matmul(x, w, step.buffer(N_OUT)))
    else:
        step.add(MatmulGated(x, w, step.buffer(N_OUT // 2), activation))
    run(step.finish(x), n)


def ops() -> None:
    """Compile every op. Products have one weight type here."""
    backend = GpuBackend(CPU)
    step = Step(backend, 96)
    x, y, qkv, ff = (step.buffer(n) for n in (1024, 1024, 1536, 512))
    q, ones = qkv.columns(0, 1024), torch.ones(1024)
    step.add(Embed(empty(PANELS["Q4_K"], 1024, 99, CPU), x))
    step.add(RmsNorm(x, ones, y, 1e-5))
    step.add(Matmul(y, weight("Q8_0", 1024, 1024), x, residual=x))
    step.add(RmsNorm(x, ones, x, 1e-5, residual=y))  # by the product's last program, as ff's int8 blocks
    step.add(RmsNorm(x, ones, y, 1e-5))
    step.add(MatmulGated(y, weight("Q8_0", 1024, 1024), ff, "silu"))
    step.add(Matmul(ff, weight("Q8_0", 512, 1024), x))
    step.add(RmsNorm(q, ones[:128], q, 1e-5, n_group=8))
    for style in ("norm", "neox"):
        step.add(Rope(qkv.columns(0, 1280), Rotation(style, 128, np.ones(64)), 128))
    for name in ACTIVATIONS:
        step.add(Gated(x, y, y, name))
    step.add(Xielu(x, y, 0.7, 1.3, 0.5, -1e-6))
    step.add(Mix(y, x, y, 1024, q.columns(0, 1), x, 1.0))
    step.add(MatchRms(x, y, 1e-5))
    step.add(Threshold(x, 0.5))
    step.add(AddPositions(x, torch.zeros(9 * 1024), 9))
    step.add(ScaleAdapters(x, AdapterScales({"a": 1.0, "b": 0.5}, 3), ((1, 2.0),) * 24 + ((0, 1.0),) * 1000))
    step.add(Observe(x, backend.squares(1024)))
    step.add(Matmul(y, weight("Q8_0", 1024, 1024), x))
    step.finish(x)
    for n in (1, 96):
        run(step, n, [0])
    run(step, 1, [0], [Top(64)])


def recurrent() -> None:
    """Compile recurrent ops in the sizes of real models."""
    rng = np.random.default_rng(0)
    step = Step(GpuBackend(CPU), 64)
    recurrent_ops.short_conv(step, rng, 8192, 4, "silu", True, True)
    recurrent_ops.delta_rule(step, rng, (2, 4), 128, 128, True, True)
    for n_state in (128, 256):
        out = recurrent_ops.scan(step, rng, 4, 64, 1, n_state, True)
    step.finish(out)
    for n in (1, 64):
        run(step, n)


def attention(k: str, v: str, head_dim: int, n: int, is_causal: bool = True) -> None:
    """Compile attention, and a shift of the cache, which turns keys."""
    backend = GpuBackend(CPU)
    step = Step(backend, 64)
    shape = AttentionShape(n_head=8, n_head_kv=2, head_dim=head_dim, scale=0.1, is_causal=is_causal)
    qkv, out = step.buffer(12 * head_dim), step.buffer(8 * head_dim)
    q, keys, values = qkv.columns(0, 8 * head_dim), *(qkv.columns(i * head_dim, 2 * head_dim) for i in (8, 10))
    rotation = Rotation("norm", head_dim, np.ones(head_dim // 2))
    cache = backend.cache(shape, mixed_table(32768), CacheType(k, v))
    step.add(Rope(qkv.columns(0, 10 * head_dim), rotation, head_dim))
    step.add(Attend(q, keys, values, cache, shape, out))
    step.add(Matmul(out, weight("Q8_0", 8 * head_dim, 1024), step.buffer(1024)))
    run(step.finish(out), n)
    cache.move(np.arange(1, 2), np.arange(1), rotation, -32)


def latent_attention(k: str, n: int) -> None:
    """Compile the attention of DeepSeek's sizes, whose values are 512 of the 576 columns of a key."""
    step, shape = Step(GpuBackend(CPU), 64), AttentionShape(16, 1, 576, 0.1, n_latent=512)
    q, keys, out = step.buffer(16 * 576), step.buffer(576), step.buffer(16 * 512)
    cache = step.backend.cache(shape, mixed_table(32768), CacheType(k, k))
    step.add(Attend(q, keys, keys.columns(0, 512), cache, shape, out))
    run(step.finish(out), n)


def moe(gate_up: str, down: str, n: int, mixture: Mixture, biases: bool) -> None:
    """Compile a mixture of 64 experts, 8 for each token."""
    n_expert, n_embd, n_ff = 64, 6144, 768
    step = Step(GpuBackend(CPU), 512)
    x, logits = step.buffer(n_embd), step.buffer(n_expert)
    parts = (
        empty(PANELS[gate_up], n_embd, n_expert * 2 * n_ff, CPU),
        empty(PANELS[down], n_ff, n_expert * n_embd, CPU),
    )
    shifts = [torch.zeros(n_expert, n) if biases else None for n in (2 * n_ff, n_embd)]
    bias = torch.zeros(n_expert) if mixture.gating == "sigmoid" else None
    step.add(Moe(x, logits, GpuExperts(n_expert, *parts, *shifts), mixture, x, None, bias))
    run(step.finish(x), n)


def cases(full: bool) -> dict[str, Callable[[], None]]:
    every = [name for name, panel in PANELS.items() if isinstance(panel, IntPanel)]
    few_cases = [(name, 1) for name in (*every, "F16", "F32", "BF16")] if full else [("Q3_K", 1), ("Q6_K", 1)]
    many_cases: list[tuple[Any, ...]] = [("Q6_K", 16)]
    attentions = ATTENTION if full else ATTENTION[:3]
    if full:
        few_cases += [("Q4_K", 2), ("Q8_0", 4), ("Q4_K", 8), ("Q3_K", 8)]
        many_cases += [("Q4_K", 16), ("Q4_K", 64), ("Q8_0", 16, "silu"), ("Q3_K", 129)]
    mixtures = {
        1: Mixture(8, True, 1.0, "silu", "sigmoid", 8, 4),
        512: Mixture(8, False, 1.0, "silu", "sparsemixer", weighs_input=True),
        64: Mixture(8, True, 1.0, "silu"),
    }
    moes = [("Q4_K", "Q6_K", n, mixture, False) for n, mixture in mixtures.items() if full or n != 64]
    if full:
        moes.append(("MXFP4", "MXFP4", 1, Mixture(8, True, 1.0, "swiglu_oai"), True))
    return {
        "ops": ops,
        "recurrent": recurrent,
        **{f"few {name} {n}": functools.partial(product, name, n) for name, n in few_cases},
        **({"few Q4_K 1 gated": functools.partial(product, "Q4_K", 1, "silu")} if full else {}),
        **{" ".join(map(str, ("many", *case))): functools.partial(product, *case) for case in many_cases},
        **{"attention {} {} {} {}".format(*case): functools.partial(attention, *case) for case in attentions},
        "both ways": functools.partial(attention, "f16", "f16", 64, 64, False),
        **{f"latent {n}": functools.partial(latent_attention, "f16", n) for n in (1, 64)},
        **{f"moe {case[0]} {case[2]}": functools.partial(moe, *case) for case in moes},
    }


def main(targets: list[str]) -> None:
    found: dict[str, dict[str, dict[str, Any]]] = {target: {} for target in targets}
    run, now = JITFunction.run, {"target": "", "case": ""}

    @functools.wraps(run)
    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        target = now["target"]
        if not target.isdigit():
            options.pop("maxnreg", None)  # torch for AMD does not ask for it
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in found[target]:
            facts: dict[str, Any] = {"kernel": self.__name__, "case": now["case"], "shared": kernel.metadata.shared}
            facts["mma"] = sorted(set(re.findall(MMA, kernel.asm.get("ptx") or kernel.asm["amdgcn"])))
            facts["fused"] = bool(re.search(r"fma\.rn\.f32[^;]*0f4B400000", kernel.asm.get("ptx", "")))
            if self.__name__ in ("matmul_decode", "matmul_mma") and target.isdigit():
                facts["memory"] = re.findall(MEMORY, kernel.asm["ptx"])
                facts["in_order"] = is_in_order(kernel.asm["ttgir"])
            if target == FULL and self.__name__.startswith(("matmul", "attend", "expert")):
                facts |= inspect(kernel)
            elif target.isdigit():
                facts |= usage(kernel)[0]
            found[target][kernel.hash] = facts
        return kernel

    JITFunction.run = compile_only
    for target in targets:
        use_target(target)
        for name, case in cases(target == FULL).items():
            now |= {"target": target, "case": name}
            case()
    json.dump({target: [*kernels.values()] for target, kernels in found.items()}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
