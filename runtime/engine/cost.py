"""What a step costs, fitted while the engine runs: how many tokens of a prompt fit into a step of so many milliseconds.

    ms = pace * (a + b * answers + c * prompt tokens + d * (positions that all tokens read, in thousands))

The four numbers come from recursive least squares of relative errors, with forgetting: older steps count less. None of
them is negative. The fit is linear, a machine is not, so a prompt's part of a step is at most 1.5 times the largest
part that was measured beside answers.

The pace follows the last steps. Other programs take a part of the machine for a second or less: that changes how long
all steps take, and tells nothing about the four numbers.
"""

import math
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

_FORGET = 0.98  # weight of a step, compared with that of the next one
_SPREAD = np.array([50.0, 5.0, 10.0, 0.5])  # sizes of the numbers: ms of a large model on two cores
_HOLD = np.diag((0.1 / _SPREAD) ** 2)  # holds the numbers that the last steps tell nothing about
_FIRST = 24  # tokens of a prompt that run beside answers before anything was measured
_GROWTH = 1.5
_HASTE = 0.5  # weight of the last step in the pace
_LEAP = 3.0  # the pace of a step counts as at most so many times the pace before


class CostModel:
    """Predicts the milliseconds of steps."""

    def __init__(self) -> None:
        self._factors = np.zeros(4)  # a, b, c, d
        self._products, self._sums = np.zeros((4, 4)), np.zeros(4)  # of the normal equations
        self._largest = 0  # tokens of prompts that were measured beside answers
        self._pace = 1.0

    def measure(self, n_answers: int, n_prompt: int, n_read: float, ms: float) -> None:
        """Learn from a step. n_read: positions that all of its tokens read together."""
        row, ms = _row(n_answers, n_prompt, n_read), max(ms, 1e-3)
        fitted = float(row @ self._factors)
        if fitted and n_prompt <= self._largest:
            self._pace += _HASTE * (min(ms / fitted, _LEAP * self._pace) - self._pace)
        if n_answers and n_prompt:
            self._largest = max(self._largest, n_prompt)
        row *= self._pace / ms  # times the factors: 1
        self._products = _FORGET * self._products + np.outer(row, row)
        self._sums = _FORGET * self._sums + row
        with suppress(np.linalg.LinAlgError):  # steps of microseconds, all alike: the factors stay
            found = np.linalg.solve(self._products + _HOLD, self._sums + _HOLD @ self._factors)
            self._factors = np.maximum(found, 0)

    def predict(self, n_answers: int, n_prompt: int, n_read: float) -> float:
        """Return the milliseconds of a step, 0 before anything was measured."""
        return self._pace * float(_row(n_answers, n_prompt, n_read) @ self._factors)

    def chunk(self, ms: float, n_past: int) -> int:
        """Return how many tokens of a prompt behind n_past others take so many milliseconds, beside answers."""
        if ms <= 0:
            return 0
        _, _, c, d = (self._pace * self._factors).tolist()
        # c n + d n (n_past + n / 2) / 1000 = ms
        linear, square = c + d * n_past / 1000, d / 2000
        divisor = linear + math.sqrt(linear * linear + 4 * square * ms)
        most = max(_FIRST, int(_GROWTH * self._largest))
        return most if most * divisor <= 2 * ms else int(2 * ms / divisor)


def _row(n_answers: int, n_prompt: int, n_read: float) -> NDArray[np.float64]:
    return np.array([1.0, n_answers, n_prompt, n_read / 1000])
