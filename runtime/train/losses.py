"""What training makes small, and the picture of how it falls."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from gguf_run.runtime.bench.drawing import Drawing
from gguf_run.runtime.bench.scatter import round_ticks
from gguf_run.runtime.train.data import Batch
from gguf_run.runtime.train.model import TorchModel, in_chunks


def _placed(model: TorchModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, the rows that have a target, and these targets."""
    device = model.backend.device
    targets = torch.from_numpy(batch.targets).to(device).reshape(-1)
    rows = torch.nonzero(targets >= 0)[:, 0]
    return torch.from_numpy(batch.ids).to(device), rows, targets[rows]


def cross_entropy(model: TorchModel, batch: Batch) -> torch.Tensor:
    """Return the sum of -log p(right token) over the tokens that are learned."""
    ids, rows, targets = _placed(model, batch)

    def loss(hidden: torch.Tensor, targets: torch.Tensor) -> Any:
        return F.cross_entropy(model.head(hidden), targets, reduction="sum")

    return in_chunks(loss, model.hidden(ids)[rows], targets)


def divergence(model: TorchModel, teacher: TorchModel, batch: Batch) -> torch.Tensor:
    """Return the sum of KL(teacher || model) over the tokens that are learned."""
    ids, rows, _ = _placed(model, batch)
    with torch.no_grad():
        right = teacher.hidden(ids)[rows]

    def loss(hidden: torch.Tensor, right: torch.Tensor) -> Any:
        with torch.no_grad():
            log_p = F.log_softmax(teacher.head(right), 1)
        return F.kl_div(F.log_softmax(model.head(hidden), 1), log_p, reduction="sum", log_target=True)

    return in_chunks(loss, model.hidden(ids)[rows], right)


@dataclass
class Losses:
    """Means over tokens, by the number of steps that were done."""

    train: list[tuple[int, float]] = field(default_factory=list)
    valid: list[tuple[int, float]] = field(default_factory=list)

    def picture(self, title: str) -> str:
        """Return a picture of both, SVG."""
        drawing, left, top, right, bottom = Drawing(800, 400), 70, 50, 775, 345
        points = [*self.train, *self.valid]
        ticks = round_ticks(min(y for _, y in points), max(y for _, y in points))
        last = max(x for x, _ in points) or 1

        def at(x: float, y: float) -> tuple[float, float]:
            return left + (right - left) * x / last, bottom - (bottom - top) * (y - ticks[0]) / (ticks[-1] - ticks[0])

        drawing.text(16, 26, title, kind="title")
        for tick in ticks:
            y = at(0, tick)[1]
            drawing.line(left, y, right, y, "grid" if tick > ticks[0] else "axis")
            drawing.text(left - 8, y + 4, f"{tick:g}", "end", "soft")
        for part in range(5):
            drawing.text(at(last * part / 4, ticks[0])[0], bottom + 18, f"{last * part / 4:g}", "middle", "soft")
        drawing.text((left + right) / 2, bottom + 40, "steps", "middle", "soft")
        lines: Sequence[tuple[str, str, list[tuple[int, float]]]] = (
            ("training", "#2f81f7", self.train), ("validation", "#db6d28", self.valid),
        )  # fmt: skip
        for i, (name, colour, line) in enumerate(lines):
            drawing.curve([at(x, y) for x, y in line], colour)
            drawing.curve([(right - 100, top + 14 + 18 * i), (right - 80, top + 14 + 18 * i)], colour)
            drawing.text(right - 74, top + 18 + 18 * i, name, kind="soft")
        return drawing.svg(title)
