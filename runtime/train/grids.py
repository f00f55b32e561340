"""Matrices on the grid of a tensor type, as training sees them: forward, the very numbers that a file will hold.

    Rounded    the weights are trained. Each step rounds them to codes; the scales stay as they are.
    Scaled     the scales and minimums are trained, rounded as the type stores them. The codes stay as they are.

`blocks` packs the codes and scales of the last step; what `values` returned is what dequantizing makes of these blocks.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gguf_run.formats.blocks.codes import SCALES, pack, unpack
from gguf_run.formats.blocks.types import TensorType
from gguf_run.formats.blocks.unpack import INTEGER_FORMS
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.formats.quantizers.quantizer import quantize


class _Through(torch.autograd.Function):
    """Other numbers in place of x, with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return other.view_as(other)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _OfSteps(torch.autograd.Function):
    """d * value + m, in the order and with the roundings of dequantize."""

    @staticmethod
    def forward(ctx: Any, d: torch.Tensor, m: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """d, m: [n_rows, n / group]; value: int8[n_rows, n]."""
        ctx.save_for_backward(value)
        ctx.shape = d.shape
        return _weights(d, m, value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (value,) = ctx.saved_tensors
        groups = grad.reshape(*ctx.shape, -1)
        return (groups * value.reshape(groups.shape)).sum(2), groups.sum(2), None


def _weights(d: torch.Tensor, m: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    groups = value.reshape(*d.shape, -1).to(d.dtype)
    return (d[..., None] * groups + m[..., None]).reshape(value.shape)


class Rounded:
    """A matrix whose weights are trained."""

    def __init__(self, tensor: Tensor, original: np.ndarray, device: str) -> None:
        """tensor: the quantized matrix that training begins with. original: f32[n_rows, n], its weights before.

        Where the nearest code to the original is another one than the tensor's, which a better method has chosen,
        training begins with the tensor's weight.
        """
        self._device = device
        self._take(tensor.blocks(), tensor.type)
        start = self._code
        self.latent = torch.from_numpy(original).to(device, copy=True)
        begin = self._rounded(start)
        self.latent = torch.where(self._nearest() == start, self.latent, begin).requires_grad_()
        self.round()

    def take(self, tensor: Tensor) -> None:
        """Take the scales and codes of a tensor that was written for the weights as they are now."""
        self._take(tensor.blocks(), tensor.type)
        self._now = self._rounded(self._code)

    def _take(self, blocks: np.ndarray, type: TensorType) -> None:
        codes, form = unpack(blocks, type), INTEGER_FORMS[type.name]
        self._codes, self._low, self._high = codes, form.q_min, form.q_max
        self._code = torch.from_numpy(codes.code).to(self._device)
        self._d, self._m = (torch.from_numpy(step).to(self._device) for step in codes.steps())
        self._grid = torch.from_numpy(form.grid().astype(np.float32)).to(self._device) if form.codebook else None

    def _nearest(self) -> torch.Tensor:
        """Return the code whose weight is nearest to each trained weight, int8[n_rows, n]; where all are 0, the old."""
        groups = self.latent.detach().reshape(*self._d.shape, -1)
        d = self._d[..., None]
        part = torch.where(d == 0, 0.0, (groups - self._m[..., None]) / torch.where(d == 0, 1.0, d))
        if self._grid is None:
            codes = torch.round(part).clamp(self._low, self._high)
        else:
            ordered, places = self._grid.sort()
            codes = places[torch.bucketize(part.contiguous(), (ordered[1:] + ordered[:-1]) / 2)]
        return torch.where(d == 0, self._code.reshape(codes.shape), codes.to(torch.int8)).reshape(self.latent.shape)

    def _rounded(self, code: torch.Tensor) -> torch.Tensor:
        return _weights(self._d, self._m, code if self._grid is None else self._grid[code.long()])

    def round(self) -> None:
        """Round the weights to codes, after they have changed."""
        self._code = self._nearest()
        self._now = self._rounded(self._code)

    def search(self) -> None:
        """Choose new scales for the weights as they are now, as ggml does. Then round them."""
        type = self._codes.type
        self._take(quantize(self.latent.detach().cpu().numpy(), type), type)
        self.round()

    def values(self) -> torch.Tensor:
        made: torch.Tensor = _Through.apply(self.latent, self._now)
        return made

    def blocks(self) -> np.ndarray:
        return pack(replace(self._codes, code=self._code.cpu().numpy()))


class Scaled:
    """A matrix whose scales and minimums are trained, as parts of what they were: 1 + `numbers`."""

    def __init__(self, tensor: Tensor, device: str) -> None:
        self._codes = codes = unpack(tensor.blocks(), tensor.type)
        form = INTEGER_FORMS[codes.type.name]
        self._value = torch.from_numpy(codes.value()).to(device)
        fields = {"scale": codes.scale, "minimum": codes.minimum, "factor": codes.factor}
        used = {"scale": True, "minimum": form.has_minimum, "factor": form.shared}
        self._first = {name: torch.from_numpy(x).to(device) for name, x in fields.items()}
        self.numbers: Mapping[str, torch.Tensor] = {
            name: torch.zeros_like(x).requires_grad_() for name, x in self._first.items() if used[name]
        }
        self._range = SCALES.get(codes.type.name)

    @staticmethod
    def fits(tensor: Tensor) -> bool:
        """Whether each group of the type has a half float or an integer of its own."""
        form = INTEGER_FORMS[tensor.type.name]
        return form.shared or (form.group == tensor.type.block_size and tensor.type.name != "MXFP4")

    def _field(self, name: str) -> torch.Tensor:
        """Return a field of the codes, as the type can store it."""
        if name not in self.numbers:
            return self._first[name]
        x = self._first[name] * (1 + self.numbers[name])
        if name == "factor" or self._range is None:
            stored = x.detach().half().float()
        else:
            low, high = self._range
            stored = torch.round(x.detach()).clamp(low if name == "scale" else 0, high)
        made: torch.Tensor = _Through.apply(x, stored)
        return made

    def values(self) -> torch.Tensor:
        scale, minimum, factor = (self._field(name) for name in ("scale", "minimum", "factor"))
        factor = factor.repeat_interleave(scale.shape[1] // factor.shape[1], 1)
        d = factor[..., 0] * scale
        m = factor[..., 1] * minimum if minimum.shape[1] else torch.full_like(d, -0.0)
        made: torch.Tensor = _OfSteps.apply(d, m, self._value)
        return made

    def blocks(self) -> np.ndarray:
        fields = {name: self._field(name).detach().cpu().numpy() for name in self._first}
        return pack(replace(self._codes, **fields))
