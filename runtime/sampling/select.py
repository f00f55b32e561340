"""The end of the chain, if options ask for it: mirostat and adaptive-p choose the candidates of the draw.

Each has two methods. `distribution` returns the candidates to draw from, by the softmax of their logits, and what it
takes for their probabilities. `chosen` learns from this probability of a token that the text goes on with.
"""

import math

import numpy as np
from numpy.typing import NDArray

from gguf_run.runtime.sampling.candidates import Candidates, head

Distribution = tuple[Candidates, NDArray[np.floating]]


class Mirostat:
    """Keeps the surprise of the text near tau, in bits (Basu et al. 2020, "Mirostat").

    Version 1 estimates the exponent of Zipf's law from the most likely tokens and derives how many tokens may come.
    Version 2 forbids tokens of more surprise than mu. Both adapt mu after each token.
    """

    N_ESTIMATE = 100  # tokens from which version 1 estimates
    MAX_MU = 1000.0  # bits; 2^mu must stay a number

    def __init__(self, version: int, tau: float, eta: float) -> None:
        self._narrowed = {1: self._by_exponent, 2: self._by_surprise}[version]
        self._tau, self._eta = tau, eta
        self.mu = min(2 * tau, self.MAX_MU)

    def distribution(self, candidates: Candidates) -> Distribution:
        candidates = self._narrowed(candidates) if len(candidates.logits) > 1 else candidates
        return candidates, candidates.probabilities()

    def chosen(self, probability: float) -> None:
        mu = self.mu - self._eta * (-math.log2(probability) - self._tau)
        self.mu = min(self.MAX_MU, max(-self.MAX_MU, mu))

    def _by_exponent(self, candidates: Candidates) -> Candidates:
        n_vocab = float(len(candidates.logits))  # only the temperature runs before mirostat: all tokens are here
        likely = head(candidates, self.N_ESTIMATE).logits.astype(np.float64)
        if len(likely) < 2 or likely[0] == likely[-1]:
            return candidates
        ranks = np.arange(1, len(likely))
        steps = np.log((ranks + 1) / ranks)
        exponent = (steps @ (likely[:-1] - likely[1:])) / (steps @ steps)
        epsilon = exponent - 1
        with np.errstate(all="ignore"):
            k = (epsilon * 2**self.mu / (1 - n_vocab**-epsilon)) ** (1 / exponent)
        return head(candidates, max(1, int(min(k, len(candidates.logits)))) if k == k else 1)

    def _by_surprise(self, candidates: Candidates) -> Candidates:
        probabilities = candidates.probabilities()
        keeps = probabilities >= min(2.0**-self.mu, float(probabilities.max()))
        return candidates.take(keeps, candidates.is_sorted)


class AdaptiveP:
    """Prefers tokens whose probability is near a target.

    The target moves against the weighted mean of the probabilities that came before; older ones weigh less.
    """

    WIDTH, PEAK, SHARPNESS = 0.3, 5.0, 10.0

    def __init__(self, target: float, decay: float) -> None:
        self._target, self._decay = target, decay
        self._weight = 1 / (1 - decay)
        self._sum = target * self._weight

    def distribution(self, candidates: Candidates) -> Distribution:
        probabilities = candidates.probabilities()
        target = min(1.0, max(0.0, 2 * self._target - self._sum / self._weight))
        distance = np.abs(probabilities - target) / self.WIDTH
        logits = self.PEAK - self.SHARPNESS * distance * distance / (1 + distance)
        return Candidates(np.where(candidates.logits == -np.inf, -np.inf, logits), candidates.ids), probabilities

    def chosen(self, probability: float) -> None:
        self._sum = probability + self._decay * self._sum
        self._weight = 1 + self._decay * self._weight
