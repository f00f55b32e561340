"""The operations that differ between instruction sets: dot products of bytes and of 16-bit numbers, table look-ups.

`simd_kernel` is the one function that knows both these operations and the vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import binding, ir

from gguf_run.formats.compiler.jit import intrinsic, types
from gguf_run.kernels_cpu.vector.isa import current
from gguf_run.kernels_cpu.vector.simd import DotSum, Lowering, Simd, Val

_I8, _I16, _I32 = (ir.IntType(n) for n in (8, 16, 32))
_F32 = ir.FloatType()


class _ByInstruction(DotSum):
    """One instruction does all of it, for `lanes` i32 lanes."""

    name: str
    lanes: int

    def add(self, u: Val, x: Val) -> DotSum:
        self.sum = _in_parts(self.s, self.lanes, self._dot, self.sum, u, x)
        return self

    def _dot(self, acc: Val, u: Val, x: Val) -> Val:
        return self.s.call(self.name, acc.type, acc, u, x)


class _Vnni(_ByInstruction):
    def _dot(self, acc: Val, u: Val, x: Val) -> Val:
        if binding.llvm_version_info < (21, 0, 0):  # these take the bytes as i32 lanes
            u, x = u.as_type(_I32), x.as_type(_I32)
        return self.s.call(f"llvm.x86.avx512.vpdpbusd.{32 * acc.lanes}", acc.type, acc, u, x)


class _Vnni512(_Vnni):
    lanes = 16


class _Vnni256(_Vnni):
    lanes = 8


class _Neon(_ByInstruction):
    name, lanes = "llvm.aarch64.neon.sdot.v4i32.v16i8", 4


class _Avx2(DotSum):
    """Products are added in pairs of 16 bits, as many as 16 bits can hold, and the pairs in i32 lanes."""

    def __init__(self, s: Simd, start: Val, bits: int) -> None:
        super().__init__(s, start, bits)
        self.pairs: Val | None = None
        self.held = 0
        self.most = 1 if bits < 0 else (1 << 15) // (2 * 127 * ((1 << bits) - 1))

    def add(self, u: Val, x: Val) -> DotSum:
        if self.bits < 0:  # |u| * (x with the sign of u): 128 * 127 * 2 < 2^15
            u, x = (_by_parts(self.s, "llvm.x86.avx2.psign.b", 32, v, u) for v in (u, x))
        products = _by_parts(self.s, "llvm.x86.avx2.pmadd.ub.sw", 32, u, x, _I16)
        if self.held == self.most:
            self._flush()
        self.pairs = products if self.pairs is None else self.pairs + products
        self.held += 1
        return self

    def _flush(self) -> None:
        if self.pairs is not None:
            self.sum = _pairs_avx2(self.s, self.sum, self.pairs, self.s.const(_I16, 1, self.pairs.lanes))
        self.pairs, self.held = None, 0

    def total(self) -> Val:
        self._flush()
        return self.sum


class _Generic(DotSum):
    def add(self, u: Val, x: Val) -> DotSum:
        v, w = u.as_type(_I32), x.as_type(_I32)
        for j in range(4):
            self.sum = self.sum + ((v >> (8 * j)) & 255) * (w << (24 - 8 * j)).sar(24)
        return self


def _in_parts(s: Simd, lanes: int, function: Callable[..., Val], *vectors: Val) -> Val:
    """Apply a function to halves of vectors, and to halves of these, so that the first has at most `lanes` lanes."""
    if vectors[0].lanes <= lanes:
        return function(*vectors)
    low, high = (
        _in_parts(s, lanes, function, *[v.part(v.lanes // 2 * n, v.lanes // 2) for v in vectors]) for n in (0, 1)
    )
    return s.concat(low, high)


def _by_parts(s: Simd, name: str, lanes: int, u: Val, x: Val, element: ir.Type = _I8) -> Val:
    """Apply an instruction for vectors of `lanes` lanes to wider ones. It returns 32 bytes of `element`."""
    result = ir.VectorType(element, 256 // element.width)
    return _in_parts(s, lanes, lambda u, x: s.call(name, result, u, x), u, x)


def _pairs_by(name: str, lanes: int) -> Callable[..., Val]:
    """Return Lowering.add_pairs by an instruction for `lanes` i32 lanes."""

    def pairs(acc: Val, x: Val, y: Val) -> Val:
        if binding.llvm_version_info < (21, 0, 0):
            x, y = x.as_type(_I32), y.as_type(_I32)
        return acc.s.call(name, acc.type, acc, x, y)

    return lambda s, *vectors: _in_parts(s, lanes, pairs, *vectors)


def _pairs_avx2(s: Simd, acc: Val, x: Val, y: Val) -> Val:
    return acc + _by_parts(s, "llvm.x86.avx2.pmadd.wd", 16, x, y, _I32)


def _pairs_neon(s: Simd, acc: Val, x: Val, y: Val) -> Val:
    def pairs(acc: Val, x: Val, y: Val) -> Val:
        low, high = (x.part(first, 4).to(_I32) * y.part(first, 4).to(_I32) for first in (0, 4))
        return acc + s.call("llvm.aarch64.neon.addp.v4i32", acc.type, low, high)

    return _in_parts(s, 4, pairs, acc, x, y)


def _pairs_generic(s: Simd, acc: Val, x: Val, y: Val) -> Val:
    v, w = x.as_type(_I32), y.as_type(_I32)
    return acc + (v << 16).sar(16) * (w << 16).sar(16) + v.sar(16) * w.sar(16)


def _look_up_by(name: str, lanes: int) -> Callable[..., Val]:
    """Return Lowering.look_up by an instruction that shuffles `lanes` bytes. x86 shuffles within each 16 bytes."""

    def look_up(s: Simd, table: Sequence[int], index: Val) -> Val:
        repeated = s.constants(_I8, [value & 255 for value in table] * (lanes // 16))
        return _in_parts(s, lanes, lambda index: s.call(name, index.type, repeated, index), index)

    return look_up


def _look_up_generic(s: Simd, table: Sequence[int], index: Val) -> Val:
    found = s.const(_I8, 0, index.lanes)
    for i, value in enumerate(table):
        found = s.select(index.compare("==", i), s.const(_I8, value, index.lanes), found)
    return found


def _floats_512(s: Simd, table: Sequence[float], index: Val) -> Val:
    numbers = s.constants(_F32, table)
    return _in_parts(s, 16, lambda i: s.call("llvm.x86.avx512.permvar.sf.512", numbers.type, numbers, i), index)


def _floats_generic(s: Simd, table: Sequence[float], index: Val) -> Val:
    found = s.const(_F32, table[0], index.lanes)
    for i, value in enumerate(table):
        found = s.select((index & 15).compare("==", i), s.const(_F32, value, index.lanes), found)
    return found


def _low_bytes_x86(s: Simd, words: Val) -> Val:
    factors = s.constants(_I8, [-128, 0] * words.lanes)  # -128 is read as 128
    return _by_parts(s, "llvm.x86.avx2.pmadd.ub.sw", 32, factors, words.as_type(_I8), _I16)


_pshufb = _look_up_by("llvm.x86.avx2.pshuf.b", 32)

_plain = functools.partial(Lowering, look_up_floats=_floats_generic, low_bytes=lambda s, words: (words << 8).sar(1))
_x86 = functools.partial(_plain, low_bytes=_low_bytes_x86)
# By Isa.dot.
LOWERINGS = {
    "vnni512": _x86(
        _Vnni512,
        _pairs_by("llvm.x86.avx512.vpdpwssd.512", 16),
        _look_up_by("llvm.x86.avx512.pshuf.b.512", 64),
        look_up_floats=_floats_512,
    ),
    "vnni256": _x86(_Vnni256, _pairs_by("llvm.x86.avx512.vpdpwssd.256", 8), _pshufb),
    "avx2": _x86(_Avx2, _pairs_avx2, _pshufb),
    "neon": _plain(_Neon, _pairs_neon, _look_up_by("llvm.aarch64.neon.tbl1.v16i8", 16)),
    "generic": _plain(_Generic, _pairs_generic, _look_up_generic),
}


def simd_kernel(emit: Callable[..., Val | None] | None = None, *, floats: str = "", apart: bool = False) -> Any:
    """Make an intrinsic of emit(s, ...), to be called from compiled code. Usable bare or with options.

    Arguments annotated int come first. They are compile-time constants, which a call gives as literals.
    All other arguments are int64 (counts and addresses), or f32 if `floats` names them.
    The result is f32 if emit is annotated to return a Val, else there is none.
    apart: whether the code is a function that is not inlined, see Simd.function. It has no result.
    """
    if emit is None:
        return functools.partial(simd_kernel, floats=floats, apart=apart)
    code, annotations = emit.__code__, emit.__annotations__
    names = code.co_varnames[1 : code.co_argcount]
    n_constants = sum(annotations[name] is int for name in names)

    @functools.wraps(emit)  # numba reads the names of the arguments; emit's s has the place of the typing context
    def define(typing_context: Any, *arguments: Any) -> Any:
        constants = [argument.literal_value for argument in arguments[:n_constants]]
        kinds = [types.float32 if name in floats.split() else types.intp for name in names[n_constants:]]
        result = types.void if annotations["return"] is None else types.float32

        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, values: Sequence[ir.Value]) -> ir.Value:
            isa = current()
            s = Simd(builder, isa, LOWERINGS[isa.dot])
            vals = [Val(s, value) for value in values[n_constants:]]
            if apart:
                name = "_".join(map(str, [emit.__name__, *constants]))
                inner = s.function(name, lambda s, *vals: emit(s, *constants, *vals), vals)
                s.b.call(inner, [val.ir for val in vals])
                return context.get_dummy_value()
            returned = emit(s, *constants, *vals)
            return context.get_dummy_value() if returned is None else returned.ir

        return result(*arguments[:n_constants], *kinds), codegen

    return intrinsic(prefer_literal=True)(define) if n_constants else intrinsic(define)
