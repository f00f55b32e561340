"""The cases that benchmarks/gpu.py measures. Each case is a function of a Bench that returns records.

A record has a name. A record of a time also has seconds, `tokens` tokens, and the least work that these need: bytes of
memory to read, or floating-point operations of tensor cores.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import Ours
from gpu_random import RandomBackend, no_file, random_part
from make_model import SHAPES, Shape, mix_of, sizes_of, tensors_of
from numpy.typing import NDArray
from perplexity import perplexity as perplexities
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

from gguf_run.kernels_gpu.backend import GpuBackend
from gguf_run.kernels_gpu.device.tuning import FEW, Tuning
from gguf_run.kernels_gpu.panels.memory import GpuWeight
from gguf_run.kernels_gpu.panels.panels import PANELS, IntPanel
from gguf_run.kernels_gpu.program import GpuProgram
from gguf_run.models.backend import CacheType, Run, Top
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.models.operands import AttentionShape, Buffer, Rotation
from gguf_run.models.ops import Attend, Embed, Matmul, MatmulGated, Outputs, Rope
from gguf_run.models.pages import PAGE, PageTable

Record = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the cases."""

    n_in: int  # of matrices
    n_out: int  # of matrices
    tokens: tuple[int, ...]  # numbers of tokens of a product
    cold: int  # bytes of weights that a timing goes through, more than caches hold
    large: int  # bytes
    square: int
    depth: int
    prefill: tuple[int, ...]
    users: tuple[int, ...]
    steps: int
    shapes: Mapping[str, Shape]


_TOKENS = 1, 2, 4, 8, 16, 32, 64, 128, 512, 2048
FULL = Sizes(4096, 14336, _TOKENS, 400 << 20, 4 << 30, 8192, 32768, (512, 2048), (8, 16, 32, 64, 128), 64, SHAPES)
_TINY = Shape("tiny", 1, 32, 1, 1, 32, 32, 8, 256, 1e4, False)
_TINIES = {name: replace(_TINY, n_expert=s.n_expert and 2, n_expert_used=1) for name, s in SHAPES.items()}
TINY = Sizes(256, 40, (1, 9, 33), 1, 4096, 32, 40, (9,), (9,), 1, _TINIES)


@dataclass(frozen=True)
class Bench:
    """Where a case runs, and its sizes."""

    device: torch.device
    sizes: Sizes
    warm: bool = False  # run everything once with one layer of a model, to compile it, without timing

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def sync(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def clean(self) -> None:
        """Free memory. A pending error of the GPU is raised here."""
        self.sync()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def wall(self, call: Callable[[], Any], rounds: int = 5) -> float:
        """Return seconds of a call: the median of some calls after one that warms up."""
        taken = []
        for i in range(1 if self.warm or not self.is_cuda else rounds + 1):
            self.sync()
            begin = time.perf_counter()
            call()
            self.sync()
            taken.append(time.perf_counter() - begin)
            if i and sum(taken[1:]) > 3:
                break
        return statistics.median(taken[1:] or taken)

    def events(self, call: Callable[[], Any], rounds: int = 30) -> float:
        """Return seconds of a call on the device: the median of some calls. The caller has warmed it up."""
        if self.warm or not self.is_cuda:
            return self.wall(call)
        marks = []
        for _ in range(rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            marks.append((begin, end))
        self.sync()
        return statistics.median(begin.elapsed_time(end) for begin, end in marks) / 1e3

    def captured(self, call: Callable[[], Any]) -> float:
        """Return seconds on the device of all launches of a call, without the time of launching."""
        call()
        self.sync()
        if self.warm or not self.is_cuda:
            return self.wall(call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        return self.events(graph.replay)


def _launches(program: GpuProgram, n: int) -> Callable[[], None]:
    """Return all launches of a program before the choice of result rows, for n tokens."""
    return functools.partial(program._parts[0].launch, n)


def _program(backend: GpuBackend, ops: Sequence[Any], result: Buffer, n_batch: int) -> GpuProgram:
    outputs = Buffer.whole("outputs", result.width, outputs=True)
    return backend.program([ops], [Outputs(result, outputs)], outputs, n_batch, 1)


def limits(bench: Bench) -> list[Record]:
    n = bench.sizes.large // 4
    x = torch.ones(n, device=bench.device)
    read = bench.captured(lambda: x.sum())
    y = torch.empty_like(x)
    copy = bench.captured(lambda: y.copy_(x))
    n = bench.sizes.square
    a, b = (torch.randn(n, n, dtype=torch.float16, device=bench.device) for _ in "ab")
    multiply = bench.captured(lambda: a @ b)
    return [
        {"name": "read", "seconds": read, "bytes": bench.sizes.large},
        {"name": "copy, read and written", "seconds": copy, "bytes": 2 * bench.sizes.large},
        {"name": f"f16 product of {n} x {n}", "seconds": multiply, "flops": 2 * n**3},
    ]


def _quantized(x: torch.Tensor) -> torch.Tensor:
    """Return rows of f32, rounded to int8 blocks of 32."""
    blocks = x.unflatten(1, (-1, 32))
    d = blocks.abs().amax(2, keepdim=True)
    inverse = torch.where(d == 0, 0.0, torch.full_like(d, 127) / d)  # 127 / d would round twice
    return ((blocks * inverse).round().double() * (d / 127).double()).flatten(1)


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest number. NaN if any number is NaN."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def matmul(
    bench: Bench, type_name: str, tokens: Sequence[int] | None = None, tuning: Tuning | None = None, gated: bool = False
) -> list[Record]:
    """Time products with cold weights. Check as many columns as there are tokens.

    The bounds: int8 blocks are those of the kernel, sums are f32; products of f16.
    """
    sizes, tokens = bench.sizes, tokens or bench.sizes.tokens
    backend = RandomBackend(bench.device)
    panel, n_in, n_out = PANELS[type_name], sizes.n_in, sizes.n_out
    n_batch = max(tokens)  # at most n_out
    first = random_part(type_name, n_in, n_out, bench.device)
    parts = [random_part(type_name, n_in, n_out, bench.device) for _ in range(-(-sizes.cold // first.nbytes))]
    backend.tuning = tuning or backend.tuning
    x, y, out = Buffer.whole("x", n_in), Buffer.whole("y", n_in), Buffer.whole("out", n_out)
    ops: list[Any] = [Embed(first, y)]  # the weights as numbers
    ops.append(Embed(random_part("F32", n_in, n_batch, bench.device), x))
    for part in [*parts, first]:
        weight = GpuWeight(n_in, (part,))
        ops.append(MatmulGated(x, weight, out.columns(0, n_out // 2), "silu") if gated else Matmul(x, weight, out))
    program = _program(backend, ops, out, n_batch)
    program.run(np.arange(n_batch, dtype=np.int32), [Run(0, 0, n_batch)], ())
    rows, result = program.memory.rows(x), program.memory.rows(out)
    w = program.memory.rows(y)[:n_batch].double()
    found = []
    for n in tokens:
        result.fill_(float("nan"))
        seconds = bench.captured(_launches(program, n)) / (len(parts) + 1)
        is_int8 = n <= FEW and isinstance(panel, IntPanel)
        left = _quantized(rows[:n]) if is_int8 else rows[:n].double()
        off, bound = 0.0, 2e-5 if n <= FEW or type_name == "F32" else 2e-3
        if not gated:
            off = _distance(result[:n, :n_batch], left @ w.T)
        if not off < bound or not result[:n, : n_out // 2 if gated else n_out].isfinite().all():
            raise AssertionError(f"{n} tokens: off by {off:.2e}, at most {bound:.0e} is allowed")
        record = {"name": f"{n} tokens" + ", gated" * gated, "seconds": seconds, "tokens": n, "off": off}
        work = {"bytes": first.nbytes} if n <= 64 else {"flops": 2 * n * n_in * n_out}
        found.append(record | work)
    return found


def attention(
    bench: Bench, kind: str, prefill: bool = False, programs: int | None = None, mixed: bool = False
) -> list[Record]:
    """Time attention of one layer of llama-8b: one token at a depth, or the first tokens. f16 is checked too.

    mixed: the pages of the cache are in random order.
    """
    n = max(bench.sizes.prefill) if prefill else 1
    depth = bench.sizes.depth if n == 1 else 0
    n_head, n_head_kv, head_dim = (32, 8, 128) if bench.is_cuda else (2, 1, 32)
    shape = AttentionShape(n_head, n_head_kv, head_dim, head_dim**-0.5)
    backend = RandomBackend(bench.device)
    if programs:
        backend.tuning = replace(backend.tuning, programs=programs)
    n_q, n_kv = n_head * head_dim, n_head_kv * head_dim
    table = random_part("F32", n_q + 2 * n_kv, n, bench.device)
    table.qs.view(torch.float32).mul_(50)
    pages = PageTable.new(0, depth + n, n, 1)
    pages.pages[0] = np.random.default_rng(0).permutation(pages.n_pages) if mixed else np.arange(pages.n_pages)
    caches = [backend.cache(shape, pages, CacheType(kind, kind)) for _ in range(3 if n == 1 else 1)]
    qkv, out = Buffer.whole("qkv", n_q + 2 * n_kv), Buffer.whole("out", n_q)
    rotation = Rotation("norm", head_dim, 5e5 ** -(np.arange(head_dim // 2) / head_dim * 2))
    ops: list[Any] = [Embed(table, qkv), Rope(qkv.columns(0, n_q + n_kv), rotation, head_dim)]
    q, k, v = (qkv.columns(*c) for c in ((0, n_q), (n_q, n_kv), (n_q + n_kv, n_kv)))
    ops += [Attend(q, k, v, cache, shape, out) for cache in caches]
    program = _program(backend, ops, out, n)
    program.memory.step.set((), np.arange(n, dtype=np.int32), [Run(0, depth, n)])
    seconds = bench.captured(_launches(program, n)) / len(caches)
    off, result = 0.0, program.memory.rows(out)
    if kind == "f16":  # queries of the last token, which stay turned in the buffer
        at = torch.from_numpy(pages.pages[0].astype(np.int64)).to(bench.device)
        held = (rows.qs.view(torch.float16).unflatten(1, (-1, PAGE)) for rows in (caches[-1].k, caches[-1].v))
        k, v = (rows[:, at].flatten(1, 2)[:, : depth + n].double() for rows in held)
        q = program.memory.rows(qkv)[n - 1, :n_q].double().view(n_head_kv, -1, head_dim)
        expected = torch.softmax(q @ k.mT * shape.scale, -1) @ v
        off = _distance(result[n - 1], expected.reshape(-1))
    if not off < 4e-3 or not result[:n].isfinite().all():
        raise AssertionError(f"off by {off:.2e}, at most 4e-3 is allowed")
    name = f"at depth {depth}" if n == 1 else f"{n} tokens"
    work = {"bytes": (caches[0].k.nbytes + caches[0].v.nbytes)} if n == 1 else {"flops": 2 * n * n * n_q}
    return [{"name": name, "seconds": seconds, "tokens": n, "off": off} | work]


def decoder_of(
    bench: Bench,
    shape: Shape,
    type_name: str,
    n_ctx: int,
    n_batch: int,
    kind: str = "f16",
    n_layer: int | None = None,
    n_seq: int = 1,
    n_cells: int | None = None,
) -> tuple[Decoder, int]:
    """Return a decoder of random weights, and the bytes of weights that a token reads."""
    n_layer = n_layer or (1 if bench.warm else shape.n_layer)
    shape = replace(shape, n_layer=n_layer)
    tensors = {info.name: no_file(info) for info in tensors_of(shape, mix_of(type_name))}
    config = ModelConfig.from_metadata(sizes_of(shape) | {"general.architecture": shape.arch}, tensors)
    backend: Any = RandomBackend(bench.device)
    layers = [backend] * n_layer
    kinds = [CacheType(kind, kind)] * n_layer
    decoder = Decoder(config, tensors, layers, n_ctx, n_batch, 1, n_seq, kinds, n_cells=n_cells)
    # of the experts, a token reads the weights of those that it goes to
    experts = sum(info.nbytes for name, info in tensors.items() if "_exps" in name)
    unread = int(experts * (1 - shape.n_expert_used / shape.n_expert)) if experts else 0
    embedding = 0 if shape.tied else backend.table(tensors["token_embd.weight"]).nbytes
    return decoder, backend.nbytes()["weights"] - embedding - unread


def _set_depth(decoder: Decoder, *n_past: int) -> None:
    """Let the first sequences have so many tokens each, and the others none."""
    for seq in range(decoder.cache.n_seq):
        decoder.cache.clear(seq)
    for seq, n in enumerate(n_past):
        decoder.cache.end(decoder.cache.begin({seq: n}) if n else [], [0] * n)


def model(bench: Bench, name: str, type_name: str, kind: str = "f16", what: str = "all") -> Iterator[Record]:
    """Time greedy decoding, short and at depth, and prefill, through the Decoder. what: "all" or "decode"."""
    sizes = bench.sizes
    shape, n_batch = sizes.shapes[name], max(sizes.prefill)
    decoder, weight_bytes = decoder_of(bench, shape, type_name, sizes.depth + n_batch, n_batch, kind)
    kv_bytes = decoder.nbytes()["cache"] / (sizes.depth + n_batch)
    program: Any = decoder._program
    steps = 1 if bench.warm else sizes.steps
    for depth in (0, sizes.depth):
        if what == "decode" and depth == 0:
            continue

        def tokens(n: int = steps, depth: int = depth) -> None:
            _set_depth(decoder, depth)
            for i in range(n):
                decoder.top({0: [i]}, None, [Top(1)])

        tokens(min(2, steps))
        wall = bench.wall(tokens, 3) / steps

        def device() -> None:
            program._parts[0].run(1, False)
            program._finders[1][0].run(1, False)

        on_device = wall if bench.warm else bench.events(device)
        at = f"decode at depth {depth}" if depth else "decode"
        cache = f", {kind} cache" if depth else ""
        yield {"name": at + cache, "seconds": wall, "tokens": 1, "bytes": weight_bytes + kv_bytes * (depth + steps / 2)}
        yield {"name": at + cache + ": not on the device", "seconds": max(1e-9, wall - on_device)}
    if what == "all":
        for n in sizes.prefill:

            def prefill(n: int = n) -> None:
                decoder.rewind(0)
                for _ in decoder.forward([i % shape.n_vocab for i in range(n)], 1):
                    pass

            yield {"name": f"prefill {n}", "seconds": bench.wall(prefill), "tokens": n}
    decoder.close()


def users(bench: Bench, name: str, type_name: str, kind: str = "f16") -> Iterator[Record]:
    """Time steps of many sequences, through the Decoder: all as long, and one long one among them."""
    sizes, steps = bench.sizes, 1 if bench.warm else 16
    depth, most = min(1024, sizes.depth), max(sizes.users)
    n_cells = sizes.depth + (most + 1) * (depth + 2 * PAGE)
    shape, n_ctx = sizes.shapes[name], sizes.depth + PAGE
    decoder, weight_bytes = decoder_of(bench, shape, type_name, n_ctx, most, kind, n_seq=most, n_cells=n_cells)
    kv_bytes = decoder.nbytes()["cache"] / n_cells
    program: Any = decoder._program
    cases = [([depth] * n, f"{n} users") for n in sizes.users]
    middle = sizes.users[len(sizes.users) // 2]
    cases.append(([sizes.depth] + [depth] * (middle - 1), f"{middle} users, one at depth {sizes.depth}"))
    for depths, what in cases:
        n = len(depths)

        def tokens(depths: Sequence[int] = depths) -> None:
            _set_depth(decoder, *depths)
            for i in range(steps):
                decoder.top({seq: [i] for seq in range(len(depths))}, None, [Top(40)] * len(depths))

        tokens()
        wall = bench.wall(tokens, 3) / steps

        def device(n: int = n) -> None:
            program._parts[0].run(n, False)
            program._finders[64][0].run(n, False)

        on_device = wall if bench.warm else bench.events(device)
        read = weight_bytes + kv_bytes * (sum(depths) + n * steps / 2)
        yield {"name": what, "seconds": wall, "tokens": n, "bytes": read}
        yield {"name": f"{what}: not on the device", "seconds": max(1e-9, wall - on_device)}
    decoder.close()


def graphs(bench: Bench) -> list[Record]:
    """Check that replayed graphs give the same bits as launches: for one sequence, many, and a prompt among them."""
    shape, n, n_layer = bench.sizes.shapes["llama-1b"], 33 if bench.is_cuda else 9, 2 if bench.is_cuda else 1
    decoder, _ = decoder_of(bench, shape, "Q4_K_M", 256, 64, n_layer=n_layer, n_seq=n)
    program: Any = decoder._program
    made: list[NDArray[np.float32]] = []
    steps = [{0: 1}, dict.fromkeys(range(n), 1), {seq: 18 if seq == 1 else 1 for seq in range(n)}, {3: 2, 4: 5}]
    for replay in (True, False):
        for launches in (program._parts[0], program._after, *(found for found, _ in program._finders.values())):
            if not replay:
                launches._graphs.clear()
                launches._captures = False
        _set_depth(decoder)
        ids = itertools.count()
        rounds = 5 if bench.is_cuda and not bench.warm else 1
        for step in steps * rounds:
            batch = {seq: [next(ids) % shape.n_vocab for _ in range(k)] for seq, k in step.items()}
            made.append(decoder.step(batch).copy())
            found = decoder.top({seq: [next(ids) % shape.n_vocab] for seq in step}, None, [Top(4)] * len(step))
            made += [found.greatest, found.columns.astype(np.float32)]
    half = len(made) // 2
    for replayed, launched in zip(made[:half], made[half:], strict=True):
        if not np.array_equal(replayed, launched) or not np.isfinite(replayed).all():
            raise AssertionError(f"logits differ by up to {np.abs(replayed - launched).max():.2e}")
    return [{"name": "launches against graphs: the same bits"}]


def launches(bench: Bench) -> list[Record]:
    """Count the kernels of a layer for one token."""
    counts = []
    owner, attribute = (JITFunction, "run") if bench.is_cuda else (GridExecutor, "__call__")
    original = getattr(owner, attribute)
    for n_layer in (1, 2):
        decoder, _ = decoder_of(bench, bench.sizes.shapes["llama-1b"], "Q4_K_M", 256, 64, n_layer=n_layer)
        seen: list[str] = []

        def counted(self: Any, *args: Any, seen: list[str] = seen, **options: Any) -> Any:
            seen.append(str(self))
            return original(self, *args, **options)

        program: Any = decoder._program
        program.memory.step.set([0], np.zeros(1, np.int32), decoder.cache.begin({0: 1}))
        setattr(owner, attribute, counted)
        try:
            for part in (program._parts[0], program._after):
                part.launch(1)
        finally:
            setattr(owner, attribute, original)
        counts.append(len(seen))
    return [{"name": "launches of a layer, one token", "value": f"{counts[1] - counts[0]}", "target": "7"}]


def perplexity(bench: Bench, model_file: str, text: str) -> list[Record]:
    """Measure the perplexity of the first 2,048 tokens of a text (64 in the interpreter), on the GPU and on the CPU."""
    values, (n_ctx, n_chunk) = [], (512, 4) if bench.is_cuda else (64, 1)
    for backend in (GpuBackend(bench.device), None):
        engine = Ours(Path(model_file), 8, 512, backend=backend)
        ids = engine.tokenize(Path(text).read_text())
        n_ctx = min(n_ctx, len(ids))
        values.append([*perplexities(engine, ids, n_ctx, min(n_chunk, len(ids) // n_ctx))][-1])
        engine.close()
    off = abs(values[0] / values[1] - 1)
    name = f"{values[0]:.4f}, CPU {values[1]:.4f}"
    return [{"name": name, "value": f"{off:.3%} apart", "target": "0.2%", "missed": not off <= 0.002}]


def tune(bench: Bench, field: str, candidate: Any) -> list[Record]:
    """Time a candidate of a field of Tuning, summed over the types that matter most."""
    tuning = Tuning()
    types = ("Q4_K", "Q6_K", "Q8_0")
    if field == "programs":
        found = attention(bench, "f16", programs=candidate)
    elif field == "rows":
        n, rows = candidate
        table = tuple((m, rows if m == n else r) for m, r in tuning.rows)
        found = [record for name in types for record in matmul(bench, name, (n,), replace(tuning, rows=table))]
    else:  # mma
        n = candidate[0]
        mma = tuple(candidate if row[0] == n else row for row in tuning.mma)
        found = [record for name in types for record in matmul(bench, name, (n,), replace(tuning, mma=mma))]
    return [{"name": f"{field} {candidate}", "seconds": sum(r["seconds"] for r in found)}]


CASES: dict[str, dict[str, Callable[..., Any]]] = {
    "limits": {"this card": limits},
    "check": {"graphs": graphs, "launches": launches},
    "sweep": {
        **{f"{name}": functools.partial(matmul, type_name=name) for name in PANELS},
        "Q4_K gated": functools.partial(matmul, type_name="Q4_K", tokens=(1, 2), gated=True),
        **{
            f"attention {kind}": functools.partial(attention, kind=kind)
            for kind in ("f16", "bf16", "q8_0", "q4_0", "int8", "fp8_e4m3", "fp8_e5m2")
        },
        **{
            f"attention {kind}, pages out of order": functools.partial(attention, kind=kind, mixed=True)
            for kind in ("f16", "q8_0")
        },
        "attention f16, prefill": functools.partial(attention, kind="f16", prefill=True),
        "attention q8_0, prefill": functools.partial(attention, kind="q8_0", prefill=True),
    },
    "model": {
        **{
            f"llama-8b {name}": functools.partial(model, name="llama-8b", type_name=name)
            for name in ("Q4_K_M", "Q8_0", "Q4_0", "Q6_K")
        },
        **{
            f"llama-8b Q4_K_M, users, {kind}": functools.partial(users, name="llama-8b", type_name="Q4_K_M", kind=kind)
            for kind in ("f16", "q8_0")
        },
        "llama-8b Q4_K_M, q8_0": functools.partial(
            model, name="llama-8b", type_name="Q4_K_M", kind="q8_0", what="decode"
        ),
        **{
            f"{name} {type_name}": functools.partial(model, name=name, type_name=type_name)
            for name, type_name in (("llama-1b", "Q4_K_M"), ("llama-1b", "Q8_0"), ("qwen3moe-2b", "Q4_K_M"),
                                    ("mixtral-2b", "Q4_K_M"))
        },
    },
    "perplexity": {"perplexity": perplexity},
    "tune": {
        **{f"rows {n} {rows}": functools.partial(tune, field="rows", candidate=(n, rows)) for n in (1, 2, 4, 8)
           for rows in (1, 2, 4, 8)},
        **{f"mma {n} {(n, tiles, programs)}": functools.partial(tune, field="mma", candidate=(n, tiles, programs))
           for n, tiles in ((16, 1), (16, 2), (32, 1), (32, 2), (64, 1)) for programs in (2, 3, 4)},
        **{f"programs {n}": functools.partial(tune, field="programs", candidate=n) for n in (132, 264, 528, 1056)},
    },
}  # fmt: skip
