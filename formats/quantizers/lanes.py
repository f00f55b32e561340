"""Sixteen floats side by side as one numba type: a scalar algorithm becomes SIMD when its types change.

A quantizer must sum in the reference's order. Therefore a sum cannot be split over the lanes of a vector. Instead each
lane works on a block of its own, with the operations of the scalar program in their order; `where` replaces `if`. The
values are LLVM vectors. An operator is one instruction with AVX-512, and two or four where registers are narrower.

    v = rows[i] * scale + 1          # rows: CPointer(F32), e.g. of scratch_f32(n); numbers are broadcast
    v = where(v > limit, limit, v)
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.types.misc import CPointer
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

LANES = 16


class Lanes(types.Type):
    """numba's type of a vector of LANES numbers, or of the LANES booleans of a comparison."""

    def __init__(self, dtype: types.Type) -> None:
        self.dtype = dtype
        super().__init__(f"Lanes({dtype})")


F32, I32, U8, MASK = (Lanes(t) for t in (types.float32, types.int32, types.uint8, types.boolean))
_IR = {F32: ir.FloatType(), I32: ir.IntType(32), U8: ir.IntType(8), MASK: ir.IntType(1)}


def _vector(lanes: Lanes) -> ir.VectorType:
    return ir.VectorType(_IR[lanes], LANES)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, _vector(lanes))


def _instruction(name: str, *first: str) -> Callable[[Any, Any, Any], Any]:
    return lambda builder, a, b: getattr(builder, name)(*first, a, b)


# operator -> (type of both operands -> instruction; type of the result, None: that of the operands)
_Forms = Mapping[Lanes, Callable[[Any, Any, Any], Any]]
_OPERATORS: Mapping[Any, tuple[_Forms, Lanes | None]] = {
    operator.add: ({F32: _instruction("fadd"), I32: _instruction("add")}, None),
    operator.iadd: ({F32: _instruction("fadd"), I32: _instruction("add")}, None),  # a += b
    operator.sub: ({F32: _instruction("fsub"), I32: _instruction("sub")}, None),
    operator.mul: ({F32: _instruction("fmul"), I32: _instruction("mul")}, None),
    operator.truediv: ({F32: _instruction("fdiv")}, None),
    operator.and_: ({I32: _instruction("and_"), MASK: _instruction("and_")}, None),
    operator.or_: ({I32: _instruction("or_"), MASK: _instruction("or_")}, None),
    operator.lshift: ({I32: _instruction("shl")}, None),
    operator.rshift: ({I32: _instruction("ashr")}, None),  # the sign comes in from the left
    **{
        relation: ({F32: _instruction("fcmp_ordered", sign), I32: _instruction("icmp_signed", sign)}, MASK)
        for relation, sign in ((operator.lt, "<"), (operator.gt, ">"), (operator.le, "<="), (operator.ge, ">="))
    },
    operator.eq: ({F32: _instruction("fcmp_ordered", "=="), I32: _instruction("icmp_signed", "==")}, MASK),
    operator.ne: ({F32: _instruction("fcmp_unordered", "!="), I32: _instruction("icmp_signed", "!=")}, MASK),
}


def _spread(context: Any, builder: ir.IRBuilder, value: Any, source: types.Type, lanes: Lanes) -> Any:
    """Return a value as lanes. Each lane gets a copy of a number, cast to the element type."""
    if isinstance(source, Lanes):
        return value
    undefined = ir.Constant(_vector(lanes), ir.Undefined)
    number = context.cast(builder, value, source, lanes.dtype)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_vector(I32), [0] * LANES))


def _register(relation: Any, forms: _Forms, result: Lanes | None) -> None:
    def operand(a: Any, b: Any) -> Lanes | None:
        """Return the lanes' type of an operation on two equal types, or on lanes and a number; else None."""
        lanes = a if isinstance(a, Lanes) else b
        return lanes if lanes in forms and all(x == lanes or isinstance(x, types.Number) for x in (a, b)) else None

    @type_callable(relation)
    def typing(context: Any) -> Any:
        def typer(a: Any, b: Any) -> Any:
            return operand(a, b) and (result or operand(a, b))

        return typer

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        lanes = operand(*sig.args)
        assert lanes is not None
        a, b = (_spread(context, builder, arg, type, lanes) for arg, type in zip(args, sig.args, strict=True))
        return forms[lanes](builder, a, b)

    for pair in ((Lanes, Lanes), (Lanes, types.Number), (types.Number, Lanes)):
        lower_builtin(relation, *pair)(lower)


for _relation, (_forms, _result) in _OPERATORS.items():
    _register(_relation, _forms, _result)


@intrinsic
def where(typing_context: Any, mask: Any, a: Any, b: Any) -> Any:
    """a in the lanes where mask is true, b in the others. One of a and b may be a number."""
    lanes = a if isinstance(a, Lanes) else b

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        values = (_spread(context, builder, args[i], sig.args[i], lanes) for i in (1, 2))
        return builder.select(args[0], *values)

    return lanes(mask, a, b), codegen


def _unary(result: Lanes, emit: Callable[[ir.IRBuilder, Any], Any], doc: str) -> Any:
    """Return an intrinsic of one argument: lanes, or a number that is repeated in all lanes."""

    def function(typing_context: Any, x: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            return emit(builder, _spread(context, builder, args[0], sig.args[0], result))

        return result(x), codegen

    function.__doc__ = doc
    return intrinsic(function)


def _call(name: str) -> Callable[[ir.IRBuilder, Any], Any]:
    """Return a function that emits a call of LLVM's function `name` of one vector of f32."""

    def emit(builder: ir.IRBuilder, x: Any) -> Any:
        function = ir.FunctionType(x.type, [x.type])
        return builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.{name}.v{LANES}f32"), [x])

    return emit


f32 = _unary(F32, lambda builder, x: x, "A number in every lane.")
fabs = _unary(F32, _call("fabs"), "Absolute value.")
sqrt = _unary(F32, _call("sqrt"), "Square root, correctly rounded.")
bits = _unary(I32, lambda builder, x: builder.bitcast(x, _vector(I32)), "The bits of floats.")
from_bits = _unary(F32, lambda builder, x: builder.bitcast(x, _vector(F32)), "The floats with these bits.")
to_int = _unary(I32, lambda builder, x: builder.fptosi(x, _vector(I32)), "Whole floats as integers.")
to_byte = _unary(U8, lambda builder, x: builder.trunc(x, _vector(U8)), "The low eight bits of integers.")
to_float = _unary(F32, lambda builder, x: builder.sitofp(x, _vector(F32)), "Integers as floats.")


@intrinsic
def any_lane(typing_context: Any, mask: Any) -> Any:
    """Whether mask is true in any lane."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        word = ir.IntType(LANES)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], word), ir.Constant(word, 0))

    return types.boolean(mask), codegen


def _scratch(lanes: Lanes) -> Any:
    def scratch(typing_context: Any, n: Any) -> Any:
        """Memory on the stack for n vectors, not initialized. n is a literal."""
        if not isinstance(n, types.IntegerLiteral):
            return None

        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            return cgutils.alloca_once(builder, _vector(lanes), size=n.literal_value)

        return CPointer(lanes)(n), codegen

    return intrinsic(prefer_literal=True)(scratch)


scratch_f32, scratch_u8 = _scratch(F32), _scratch(U8)


@intrinsic
def offset(typing_context: Any, vectors: Any, n: Any) -> Any:
    """Return the pointer to vectors[n]."""
    return vectors(vectors, n), lambda context, builder, sig, args: builder.gep(args[0], [args[1]])


@intrinsic
def numbers(typing_context: Any, vectors: Any) -> Any:
    """Return a pointer to the single numbers of vectors in memory: lane k of vector i is number i * LANES + k."""
    pointer = CPointer(vectors.dtype.dtype)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(pointer))

    return pointer(vectors), codegen
