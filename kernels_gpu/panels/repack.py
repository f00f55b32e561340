"""Makes panels (layouts: panels.py) of a file's blocks at load: exactly, on the device, with torch's ops."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as Array

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import TensorType, type_by_name
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.kernels_gpu.panels.memory import WeightPart, empty
from gguf_run.kernels_gpu.panels.panels import PANELS, ROUNDED, FloatPanel, IntPanel, panel_for

_PIECE = 16 << 20  # bytes of the file at a time; repacking needs several times as much memory

# Where a type's codes are: first qs, then the high bits. (field, run, bits): each run of bytes of a field holds
# 8 / bits runs of weights; the first run of weights is in the lowest bits.
_CODES: dict[str, tuple[tuple[str, int, int], ...]] = {
    "Q4_0": (("qs", 16, 4),),
    "Q4_1": (("qs", 16, 4),),
    "Q5_0": (("qs", 16, 4), ("qh", 1, 1)),
    "Q5_1": (("qs", 16, 4), ("qh", 1, 1)),
    "Q8_0": (("qs", 1, 8),),
    "Q2_K": (("qs", 32, 2),),
    "Q3_K": (("qs", 32, 2), ("hmask", 32, 1)),
    "Q4_K": (("qs", 32, 4),),
    "Q5_K": (("qs", 32, 4), ("qh", 32, 1)),
    "Q6_K": (("ql", 64, 4), ("qh", 32, 2)),
    "IQ4_NL": (("qs", 16, 4),),
    "IQ4_XS": (("qs", 16, 4),),
    "MXFP4": (("qs", 16, 4),),
}


def _shifts(device: Any, n: int, by: int) -> Array:
    return torch.arange(0, n * by, by, dtype=torch.uint8, device=device)


def _field(blocks: Array, type: TensorType, name: str, size: int = 0) -> Array:
    """Return uint8[n_row, n_block, bytes]: the bytes of a field, or `size` bytes from its first byte on."""
    assert type.dtype.fields is not None
    dtype, at = type.dtype.fields[name][:2]
    return blocks[..., at : at + (size or dtype.itemsize)]


def _codes(blocks: Array, type: TensorType, name: str, run: int, bits: int) -> Array:
    """Return uint8[n_row, n_in]: some bits of all codes, in the order of the weights."""
    runs = _field(blocks, type, name).unflatten(-1, (-1, 1, run))
    parts = runs >> _shifts(blocks.device, 8 // bits, bits)[:, None] & (1 << bits) - 1
    return parts.reshape(len(blocks), -1)


def _pack_qs(codes: Array, panel: IntPanel) -> Array:
    units = codes.unflatten(-1, (-1, panel.unit // 16, 16))
    if panel.bits == 8:
        return units.transpose(1, 2)
    fields = units << _shifts(codes.device, panel.unit // 16, panel.bits)[:, None]
    return fields.sum(-2, dtype=torch.uint8)


def _pack_high(codes: Array, panel: IntPanel) -> Array:
    """Pack high bits. Those of weight 16 f + 4 i + j of a unit go into byte j of a word.

    One bit: bit 4 (f % 2) + i of word f / 2. Two bits: bits 2 i and 2 i + 1 of word f.
    """
    n_share = 3 - panel.high
    shifts = _shifts(codes.device, n_share, 4)[:, None] + _shifts(codes.device, 4, panel.high)
    words = codes.unflatten(-1, (-1, panel.unit // 16 // n_share, n_share, 4, 4)) << shifts[..., None]
    return words.sum((-3, -2), dtype=torch.uint8)


def _pairs_of_6_bits(blocks: Array, type: TensorType) -> Array:
    """Return scale and minimum of eight groups, a byte each (layout: formats/blocks/unpack_k.py)."""
    s, m, low = _field(blocks, type, "scales").unflatten(-1, (3, 4)).unbind(-2)
    scale = torch.cat([s & 63, low & 15 | s >> 6 << 4], -1)
    minimum = torch.cat([m & 63, low >> 4 | m >> 6 << 4], -1)
    return torch.stack([scale, minimum], -1)


def _scales_q3_k(blocks: Array, type: TensorType) -> Array:
    """Return 16 scales of 6 bits, minus 32."""
    scales = _field(blocks, type, "scales")
    low, top = scales[..., :8], scales[..., 8:]
    low = torch.cat([low & 15, low >> 4], -1)
    top = (top.unsqueeze(-2) >> _shifts(blocks.device, 4, 2)[:, None] & 3).flatten(-2)
    return (low | top << 4) - 32


def _scales_iq4_xs(blocks: Array, type: TensorType) -> Array:
    """Return 8 scales of 6 bits, minus 32."""
    low, top = _field(blocks, type, "scales_l"), _field(blocks, type, "scales_h")
    low = (low.unsqueeze(-1) >> _shifts(blocks.device, 2, 4) & 15).flatten(-2)
    top = (top.unsqueeze(-1) >> _shifts(blocks.device, 4, 2) & 3).flatten(-2)
    return (low | top << 4) - 32


# Scales that the panel has in another form than the file.
_SCALES: dict[str, Callable[[Array, TensorType], Array]] = {
    "Q3_K": _scales_q3_k,
    "Q4_K": _pairs_of_6_bits,
    "Q5_K": _pairs_of_6_bits,
    "IQ4_XS": _scales_iq4_xs,
}


def _planes(blocks: Array, type: TensorType, panel: IntPanel) -> list[Array]:
    """Return the planes of rows of blocks, uint8[n_row, n_block, type_size]."""
    qs, *high = (_codes(blocks, type, *codes) for codes in _CODES[type.name])
    planes = [_pack_qs(qs, panel), *(_pack_high(codes, panel) for codes in high)]
    if not panel.d_bytes:
        return [*planes, _field(blocks, type, "e" if panel.scales == "e8m0" else "d", panel.scale_bytes)]
    in_form = _SCALES.get(type.name)
    scales = in_form(blocks, type) if in_form else _field(blocks, type, "scales")
    return [*planes, scales, _field(blocks, type, "d", panel.d_bytes)]


def _as_q8_0(blocks: NDArray[np.uint8], type: TensorType) -> NDArray[np.uint8]:
    """Return blocks of INT8 as Q8_0: the same codes, their scales rounded to f16."""
    stored = blocks.view(type.dtype)
    out = np.empty(stored.shape, type_by_name("Q8_0").dtype)
    out["d"], out["qs"] = stored["d"], stored["qs"]
    return out.view(np.uint8)


class Uploader:
    """Copies rows of files to a device through two pinned buffers: one is filled while the other one is sent."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._staging: list[Array] = []
        self._sent: list[Any] = [None, None]

    def send(self, data: NDArray[np.uint8]) -> Array:
        """Return a copy of data on the device."""
        is_cuda = self.device.type == "cuda"
        if not self._staging:
            self._staging = [torch.empty(0, dtype=torch.uint8)] * 2
        if len(self._staging[0]) < data.size:
            self._staging[0] = torch.empty(max(data.size, _PIECE), dtype=torch.uint8, pin_memory=is_cuda)
        self._staging.reverse()
        self._sent.reverse()
        staging = self._staging[1]
        if self._sent[1] is not None:
            self._sent[1].synchronize()
        np.copyto(staging[: data.size].numpy(), data.reshape(-1))
        sent = staging[: data.size].to(self.device, non_blocking=True)
        if is_cuda:
            self._sent[1] = torch.cuda.Event()
            self._sent[1].record()
        return sent.view(data.shape)

    def repack(self, tensors: Sequence[Tensor]) -> WeightPart:
        """Return the rows of all tensors, which have one type, as one part. Release the file's pages."""
        type, n_in = tensors[0].type, tensors[0].ne[0]
        panel, held = panel_for(type.name), type_by_name(ROUNDED.get(type.name, type.name))
        n_out = sum(tensor.n_rows for tensor in tensors)
        part = empty(panel, n_in, n_out, self.device)
        row = 0
        for tensor in tensors:
            step = max(1, _PIECE // max(tensor.type.row_bytes(n_in), 4 * n_in if type.name not in PANELS else 0))
            for first in range(0, tensor.n_rows, step):
                end = min(first + step, tensor.n_rows)
                blocks = tensor.blocks(first, end)
                if type.name == "INT8":
                    blocks = _as_q8_0(blocks, type)
                elif type.name not in PANELS:
                    values = dequantize(blocks, type)
                    if tensor.scales:
                        matrix = np.arange(first, end) * len(tensor.scales) // tensor.n_rows
                        values *= np.array(tensor.scales, np.float32)[matrix, None]
                    rounded = values.astype(np.float16) if panel.scales == "F16" else values
                    blocks = rounded.view(np.uint8)
                rows = slice(row + first, row + end)
                sent = self.send(blocks)
                if isinstance(panel, FloatPanel):
                    part.qs[rows, : sent.shape[1]] = sent
                else:
                    planes = _planes(sent.unflatten(1, (-1, held.type_size)), held, panel)
                    for to, plane in zip(part.planes, planes, strict=True):
                        to[rows] = plane.reshape(end - first, -1)
                tensor.release(first, end)
            row += tensor.n_rows
        return part
