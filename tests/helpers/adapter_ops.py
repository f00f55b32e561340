"""ScaleAdapters in a step of several sequences, for all tokens and for the wanted ones."""

import numpy as np
from cpu_ops import Step

from gguf_run.models.adapter_scales import AdapterScales
from gguf_run.models.backend import Run
from gguf_run.models.rare_ops import ScaleAdapters

COLUMNS = ((1, 2.0),) * 3 + ((0, 0.5),) * 16 + ((1, -1.5),) + ((2, 1.0),) * 21
WIDTH = len(COLUMNS)
RUNS = [Run(3, 0, 4), Run(0, 7, 1), Run(1, 2, 3)]
N_TOKENS = sum(run.n_tokens for run in RUNS)
WANTED = [7, 0, 4]


class Scaled:
    """A step that scales columns of a buffer twice: before the outputs, and among the wanted rows only."""

    def __init__(self, step: Step) -> None:
        self.scales = AdapterScales({"a": 1.0, "b": 0.25, "c": 0.0}, n_seq=4)
        values = np.random.default_rng(1).standard_normal((N_TOKENS, WIDTH + 9)).astype(np.float32)
        values[2, 5 + WIDTH - 21] = np.nan  # of the adapter c
        self._step = step
        every = step.input(values)
        step.add(ScaleAdapters(every.columns(5, WIDTH), self.scales, COLUMNS))
        out = step.outputs(every)
        step.add(ScaleAdapters(out.columns(0, WIDTH), self.scales, COLUMNS))
        step.finish(out)

    def run(self) -> np.ndarray:
        ids = np.arange(N_TOKENS, dtype=np.int32)
        return self._step.program.run(ids, RUNS, WANTED).values.copy()


def compare(twin: Step, other: Step) -> tuple[np.ndarray, np.ndarray]:
    """Return the results of two backends, with the first scales and then with others."""
    results = []
    for scaled in (Scaled(twin), Scaled(other)):
        first = scaled.run()
        scaled.scales.set(0, {"c": 3.0, "b": -2.0})
        scaled.scales.set(3, {})
        results.append(np.concatenate([first, scaled.run()]))
    return results[0], results[1]
