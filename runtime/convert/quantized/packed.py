"""GPTQ, Marlin, AWQ and compressed-tensors: integers of 2 to 8 bits packed into words of 32.

GPTQ packs along the inputs, transposed: qweight[word, o] holds codes of column o of the transposed matrix. AWQ packs
along the outputs (GEMM) or the inputs (GEMV), compressed-tensors along the inputs. References: AutoGPTQ 0.7 and
GPTQModel 7 (QuantLinear.pack), AutoAWQ 0.2 (WQLinear_GEMM, WQLinear_GEMV), compressed-tensors 0.20 (pack_to_int32).
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.runtime.convert.quantized.grid import Grid, GridNumbers, unpack_codes
from gguf_run.runtime.convert.quantized.parts import FLOATS, Parts, even_groups, numbers, wrong
from gguf_run.runtime.convert.quantized.scaled import fp4

_WORD = 32  # bits; and so many codes fill whole words, whatever their width
_AWQ_NIBBLE = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where in a word column i of eight is: even columns come first
_MARLIN_COLUMNS = 64  # of outputs that one tile of 1024 codes covers (and 16 inputs)


def gptq(parts: Parts) -> list[Tensor]:
    """qweight I32[n_in * bits / 32, n_out], qzeros I32[n_group, n_out * bits / 32], scales [n_group, n_out], and g_idx
    I32[n_in]: the group of each input, in any order if columns were quantized by activation (desc_act)."""
    qweight, scales = parts.need(".qweight", "I32", ndim=2), parts.need(".scales", *FLOATS, ndim=2)
    qzeros = parts.need(".qzeros", "I32", ndim=2)
    n_group, n_out = scales.shape
    n_bits, rest = divmod(qzeros.shape[1] * _WORD, n_out)
    if (
        rest
        or not 2 <= n_bits <= 8
        or qweight.shape[1] != n_out
        or qweight.shape[0] % n_bits
        or len(qzeros.array()) != n_group
    ):
        raise wrong(qweight, f"has the shape {qweight.shape}", f"words of 2 to 8 bits that go with qzeros "
                    f"{qzeros.shape} and scales {scales.shape}")  # fmt: skip
    n_in = qweight.shape[0] // n_bits * _WORD
    stored = parts.get(".g_idx")
    if stored is None or stored.shape == (0,):
        groups = even_groups(n_in, n_group, scales)
    else:
        groups = parts.need(".g_idx", "I32", "I64", shape=(n_in,)).array().astype(np.int64)
        if groups.min() < 0 or groups.max() >= n_group:
            raise wrong(stored, f"has groups {groups.min()} to {groups.max()}", f"0 to {n_group - 1}")
    # Version 1 stores zero points less one, subtracted from whole words: borrows went where the carries go back to.
    v2 = parts.config.get("checkpoint_format") == "gptq_v2" or "gptqmodel" in str(parts.config.get("packing_format"))
    ones = np.uint32(0 if v2 else _WORD_MAX // ((1 << n_bits) - 1))

    def codes(first: int, end: int) -> NDArray[np.uint8]:
        return unpack_codes(qweight.array()[:, first:end].T, n_bits)

    def read(first: int, end: int) -> GridNumbers:
        start = first // _WORD
        words = qzeros.array()[:, start * n_bits : -(-end // _WORD) * n_bits].view(np.uint32)
        if n_bits in (2, 4, 8):
            zero = unpack_codes(words + ones, n_bits)
        else:
            zero = (unpack_codes(words, n_bits) + np.uint8(not v2)) & np.uint8((1 << n_bits) - 1)
        zero = zero[:, first - start * _WORD : end - start * _WORD]
        return GridNumbers(numbers(scales.array()[:, first:end].T, scales.dtype), zero.T.astype(np.float32))

    return [parts.weight(f"{parts.base}.weight", Grid(n_out, n_bits, groups, codes, read), qweight)]


_WORD_MAX = (1 << _WORD) - 1


@functools.cache
def _marlin_order() -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return where codes and scales of Marlin come from: int[1024] of 16 x 64 codes, and int[64] and int[32] of scales.

    The order in which the 32 threads of a tensor core want their operands (IST-DASLab/marlin): thread i has column
    i / 4 and rows 2 (i % 4) + {0, 1, 8, 9} of a 16 x 16 tile, and of its right half; of four tiles side by side.
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
    """B I32[n_in / 16, 2 n_out], s [n_group, n_out]: 4 bits, zero point 8, in the order of Marlin's kernel."""
    b, s = parts.need(".B", "I32", ndim=2), parts.need(".s", *FLOATS, ndim=2)
    n_in, n_out = 16 * b.shape[0], b.shape[1] // 2
    if s.shape[1] != n_out or b.shape[1] % (2 * _MARLIN_COLUMNS):
        raise wrong(b, f"has the shape {b.shape}", f"[n_in / 16, 2 n_out] with n_out a multiple of {_MARLIN_COLUMNS} "
                    f"that goes with s {s.shape}")  # fmt: skip
    order, grouped, single = _marlin_order()
    scale_order = single if len(s.array()) == 1 else grouped

    def span(first: int, end: int) -> tuple[int, int, slice]:
        """Whole tiles of columns, and which of theirs are wanted."""
        start = first // _MARLIN_COLUMNS
        return start, -(-end // _MARLIN_COLUMNS), slice(first - start * _MARLIN_COLUMNS, end - start * _MARLIN_COLUMNS)

    def codes(first: int, end: int) -> NDArray[np.uint8]:
        start, stop, wanted = span(first, end)
        stored = unpack_codes(b.array()[:, start * 128 : stop * 128], 4).reshape(n_in // 16, stop - start, 1024)
        plain = np.empty_like(stored)
        plain[..., order] = stored  # four tiles of 16 x 16
        tiles = plain.reshape(n_in // 16, stop - start, 4, 16, 16).transpose(1, 2, 4, 0, 3)
        return np.ascontiguousarray(tiles.reshape(-1, n_in)[wanted])

    def read(first: int, end: int) -> GridNumbers:
        start, stop, wanted = span(first, end)
        stored = numbers(s.array()[:, start * 64 : stop * 64], s.dtype).reshape(len(s.array()), -1, len(scale_order))
        plain = np.empty_like(stored)
        plain[..., scale_order] = stored
        scale = plain.reshape(len(stored), -1)[:, wanted].T
        return GridNumbers(scale, np.full_like(scale, 8))

    grid = Grid(n_out, 4, even_groups(n_in, s.shape[0], s), codes, read)
    return [parts.weight(f"{parts.base}.weight", grid, b)]


def awq(parts: Parts) -> list[Tensor]:
    """GEMM: qweight I32[n_in, n_out / 8], qzeros I32[n_group, n_out / 8], scales [n_group, n_out]. GEMV: qweight
    I32[n_out, n_in / 8], qzeros and scales by row, with columns that fill up words. Always 4 bits."""
    if str(parts.config.get("version")).lower() == "gemv":
        return _awq_gemv(parts)
    qweight, scales = parts.need(".qweight", "I32", ndim=2), parts.need(".scales", *FLOATS, ndim=2)
    (n_group, n_out), n_in = scales.shape, qweight.shape[0]
    if qweight.shape[1] * 8 != n_out:
        raise wrong(qweight, f"has the shape {qweight.shape}", f"[n_in, {n_out / 8:g}] (4 bits, scales {scales.shape})")
    qzeros = parts.need(".qzeros", "I32", shape=(n_group, n_out // 8))

    def columns(words: NDArray[Any], first: int, end: int) -> NDArray[np.uint8]:
        """Columns first .. end of packed words[rows, n_out / 8], as rows."""
        start = first // 8
        octets = unpack_codes(words[:, start : -(-end // 8)], 4).reshape(len(words), -1, 8)[..., _AWQ_NIBBLE]
        return octets.reshape(len(words), -1)[:, first - 8 * start : end - 8 * start].T

    def codes(first: int, end: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(columns(qweight.array(), first, end))

    def read(first: int, end: int) -> GridNumbers:
        zero = columns(qzeros.array(), first, end).astype(np.float32)
        return GridNumbers(numbers(scales.array()[:, first:end].T, scales.dtype), zero)

    grid = Grid(n_out, 4, even_groups(n_in, n_group, scales), codes, read)
    return [parts.weight(f"{parts.base}.weight", grid, qweight)]


def _awq_gemv(parts: Parts) -> list[Tensor]:
    qweight, scales = parts.need(".qweight", "I32", ndim=2), parts.need(".scales", *FLOATS, ndim=2)
    n_out, n_in = qweight.shape[0], qweight.shape[1] * 8
    size = parts.config.get("q_group_size", parts.config.get("group_size"))
    size = n_in if size == -1 else size
    if (
        type(size) is not int
        or size < 1
        or scales.shape[0] != n_out
        or scales.shape[1] * size < n_in
        or scales.shape[1] % 8
    ):
        raise wrong(
            scales, f"has the shape {scales.shape}", f"[{n_out}, at least {n_in} / group size {size}, whole words]"
        )
    n_group = -(-n_in // size)
    qzeros = parts.need(".qzeros", "I32", shape=(n_out, scales.shape[1] // 8))

    def codes(first: int, end: int) -> NDArray[np.uint8]:
        return unpack_codes(qweight.array()[first:end], 4)

    def read(first: int, end: int) -> GridNumbers:
        zero = unpack_codes(qzeros.array()[first:end], 4)[:, :n_group].astype(np.float32)
        return GridNumbers(numbers(scales.array()[first:end, :n_group], scales.dtype), zero)

    grid = Grid(n_out, 4, np.arange(n_in, dtype=np.int64) // size, codes, read)
    return [parts.weight(f"{parts.base}.weight", grid, qweight)]


def packed(parts: Parts) -> list[Tensor]:
    """compressed-tensors: weight_packed I32[n_out, n_in * bits / 32], weight_scale [n_out, n_group or 1] or [1], with
    minimums weight_zero_point I32[n_out * bits / 32, n_group], weight_g_idx as GPTQ's g_idx. U8: NVFP4 or MXFP4."""
    codes_of = parts.need("_packed", "I32", "U8", ndim=2)
    if codes_of.dtype == "U8":
        return fp4(parts, codes_of)
    shape = parts.need("_shape", "I32", "I64", shape=(2,)).array()
    n_out, n_in = int(shape[0]), int(shape[1])
    scale = parts.need("_scale", *FLOATS)
    groups_of = parts.config.get("config_groups")
    widths = [
        group["weights"]["num_bits"]
        for group in (groups_of.values() if isinstance(groups_of, dict) else ())
        if isinstance(group, dict) and isinstance(group.get("weights"), dict) and "num_bits" in group["weights"]
    ]
    n_words = codes_of.shape[1]
    n_bits = next((n for n in widths if type(n) is int and 1 <= n <= 8 and -(-n_in * n // _WORD) == n_words), 0)
    table = scale.array().reshape(-1, scale.shape[-1] if len(scale.shape) > 1 else 1)
    if not n_bits or codes_of.shape[0] != n_out or len(table) not in (1, n_out):
        raise wrong(codes_of, f"has the shape {codes_of.shape}", f"rows of {n_in} codes of {widths} bits (num_bits) "
                    f"that go with scales {scale.shape}")  # fmt: skip
    stored = parts.get("_g_idx")
    groups = even_groups(n_in, table.shape[1], scale)
    if stored is not None:
        groups = parts.need("_g_idx", "I32", "I64", shape=(n_in,)).array().astype(np.int64)
        if (groups == -1).all():  # not set: columns in their order
            groups = even_groups(n_in, table.shape[1], scale)
        elif groups.min() < 0 or groups.max() >= table.shape[1]:
            raise wrong(stored, f"has groups {groups.min()} to {groups.max()}", f"0 to {table.shape[1] - 1}")
    zeros = parts.get("_zero_point")
    if zeros is not None:
        zeros = parts.need("_zero_point", "I32", shape=(-(-n_out * n_bits // _WORD), table.shape[1]))

    def codes(first: int, end: int) -> NDArray[np.uint8]:
        words = codes_of.array()[first:end]
        missing = -n_words % n_bits  # eight codes are whole bytes: the last ones may be cut off
        words = np.pad(words, ((0, 0), (0, missing))) if missing else words
        return np.ascontiguousarray(unpack_codes(words, n_bits)[:, :n_in])

    def read(first: int, end: int) -> GridNumbers:
        rows = np.broadcast_to(table, (n_out, table.shape[1]))[first:end]
        zero = np.full((end - first, 1), 1 << n_bits - 1, np.float32)
        if zeros is not None:
            start = first // _WORD
            words = zeros.array()[start * n_bits : -(-end // _WORD) * n_bits].T
            words = np.pad(words, ((0, 0), (0, -words.shape[1] % n_bits)))
            zero = unpack_codes(words, n_bits)[:, first - start * _WORD : end - start * _WORD].T.astype(np.float32)
        return GridNumbers(numbers(rows, scale.dtype), zero)

    return [parts.weight(parts.base, Grid(n_out, n_bits, groups, codes, read), codes_of)]
