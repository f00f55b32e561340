"""Runs single ops through the Backend protocol. A test's values go in through `Embed`, results come out as `Outputs`.

Only the protocol is used, so the same tests can check another backend. The NumPy twins of what only the CPU backend has
(blocks of int8 activations, panels) are at the end.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy_backend import NumpyBackend, NumpyWeight
from paged import mixed_table

from gguf_run.formats.blocks.coded import CODED_FORMS, CODES_OF_4_BITS
from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import TensorType, type_by_name
from gguf_run.formats.blocks.unpack import INTEGER_FORMS
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.kernels_cpu.backend import CpuBackend
from gguf_run.kernels_cpu.panels.memory import WeightPart
from gguf_run.kernels_cpu.panels.panels import (
    BLOCK,
    FLOAT8_FACTOR,
    LARGEST_FINE,
    ROWS,
    X_BLOCK_BYTES,
    X_D,
    X_D_SUMS,
    X_SUMS,
    CodedPanel,
    IntPanel,
)
from gguf_run.kernels_cpu.panels.planes import bit_places, is_paired
from gguf_run.kernels_cpu.vector.simd import I16
from gguf_run.models.backend import CacheType, Run
from gguf_run.models.operands import AttentionShape, Buffer
from gguf_run.models.ops import Embed, Outputs

# Types whose weights are multiplied with int8 activations; all others read the activations as they are.
QUANTIZED = (*INTEGER_FORMS, *CODES_OF_4_BITS)


@functools.cache
def cpu(n_threads: int = 2) -> CpuBackend:
    """Return a backend that all tests share, so that not every test starts threads."""
    return CpuBackend(n_threads)


@dataclass(frozen=True)
class MemoryTensor:
    """formats.gguf.reader.Tensor without a file."""

    name: str
    type: TensorType
    ne: tuple[int, ...]
    data: np.ndarray  # uint8[n_rows, row_bytes]
    scales: tuple[float, ...] = ()
    rounding: tuple[str, int, float] | None = None

    @property
    def n_rows(self) -> int:
        return len(self.data)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    offset, file = 0, None
    same_shape = TensorInfo.same_shape

    def blocks(self, first: int = 0, end: int | None = None) -> np.ndarray:
        return self.data[first:end]

    def release(self, first: int = 0, end: int | None = None) -> None:
        pass


def tensor_of(blocks: np.ndarray, type_name: str) -> MemoryTensor:
    """A tensor of blocks, uint8[n_rows, row_bytes]."""
    type = type_by_name(type_name)
    n_in = blocks.shape[1] // type.type_size * type.block_size
    return MemoryTensor("test", type, (n_in, len(blocks)), blocks)


def f32_tensor(values: np.ndarray) -> MemoryTensor:
    """values: [n_rows, n_in]."""
    return tensor_of(np.ascontiguousarray(values, np.float32).view(np.uint8), "F32")


def random_tensor(type_name: str, n_rows: int, n_in: int, seed: int = 0) -> MemoryTensor:
    """Return blocks of random bits. Only factors are chosen: none is infinite, NaN or far from the others."""
    rng, type = np.random.default_rng(seed), type_by_name(type_name)
    shape = (n_rows, n_in // type.block_size)
    assert n_in % type.block_size == 0
    if type.dtype.kind == "f":
        numbers = rng.standard_normal(shape).astype(type.dtype)
    elif type_name == "BF16":
        numbers = (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    elif type.dtype.kind == "i":
        numbers = rng.integers(-128, 128, shape).astype(type.dtype)
    else:
        numbers = rng.integers(0, 256, (*shape, type.type_size), np.uint8).view(type.dtype)[..., 0]
        for name in type.dtype.names or ():
            part = numbers[name]
            if part.dtype.kind == "f":  # of both signs, and nowhere near 0
                part[...] = rng.choice([-1, 1], part.shape) * rng.uniform(0.01, 0.1, part.shape)
        if type_name in CODED_FORMS and type_name.startswith("FP8"):  # no NaN, nothing infinite
            numbers["qs"] = numbers["qs"] & 0x80 | (numbers["qs"] & 0x7F) % 0x7C
        if type_name == "INT8" or type_name in CODED_FORMS:
            numbers["d"] = np.abs(numbers["d"])
            if type_name.endswith("_128"):
                numbers["d"] = numbers["d"][np.arange(n_rows) // ROWS * ROWS]
            elif type.block_size == 32:
                numbers["d"] = numbers["d"][:, :1]
        if type_name == "MXFP4":
            numbers["e"] = rng.integers(120, 128, shape)
        if type_name == "NVFP4":
            numbers["d"] = rng.integers(0x20, 0x40, numbers["d"].shape)
        if type_name == "IQ1_M":  # d's bits are the top nibbles of the four scales
            d = rng.uniform(0.01, 0.1, shape).astype(np.float16).view(np.uint16)
            for i in range(4):
                numbers["scales"][..., i] = numbers["scales"][..., i] & 0xFFF | (d >> 4 * i & 15) << 12
    return tensor_of(np.ascontiguousarray(numbers).view(np.uint8).reshape(n_rows, -1), type_name)


def weights_of(tensors: Sequence[MemoryTensor]) -> np.ndarray:
    """Return what is multiplied, float64[n_out, n_in]: of NF4 and FP4 the values of codes are rounded to 16 bits."""
    parts = []
    for t in tensors:
        blocks, d = t.blocks(), np.ones(1)
        if t.type.name in CODES_OF_4_BITS:
            fields = blocks.copy().view(t.type.dtype)
            d = fields["d"].repeat(t.type.block_size, 1).astype(np.float64)
            fields["d"] = 1
            blocks = fields.view(np.uint8)
        values = dequantize(blocks, t.type).astype(np.float64)
        parts.append(values if d.size == 1 else np.round(values * LARGEST_FINE) / LARGEST_FINE * d)
    return np.concatenate(parts)


class Step:
    """A program for a few ops, which a test adds one after the other."""

    def __init__(self, backend: Any, n_batch: int) -> None:
        self.backend, self.n_batch = backend, n_batch
        self.parts: list[list[Any]] = [[]]
        self.after: list[Any] = []
        self._n_buffers = 0
        self.program: Any = None

    @property
    def ops(self) -> list[Any]:
        """The list that grows."""
        return self.after or self.parts[-1]

    def add(self, op: Any) -> None:
        self.ops.append(op)

    def buffer(self, width: int) -> Buffer:
        """A new buffer: for all tokens, or after `outputs` for the wanted ones."""
        self._n_buffers += 1
        return Buffer.whole(f"buffer {self._n_buffers}", width, outputs=bool(self.after))

    def input(self, values: np.ndarray, out: Buffer | None = None) -> Buffer:
        """Return a buffer (or `out`) that holds row ids[t] of values, float32[any, width], in each run."""
        out = out or self.buffer(values.shape[1])
        self.add(Embed(self.backend.table(f32_tensor(values)), out))
        return out

    def vector(self, values: np.ndarray) -> Any:
        return self.backend.vector([f32_tensor(values[None])])

    def outputs(self, x: Buffer) -> Buffer:
        """Return a buffer of the wanted rows of x. Ops that are added after this call compute only those rows."""
        out = Buffer.whole("outputs", x.width, outputs=True)
        self.after.append(Outputs(x, out))
        return out

    def finish(self, result: Buffer) -> "Step":
        """Make the program. It returns rows of `result`."""
        if not self.after:
            result = self.outputs(result)
        self.program = self.backend.program(self.parts, self.after, result, self.n_batch, self.n_batch)
        return self

    def run(self, n_tokens: int, n_past: int = 0, first_id: int = 0) -> np.ndarray:
        """All result rows for ids first_id, first_id + 1, ..."""
        ids = np.arange(first_id, first_id + n_tokens, dtype=np.int32)
        return self.program.run(ids, [Run(0, n_past, n_tokens)], range(n_tokens)).values.copy()


def new_cache(backend: Any, shape: AttentionShape, n_ctx: int, n_seq: int = 1, kind: str = "f16") -> Any:
    return backend.cache(shape, mixed_table(n_ctx, n_seq), CacheType(kind, kind))


def kernel_names(step: Step) -> list[str]:
    """The kernels on the tape of a program of the CPU backend."""
    return [kernel.function.__name__ for kernel in step.program._tape.kernels]


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest expected number. NaN if only one of both has a NaN."""
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# Twins of what is private to the CPU backend.
def quantize_twin(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of 32: d f32[..., n / 32] and q int8[..., n / 32, 32], with the same roundings as the kernel."""
    x = np.asarray(x, np.float32).reshape(*x.shape[:-1], -1, BLOCK)
    largest = np.abs(x).max(axis=-1)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest == 0, np.float32(0), np.float32(127) / largest)
    return largest / np.float32(127), np.rint(x * inverse[..., None]).astype(np.int8)


def as_quantized(x: np.ndarray) -> np.ndarray:
    """Return x in float64, rounded to int8 blocks."""
    d, q = quantize_twin(x)
    return (d[..., None].astype(np.float64) * q).reshape(x.shape)


def read_q8(blocks: np.ndarray) -> dict[str, np.ndarray]:
    """The fields of activation blocks, uint8[..., n * X_BLOCK_BYTES] (layout: kernels_cpu/panels/panels.py)."""
    offsets = {"q": (0, "i1", BLOCK), "d": (X_D, "f4", 1), "sums": (X_SUMS, "i4", 3), "d_sums": (X_D_SUMS, "f4", 3)}
    dtype = np.dtype(
        {
            "names": list(offsets),
            "offsets": [at for at, _, _ in offsets.values()],
            "formats": [(code, n) for _, code, n in offsets.values()],
            "itemsize": X_BLOCK_BYTES,
        }
    )
    fields = np.ascontiguousarray(blocks).view(dtype)
    return {name: fields[name] for name in offsets}


def unpack_panel(part: WeightPart, n_in: int) -> np.ndarray:
    """Return the numbers in a panel (kernels_cpu/panels/panels.py): float32[rows filled up to 16s, n_in]."""
    panel, n_group = part.panel, -(-part.n_out // ROWS)
    if isinstance(panel, CodedPanel):
        return _coded_twin(panel, part.data.reshape(n_group, -1), n_in)
    if not isinstance(panel, IntPanel):
        words = part.data.view(f"u{panel.element_bytes}").reshape(n_group, n_in, ROWS).swapaxes(1, 2)
        words = np.ascontiguousarray(words).reshape(-1, n_in)
        if panel.element == I16:
            return (words.astype(np.uint32) << 16).view(np.float32)
        return words.view(f"f{panel.element_bytes}").astype(np.float32)
    stored = part.data.reshape(n_group, -1)
    row_scales = _bytes(stored, 0, panel.rows_at).view(np.float32)
    spans = stored[:, panel.rows_at :].reshape(n_group, n_in // panel.span, panel.span_bytes)
    factors = _bytes(spans, 0, 2 * ROWS * panel.n_factors).view("f2").astype(np.float32)
    factors = factors.reshape(*spans.shape[:2], panel.n_factors, ROWS)
    heads = _bytes(spans, 2 * ROWS * panel.n_factors, panel.quants_at)
    heads = heads.reshape(*spans.shape[:2], panel.n_steps, panel.head_bytes)
    numbers = _head_twin(panel, heads)  # [group, span, step, scales and then minimums, row]
    per = panel.columns // panel.group
    scale, minimum = numbers[..., :per, :], numbers[..., per:, :]
    if panel.scales.shared:
        scale = factors[:, :, None, :1] * scale
        minimum = factors[:, :, None, 1:] * minimum
    planes = _bytes(spans, panel.quants_at, panel.span_bytes)
    planes = planes.reshape(n_group, -1, panel.bits, ROWS, 4)  # of blocks of 32 columns
    u = np.zeros((*planes.shape[:2], 8, ROWS, 4), np.int16)
    for i in range(8):
        for plane, at, bit, mask in bit_places(panel, i):
            u[:, :, i] |= (planes[:, :, plane].astype(np.int16) >> at & mask) << bit
    if panel.codebook:
        fine = np.array(panel.fine)[u] / 256 if panel.fine else 0
        u = np.array(panel.codebook)[u] + panel.offset + fine
    assert u.max() < 1 << panel.dot_bits
    # [group, block, columns / 4, row, 4] -> [group, row, scale's group, column]
    q = u.transpose(0, 3, 1, 2, 4).reshape(n_group, ROWS, -1, panel.group).astype(np.float32) - np.float32(panel.offset)
    scale, minimum = (a.reshape(n_group, -1, ROWS).transpose(0, 2, 1)[..., None] for a in (scale, minimum))
    values = scale * q if scale.size else q
    if panel.rows_at:
        values = values * row_scales[:, :, None, None]
    return (values + minimum if panel.has_minimum else values).reshape(-1, n_in)


def _coded_twin(panel: CodedPanel, data: np.ndarray, n_in: int) -> np.ndarray:
    """As unpack_panel. data: uint8[n_group, group_bytes]."""
    n_scales = panel.n_scales(n_in)
    scales = _bytes(data, 0, 4 * n_scales).view(np.float32).reshape(len(data), -1, 1 if panel.shared else ROWS)
    codes = data[:, -(n_in * ROWS // (2 if panel.table else 1)) :].reshape(len(data), -1, ROWS)
    if panel.table:
        codes = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(data), n_in, ROWS)
        values = np.array(panel.table, np.float32)[codes]
    else:
        codes = codes.reshape(len(data), -1, ROWS, 2).swapaxes(2, 3).reshape(codes.shape)
        values = CODED_FORMS[panel.name if "INT8" in panel.name else f"FP8_{panel.name}"].table[codes]
        scales = scales / np.float32(FLOAT8_FACTOR.get(panel.name, 1))
    values = values * scales.repeat(n_in // scales.shape[1], axis=1)
    return values.swapaxes(1, 2).reshape(-1, n_in)


def _bytes(spans: np.ndarray, first: int, end: int) -> np.ndarray:
    return np.ascontiguousarray(spans[..., first:end])


def _head_twin(panel: IntPanel, heads: np.ndarray) -> np.ndarray:
    """float32[..., numbers of a step, ROWS] from uint8[..., head_bytes] (layout: kernels_cpu/panels/panels.py)."""
    name = panel.scales.name
    if name == "f32 64":
        return heads.view("f4").reshape(*heads.shape[:-1], 1, ROWS).repeat(2, -2) * np.float32(256)
    if name == "row":
        return np.zeros((*heads.shape[:-1], 0, ROWS), np.float32)
    if name in ("f16", "f32"):
        return heads.view({"f16": "f2", "f32": "f4"}[name]).astype(np.float32).reshape(*heads.shape[:-1], -1, ROWS)
    fields = heads.reshape(*heads.shape[:-1], -1, ROWS).astype(np.int32)
    if is_paired(panel):  # the first two fields alternate
        pair = fields[..., :2, :].reshape(*heads.shape[:-1], ROWS, 2).swapaxes(-1, -2)
        nibbles = fields[..., 2:, :]
        if name == "k4":
            fields = np.concatenate([pair & 15, pair >> 4], axis=-2)
        else:
            second = np.concatenate([nibbles & 15, nibbles >> 4], axis=-2) | pair >> 6 << 4
            fields = np.concatenate([pair & 63, second], axis=-2) - 32
    elif name == "k6":
        fourth = np.sum([(fields[..., i, :] >> 6) << 2 * i for i in range(3)], axis=0)
        fields = np.concatenate([fields & 63, fourth[..., None, :]], axis=-2)
    elif name == "k8":
        fields = fields.astype(np.uint8).view(np.int8)
    else:
        return np.ldexp(np.float32(1), fields - 128).astype(np.float32)
    return fields.astype(np.float32)


@dataclass(frozen=True)
class Q8Weight(NumpyWeight):
    """A weight of which some rows are multiplied with int8 activations."""

    is_quantized: np.ndarray  # bool[n_out]: these rows

    def product(self, x: np.ndarray) -> np.ndarray:
        result = super().product(x)
        if self.is_quantized.any():
            result[..., self.is_quantized] = as_quantized(x) @ self.data[self.is_quantized].T
        return result


class Q8Backend(NumpyBackend):
    """The float64 oracle of CpuBackend. Only activations of quantized weights are rounded, to int8."""

    def weight(self, tensors: Sequence[Any]) -> Q8Weight:
        is_quantized = np.concatenate([np.full(t.n_rows, t.type.name in QUANTIZED) for t in tensors])
        return Q8Weight(self._dequantized(tensors), is_quantized)
