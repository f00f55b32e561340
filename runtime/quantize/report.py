"""What quantizing changes: sizes before and after, and how far the weights of each type are from the original."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.runtime.quantize.plan import Item


@dataclass(frozen=True)
class Loss:
    """What a tensor lost. Both sums are 0 for a tensor that was copied."""

    error: float = 0.0  # sum over its weights of the squared errors
    power: float = 0.0  # sum over its weights of the squares

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.error + other.error, self.power + other.power)

    def relative(self) -> float:
        """Return sqrt(error / power), 0 for a tensor of zeros."""
        return math.sqrt(self.error / self.power) if self.power else 0.0


@dataclass(frozen=True)
class TypeReport:
    """The tensors that are written as one type. The last three leave out copied tensors; None: all are copied."""

    type: str
    n_tensors: int
    nbytes: int
    bits_per_weight: float
    rmse: float | None  # root of the mean squared error of a weight
    loss: Loss | None
    worst: tuple[str, Loss] | None  # the tensor with the largest relative loss


def bits_per_weight(tensors: Sequence[TensorInfo]) -> float:
    """Return the bits per weight of all tensors together, 0 without weights."""
    return 8 * sum(t.nbytes for t in tensors) / max(1, sum(t.n_elements for t in tensors))


def type_reports(items: Sequence[Item], losses: Sequence[Loss]) -> list[TypeReport]:
    """Return a report for each type, in the order in which the types first occur. losses: of each item."""
    reports = []
    for name in dict.fromkeys(item.target.type.name for item in items):
        group = [(item, loss) for item, loss in zip(items, losses, strict=True) if item.target.type.name == name]
        targets = [item.target for item, _ in group]
        converted = [(item.target, loss) for item, loss in group if not item.is_copy]
        rmse = total = worst = None
        if converted:
            total = sum((loss for _, loss in converted), Loss())
            rmse = (total.error / sum(target.n_elements for target, _ in converted)) ** 0.5
            tensor, loss = max(converted, key=lambda pair: pair[1].relative())
            worst = tensor.name, loss
        nbytes = sum(target.nbytes for target in targets)
        reports.append(TypeReport(name, len(group), nbytes, bits_per_weight(targets), rmse, total, worst))
    return reports
