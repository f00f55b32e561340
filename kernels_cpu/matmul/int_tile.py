"""16 rows of an integer panel times one or several tokens as int8. panels/panels.py has the layouts of both."""

import functools
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

from gguf_run.kernels_cpu.panels.panels import BLOCK, ROWS, X_BLOCK_BYTES, X_D, X_D_SUMS, X_PAIR, X_SUMS, IntPanel
from gguf_run.kernels_cpu.panels.planes import HIGHER, bit_places, is_paired
from gguf_run.kernels_cpu.vector.simd import F16, F32, I8, I16, I32, I64, Scalar, Simd, Val


def int_tile(
    s: Simd,
    panel: IntPanel,
    ws: list[Val],
    n_steps: Val,
    xs: list[Val],
    places: list[tuple[Val, Val]],
    ahead: Val | None = None,
) -> None:
    """out[t, p, r] = init[t, p, r] + sum of w[p, r] * x[t] for tokens t, panels p and rows r.

    ws: addresses of the panels.
    xs: addresses of the tokens' activation blocks.
    places: addresses (init, out) for each token and panel; the panels of a token are neighbours.
    ahead: bytes between what is read and what is prefetched; below 0, or None: nothing is prefetched.
    """
    lanes = s.isa.lanes if len(xs) > 1 else ROWS

    def some_rows(i: Val) -> None:
        first = i * lanes
        acc = start = [s.load(init + first * 4, F32, lanes) for init, _ in places]
        if panel.rows_at:
            acc = [s.const(F32, 0.0, lanes)] * len(start)
        sums = _run(s, panel, [w + panel.rows_at for w in ws], first, n_steps, xs, acc, ahead)
        if panel.rows_at:
            scales = [s.load(w + first * 4, F32, lanes) for w in ws]
            sums = [s.fma(total, scales[i % len(ws)], start[i]) for i, total in enumerate(sums)]
        for value, (_, out) in zip(sums, places, strict=True):
            s.store(value, out + first * 4)

    if lanes == ROWS:
        some_rows(s.const(I64, 0))
    else:
        s.each(ROWS // lanes, some_rows)


def _run(
    s: Simd,
    panel: IntPanel,
    ws: list[Val],
    first: Val,
    n_steps: Val,
    xs: list[Val],
    acc: list[Val],
    ahead: Val | None,
) -> list[Val]:
    """Return acc + the products over all steps, for the rows from `first` on that are the lanes of acc."""
    n_blocks, step_bytes = panel.columns // BLOCK, panel.span_bytes // panel.n_steps
    lanes, in_order = acc[0].lanes, len(xs) == 1 and s.isa.lanes == ROWS

    def span(j: Val, acc: list[Val]) -> list[Val]:
        ats = [w + j * panel.span_bytes for w in ws]
        if in_order and panel.n_steps > 1:
            for at, line in itertools.product(ats, range(0, panel.quants_at, 64)):
                s.prefetch(at + line)
            s.keep_order()
        factors = [load_factors(s, panel, at, first, lanes) for at in ats]

        def step(i: Val, acc: list[Val]) -> list[Val]:
            if ahead is not None:
                prefetch_step(s, [at + i * step_bytes for at in ats], step_bytes, ahead)
            pairs = zip(ats, factors, strict=True)
            stepped = [decode_blocks(s, panel, at, own, first, lanes, i, in_order) for at, own in pairs]
            for n, blocks in enumerate(zip(*stepped, strict=True)):
                x_at = ((j * panel.n_steps + i) * n_blocks + n) * X_BLOCK_BYTES
                acc = (_add_paired if is_paired(panel) else _add)(s, panel, blocks, [x + x_at for x in xs], acc)
            return acc

        return s.loop(panel.n_steps, acc, step) if panel.n_steps > 1 else step(s.const(I64, 0), acc)

    return s.loop(n_steps >> _log2(panel.n_steps), acc, span)


def prefetch_step(s: Simd, addresses: list[Val], n_bytes: int, ahead: Val) -> None:
    """Prefetch n_bytes that are `ahead` behind each address, into the second-level cache. Below 0: no instruction runs.

    Without it, a processor reads panels whose scales stand apart from their quants at half the speed of memory.
    """
    with s.b.if_then(ahead.compare(">=", 0).ir):
        for address, line in itertools.product(addresses, range(0, n_bytes, 64)):
            s.prefetch(address + ahead + line, 2)


def _add(s: Simd, shape: IntPanel, blocks: "tuple[_Block, ...]", xs: list[Val], acc: list[Val]) -> list[Val]:
    """Return acc + the products over the same 32 columns of all panels. xs: addresses of the tokens' blocks."""
    lanes, n_groups = acc[0].lanes, BLOCK // shape.group
    first_sum = 0 if n_groups == 1 else 4  # the sum of all 32 values, or of each half
    signed = shape.offset == 128 and s.isa.signed_bytes
    for g in range(n_groups):
        n_bits = -8 if signed else shape.dot_bits
        dots = [[s.dot_sum(s.const(I32, 0, lanes), n_bits) for _ in blocks] for _ in xs]
        fine = [[s.dot_sum(s.const(I32, 0, lanes), n_bits) for _ in blocks if shape.fine] for _ in xs]
        for i in range(8 // n_groups * g, 8 // n_groups * (g + 1)):
            us = [block.quant(i, signed=signed) for block in blocks]
            us += [block.quant(i, shape.fine, signed=signed) for block in blocks if shape.fine]
            for x, row, more in zip(xs, dots, fine, strict=True):
                x4 = _spread(s, x, 4 * i, I32, lanes).as_type(I8)
                for u, dot in zip(us, row + more, strict=True):
                    dot.add(u, x4)
        new = []
        for t, x in enumerate(xs):
            d, correction = _spread(s, x, X_D, F32, lanes), None  # d is loaded here: registers are scarce
            if shape.offset and not signed:  # sum (u - offset) * x = sum u * x - offset * sum x
                correction = _spread(s, x, X_SUMS + first_sum + 4 * g, I32, lanes) << _log2(shape.offset)
            for p, (block, dot) in enumerate(zip(blocks, dots[t], strict=True)):
                totals = [part.total() for part in (dot, *fine[t][p : p + 1])]
                totals = [total - correction for total in totals] if correction else totals
                total = (totals[0] << 8) + totals[1] if shape.fine else totals[0]
                factor = block.scales[g] * d if block.scales else d
                new.append(s.fma(total.to(F32), factor, acc[t * len(blocks) + p]))
        acc = new
    if shape.has_minimum:
        for g in range(n_groups):
            d_sums = [_spread(s, x, X_D_SUMS + first_sum + 4 * g, F32, lanes) for x in xs]
            pairs = [(block.minimums[g], d_sum) for d_sum in d_sums for block in blocks]
            acc = [s.fma(minimum, d_sum, a) for (minimum, d_sum), a in zip(pairs, acc, strict=True)]
    return acc


def _add_paired(s: Simd, shape: IntPanel, blocks: "tuple[_Block, ...]", xs: list[Val], acc: list[Val]) -> list[Val]:
    """As _add, for paired panels. A lane holds two sums of 16 bits: of columns 0 to 15, and of columns 16 to 31."""
    lanes, new = acc[0].lanes, []
    dots = [
        [[s.dot_sum(s.const(I32, 0, lanes), shape.dot_bits + up) for up in (0, HIGHER)] for _ in blocks] for _ in xs
    ]
    for i in range(8):
        us = [block.quant(i) for block in blocks]
        for x, row in zip(xs, dots, strict=True):
            x4 = _spread(s, x, 4 * i, I32, lanes).as_type(I8)
            for u, halves in zip(us, row, strict=True):
                halves[i // 4].add(u, x4)
    for t, x in enumerate(xs):
        d, sums = _spread(s, x, X_D, F32, lanes), _spread(s, x, X_PAIR, I32, lanes).as_type(I16)
        for p, (block, (low, high)) in enumerate(zip(blocks, dots[t], strict=True)):
            pair = (low.total() & 0xFFFF | high.total() << 16 - HIGHER).as_type(I16)
            if shape.offset:
                pair = pair - (sums << _log2(shape.offset))
            zero = s.const(I32, 0, lanes)
            total = s.add_pairs(zero, pair, block.scales[0]).to(F32) * block.factors[0]
            if shape.has_minimum:
                total = s.fma(s.add_pairs(zero, block.minimums[0], sums).to(F32), block.factors[1], total)
            new.append(s.fma(total, d, acc[t * len(blocks) + p]))
    return new


def _spread(s: Simd, x: Val, at: int, element: Scalar, lanes: int) -> Val:
    """Load the number at byte `at` of the block of activations at x, into all lanes."""
    if not s.isa.by_lane:
        return s.load(x + at, element, splat=lanes)
    four = s.load(x + at // 16 * 16, element, 4)  # the compiler loads them once
    return s.shuffle(four, [at % 16 // 4] * lanes)


class _Block(NamedTuple):
    """32 columns of some rows."""

    scales: list[Val]  # f32[rows] of each group; empty if all scales are 1. Paired: i16[2 * rows] of both groups
    minimums: list[Val]  # the same; empty if there are none
    factors: list[Val]  # f32[rows]: of the scales and the minimums of a paired panel
    quant: Callable[..., Val]  # from i to u of vector i: columns 4i to 4i + 3 of each row, see load_quants


def load_quants(s: Simd, shape: IntPanel, planes: Val, lanes: int = ROWS, in_order: bool = False) -> Callable[..., Val]:
    """Load the planes of 32 columns of `lanes` rows. Return a function from i to vector i of u, bytes.

    The function has two more arguments: the codebook to look in, and whether it returns u - 128, if 128 is the offset.
    in_order: see decode_blocks.
    """
    stored = []
    for plane in range(shape.bits):
        if in_order:
            s.keep_order()
        stored.append(s.load(planes + 64 * plane, I8, 4 * lanes))

    def quant(i: int, book: tuple[int, ...] = shape.codebook, *, signed: bool = False) -> Val:
        if shape.bits == 8:
            return stored[i] ^ 0x80 if signed else stored[i]
        up = HIGHER * (i // 4) if is_paired(shape) else 0
        places = bit_places(shape, i)
        parts = [_moved(stored[plane], bit + up - at) & mask << bit + up for plane, at, bit, mask in places]
        u = functools.reduce(operator.or_, parts)
        return s.look_up([value if signed else value + shape.offset for value in book], u) if book else u

    return quant


def load_factors(s: Simd, shape: IntPanel, at: Val, first: Val, lanes: int) -> list[Val]:
    """Load the factors of the span at `at`, f32, for `lanes` rows from row `first` on."""
    return [s.load(at + first * 2 + 2 * ROWS * n, F16, lanes).to(F32) for n in range(shape.n_factors)]


def decode_blocks(
    s: Simd, shape: IntPanel, at: Val, factors: list[Val], first: Val, lanes: int, i: Val, in_order: bool
) -> Iterator[_Block]:
    """Decode the scales of step i of the span at `at`, then load its planes, for `lanes` rows from row `first` on.

    in_order: all lines are asked for in the order of their addresses, the scales of all steps of the span first. Else
        the CPU's own prefetchers do not see one stream, and one token takes up to a fifth longer.
    """
    scales, minimums = _head(s, shape, at + i * shape.head_bytes + 2 * ROWS * shape.n_factors, first, lanes)
    if factors and not is_paired(shape):
        scales = [scale * factors[0] for scale in scales]
        minimums = [minimum * factors[1] for minimum in minimums]
    quants = at + first * 4 + i * shape.step_bytes + shape.quants_at
    per = 1 if is_paired(shape) else BLOCK // shape.group
    for n in range(shape.columns // BLOCK):
        groups = slice(per * n, per * n + per)
        quant = load_quants(s, shape, quants + 64 * shape.bits * n, lanes, in_order)
        yield _Block(scales[groups], minimums[groups], factors, quant)


def _head(s: Simd, shape: IntPanel, at: Val, first: Val, lanes: int) -> tuple[list[Val], list[Val]]:
    """Return the scales and minimums of a step (see panels/panels.py), without the factors of the span."""
    name, n = shape.scales.name, shape.columns // shape.group

    def byte(i: int) -> Val:
        return s.load(at + first + ROWS * i, I8, lanes).to(I32, signed=name == "k8")

    match name:
        case "k3" | "k4":
            pair = s.load(at + first * 2, I8, 2 * lanes).to(I16, signed=False)
            if name == "k4":
                return [pair & 15], [pair >> 4]
            nibbles = byte(2)
            second = ((nibbles | nibbles << 12) & 0xF000F).as_type(I16) | pair >> 2 & 0x30
            return [v - 32 for v in (pair & 63, second)], []
        case "k6":
            low = [byte(i) for i in range(3)]
            six = [v & 63 for v in low] + [low[0] >> 6 | (low[1] >> 6) << 2 | (low[2] >> 6) << 4]
            return [v.to(F32) for v in six[:n]], [v.to(F32) for v in six[n:]]
        case "k8":
            return [byte(i).to(F32) for i in range(n)], []
        case "none" | "row":
            return [], []
        case "f32 64":
            return [s.load(at + first * 4, F32, lanes)] * 2, []
        case "e8m0":
            e = byte(0)
            power = s.select(e.compare("<", 2), s.const(I32, 0x00200000, lanes) << e, (e - 1) << 23)
            return [power.as_type(F32)], []
    width, element = (2, F16) if name == "f16" else (4, F32)
    count = n * (1 + shape.has_minimum)
    at = at + first * width
    numbers = [s.load(at + ROWS * width * i, element, lanes).to(F32) for i in range(count)]
    return numbers[:n], numbers[n:]


def _log2(power: int) -> int:
    return power.bit_length() - 1


def _moved(v: Val, left: int) -> Val:
    """All bytes shifted left, or right if `left` is negative. The caller masks the bits that come from a neighbour."""
    if left == 0:
        return v
    words = v.as_type(I16)
    return (words << left if left > 0 else words >> -left).as_type(I8)
