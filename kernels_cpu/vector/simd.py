"""SIMD in Python: a small vector vocabulary that emits LLVM IR.

A kernel is a Python function. It runs once, while numba compiles, and calls the vocabulary with `Val`s: values that
will exist when the compiled code runs. So Python's loops become unrolled code, and Python's lists become registers:

    def emit(s: Simd, x: Val, n: Val) -> Val:                    # sum of n*16 floats at address x
        def body(i: Val, acc: list[Val]) -> list[Val]:
            return [acc[0] + s.load(x + i * 64, F32, 16)]
        return s.sum(s.loop(n, [s.const(F32, 0.0, 16)], body)[0])

Vectors may be wider than the machine's registers: LLVM splits them. The code depends on the instruction set only for
half floats, for fused multiply-add and for the operations in lowering.py. `simd_kernel` there makes an intrinsic of a
function like `emit`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from llvmlite import ir

from gguf_run.formats.compiler.jit import cgutils
from gguf_run.kernels_cpu.vector.isa import Isa

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
Scalar: TypeAlias = ir.Type
Number = int | float


def _vector(element: Scalar, lanes: int) -> ir.Type:
    return ir.VectorType(element, lanes) if lanes > 1 else element


def _operator(int_op: str | None, float_op: str | None = None) -> Callable[["Val", "Val | Number"], "Val"]:
    """Return an operator of Val by the names of LLVM's instructions for integers and for floats, if there are any."""
    return lambda value, other: value._op(int_op, float_op, other)


class Val:
    """A value at run time: an LLVM scalar or vector. Python numbers in an expression get its shape."""

    def __init__(self, s: "Simd", ir_value: ir.Value) -> None:
        self.s, self.ir = s, ir_value
        self.type = ir_value.type
        self.element: Scalar = getattr(self.type, "element", self.type)
        self.lanes: int = getattr(self.type, "count", 1)
        self.is_float = isinstance(self.element, (ir.FloatType, ir.HalfType))

    def _with(self, other: "Val | Number") -> ir.Value:
        return other.ir if isinstance(other, Val) else self.s.const(self.element, other, self.lanes).ir

    def _op(self, int_op: str | None, float_op: str | None, other: "Val | Number") -> "Val":
        op = float_op if self.is_float else int_op
        assert op is not None
        return Val(self.s, getattr(self.s.b, op)(self.ir, self._with(other)))

    __add__ = _operator("add", "fadd")
    __sub__ = _operator("sub", "fsub")
    __mul__ = _operator("mul", "fmul")
    __truediv__ = _operator(None, "fdiv")
    __and__ = _operator("and_")
    __or__ = _operator("or_")
    __xor__ = _operator("xor")
    __lshift__ = _operator("shl")
    __rshift__ = _operator("lshr")  # logical: zeros come in from the left

    def sar(self, count: int) -> "Val":
        """Arithmetic shift right: the sign comes in from the left."""
        return self._op("ashr", None, count)

    def compare(self, relation: str, other: "Val | Number") -> "Val":
        """Compare lane by lane: lanes of one bit. Integers compare signed, floats ordered (false for NaN)."""
        compare = self.s.b.fcmp_ordered if self.is_float else self.s.b.icmp_signed
        return Val(self.s, compare(relation, self.ir, self._with(other)))

    def as_type(self, element: Scalar) -> "Val":
        """The same bits as lanes of another width."""
        bits = self.lanes * _width(self.element)
        return Val(self.s, self.s.b.bitcast(self.ir, _vector(element, bits // _width(element))))

    def to(self, element: Scalar, *, signed: bool = True) -> "Val":
        """The same numbers as another type, lane by lane. f32 to int drops the fraction (Simd.rint rounds)."""
        b, target = self.s.b, _vector(element, self.lanes)
        to_float = isinstance(element, ir.FloatType)
        if self.element == element:
            return self
        if self.element == F16 and to_float:
            return self.s.widen_half(self)
        if self.is_float and element == F16:
            return self.s.narrow_half(self)
        if self.is_float:
            return Val(self.s, b.fptosi(self.ir, target))
        if to_float:
            return Val(self.s, (b.sitofp if signed else b.uitofp)(self.ir, target))
        if _width(element) < _width(self.element):
            return Val(self.s, b.trunc(self.ir, target))
        return Val(self.s, (b.sext if signed else b.zext)(self.ir, target))

    def part(self, first: int, lanes: int) -> "Val":
        """Lanes first to first + lanes - 1."""
        return self.s.shuffle(self, range(first, first + lanes))


def _width(element: Scalar) -> int:
    return {F32: 32, F16: 16}.get(element) or element.width


class DotSum:
    """Each add(u, x) adds the sum over j < 4 of u[4i+j] * x[4i+j] to lane i, exactly. The lanes begin with `start`.

    start: i32 lanes.
    u: four times as many bytes, unsigned and below 2^bits. Eight bits are unsigned or, if the instruction set has
        signed_bytes, signed: then bits is -8.
    x: as many bytes as u, signed and never -128.
    """

    def __init__(self, s: "Simd", start: Val, bits: int) -> None:
        assert bits != (8 if s.isa.signed_bytes else -8)
        self.s, self.sum, self.bits = s, start, bits

    def add(self, u: Val, x: Val) -> "DotSum":
        raise NotImplementedError

    def total(self) -> Val:
        return self.sum


@dataclass(frozen=True)
class Lowering:
    """The operations that differ between instruction sets: a row of lowering.LOWERINGS."""

    dot_sum: type[DotSum]
    add_pairs: Callable[["Simd", Val, Val, Val], Val]  # see Simd.add_pairs
    look_up: Callable[["Simd", Sequence[int], Val], Val]  # see Simd.look_up
    look_up_floats: Callable[["Simd", Sequence[float], Val], Val]  # see Simd.look_up_floats
    low_bytes: Callable[["Simd", Val], Val]  # see Simd.low_bytes


class Simd:
    """Emits code into one LLVM builder for one instruction set. Addresses are i64 scalars, in bytes."""

    def __init__(self, builder: ir.IRBuilder, isa: Isa, lowering: Lowering) -> None:
        self.b, self.isa, self.lowering = builder, isa, lowering

    def function(self, name: str, emit: Callable[..., Val | None], arguments: Sequence[Val]) -> ir.Function:
        """Return emit(s, *arguments) as a function that is not inlined, so that loops in it have all registers."""
        if name in self.b.module.globals:
            return self.b.module.globals[name]
        new = ir.Function(self.b.module, ir.FunctionType(ir.VoidType(), [value.type for value in arguments]), name)
        new.linkage = "internal"
        new.attributes.add("noinline")
        inner = Simd(ir.IRBuilder(new.append_basic_block()), self.isa, self.lowering)
        emit(inner, *[Val(inner, argument) for argument in new.args])
        inner.b.ret_void()
        return new

    # values and memory
    def const(self, element: Scalar, value: Number, lanes: int = 1) -> Val:
        number = float(value) if isinstance(element, (ir.FloatType, ir.HalfType)) else int(value)
        return Val(self, ir.Constant(_vector(element, lanes), [number] * lanes if lanes > 1 else number))

    def constants(self, element: Scalar, values: Sequence[Number]) -> Val:
        return Val(self, ir.Constant(ir.VectorType(element, len(values)), list(values)))

    def splat(self, scalar: Val, lanes: int) -> Val:
        undefined = ir.Constant(_vector(scalar.element, lanes), ir.Undefined)
        return self._shuffle(self.b.insert_element(undefined, scalar.ir, ir.Constant(I32, 0)), undefined, [0] * lanes)

    def load(self, address: Val, element: Scalar, lanes: int = 1, *, splat: int = 1) -> Val:
        """Load lanes of an element (unaligned); with splat=n, one element repeated n times."""
        loaded = self.b.load(self.b.inttoptr(address.ir, _vector(element, lanes).as_pointer()))
        loaded.align = 1
        value = Val(self, loaded)
        return self.splat(value, splat) if splat > 1 else value

    def store(self, value: Val, address: Val) -> None:
        self.b.store(value.ir, self.b.inttoptr(address.ir, value.type.as_pointer())).align = 1

    def prefetch(self, address: Val, level: int = 1) -> None:
        """Prefetch the cache line at an address, which need not be valid, into the cache of a level."""
        name, void = "llvm.prefetch.p0i8", ir.VoidType()
        pointer = Val(self, self.b.inttoptr(address.ir, I8.as_pointer()))
        self.call(name, void, pointer, self.const(I32, 0), self.const(I32, 4 - level), self.const(I32, 1))

    def keep_order(self) -> None:
        """Keep the compiler from moving loads and stores across this place. No instruction comes of it."""
        self.b.fence("seq_cst", "singlethread")

    def shuffle(self, value: Val, lanes: Sequence[int] | range) -> Val:
        return self._shuffle(value.ir, ir.Constant(value.type, ir.Undefined), lanes)

    def concat(self, low: Val, high: Val) -> Val:
        return self._shuffle(low.ir, high.ir, range(2 * low.lanes))

    def zip(self, x: Val, y: Val, first: int, lanes: int) -> Val:
        """x[first], y[first], x[first + 1], y[first + 1] ...: `lanes` lanes of each."""
        return self._shuffle(x.ir, y.ir, [n for i in range(first, first + lanes) for n in (i, x.lanes + i)])

    def _shuffle(self, x: ir.Value, y: ir.Value, lanes: Sequence[int] | range) -> Val:
        return Val(self, self.b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))))

    def select(self, condition: Val, yes: Val, no: Val) -> Val:
        return Val(self, self.b.select(condition.ir, yes.ir, no.ir))

    def loop(self, count: Val | int, carried: list[Val], body: Callable[[Val, list[Val]], list[Val]]) -> list[Val]:
        """for i in range(count): carried = body(i, carried). Returns the last carried. count may be 0."""
        count = self.const(I64, count) if isinstance(count, int) else count
        before = self.b.block
        head, inside, after = (self.b.append_basic_block(name) for name in ("head", "body", "after"))
        self.b.branch(head)
        self.b.position_at_end(head)
        i = self.b.phi(I64)
        phis = [self.b.phi(value.type) for value in carried]
        i.add_incoming(ir.Constant(I64, 0), before)
        for phi, value in zip(phis, carried, strict=True):
            phi.add_incoming(value.ir, before)
        self.b.cbranch(self.b.icmp_signed("<", i, count.ir), inside, after)
        self.b.position_at_end(inside)
        new = body(Val(self, i), [Val(self, phi) for phi in phis])
        i.add_incoming(self.b.add(i, ir.Constant(I64, 1)), self.b.block)
        for phi, value in zip(phis, new, strict=True):
            phi.add_incoming(value.ir, self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)
        return [Val(self, phi) for phi in phis]

    def each(self, count: Val | int, body: Callable[[Val], None]) -> None:
        """for i in range(count): body(i)."""

        def once(i: Val, none: list[Val]) -> list[Val]:
            body(i)
            return none

        self.loop(count, [], once)

    # arithmetic
    def call(self, name: str, result: ir.Type, *arguments: Val) -> Val:
        signature = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.b.module, signature, name)
        return Val(self, self.b.call(function, [argument.ir for argument in arguments]))

    def _float_call(self, name: str, *arguments: Val) -> Val:
        lanes = arguments[0].lanes
        return self.call(f"llvm.{name}.{f'v{lanes}' if lanes > 1 else ''}f32", arguments[0].type, *arguments)

    def fma(self, x: Val, y: Val, z: Val) -> Val:
        """x * y + z, fused if that is one instruction. Else fusing would be a call for each lane."""
        return self._float_call("fma", x, y, z) if self.isa.fma else x * y + z

    def maximum(self, x: Val, y: Val) -> Val:
        return self.select(x.compare(">", y), x, y)

    def minimum(self, x: Val, y: Val) -> Val:
        return self.select(x.compare("<", y), x, y)

    def absolute(self, x: Val) -> Val:
        return self._float_call("fabs", x)

    def rint(self, x: Val) -> Val:
        """Nearest integer, halves to even, as i32; |x| < 2^22. Adding 1.5 * 2^23 leaves the integer in the mantissa."""
        magic = self.const(F32, 12582912.0, x.lanes)
        return (x + magic).as_type(I32) - magic.as_type(I32)

    def fold(self, x: Val, combine: Callable[[Val, Val], Val]) -> Val:
        """Combine all lanes into a scalar: combine the two halves of the vector until one lane is left."""
        while x.lanes > 2:
            half = x.lanes // 2
            x = combine(x.part(0, half), x.part(half, half))
        first, second = (Val(self, self.b.extract_element(x.ir, ir.Constant(I32, n))) for n in (0, 1))
        return combine(first, second)

    def sum(self, x: Val) -> Val:
        return self.fold(x, lambda a, b: a + b)

    def exp(self, x: Val, *, bounded: bool = False) -> Val:
        """e^x of f32 lanes, relative error below 2e-7; 0 for x below -87.3, e^88 above 88.

        bounded: x must be below 88. Then the relative error is up to 1e-7 |x|, and x below -87.3 gives e^-87.3.

        Method: x = n ln 2 + r with |r| <= ln(2) / 2. A minimax polynomial of degree 5 gives e^r. Adding n to the
        exponent multiplies by 2^n.
        """
        low, high = self.const(F32, -87.3, x.lanes), self.const(F32, 88.0, x.lanes)
        kept = self.maximum(low, x)  # this order keeps NaN
        if not bounded:
            kept = self.select(x.compare(">", high), high, kept)
        magic = self.const(F32, 12582912.0, x.lanes)  # as in rint: n is in the lowest bits of shifted
        shifted = self.fma(kept, self.const(F32, 1.4426950408889634, x.lanes), magic)
        n, r = shifted - magic, kept
        # ln 2 in two parts. The first has few bits: n * part is exact.
        for part in (0.6931471805599453,) if bounded else (0.693145751953125, 1.4286068203094172e-06):
            r = self.fma(n, self.const(F32, -part, x.lanes), r)
        p = self.const(F32, 0.00829026382, x.lanes)
        for c in (0.0418982059, 0.166676387, 0.499991477, 0.999999702, 1.0):
            p = self.fma(p, r, self.const(F32, c, x.lanes))
        scaled = (p.as_type(I32) + (shifted.as_type(I32) << 23)).as_type(F32)
        return scaled if bounded else self.select(x.compare("<", low), self.const(F32, 0.0, x.lanes), scaled)

    # half floats: one instruction if the CPU has it, else integer arithmetic
    def widen_half(self, x: Val) -> Val:
        if self.isa.f16c:
            return Val(self, self.b.fpext(x.ir, _vector(F32, x.lanes)))
        bits = x.as_type(I16).to(I32, signed=False)
        sign, rest = (bits & 0x8000) << 16, (bits & 0x7FFF) << 13
        value = rest.as_type(F32) * 2.0**112  # changes the exponent's bias from 15 to 127, for subnormals too
        special = rest | 0x7F800000  # exponent 31: infinity or nan
        magnitude = self.select(rest.compare(">=", 0x0F800000), special, value.as_type(I32))
        return (magnitude | sign).as_type(F32)

    def narrow_half(self, x: Val) -> Val:
        """f32 to f16: to nearest, halves to even. Numbers that are too large become infinity."""
        if self.isa.f16c:
            return Val(self, self.b.fptrunc(x.ir, _vector(F16, x.lanes)))
        bits = x.as_type(I32)
        sign, rest = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
        # Subnormal: the last bit of 0.5 as f32 is 2^-24, and there the addition rounds.
        small = (rest.as_type(F32) + 0.5).as_type(I32) - 0x3F000000
        odd = (rest >> 13) & 1
        normal = (rest - (112 << 23) + 0xFFF + odd) >> 13
        value = self.select(rest.compare("<", 113 << 23), small, normal)
        infinity, nan = self.const(I32, 0x7C00, x.lanes), self.const(I32, 0x7E00, x.lanes)
        value = self.select(value.compare(">", infinity), infinity, value)
        value = self.select(rest.compare(">", 0x7F800000), nan, value)
        return (value | sign).to(I16).as_type(F16)

    def look_up(self, table: Sequence[int], index: Val) -> Val:
        """table[i] for each byte i of index. The table has 16 bytes, signed or not."""
        return self.lowering.look_up(self, table, index)

    def look_up_floats(self, table: Sequence[float], index: Val) -> Val:
        """table[i] for the lowest four bits i of each i32 lane of index. The table has 16 numbers, f32."""
        return self.lowering.look_up_floats(self, table, index)

    def low_bytes(self, words: Val) -> Val:
        """The low byte of each i16 lane, signed, times 128."""
        return self.lowering.low_bytes(self, words)

    # dot products of integers
    def dot_sum(self, start: Val, bits: int) -> DotSum:
        """Begin a sum of dot products with `start`, i32 lanes."""
        return self.lowering.dot_sum(self, start, bits)

    def dot(self, acc: Val, u: Val, x: Val, bits: int) -> Val:
        """acc[i] + sum over j < 4 of u[4i+j] * x[4i+j]: one DotSum.add."""
        return self.dot_sum(acc, bits).add(u, x).total()

    def add_pairs(self, acc: Val, x: Val, y: Val) -> Val:
        """acc[i] + x[2i] * y[2i] + x[2i+1] * y[2i+1]: i32 lanes; x, y: twice as many i16 lanes."""
        return self.lowering.add_pairs(self, acc, x, y)
