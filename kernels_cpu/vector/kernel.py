"""A function that emits SIMD code becomes an intrinsic of numba. Only this file knows the table of instruction sets."""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from gguf_run.formats.compiler.jit import types
from gguf_run.kernels_cpu.vector import isa
from gguf_run.kernels_cpu.vector.lowering import LOWERINGS
from gguf_run.kernels_cpu.vector.simd import Simd, Val


def kernel(signature: Any, emit: Callable[..., Val | None]) -> tuple[Any, Callable[..., ir.Value]]:
    """Return what an @intrinsic must return: `emit(s, *arguments)` becomes the code of a call with this signature.

    signature: of numba's types. emit does not get literal arguments (compile-time constants): the intrinsic closes over
    their values.
    """

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        current = isa.current()
        s = Simd(builder, current, LOWERINGS[current.dot])
        values = [Val(s, a) for a, t in zip(arguments, sig.args, strict=True) if not isinstance(t, types.Literal)]
        result = emit(s, *values)
        return result.ir if result is not None else context.get_dummy_value()

    return signature, codegen
