"""What an importance matrix says of its tensors and layers: the figures of `llama-imatrix --show-statistics`.

All are of mean squares of activations, one value for each input channel (and expert that saw a token):

    Σ(Act²)     their sum                      % Active  share of them above 1e-5
    Entropy     of their shares of the sum, in bits; E (norm): of log2(N), the most there can be
    ZD          share of them more than one standard deviation above the mean (Dumitru et al. 2024, arXiv:2406.17415)
    CosSim      cosine of the sums' angle with those of the same tensor one layer before (0: there is none)
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gguf_run.formats.gguf.imatrix import Imatrix, Sums

_ACTIVE = 1e-5


@dataclass(frozen=True)
class Statistics:
    """Of one tensor; see above. layer: -1 for what is in none."""

    layer: int
    tensor: str
    n: int
    total: float
    low: float
    high: float
    mean: float
    deviation: float
    active: float
    entropy: float
    z_density: float
    similarity: float

    @property
    def normalized(self) -> float:
        return self.entropy / math.log2(self.n) if self.n > 1 else 0.0


def statistics(imatrix: Imatrix) -> list[Statistics]:
    """By tensor's name, the largest sum first. Tensors that saw no token are left out."""
    found = [_statistics(name, imatrix.sums) for name, entry in imatrix.sums.items() if entry.counts.any()]
    return sorted(found, key=lambda s: (s.tensor, -s.total))


def _statistics(name: str, sums: Mapping[str, Sums]) -> Statistics:
    entry = sums[name]
    seen = entry.counts > 0
    x = (entry.sums[seen] / entry.counts[seen, None].astype(np.float64)).reshape(-1)
    total, deviation = x.sum(), x.std()
    p = x[x > 0] / total
    match = re.search(r"blk\.(\d+)\.", name)
    similarity = 0.0
    if match is not None:
        before = sums.get(f"{name[: match.start(1)]}{int(match[1]) - 1}{name[match.end(1) :]}")
        similarity = 0.0 if before is None else _cosine(entry.sums, before.sums)
    return Statistics(
        layer=-1 if match is None else int(match[1]),
        tensor=name.removesuffix(".weight").split(".")[-1],
        n=x.size,
        total=float(total),
        low=float(x.min()),
        high=float(x.max()),
        mean=float(x.mean()),
        deviation=float(deviation),
        active=float((x > _ACTIVE).mean()),
        entropy=float(-(p * np.log2(p)).sum()),
        z_density=float((x - x.mean() > deviation).mean()) if deviation else 0.0,
        similarity=similarity,
    )


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = (x.reshape(-1).astype(np.float64) for x in (a, b))
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / lengths) if a.size == b.size and lengths else 0.0


def table(found: list[Statistics]) -> Iterator[str]:
    """Lines: all tensors, then the layers' means, weighted with the tensors' sizes."""
    yield (
        f"{'Layer':>5}  {'Tensor':<20} {'Σ(Act²)':>12} {'Min':>9} {'Max':>11} {'μ':>9} {'σ':>9} {'% Active':>9} "
        f"{'N':>7} {'Entropy':>8} {'E (norm)':>9} {'ZD':>8} {'CosSim':>7}"
    )
    for s in found:
        yield (
            f"{s.layer if s.layer >= 0 else '-':>5}  {s.tensor:<20} {s.total:>12.2f} {s.low:>9.4f} {s.high:>11.4f} "
            f"{s.mean:>9.2f} {s.deviation:>9.2f} {s.active:>9.2%} {s.n:>7} {s.entropy:>8.4f} {s.normalized:>9.2%} "
            f"{s.z_density:>8.2%} {s.similarity:>7.4f}"
        )
    yield f"\n{'Layer':>5} {'μΣ(Act²)':>12} {'μZD':>9} {'μCosSim':>8}"
    for layer in sorted({s.layer for s in found} - {-1}):
        its = [s for s in found if s.layer == layer]
        n = sum(s.n for s in its)
        total, z_density, similarity = (
            sum(s.n * value for s, value in zip(its, values, strict=True)) / n
            for values in zip(*((s.total, s.z_density, s.similarity) for s in its), strict=True)
        )
        yield f"{layer:>5} {total:>12.2f} {z_density:>9.4%} {similarity:>8.4f}"
