"""Rounding that knows the second moments H = E[x xT] of a matrix's input, on ggml's grids.

The loss of rounding a row w to q is (w - q) H (w - q)T: by how much the product with x is off, squared, in the mean.
`_feed_back` rounds one column after another, and changes those right of it so that they make up for the error (GPTQ,
Frantar et al., arXiv:2210.17323). `_descend` then changes codes and scales, one at a time, wherever the loss gets less.

Rows are independent of each other. Columns come in blocks of the type. metric.py prepares H.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.codes import SCALES, Codes, pack, unpack
from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import TensorType
from gguf_run.formats.blocks.unpack import INTEGER_FORMS
from gguf_run.formats.compiler.deferred import COMPILING
from gguf_run.formats.compiler.jit import njit
from gguf_run.formats.quantizers.metric import Metric
from gguf_run.formats.quantizers.quantizer import SEARCHES, quantize

if COMPILING:
    from gguf_run.formats.blocks.scalars import half_bits, half_to_f32

_TILE = 256  # columns of a product that stay in a core's cache
_FMA = {"contract"}  # a product and a sum may become one instruction


@njit(fastmath=_FMA)
def _subtract_product(x: Any, first: int, a: Any, b: Any, row: int) -> None:
    """x[:, first:] -= a @ b[row : row + len(a.T), first:]. The number of columns of a is a multiple of 4."""
    for left in range(first, x.shape[1], _TILE):
        right = min(x.shape[1], left + _TILE)
        for r in range(len(x)):
            to = x[r, left:right]
            for j in range(0, a.shape[1], 4):
                a0, a1, a2, a3 = a[r, j], a[r, j + 1], a[r, j + 2], a[r, j + 3]
                b0, b1 = b[row + j, left:right], b[row + j + 1, left:right]
                b2, b3 = b[row + j + 2, left:right], b[row + j + 3, left:right]
                for k in range(right - left):
                    to[k] -= a0 * b0[k] + a1 * b1[k] + a2 * b2[k] + a3 * b3[k]


@njit(forceinline=True)
def _value(code: Any, levels: Any) -> Any:
    """What a code means, in units of the scale."""
    return np.float32(code) if len(levels) == 0 else levels[code]


@njit(forceinline=True)
def _nearest(x: Any, levels: Any, low: int, high: int) -> Any:
    """The code whose value is nearest to x: a whole number of low .. high, or an index of levels, if there are any."""
    best: Any = np.int64(min(max(np.rint(x), np.float32(low)), np.float32(high)))
    if len(levels):
        best = 0
        for code in range(1, len(levels)):
            if abs(x - levels[code]) < abs(x - levels[best]):
                best = code
    return best


@njit(fastmath=_FMA)
def _feed_back(w: Any, first: int, d: Any, m: Any, u: Any, code: Any, levels: Any, low: int, high: int) -> None:
    """Round the block of columns from `first` on, and let the columns right of each make up for its errors.

    w: f32[n_rows, n], changed. d, m: f32[n_rows, groups]. code: i8[n_rows, block], filled.
    """
    block, group = code.shape[1], code.shape[1] // d.shape[1]
    errors = np.empty(code.shape, np.float32)
    for r in range(len(w)):
        x = w[r, first : first + block]
        for j in range(block):
            scale, minimum = d[r, j // group], m[r, j // group]
            inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
            best = _nearest((x[j] - minimum) * inverse, levels, low, high)
            row = u[first + j, first : first + block]
            error = (x[j] - (scale * _value(best, levels) + minimum)) / row[j]
            code[r, j], errors[r, j] = best, error
            for k in range(j + 1, block):
                x[k] -= error * row[k]
    _subtract_product(w, first + block, errors, u, first)


@njit(fastmath=_FMA)
def _descend_codes(g: Any, h: Any, code: Any, scale: Any, factor: Any, change: Any, levels: Any, span: Any) -> None:
    """Move the codes of a block of one row to where the loss is least, one after another.

    g: f32[block], (w - q) H. h: f32[block, block]. change: f32[block], q is increased by it. Both are kept up to date.
    """
    group = len(code) // len(scale)
    for j in range(len(code)):
        d, value = factor * scale[j // group], _value(code[j], levels)
        if d != 0:
            best = _nearest(value + g[j] / (h[j, j] * d), levels, span[0], span[1])
            step = d * (_value(best, levels) - value)
            if step * (2 * g[j] - step * h[j, j]) > 0:
                code[j] = best
                change[j] += step
                for k in range(len(g)):
                    g[k] -= step * h[j, k]


@njit(fastmath=_FMA)
def _descend_number(now: Any, limits: Any, v: Any, first: int, end: int, g: Any, h: Any, change: Any) -> Any:
    """Return the number with the least loss, where an increase by t adds t * v to the weights first .. end of a block.

    limits: f32[2], those of a whole number; f32[0] for a number that is stored as f16.
    """
    product, slope, curve = np.zeros(len(g), np.float32), np.float32(0), np.float32(0)
    for j in range(first, end):
        for k in range(len(g)):
            product[k] += v[j] * h[j, k]
    for j in range(first, end):
        slope += v[j] * g[j]
        curve += v[j] * product[j]
    best = now + slope / curve if curve > 0 else now
    if len(limits):
        best = min(max(np.float32(np.rint(best)), limits[0]), limits[1])
    else:
        best = half_to_f32(np.int64(half_bits(best)))
    step = best - now
    if not step * (2 * slope - step * curve) > 0:
        return now
    for k in range(len(g)):
        g[k] -= step * product[k]
    for j in range(first, end):
        change[j] += step * v[j]
    return best


@njit(fastmath=_FMA)
def _descend_scales(g: Any, h: Any, change: Any, values: Any, numbers: Any, factor: Any, limits: Any) -> Any:
    """Improve the scales or the minimums of a block of one row, and return the factor that they share.

    values: f32[block], what one unit of the numbers adds to the weights, in units of the factor.
    limits: f32[2], those of the numbers; f32[0] if they are stored as f16, without a factor.
    """
    group = len(values) // len(numbers)
    v = factor * values
    for a in range(len(numbers)):
        numbers[a] = _descend_number(numbers[a], limits, v, a * group, a * group + group, g, h, change)
    if len(limits):
        for j in range(len(v)):
            v[j] = numbers[j // group] * values[j]
        factor = _descend_number(factor, limits[:0], v, 0, len(v), g, h, change)
    return factor


@njit(fastmath=_FMA)
def _descend(
    g: Any, first: int, h: Any, code: Any, scale: Any, minimum: Any, factor: Any, levels: Any, span: Any, limits: Any,
    refit: bool,
) -> None:  # fmt: skip
    """Improve the codes, then the scales, of the block of columns from `first` on.

    g: f32[n_rows, n], (w - q) H, kept up to date. The arrays after h have the block's columns of `Codes` alone.
    """
    own = h[first : first + code.shape[1], first : first + code.shape[1]].copy()
    changes = np.zeros(code.shape, np.float32)
    values = np.empty(code.shape[1], np.float32)
    for r in range(len(g)):
        here, change = g[r, first : first + code.shape[1]].copy(), changes[r]
        _descend_codes(here, own, code[r], scale[r], factor[r, 0], change, levels, span)
        if refit:
            for j in range(len(values)):
                values[j] = _value(code[r, j], levels)
            factor[r, 0] = _descend_scales(here, own, change, values, scale[r], factor[r, 0], limits)
            if minimum.shape[1]:
                values[:] = 1
                factor[r, 1] = _descend_scales(here, own, change, values, minimum[r], factor[r, 1], limits)
    _subtract_product(g, 0, changes, h, first)


def round_rows(
    x: NDArray[np.float32], type: TensorType, metric: Metric, sweeps: int = 0, refit: bool = True
) -> NDArray[np.uint8]:
    """Return the blocks of rows f32[n_rows, n], uint8[n_rows, row_bytes].

    The scales of a block are those of ggml's search, weighted by importance, for its columns as the errors left them.
    Then the columns are swept so many times: codes are improved, and scales, too, if `refit`. Types whose scales are
    floats of 8 bits keep them.
    FormatError for what `quantize` does not take.
    """
    form, block, (n_rows, n) = INTEGER_FORMS[type.name], metric.block, x.shape
    levels = form.grid()[:16].astype(np.float32)
    w = x.reshape(n_rows, -1, block)[:, metric.order].reshape(n_rows, n)
    importance, rest = metric.importance, w.copy()
    parts: list[Codes] = []
    for first in range(0, n, block):
        here = slice(first, first + block)
        part = unpack(quantize(rest[:, here], type, importance[here], 1, type.name in SEARCHES), type)
        if not form.shared and type.name not in SEARCHES:
            part = replace(part, scale=part.scale[:, :1].copy())  # ternary types store one, which `unpack` repeats
        _feed_back(rest, first, *part.steps(), metric.factor, part.code, levels, form.q_min, form.q_max)
        parts.append(part)
    if sweeps:
        span, limits = np.array([form.q_min, form.q_max]), np.array(SCALES.get(type.name, ()), np.float32)
        g = np.zeros_like(w)
        error = np.concatenate([dequantize(pack(part), type) for part in parts], axis=1) - w
        _subtract_product(g, 0, error, metric.moments, 0)
        for i in list(range(len(parts))) * sweeps:
            part = parts[i]
            stored = part.code, part.scale, part.minimum, part.factor[:, 0]
            _descend(g, i * block, metric.moments, *stored, levels, span, limits, refit and type.name not in SEARCHES)
    blocks = np.empty((n_rows, len(parts), type.type_size), np.uint8)
    blocks[:, metric.order] = np.stack([pack(part) for part in parts], axis=1)
    return blocks.reshape(n_rows, -1)
