"""Weights for the functions of ops.py. A matrix stays in its file: blocks are dequantized whenever it is multiplied.

What is trained is asked for by the tensor's name: `trained` has tensors in place of those of the file, `adapted` pairs
of low rank beside them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.gguf.parts import matrix_of
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.backend import CacheType
from gguf_run.models.experts import ExpertTensors
from gguf_run.models.operands import AttentionShape
from gguf_run.models.pages import PageTable
from gguf_run.models.weights import Loader, Matrix

AnyLoader: TypeAlias = Loader[Any, Any, Any, Any, Any, Any, Any]


@dataclass
class Pair:
    """What is added to a matrix: factor * b @ a."""

    a: torch.Tensor  # [rank, n_in]
    b: torch.Tensor  # [n_out, rank], rows in the file's order
    factor: float
    dropout: float = 0.0  # part of the input that a does not see, while gradients are computed


class _Product(torch.autograd.Function):
    """x @ w.T of a matrix that is read when it is needed, and read again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        ctx.read = read
        return x @ read().T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.read(), None


@dataclass
class TorchWeight:
    """The rows of some tensors, one below the other."""

    backend: "TorchBackend"
    tensors: Sequence[Tensor]
    # Of each tensor whose rows the matrix has in another order than the file: that order.
    orders: Mapping[str, NDArray[np.intp]] = field(default_factory=dict)
    is_trained: bool = False  # whether the tensors are those of the file, as `trained` and `adapted` have them

    @property
    def n_in(self) -> int:
        return self.tensors[0].ne[0]

    @property
    def n_out(self) -> int:
        return sum(tensor.ne[1] for tensor in self.tensors)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x @ weight.T"""
        parts = [self._of(tensor, x) for tensor in self.tensors]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _of(self, tensor: Tensor, x: torch.Tensor) -> torch.Tensor:
        backend, name = self.backend, tensor.name
        if self.is_trained and name in backend.trained:
            made = backend.rounded(x, tensor) @ backend.trained[name]().T
        else:
            made = _Product.apply(backend.rounded(x, tensor), partial(backend.read, tensor))
        pair = backend.adapted.get(name) if self.is_trained else None
        if pair is not None:
            seen = torch.nn.functional.dropout(x, pair.dropout, torch.is_grad_enabled() and backend.is_training)
            made = made + pair.factor * ((seen @ pair.a.T) @ pair.b.T)
        return made[:, torch.from_numpy(self.orders[name])] if name in self.orders else made

    def values(self) -> torch.Tensor:
        """Return the numbers, [n_out, n_in], or those of each head if there are three dimensions."""
        found = torch.cat([self.backend.read(tensor) for tensor in self.tensors])
        return found.reshape(*self.tensors[0].ne[::-1]) if len(self.tensors[0].ne) > 2 else found


@dataclass
class TorchVector:
    """The numbers of some tensors, one after the other."""

    backend: "TorchBackend"
    tensors: Sequence[Tensor]
    is_trained: bool = False

    @cached_property
    def _held(self) -> torch.Tensor:
        return torch.cat([self.backend.read(tensor, is_kept=True).reshape(-1) for tensor in self.tensors])

    def values(self) -> torch.Tensor:
        trained = self.backend.trained.get(self.tensors[0].name) if self.is_trained else None
        return self._held if trained is None else trained()


@dataclass(frozen=True)
class TorchTable:
    """A matrix whose rows are looked up."""

    backend: "TorchBackend"
    tensor: Tensor

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        used, places = torch.unique(ids, return_inverse=True)
        blocks = self.tensor.blocks()[used.cpu().numpy()]
        return self.backend.made(dequantize(blocks, self.tensor.type))[places]


class TorchExperts:
    """The matrices of a layer's experts."""

    def __init__(self, backend: "TorchBackend", tensors: Sequence[Tensor]) -> None:
        held = ExpertTensors.of(tensors)
        each = range(held.n_expert)
        self.into = [TorchWeight(backend, [matrix_of(one, e) for one in held.into]) for e in each]
        self.down = [TorchWeight(backend, [matrix_of(held.down, e)]) for e in each]
        self.factors = [1.0] * held.n_expert if held.factors is None else held.factors.tolist()
        self._biases = [backend.read(one, is_kept=True).reshape(held.n_expert, -1) for one in held.biases]
        self._none = backend.made(np.zeros(1, np.float32))

    def biases(self, e: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return those of expert e: of `into`, and of `down`."""
        if not self._biases:
            return self._none, self._none
        return torch.cat([bias[e] for bias in self._biases[:-1]]), self._biases[-1][e]


@dataclass(frozen=True, eq=False)
class TorchCache:
    """The name of a layer's keys and values: those of a step are in its Memory."""

    kinds: str = "kv"


@dataclass(frozen=True, eq=False)
class TorchState:
    """No state: all sequences are whole."""

    n_slots: int


class TorchBackend:
    """The part of protocol.Backend that listing ops needs. It makes no program: model.py runs the lists."""

    name = "torch"

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = device, dtype
        self.trained: dict[str, Callable[[], torch.Tensor]] = {}
        self.adapted: dict[str, Pair] = {}
        self.is_training = False
        self.rounds_activations = False  # to int8, as the CPU rounds what quantized matrices read
        self._held: dict[tuple[str, int], torch.Tensor] = {}

    def made(self, values: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, self.dtype)

    def read(self, tensor: Tensor, is_kept: bool = False) -> torch.Tensor:
        """Return the numbers of a tensor, [n_rows, ne[0]]. A GPU keeps those of matrices: copying takes too long."""
        key = tensor.name, getattr(tensor, "start", 0)
        if (held := self._held.get(key)) is not None:
            return held
        made = self.made(dequantize(tensor.blocks(), tensor.type))
        if tensor.scales:
            factors = torch.tensor(tensor.scales, device=self.device, dtype=self.dtype)
            made = (made.reshape(len(factors), -1) * factors[:, None]).reshape(made.shape)
        if self.device != "cpu" and not is_kept:
            self._held[key] = made
        return made

    def rounded(self, x: torch.Tensor, tensor: Tensor) -> torch.Tensor:
        """Return what a matrix reads."""
        if not self.rounds_activations or not tensor.type.is_quantized:
            return x
        blocks = x.detach().reshape(len(x), -1, 32)
        d = blocks.abs().amax(2, keepdim=True) / 127
        near = (torch.round(blocks / d.clamp(min=1e-30)) * d).reshape(x.shape)
        return x + (near - x.detach())

    def table(self, tensor: Tensor) -> TorchTable:
        return TorchTable(self, tensor)

    def weight(self, tensors: Sequence[Tensor]) -> TorchWeight:
        return TorchWeight(self, [*tensors])

    def vector(self, tensors: Sequence[Tensor]) -> TorchVector:
        return TorchVector(self, [*tensors])

    def experts(self, tensors: Sequence[Tensor]) -> TorchExperts:
        return TorchExperts(self, tensors)

    def cache(self, shape: AttentionShape, table: PageTable, kind: CacheType) -> TorchCache:
        return TorchCache()

    def state(self, n_floats: int, n_slots: int) -> TorchState:
        return TorchState(n_slots)


class TorchLoader(AnyLoader):
    """Marks the matrices and norms that are in the model as they are in the file: these can be trained."""

    def __init__(self, backend: TorchBackend, tensors: Mapping[str, Tensor]) -> None:
        whole: Any = backend  # what it lacks of the protocol, nobody asks for
        super().__init__(whole, tensors, lambda n_bytes: None)
        self.matrices: dict[str, Tensor] = {}  # that can be trained
        self.norms: dict[str, Tensor] = {}

    def matrix(
        self, *names: str, orders: Mapping[str, NDArray[np.intp]] | None = None, **more: Any
    ) -> Matrix[Any, Any]:
        made = super().matrix(*names, **more)
        made.weight.orders = {f"{name}.weight": order for name, order in (orders or {}).items()}
        made.weight.is_trained = True
        self.matrices.update((tensor.name, tensor) for tensor in made.weight.tensors)
        return made

    def norm(self, name: str) -> tuple[Any, Any]:
        weight, bias = super().norm(name)
        weight.is_trained = True
        self.norms[weight.tensors[0].name] = weight.tensors[0]
        return weight, bias
