"""What kernels need and Python lacks: typed views of addresses, atomics, pauses of threads, calls of addresses."""

from typing import Any

import numpy as np
from llvmlite import ir

from gguf_run.formats.compiler.jit import carray, cgutils, intrinsic, njit, types

_I64 = ir.IntType(64)


def _place(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Return an address as a pointer to an int64."""
    return builder.inttoptr(address, _I64.as_pointer())


@intrinsic
def pointer(typing_context, address):
    """An integer address as void*."""
    pointer_type = ir.IntType(8).as_pointer()
    return types.voidptr(types.intp), lambda context, builder, sig, args: builder.inttoptr(args[0], pointer_type)


@njit(inline="always")
def f32_at(address, n):
    """float32[n] at an address."""
    return carray(pointer(address), n, np.float32)


@njit(inline="always")
def f64_at(address, n):
    """float64[n] at an address."""
    return carray(pointer(address), n, np.float64)


@njit(inline="always")
def i32_at(address, n):
    """int32[n] at an address."""
    return carray(pointer(address), n, np.int32)


@njit(inline="always")
def i64_at(address, n):
    """int64[n] at an address."""
    return carray(pointer(address), n, np.int64)


@intrinsic
def atomic_add(typing_context, address, value):
    """Add to the int64 at an address; return its old value. All atomics here are sequentially consistent."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _place(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.intp, types.int64), codegen


@intrinsic
def atomic_load(typing_context, address):
    """The int64 at an address."""
    signature = types.int64(types.intp)
    return signature, lambda context, builder, sig, args: builder.load_atomic(_place(builder, args[0]), "seq_cst", 8)


@intrinsic
def atomic_store(typing_context, address, value):
    """Set the int64 at an address."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _place(builder, args[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@intrinsic
def atomic_swap_if(typing_context, address, expected, new):
    """Set the int64 at an address to `new` if it is `expected`; return whether it was."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        swapped = builder.cmpxchg(_place(builder, args[0]), args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(swapped, 1)

    return types.boolean(types.intp, types.int64, types.int64), codegen


_PAUSE = {"x86_64": "llvm.x86.sse2.pause", "aarch64": "llvm.aarch64.hint", "arm64": "llvm.aarch64.hint"}


@intrinsic
def pause(typing_context):
    """Tell the CPU that this is a loop that waits."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        name = _PAUSE.get(builder.module.triple.split("-")[0])
        if name:
            hint = [ir.Constant(ir.IntType(32), 1)] if "aarch64" in name else []
            signature = ir.FunctionType(ir.VoidType(), [value.type for value in hint])
            builder.call(cgutils.get_or_insert_function(builder.module, signature, name), hint)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def yield_cpu(typing_context):
    """Let another thread run, if one waits for this core."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        name = "SwitchToThread" if "windows" in builder.module.triple else "sched_yield"
        signature = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_op(typing_context, function, args, piece, ith, nth):
    """Call function(args, piece, ith, nth). function: the address of an op's compiled function."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, a: Any) -> Any:
        signature = ir.FunctionType(_I64, [_I64] * 4)
        return builder.call(builder.inttoptr(a[0], signature.as_pointer()), a[1:])

    return types.intp(*[types.intp] * 5), codegen
