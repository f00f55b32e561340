"""What training makes small, and the picture of how it falls."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from gguf_run.runtime.bench.curves import curves
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
        return curves(title, "steps", {"training": self.train, "validation": self.valid})
