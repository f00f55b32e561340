"""What a step costs, fitted while the engine runs: how many tokens of a prompt fit into a step of so many milliseconds.

    ms = a + b * answers + c * prompt tokens + d * (positions that all tokens read, in thousands)

The four numbers come from recursive least squares with forgetting: older steps count less. The fit is linear, a machine
is not, so a prompt's part of a step grows at most to twice the largest part that was measured beside answers.
"""

import math

import numpy as np

_FORGET = 0.98  # weight of a step, compared with that of the next one
_FIRST = 24  # tokens of a prompt that run beside answers before anything was measured
_MOST_TRUST = 1e6  # variance of a number above which nothing is forgotten: nothing new was learnt about it


class CostModel:
    """Predicts the milliseconds of steps."""

    def __init__(self) -> None:
        self._factors = np.zeros(4)  # a, b, c, d
        self._variance = np.diag([1e3, 1e2, 1e2, 1e2])
        self._n_steps = 0
        self._largest = _FIRST  # tokens of prompts that were measured beside answers

    def measure(self, n_answers: int, n_prompt: int, n_read: float, ms: float) -> None:
        """Learn from a step. n_read: positions that all of its tokens read together."""
        if n_answers and n_prompt:
            self._largest = max(self._largest, n_prompt)
        row = _row(n_answers, n_prompt, n_read)
        spread = self._variance @ row
        gain = spread / (_FORGET + row @ spread)
        self._factors += gain * (ms - row @ self._factors)
        self._variance -= np.outer(gain, spread)
        if self._variance.trace() < _MOST_TRUST:
            self._variance /= _FORGET
        self._n_steps += 1

    def predict(self, n_answers: int, n_prompt: int, n_read: float) -> float:
        """Return the milliseconds of a step, 0 before anything was measured."""
        return float(_row(n_answers, n_prompt, n_read) @ np.maximum(self._factors, 0))

    def chunk(self, ms: float, n_past: int) -> int:
        """Return how many tokens of a prompt behind n_past others take so many milliseconds, beside answers."""
        if ms <= 0:
            return 0
        if not self._n_steps or self._factors[2] <= 0:
            return _FIRST
        _, _, c, d = np.maximum(self._factors, 0).tolist()
        # c n + d n (n_past + n / 2) / 1000 = ms
        linear, square = c + d * n_past / 1000, d / 2000
        n = 2 * ms / (linear + math.sqrt(linear * linear + 4 * square * ms))
        return int(min(n, 2 * self._largest))


def _row(n_answers: int, n_prompt: int, n_read: float) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return np.array([1.0, n_answers, n_prompt, n_read / 1000])
