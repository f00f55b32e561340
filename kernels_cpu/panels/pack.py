"""Unpacked blocks of 16 rows become spans of an integer panel: called by the kernel of repack.py."""

import functools
import operator

from gguf_run.kernels_cpu.panels.panels import BLOCK, LARGEST_FINE, PANELS, ROWS, IntPanel
from gguf_run.kernels_cpu.panels.planes import bit_places
from gguf_run.kernels_cpu.vector.lowering import simd_kernel
from gguf_run.kernels_cpu.vector.simd import F16, F32, I8, I16, I32, Simd, Val


@simd_kernel
def pack(s: Simd, panel: int, n_columns: int, q: Val, scale: Val, minimum: Val, factor: Val, out: Val) -> None:
    """Pack the unpacked blocks of 16 rows into spans of their panel.

    panel: place in PANELS.
    n_columns: a multiple of the panel's span.
    q: address of int8[16][n_columns].
    scale, minimum: addresses of f32[n_columns / group][16].
    factor: address of f32[2][16].
    out: address of the spans.
    """
    shape = PANELS[panel]
    assert isinstance(shape, IntPanel)

    def span(n: Val) -> None:
        to = out + n * shape.span_bytes
        for i in range(shape.n_factors):
            s.store(s.load(factor + 64 * i, F32, ROWS).to(F16), to + 2 * ROWS * i)
        s.each(shape.n_steps, lambda i: step(n * shape.n_steps + i, i, to))

    def step(k: Val, i: Val, to: Val) -> None:
        """Pack step k of all steps, which is step i of the span at `to`."""
        per = shape.columns // shape.group
        numbers = [at + k * (4 * ROWS * per) for at in (scale, minimum)[: 1 + shape.has_minimum]]
        fields = _heads(s, shape, [s.load(at + 4 * ROWS * g, F32, ROWS) for at in numbers for g in range(per)])
        head = to + i * shape.head_bytes + 2 * ROWS * shape.n_factors
        for n, field in enumerate(fields):  # only the last one may be smaller
            s.store(field, head + -(-shape.head_bytes // (16 * len(fields))) * 16 * n)
        quants = to + i * shape.step_bytes + shape.quants_at
        for b in range(shape.columns // BLOCK):
            at = q + k * shape.columns + BLOCK * b
            vectors = _across(s, [s.load(at + n_columns * r, I32, BLOCK // 4) for r in range(ROWS)])
            for n, plane in enumerate(_planes(shape, vectors)):
                s.store(plane, quants + 64 * (shape.bits * b + n))

    s.each(n_columns // shape.span, span)


def _across(s: Simd, rows: list[Val]) -> list[Val]:
    """Transpose 16 rows of 8 words to 8 vectors of 16: interleave row r with row r + 8, then r + 4, r + 2, r + 1."""
    vectors = [s.zip(rows[r], rows[r + 8], 0, 8) for r in range(8)]
    for distance in (4, 2, 1):
        # a vector holds words of several rows, of fewer and fewer columns
        count = len(vectors) // (2 * distance)
        pairs = [
            (vectors[c * 2 * distance + r], vectors[c * 2 * distance + r + distance])
            for c in range(count)
            for r in range(distance)
        ]
        halves = [[s.zip(a, b, first, 8) for a, b in pairs] for first in (0, 8)]
        vectors = [
            value for c in range(count) for half in halves for value in half[c * distance : c * distance + distance]
        ]
    return [vector.as_type(I8) for vector in vectors]


def _planes(panel: IntPanel, vectors: list[Val]) -> list[Val]:
    """Return the planes (panels.py) of eight vectors of q, or of codes."""
    u = vectors if panel.codebook else [v + panel.offset for v in vectors]
    planes: list[list[Val]] = [[] for _ in range(panel.bits)]
    for i in range(8):
        for plane, at, bit, mask in bit_places(panel, i):
            planes[plane].append(_shifted((u[i] >> bit) & mask, at))
    return [functools.reduce(operator.or_, parts) for parts in planes]


def _shifted(v: Val, left: int) -> Val:
    return (v.as_type(I16) << left).as_type(I8)  # no bit leaves its byte


def _neighbours(s: Simd, x: Val, y: Val) -> Val:
    return s.zip(x, y, 0, ROWS)


def _heads(s: Simd, panel: IntPanel, numbers: list[Val]) -> list[Val]:
    """Return the fields of a step's head. numbers: the scales of the step, then its minimums."""
    words = [v.to(I32) for v in numbers] if panel.scales.shared else []
    n = panel.columns // panel.group
    match panel.scales.name:
        case "row":
            return []
        case "f32 64":
            return [numbers[0] * (1 / LARGEST_FINE)]
        case "f16":
            return [v.to(F16) for v in numbers]
        case "f32":
            return numbers
        case "k8":
            return [v.to(I8) for v in words]
        case "k4":
            return [_neighbours(s, *[(words[g] | words[n + g] << 4).to(I8) for g in range(n)])]
        case "k3":
            a, b, c, d = (v + 32 for v in words)
            pair = _neighbours(s, *[(low | (high >> 4) << 6).to(I8) for low, high in ((a, c), (b, d))])
            return [pair, ((c & 15) | (d & 15) << 4).to(I8)]
        case "k6":
            return [(words[i] | ((words[3] >> 2 * i) & 3) << 6).to(I8) for i in range(3)]
        case _:  # e8m0: see e8m0_half
            bits = numbers[0].as_type(I32)
            e = s.select((bits >> 23).compare("==", 0), (bits >> 22) & 1, (bits >> 23) + 1)
            return [e.to(I8)]
