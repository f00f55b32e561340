"""Compiles a function to one object file with a C entry, by numba. machine_code.py loads it."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from gguf_run.formats.compiler.machine_code import ENTRY, Code, Kind, n_words

_I64 = ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()


def compile_entry(function: Callable[..., Any], kinds: tuple[Kind, ...], options: dict[str, Any]) -> Code | None:
    """Compile a function for arguments of these kinds, to what `Loader.load` takes.

    None if the function does not return a number, or needs numba's runtime.
    """
    compiler, registry = _numba("core.compiler"), _numba("core.registry")

    class Compiler(_numba("core.dispatcher")._FunctionCompiler):  # type: ignore[misc]
        def _customize_flags(self, flags: Any) -> Any:
            flags.no_cpython_wrapper = flags.no_cfunc_wrapper = flags.no_compile = True
            return flags

    options = {"nopython": True, **options}
    with _numba("core.compiler_lock").global_compiler_lock:
        types = tuple(_numba_type(kind) for kind in kinds)
        found = Compiler(function, registry.cpu_target, options, {}, compiler.Compiler).compile(types, None)
        library = found.library
        result = _add_entry(found, kinds)
        if result is None:
            return None
        module = library._final_module
        for other in dict.fromkeys(library._linking_libraries):
            module.link_in(other._get_module_for_linking(), preserve=True)
        for part in module.functions:
            if not part.is_declaration and part.name != ENTRY:
                part.linkage = "internal"  # can be inlined or dropped, and clashes with no name of another object
        library._optimize_final_module()
        missing = [part.name for part in library._final_module.functions if part.is_declaration]
        if any(name.startswith(("NRT_", "numba_")) for name in missing):
            return None
        return Code(result, library.codegen._tm.emit_object(library._final_module))


def _numba(module: str) -> Any:
    return importlib.import_module(f"numba.{module}")


def _numba_type(kind: Kind) -> Any:
    types, from_dtype = _numba("core.types"), _numba("np.numpy_support").from_dtype
    if isinstance(kind, np.dtype):
        return types.CPointer(from_dtype(kind))
    if isinstance(kind, tuple):
        return types.Array(from_dtype(np.dtype(kind[0])), kind[1], "C")
    return {"i8": types.int64, "f8": types.float64, "b1": types.boolean}[kind]


def _add_entry(found: Any, kinds: tuple[Kind, ...]) -> str | None:
    """Add the entry to the library of a compiled function. Return the kind of its result, None if it is no number."""
    types = _numba("core.types")
    context, fndesc, result = found.target_context, found.fndesc, found.signature.return_type
    kind = "none" if result == types.none else "b1" if result == types.boolean else ""
    kind = kind or ("i8" if isinstance(result, types.Integer) else "f8" if isinstance(result, types.Float) else "")
    if not kind:
        return None
    module = context.create_module(ENTRY)
    _define_memory(module)
    inner = ir.Function(module, context.call_conv.get_function_type(result, fndesc.argtypes), fndesc.llvm_func_name)
    is_op = isinstance(kinds[0], np.dtype) if kinds else False
    plain = [ir.DoubleType() if kind == "f8" else _I64 for kind in kinds for _ in range(n_words(kind))]
    entry_type = ir.FunctionType(_I64, plain) if is_op else ir.FunctionType(ir.VoidType(), [*plain, _I64.as_pointer()])
    entry = ir.Function(module, entry_type, ENTRY)
    builder = ir.IRBuilder(entry.append_basic_block())
    words = iter(entry.args)
    values = [
        _argument(context, builder, type_, [next(words) for _ in range(n_words(kind))])
        for type_, kind in zip(fndesc.argtypes, kinds, strict=True)
    ]
    status, value = context.call_conv.call_function(builder, inner, result, fndesc.argtypes, values)
    wide = types.float64 if kind == "f8" else types.int64
    number = _I64(0) if kind == "none" else context.cast(builder, value, result, wide)
    if is_op:
        builder.ret(number)
    else:
        outcome = entry.args[-1]
        builder.store(builder.zext(status.is_error, _I64), outcome)
        builder.store(builder.bitcast(number, _I64), builder.gep(outcome, [_I64(1)]))
        builder.ret_void()
    found.library.add_ir_module(module)
    return kind


def _argument(context: Any, builder: ir.IRBuilder, type_: Any, words: list[ir.Value]) -> ir.Value:
    """Make an argument for a compiled function from the words that the entry got."""
    types = _numba("core.types")
    if isinstance(type_, types.CPointer):
        return builder.inttoptr(words[0], context.get_value_type(type_))
    if not isinstance(type_, types.Array):
        return builder.trunc(words[0], ir.IntType(1)) if type_ == types.boolean else words[0]
    array = context.make_array(type_)(context, builder)
    size = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(type_.dtype)))
    shape, strides = words[1:], [size]
    for n in shape[:0:-1]:
        strides.insert(0, builder.mul(strides[0], n))
    data = builder.inttoptr(words[0], array.data.type)
    _numba("np.arrayobj").populate_array(array, data=data, shape=shape, strides=strides, itemsize=size, meminfo=None)
    return array._getvalue()


def _define_memory(module: ir.Module) -> None:
    """Define what numba's runtime does for arrays that a function makes: allocate them, and free the last reference.

    An array has a head of five words (word 0: references, word 3: address of the data). The data follows.
    """
    malloc = ir.Function(module, ir.FunctionType(_BYTES, [_I64]), "malloc")
    free = ir.Function(module, ir.FunctionType(ir.VoidType(), [_BYTES]), "free")
    allocate_type = ir.FunctionType(_BYTES, [_I64, ir.IntType(32)])
    allocate = ir.Function(module, allocate_type, "NRT_MemInfo_alloc_aligned")
    builder = ir.IRBuilder(allocate.append_basic_block())
    size, align = allocate.args[0], builder.zext(allocate.args[1], _I64)
    memory = builder.call(malloc, [builder.add(builder.add(size, align), _I64(40))])
    head = builder.bitcast(memory, _I64.as_pointer())
    start = builder.ptrtoint(memory, _I64)
    with builder.if_then(builder.icmp_unsigned("==", start, _I64(0)), likely=False):
        builder.ret(memory)
    data = builder.and_(builder.add(builder.add(start, _I64(39)), align), builder.neg(align))
    builder.store(_I64(1), head)
    builder.store(data, builder.gep(head, [_I64(3)]))
    builder.ret(memory)
    release = ir.Function(module, ir.FunctionType(ir.VoidType(), [_BYTES]), "NRT_MemInfo_call_dtor")
    builder = ir.IRBuilder(release.append_basic_block())
    builder.call(free, release.args)
    builder.ret_void()
