"""GPTQ, Marlin, AWQ, MLX and compressed-tensors: integers of 2 to 8 bits packed into words of 32.

A word holds codes of one output, of inputs that follow each other. A word of AWQ GEMM holds codes of one input, of
outputs that follow each other. GPTQ, Marlin and AWQ GEMM store the matrix transposed.

References: AutoGPTQ 0.7 and GPTQModel 7 (QuantLinear.pack), AutoAWQ 0.2 (WQLinear_GEMM, WQLinear_GEMV),
compressed-tensors 0.20 (pack_to_int32), IST-DASLab/marlin, mlx.core.quantize.
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.gguf.mapped import quoted
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.runtime.convert.quantized.grid import Grid, GridNumbers, unpack_codes
from gguf_run.runtime.convert.quantized.parts import FLOATS, Parts, even_groups, numbers, wrong
from gguf_run.runtime.convert.quantized.scaled import fp4

Codes = NDArray[np.uint8]
_WORD = 32  # bits of a word; also so many codes of any width fill whole words
_WORD_MAX = (1 << _WORD) - 1
_AWQ_NIBBLE = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where in a word column i of eight is: even columns come first
_MARLIN_COLUMNS = 64  # outputs of a tile of 1024 codes (16 inputs)


def _span(first: int, end: int, size: int) -> tuple[slice, slice]:
    """Return the tiles of `size` outputs that hold the outputs first .. end, and where in those tiles they are."""
    start = first // size
    return slice(start, -(-end // size)), slice(first - start * size, end - start * size)


def gptq(parts: Parts) -> list[Tensor]:
    """Return the weight of these tensors:

    .qweight   I32[n_in * n_bits / 32, n_out]
    .qzeros    I32[n_group, n_out * n_bits / 32]
    .scales    float[n_group, n_out]
    .g_idx     I32[n_in], the group of each input; in any order if columns were quantized by activation (desc_act)
    """
    qweight, scales = parts.need(".qweight", "I32", ndim=2), parts.need(".scales", *FLOATS, ndim=2)
    qzeros = parts.need(".qzeros", "I32", ndim=2)
    n_group, n_out = scales.shape
    n_bits, rest = divmod(qzeros.shape[1] * _WORD, n_out)
    fits = rest == 0 and 2 <= n_bits <= 8 and qweight.shape[0] % n_bits == 0
    if not fits or qweight.shape[1] != n_out or qzeros.shape[0] != n_group:
        raise wrong(qweight, f"words of 2 to 8 bits that go with qzeros {qzeros.shape} and scales {scales.shape}")
    n_in = qweight.shape[0] // n_bits * _WORD
    groups = parts.groups(".g_idx", n_in, n_group, scales)
    # Version 1 stores zero points less one. It subtracts from whole words; adding to whole words undoes the borrows.
    v2 = parts.config.get("checkpoint_format") == "gptq_v2" or "gptqmodel" in str(parts.config.get("packing_format"))
    ones = np.uint32(0 if v2 else _WORD_MAX // ((1 << n_bits) - 1))

    def codes(first: int, end: int) -> Codes:
        return unpack_codes(qweight.array()[:, first:end].T, n_bits)

    def read(first: int, end: int) -> GridNumbers:
        tiles, wanted = _span(first, end, _WORD)
        words = qzeros.array()[:, tiles.start * n_bits : tiles.stop * n_bits].view(np.uint32)
        if n_bits in (2, 4, 8):
            zero = unpack_codes(words + ones, n_bits)
        else:
            zero = (unpack_codes(words, n_bits) + np.uint8(not v2)) & np.uint8((1 << n_bits) - 1)
        zero = zero[:, wanted].T.astype(np.float32)
        return GridNumbers(numbers(scales.array()[:, first:end].T, scales.dtype), zero)

    return [parts.weight(f"{parts.base}.weight", Grid(n_out, n_bits, groups, codes, read), qweight)]


@functools.cache
def _marlin_order() -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the places of stored codes int[1024] in 16 x 64, of scales of groups int[64], of scales of rows int[32].

    It is the order in which the 32 threads of a tensor core take their operands. In each of four tiles of 16 x 16 that
    lie side by side, thread i has column i / 4 of both halves, and rows 2 (i % 4) + {0, 1, 8, 9}.
    """
    thread, tile, nibble = np.ix_(range(32), range(4), [0, 2, 4, 6, 1, 3, 5, 7])
    half, step = nibble // 4, nibble % 4
    row = 2 * (thread % 4) + step % 2 + 8 * (step // 2)
    codes = (256 * tile + 16 * row + thread // 4 + 8 * half).reshape(-1)
    i, j = np.ix_(range(8), range(8))
    grouped = (i + 8 * j).reshape(-1)
    single = (2 * np.arange(4)[:, None] + np.array([0, 1, 8, 9, 16, 17, 24, 25])).reshape(-1)
    return codes, grouped, single


def marlin(parts: Parts) -> list[Tensor]:
    """Return the weight of .B I32[n_in / 16, 2 n_out] and .s float[n_group, n_out]: 4 bits, zero point 8."""
    b, s = parts.need(".B", "I32", ndim=2), parts.need(".s", *FLOATS, ndim=2)
    n_in, n_out = 16 * b.shape[0], b.shape[1] // 2
    if s.shape[1] != n_out or b.shape[1] % (2 * _MARLIN_COLUMNS):
        raise wrong(b, f"[n_in / 16, 2 n_out], n_out a multiple of {_MARLIN_COLUMNS} that goes with s {s.shape}")
    order, grouped, single = _marlin_order()
    scale_order = single if s.shape[0] == 1 else grouped

    def codes(first: int, end: int) -> Codes:
        tiles, wanted = _span(first, end, _MARLIN_COLUMNS)
        stored = unpack_codes(b.array()[:, tiles.start * 128 : tiles.stop * 128], 4).reshape(n_in // 16, -1, 1024)
        plain = np.empty_like(stored)
        plain[..., order] = stored
        outputs = plain.reshape(n_in // 16, -1, 4, 16, 16).transpose(1, 2, 4, 0, 3)
        return np.ascontiguousarray(outputs.reshape(-1, n_in)[wanted])

    def read(first: int, end: int) -> GridNumbers:
        tiles, wanted = _span(first, end, _MARLIN_COLUMNS)
        found = numbers(s.array()[:, tiles.start * _MARLIN_COLUMNS : tiles.stop * _MARLIN_COLUMNS], s.dtype)
        stored = found.reshape(s.shape[0], -1, len(scale_order))
        plain = np.empty_like(stored)
        plain[..., scale_order] = stored
        scale = plain.reshape(len(stored), -1)[:, wanted].T
        return GridNumbers(scale, np.full_like(scale, 8))

    grid = Grid(n_out, 4, even_groups(n_in, s.shape[0], s), codes, read)
    return [parts.weight(f"{parts.base}.weight", grid, b)]


def awq(parts: Parts) -> list[Tensor]:
    """Return the weight of these tensors, always of 4 bits. GEMV has rows of outputs, see _awq_gemv.

    .qweight   I32[n_in, n_out / 8]
    .qzeros    I32[n_group, n_out / 8]
    .scales    float[n_group, n_out]
    """
    if str(parts.config.get("version")).lower() == "gemv":
        return _awq_gemv(parts)
    qweight, scales = parts.need(".qweight", "I32", ndim=2), parts.need(".scales", *FLOATS, ndim=2)
    (n_group, n_out), n_in = scales.shape, qweight.shape[0]
    if qweight.shape[1] * 8 != n_out:
        raise wrong(qweight, f"[n_in, {n_out / 8:g}] (4 bits, scales {scales.shape})")
    qzeros = parts.need(".qzeros", "I32", shape=(n_group, n_out // 8))

    def columns(words: NDArray[Any], first: int, end: int) -> Codes:
        """Return columns first .. end of packed words[rows, n_out / 8], as rows."""
        tiles, wanted = _span(first, end, 8)
        octets = unpack_codes(words[:, tiles], 4).reshape(len(words), -1, 8)[..., _AWQ_NIBBLE]
        return octets.reshape(len(words), -1)[:, wanted].T

    def codes(first: int, end: int) -> Codes:
        return np.ascontiguousarray(columns(qweight.array(), first, end))

    def read(first: int, end: int) -> GridNumbers:
        zero = columns(qzeros.array(), first, end).astype(np.float32)
        return GridNumbers(numbers(scales.array()[:, first:end].T, scales.dtype), zero)

    grid = Grid(n_out, 4, even_groups(n_in, n_group, scales), codes, read)
    return [parts.weight(f"{parts.base}.weight", grid, qweight)]


def _awq_gemv(parts: Parts) -> list[Tensor]:
    """.qweight I32[n_out, n_in / 8]; .qzeros and .scales by row, with columns that fill up words."""
    qweight, scales = parts.need(".qweight", "I32", ndim=2), parts.need(".scales", *FLOATS, ndim=2)
    n_out, n_in = qweight.shape[0], qweight.shape[1] * 8
    size = parts.config.get("q_group_size", parts.config.get("group_size"))
    size = n_in if size == -1 else size
    rows, columns = scales.shape
    if type(size) is not int or size < 1 or rows != n_out or columns * size < n_in or columns % 8:
        raise wrong(scales, f"[{n_out}, at least {n_in} / group size {size}, whole words]")
    n_group = -(-n_in // size)
    qzeros = parts.need(".qzeros", "I32", shape=(n_out, columns // 8))

    def codes(first: int, end: int) -> Codes:
        return unpack_codes(qweight.array()[first:end], 4)

    def read(first: int, end: int) -> GridNumbers:
        zero = unpack_codes(qzeros.array()[first:end], 4)[:, :n_group].astype(np.float32)
        return GridNumbers(numbers(scales.array()[first:end, :n_group], scales.dtype), zero)

    grid = Grid(n_out, 4, np.arange(n_in, dtype=np.int64) // size, codes, read)
    return [parts.weight(f"{parts.base}.weight", grid, qweight)]


def mlx(parts: Parts) -> list[Tensor]:
    """Return the weight of these tensors; scale * code + bias is exact in Q4_1 where half floats hold the numbers.

    .weight    U32[n_out, n_in * n_bits / 32]
    .scales    float[n_out, n_group]
    .biases    float[n_out, n_group]
    """
    scales = parts.need(".scales", *FLOATS, ndim=2)
    own = parts.config.get(parts.base)  # a module may have numbers of its own
    config = {**parts.config, **(own if isinstance(own, dict) else {})}
    n_bits, size, mode = config.get("bits"), config.get("group_size"), config.get("mode", "affine")
    if mode != "affine" or n_bits not in (2, 3, 4, 5, 6, 8) or size not in (32, 64, 128):
        shown = f"{quoted(str(mode))} with {n_bits} bits in groups of {size}"
        known = "affine is, with 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128"
        raise UnsupportedError(
            f"{parts.path}: {quoted(parts.base)} is quantized as {shown}, which is not known: {known}"
        )
    (n_out, n_group), n_in = scales.shape, scales.shape[1] * size
    weight = parts.need(".weight", "U32", shape=(n_out, n_in * n_bits // _WORD))
    biases = parts.need(".biases", *FLOATS, shape=(n_out, n_group))

    def codes(first: int, end: int) -> Codes:
        return unpack_codes(weight.array()[first:end], n_bits)

    def read(first: int, end: int) -> GridNumbers:
        scale, bias = (numbers(part.array()[first:end], part.dtype) for part in (scales, biases))
        return GridNumbers(scale, np.zeros((1, 1), np.float32), bias)

    groups = np.arange(n_in, dtype=np.int64) // size
    return [parts.weight(f"{parts.base}.weight", Grid(n_out, n_bits, groups, codes, read, exact=True), weight)]


def packed(parts: Parts) -> list[Tensor]:
    """Return a weight that compressed-tensors stored as several tensors. A _packed of U8 is NVFP4 or MXFP4.

    _packed       I32[n_out, n_in * n_bits / 32]
    _shape        I64[2]: n_out, n_in
    _scale        float[n_out, n_group or 1] or [1]
    _zero_point   I32[n_out * n_bits / 32, n_group], if the method is asymmetric
    _g_idx        I32[n_in], as GPTQ's
    """
    stored = parts.need("_packed", "I32", "U8", ndim=2)
    if stored.dtype == "U8":
        return fp4(parts, stored)
    n_out, n_in = (int(n) for n in parts.need("_shape", "I32", "I64", shape=(2,)).array())
    scale = parts.need("_scale", *FLOATS)
    table = scale.array().reshape(-1, scale.shape[-1] if len(scale.shape) > 1 else 1)
    widths, n_words = _widths(parts.config.get("config_groups")), stored.shape[1]
    n_bits = next((n for n in widths if type(n) is int and 1 <= n <= 8 and -(-n_in * n // _WORD) == n_words), 0)
    if not n_bits or stored.shape[0] != n_out or len(table) not in (1, n_out):
        raise wrong(stored, f"rows of {n_in} codes of {widths} bits (num_bits) that go with scales {scale.shape}")
    groups = parts.groups("_g_idx", n_in, table.shape[1], scale)
    zeros = parts.get("_zero_point")
    if zeros is not None:
        zeros = parts.need("_zero_point", "I32", shape=(-(-n_out * n_bits // _WORD), table.shape[1]))

    def unpacked(words: NDArray[Any]) -> Codes:
        """Return codes of rows of words. Eight codes are whole bytes; the last bytes of a row may be cut off."""
        return unpack_codes(np.pad(words, ((0, 0), (0, -words.shape[1] % n_bits))), n_bits)

    def codes(first: int, end: int) -> Codes:
        return np.ascontiguousarray(unpacked(stored.array()[first:end])[:, :n_in])

    def read(first: int, end: int) -> GridNumbers:
        rows = np.broadcast_to(table, (n_out, table.shape[1]))[first:end]
        zero = np.full((end - first, 1), 1 << n_bits - 1, np.float32)
        if zeros is not None:
            tiles, wanted = _span(first, end, _WORD)
            words = zeros.array()[tiles.start * n_bits : tiles.stop * n_bits].T
            zero = unpacked(words)[:, wanted].T.astype(np.float32)
        return GridNumbers(numbers(rows, scale.dtype), zero)

    return [parts.weight(parts.base, Grid(n_out, n_bits, groups, codes, read), stored)]


def _widths(config_groups: Any) -> list[Any]:
    """Return num_bits of all groups of compressed-tensors' config."""
    groups = config_groups.values() if isinstance(config_groups, dict) else ()
    weights = [group.get("weights") for group in groups if isinstance(group, dict)]
    return [each["num_bits"] for each in weights if isinstance(each, dict) and "num_bits" in each]
