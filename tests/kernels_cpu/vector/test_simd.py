"""The SIMD vocabulary: what depends on the instruction set, in every lowering that this machine can run."""

import os
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from gguf_run.formats.compiler.machine_code import host_features
from gguf_run.formats.compiler.resolve import tell_numba
from gguf_run.kernels_cpu.vector.isa import ISAS, Isa, choose
from gguf_run.kernels_cpu.vector.lowering import LOWERINGS
from gguf_run.kernels_cpu.vector.simd import F16, F32, I8, I16, I32, Simd, Val

tell_numba()
FEATURES = os.environ.get("NUMBA_CPU_FEATURES", host_features())
RUNNABLE = [isa for isa in ISAS if isa.needs <= {word[1:] for word in FEATURES.split(",") if word.startswith("+")}]
on_each_isa = pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
GENERIC = next(isa for isa in ISAS if not isa.needs)  # the one that runs anywhere


def run(isa: Isa, emit: Callable[..., None], *arrays: np.ndarray) -> None:
    """Compile emit(s, i, *addresses of the arrays' vectors number i) for an instruction set, and run it for all i.

    The arrays are [n, lanes], C-contiguous.
    """

    @intrinsic
    def word(typing_context: Any, addresses: Any, n: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, arguments: Any) -> ir.Value:
            s = Simd(builder, isa, LOWERINGS[isa.dot])
            table, count = (Val(s, argument) for argument in arguments)

            def body(i: Val) -> None:
                starts = [s.load(table + 8 * k, ir.IntType(64)) for k in range(len(arrays))]
                emit(s, *[start + i * array.strides[0] for start, array in zip(starts, arrays, strict=True)])

            s.each(count, body)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), codegen

    @numba.njit
    def call(addresses: int, n: int) -> None:
        word(addresses, n)

    addresses = np.array([array.ctypes.data for array in arrays])
    call(addresses.ctypes.data, len(arrays[0]))


def convert(isa: Isa, function: Callable[[Simd, Val], Val], x: np.ndarray, dtype: Any) -> np.ndarray:
    """function of all numbers of x, f16 or f32[n], 16 at a time."""
    element = {2: F16, 4: F32}[x.itemsize]
    padded = np.zeros((-(-len(x) // 16), 16), x.dtype)
    padded.reshape(-1)[: len(x)] = x
    out = np.zeros(padded.shape, dtype)
    run(isa, lambda s, at, to: s.store(function(s, s.load(at, element, 16)), to), padded, out)
    return out.reshape(-1)[: len(x)]


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """NaN in the same places, everything else in every bit."""
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    bits = f"u{expected.itemsize}"
    np.testing.assert_array_equal(actual.view(bits)[~nan], expected.view(bits)[~nan])


@on_each_isa
def test_halves_are_widened_exactly(isa: Isa) -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):  # ARM's conversion signals some NaN
        expected = halves.astype(np.float32)
    assert_same_bits(convert(isa, lambda s, x: x.to(F32), halves, np.float32), expected)


@on_each_isa
def test_halves_are_rounded_to_nearest_even(isa: Isa) -> None:
    """All halves, the middles between two neighbours, and the floats next to both."""
    positive = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    positive[-1] = 65536.0  # what would follow the greatest half
    points = np.concatenate([positive, (positive[1:] + positive[:-1]) / 2])
    points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-1))])
    extremes = np.array([1e-45, 1e-38, 65519.996, 65520.0, 3e38, np.inf, np.nan], np.float32)
    x = np.concatenate([points, -points, extremes, -extremes]).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    assert_same_bits(convert(isa, lambda s, x: x.to(F16), x, np.float16), expected)


@on_each_isa
def test_exp(isa: Isa) -> None:
    x = np.concatenate([np.linspace(-87.3, 88, 200001), np.linspace(-1e-3, 1e-3, 1001), [0.0, -0.0]])
    x = x.astype(np.float32)
    x = x[(x >= np.float32(-87.3)) & (x <= 88)]
    expected = np.exp(x.astype(np.float64))
    actual = convert(isa, lambda s, x: s.exp(x), x, np.float32)
    # a float has 24 bits: 6e-8 is the rounding of the result alone
    assert np.abs(actual / expected - 1).max() < 2e-7
    assert actual[x == 0].tolist() == [1.0] * (x == 0).sum()


@on_each_isa
def test_bounded_exp(isa: Isa) -> None:
    x = np.concatenate([np.linspace(-87, 12, 200001), [0.0, np.nan, -88, -1e30, -np.inf]]).astype(np.float32)
    actual = convert(isa, lambda s, x: s.exp(x, bounded=True), x, np.float32)
    expected = np.exp(x[:-4].astype(np.float64))
    assert (np.abs(actual[:-4] / expected - 1) < 2e-7 + 1e-7 * np.abs(x[:-4])).all()
    assert np.isnan(actual[-4])
    assert ((actual[-3:] >= 0) & (actual[-3:] < 2e-38)).all()


@on_each_isa
def test_exp_beyond_its_range(isa: Isa) -> None:
    x = np.array([-87.31, -88, -1e3, -1e30, -np.inf, 88.1, 1e3, 1e30, np.inf], np.float32)
    actual = convert(isa, lambda s, x: s.exp(x), x, np.float32)
    assert (actual[:5] == 0).all()
    assert actual[5:] == pytest.approx(np.exp(88.0), rel=2e-7)


@on_each_isa
def test_rint(isa: Isa) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([np.arange(-300, 300) / 2, rng.uniform(-130, 130, 10000), [4e6, -4e6]]).astype(np.float32)
    actual = convert(isa, lambda s, x: s.rint(x), x, np.int32)
    np.testing.assert_array_equal(actual, np.rint(x).astype(np.int32))


def bits_of(isa: Isa, bits: int) -> tuple[int, int, int]:
    """Return DotSum.bits for numbers of so many bits, and the least and the largest number."""
    return (-8, -128, 127) if bits == 8 and isa.signed_bytes else (bits, 0, (1 << bits) - 1)


@on_each_isa
@pytest.mark.parametrize("bits", [2, 4, 5, 7, 8])
def test_dot_is_exact(isa: Isa, bits: int) -> None:
    rng = np.random.default_rng(bits)
    bits, low, high = bits_of(isa, bits)
    u = rng.integers(low, high + 1, (500, 64))
    x = rng.integers(-127, 128, (500, 64))
    u[:5], u[5:10] = high, low  # sums that would overflow 16 bits if they could
    x[:10] = np.array([[127], [-127], [1], [-1], [0]] * 2)
    acc = rng.integers(-(2**30), 2**30, (500, 16)).astype(np.int32)
    out = np.zeros_like(acc)

    def emit(s: Simd, acc: Val, u: Val, x: Val, out: Val) -> None:
        s.store(s.dot(s.load(acc, I32, 16), s.load(u, I8, 64), s.load(x, I8, 64), bits), out)

    run(isa, emit, acc, u.astype(np.uint8), x.astype(np.int8), out)
    np.testing.assert_array_equal(out, acc + (u * x).reshape(500, 16, 4).sum(-1))


@on_each_isa
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_dot_sum_is_exact(isa: Isa, bits: int) -> None:
    """Eight products in one sum, the largest that there are among them."""
    rng = np.random.default_rng(bits)
    bits, low, high = bits_of(isa, bits)
    u = rng.integers(low, high + 1, (50, 8, 64))
    x = rng.integers(-127, 128, (50, 8, 64))
    u[:3], x[0], x[1] = high, 127, -127
    u[3:5], x[3], x[4] = low, 127, -127
    out = np.zeros((50, 16), np.int32)
    expected = (u * x).sum(1).reshape(50, 16, 4).sum(-1)

    def emit(s: Simd, u: Val, x: Val, out: Val) -> None:
        dots = s.dot_sum(s.const(I32, 5, 16), bits)
        for i in range(8):
            dots.add(s.load(u + 64 * i, I8, 64), s.load(x + 64 * i, I8, 64))
        s.store(dots.total(), out)

    run(isa, emit, u.astype(np.uint8).reshape(50, -1), x.astype(np.int8).reshape(50, -1), out)
    np.testing.assert_array_equal(out, expected + 5)


@on_each_isa
def test_add_pairs(isa: Isa) -> None:
    rng = np.random.default_rng(0)
    acc = rng.integers(-(2**30), 2**30, (50, 16)).astype(np.int32)
    x = rng.integers(-(2**14), 2**14, (50, 32)).astype(np.int16)
    y = rng.integers(-(2**15), 2**15, (50, 32)).astype(np.int16)
    x[:2], y[0], y[1] = -(2**15), 2**15 - 1, -(2**15)
    acc[:2] = [[0], [-1]]  # -1: the sum of the products alone is 2^31
    out = np.zeros_like(acc)

    def emit(s: Simd, acc: Val, x: Val, y: Val, out: Val) -> None:
        s.store(s.add_pairs(s.load(acc, I32, 16), s.load(x, I16, 32), s.load(y, I16, 32)), out)

    run(isa, emit, acc, x, y, out)
    np.testing.assert_array_equal(out, acc + (x.astype(np.int64) * y).reshape(50, 16, 2).sum(-1))


def test_integer_words() -> None:
    """Shifts, masks, signs and widths, compared with NumPy."""
    rng = np.random.default_rng(0)
    a = rng.integers(-(2**31), 2**31, (50, 16)).astype(np.int32)
    b = rng.integers(-(2**31), 2**31, (50, 16)).astype(np.int32)
    unsigned = a.view(np.uint32)
    cases: list[tuple[Callable[[Simd, Val, Val], Val], np.ndarray]] = [
        (lambda s, x, y: (x & y) | (x ^ 0x0F0F), (a & b) | (a ^ 0x0F0F)),
        (lambda s, x, y: (x >> 5) + (y << 3), (unsigned >> 5).view(np.int32) + (b << 3)),
        (lambda s, x, y: x.sar(7) - y, (a >> 7) - b),
        (lambda s, x, y: s.select(x.compare("<", y), x, y), np.minimum(a, b)),
        (lambda s, x, y: x.to(I8).to(I32), a.astype(np.int8).astype(np.int32)),
        (lambda s, x, y: x.to(I8).to(I32, signed=False), a.astype(np.uint8).astype(np.int32)),
        (lambda s, x, y: x.to(F32).as_type(I32), a.astype(np.float32).view(np.int32)),
        (lambda s, x, y: x.to(F32, signed=False).as_type(I32), unsigned.astype(np.float32).view(np.int32)),
        (lambda s, x, y: s.concat(x.part(8, 8), y.part(0, 8)), np.concatenate([a[:, 8:], b[:, :8]], axis=1)),
        (lambda s, x, y: s.splat(s.sum(x), 16), np.repeat(a.sum(1, dtype=np.int32)[:, None], 16, 1)),
        (lambda s, x, y: s.splat(s.fold(x, s.maximum), 16), np.repeat(a.max(1)[:, None], 16, 1)),
        (lambda s, x, y: x * y, a * b),
    ]
    for i, (word, expected) in enumerate(cases):
        out = np.zeros_like(a)

        def emit(s: Simd, x: Val, y: Val, to: Val, word: Callable[[Simd, Val, Val], Val] = word) -> None:
            s.store(word(s, s.load(x, I32, 16), s.load(y, I32, 16)), to)

        run(GENERIC, emit, a, b, out)
        np.testing.assert_array_equal(out, expected, err_msg=f"case {i}")


def test_loop_may_run_no_time_and_carries_values() -> None:
    counts = np.arange(4, dtype=np.int64)[:, None].copy()
    out = np.zeros((4, 2), np.int64)

    def emit(s: Simd, count: Val, to: Val) -> None:
        i64 = ir.IntType(64)
        first, second = s.loop(
            s.load(count, i64), [s.const(i64, 1), s.const(i64, 10)], lambda i, c: [c[0] + c[1], c[1] + i]
        )
        s.store(first, to)
        s.store(second, to + 8)

    run(GENERIC, emit, counts, out)
    assert out.tolist() == [[1, 10], [11, 10], [21, 11], [32, 13]]


def test_isa_is_chosen_by_features() -> None:
    avx2 = "+avx2,+f16c,+fma"
    vnni512 = avx2 + ",+avx512f,+avx512bw,+avx512vl,+avx512vnni"
    chosen = {
        vnni512: "AVX-512 VNNI",
        vnni512 + ",+avxvnni": "AVX-512 VNNI",
        vnni512.replace("+avx512vnni", "-avx512vnni"): "AVX2",
        avx2 + ",+avxvnni": "AVX-VNNI",
        avx2: "AVX2",
        "+avx2,-f16c,+fma": "generic",
        "+neon,+dotprod": "NEON dotprod",
        "+neon": "generic",
        "": "generic",
    }
    assert {features: choose(features).name for features in chosen} == chosen


@pytest.mark.parametrize("bits", [4, -8])
def test_neon_dot_compiles(bits: int) -> None:
    """On any machine: LLVM accepts the code and makes four sdot of 64 bytes."""
    isa = next(isa for isa in ISAS if isa.dot == "neon")
    module = ir.Module("neon")
    module.triple = "aarch64-unknown-linux-gnu"
    i64 = ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64] * 3), "dot")
    s = Simd(ir.IRBuilder(function.append_basic_block()), isa, LOWERINGS[isa.dot])
    u, x, out = (Val(s, argument) for argument in function.args)
    s.store(s.dot(s.load(out, I32, 16), s.load(u, I8, 64), s.load(x, I8, 64), bits), out)
    s.b.ret_void()
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(module.triple).create_target_machine(features="+neon,+dotprod", opt=2)
    assert machine.emit_assembly(binding.parse_assembly(str(module))).count("sdot") == 4


@on_each_isa
def test_look_up_floats(isa: Isa) -> None:
    """By the lowest four bits of each lane, whatever the others are."""
    table = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    index = np.random.default_rng(1).integers(-(2**31), 2**31, (40, 16)).astype(np.int32)
    out = np.zeros(index.shape, np.float32)
    run(isa, lambda s, at, to: s.store(s.look_up_floats(table.tolist(), s.load(at, I32, 16)), to), index, out)
    np.testing.assert_array_equal(out, table[index & 15])


@on_each_isa
def test_low_bytes(isa: Isa) -> None:
    words = np.arange(-32768, 32768).astype(np.int16).reshape(-1, 16)
    out = np.zeros_like(words)
    run(isa, lambda s, at, to: s.store(s.low_bytes(s.load(at, I16, 16)), to), words, out)
    np.testing.assert_array_equal(out, words.astype(np.int8).astype(np.int16) * 128)
