"""Copies of rows: embeddings of token ids, and the rows whose logits are wanted."""

import functools
from typing import Any

import numpy as np

from gguf_run.formats.blocks.coded import CODED_FORMS
from gguf_run.formats.blocks.unpack import INTEGER_FORMS
from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import carray, clone
from gguf_run.kernels_cpu.replay.op import TapeOp, n_rows, row_op

if COMPILING:
    from gguf_run.formats.blocks.coded import decode
    from gguf_run.formats.blocks.scalars import half_to_f32
    from gguf_run.kernels_cpu.vector.native import f32_at, i32_at, i64_at, pointer

# Placeholders: `clone` replaces them in _embed_blocks.
unpack: Any = None
BLOCK_SIZE = TYPE_SIZE = GROUP = N_CODES = 0
HAS_MINIMUM = False

FLOAT_TABLES = ("F32", "F16", "BF16")
_FIELDS = "rows ids table row_bytes n out out_stride grid n_grid"


def _embed_blocks(a, first, end):
    """out[t] = scale * row ids[t] of a table of a block-quantized type, stored as in the file."""
    ids = i32_at(a.ids, n_rows(a))
    q = np.empty(BLOCK_SIZE, np.int8)
    scale, minimum = np.empty(BLOCK_SIZE // GROUP, np.float32), np.zeros(BLOCK_SIZE // GROUP, np.float32)
    factor = np.ones(2, np.float32)
    grid = carray(pointer(a.grid), a.n_grid, np.int8)
    for t in range(first, end):
        src = carray(pointer(a.table + ids[t] * a.row_bytes), a.row_bytes, np.uint8)
        for b in range(a.n // BLOCK_SIZE):
            unpack(src, b * TYPE_SIZE, q, scale, minimum, factor, grid)
            out = f32_at(a.out + t * a.out_stride + b * BLOCK_SIZE * 4, BLOCK_SIZE)
            for i in range(BLOCK_SIZE):
                value = factor[0] * scale[i // GROUP] * q[i]
                out[i] = (value + factor[1] * minimum[i // GROUP] if HAS_MINIMUM else value) * a.scale


def _embed_coded(a, first, end):
    """out[t] = scale * row ids[t] of a table of a coded type, stored as blocks."""
    ids = i32_at(a.ids, n_rows(a))
    for t in range(first, end):
        out = f32_at(a.out + t * a.out_stride, a.n)
        row = carray(pointer(a.table + ids[t] * a.row_bytes), a.row_bytes, np.uint8)
        decode(row, TYPE_SIZE, f32_at(a.grid, N_CODES), out)
        for i in range(a.n):
            out[i] *= a.scale


@functools.cache
def _embed_floats(kind: int) -> TapeOp:
    """Return the op out[t] = scale * row ids[t] of a table of floats. kind: place in FLOAT_TABLES."""

    @row_op(_FIELDS, "scale", grain=4)
    def embed_floats(a, first, end):
        ids = i32_at(a.ids, n_rows(a))
        for t in range(first, end):
            row = pointer(a.table + ids[t] * a.row_bytes)
            wide, half = carray(row, a.n, np.float32), carray(row, a.n, np.uint16)
            out = f32_at(a.out + t * a.out_stride, a.n)
            for i in range(a.n):
                if kind == 0:
                    value = wide[i]
                elif kind == 1:
                    value = half_to_f32(np.int64(half[i]))
                else:
                    value = np.uint32(np.uint32(half[i]) << 16).view(np.float32)
                out[i] = value * a.scale

    return embed_floats


@functools.cache
def embed(type_name: str) -> TapeOp:
    """Return the op out[t] = scale * row ids[t] of a table of one type: of blocks, F32, F16 or BF16."""
    form = INTEGER_FORMS.get(type_name)
    if coded := CODED_FORMS.get(type_name):
        function = clone(_embed_coded, type_name, TYPE_SIZE=coded.type.type_size, N_CODES=len(coded.table))
        return row_op(_FIELDS, "scale", grain=4)(function)
    if form is None:
        return _embed_floats(FLOAT_TABLES.index(type_name))
    function = clone(_embed_blocks, type_name, **form.constants)
    return row_op(_FIELDS, "scale", grain=4)(function)


@row_op("rows index n x x_stride out out_stride", grain=4)
def copy_rows(a, first, end):
    """out[i] = x[index[i]]."""
    index = i64_at(a.index, n_rows(a))
    for i in range(first, end):
        x, out = f32_at(a.x + index[i] * a.x_stride, a.n), f32_at(a.out + i * a.out_stride, a.n)
        for k in range(a.n):
            out[k] = x[k]
