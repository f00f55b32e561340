"""What quantizing changes: sizes before and after, and how far the weights of each type are from the original."""

from collections.abc import Sequence
from dataclasses import dataclass

from gguf_run.runtime.quantize.file import Loss
from gguf_run.runtime.quantize.plan import Item


@dataclass(frozen=True)
class Sizes:
    """The sizes of some tensors."""

    n_tensors: int
    n_weights: int
    before: int  # bytes in the input
    after: int  # bytes in the output

    @classmethod
    def of(cls, items: Sequence[Item]) -> "Sizes":
        sources, targets = [item.source for item in items], [item.target for item in items]
        n_weights = sum(target.n_elements for target in targets)
        return cls(len(items), n_weights, sum(s.nbytes for s in sources), sum(t.nbytes for t in targets))

    def bits_per_weight(self) -> tuple[float, float]:
        """Return the bits per weight before and after, 0 without weights."""
        n = max(1, self.n_weights)
        return 8 * self.before / n, 8 * self.after / n


@dataclass(frozen=True)
class TypeReport:
    """All tensors that are written as one type. The losses leave out tensors that were copied; None: all were."""

    type: str
    sizes: Sizes
    rmse: float | None = None  # root of the mean squared error of a weight
    relative: float | None = None  # root of the sum of squared errors by the sum of squares
    worst: tuple[str, float] | None = None  # the tensor with the largest relative loss, and that loss


def type_reports(items: Sequence[Item], losses: Sequence[Loss]) -> list[TypeReport]:
    """Return a report for each type, in the order in which the types first occur. losses: of each item."""
    reports = []
    for name in dict.fromkeys(item.target.type.name for item in items):
        group = [(item, loss) for item, loss in zip(items, losses, strict=True) if item.target.type.name == name]
        report = TypeReport(name, Sizes.of([item for item, _ in group]))
        if converted := [(item, loss) for item, loss in group if not item.is_copy]:
            total = sum((loss for _, loss in converted), Loss())
            rmse = (total.error / sum(item.target.n_elements for item, _ in converted)) ** 0.5
            item, loss = max(converted, key=lambda pair: pair[1].relative())
            report = TypeReport(name, report.sizes, rmse, total.relative(), (item.target.name, loss.relative()))
        reports.append(report)
    return reports
