"""How strongly each sequence uses each adapter: data that a step reads, so that one program serves all mixtures."""

from collections.abc import Mapping

import numpy as np

from gguf_run.formats.errors import OptionError

MOST = 1e6  # the largest scale


class AdapterScales:
    """A table that backends read at the start of each step. Its memory stays where it is."""

    def __init__(self, defaults: Mapping[str, float], n_seq: int) -> None:
        """defaults: the scale of each adapter, by name, which each sequence has at first."""
        self.defaults = dict(defaults)
        self.values = np.zeros((n_seq, len(defaults)), np.float32)  # 0: the sequence does not use the adapter
        for seq in range(n_seq):
            self.set(seq, None)

    def check(self, scales: Mapping[str, float]) -> None:
        """Raise OptionError for an adapter that is not loaded, and for a scale that is not allowed."""
        for name, scale in scales.items():
            if name not in self.defaults:
                raise OptionError(f"adapter {name} is not loaded (--lora): choose among {', '.join(self.defaults)}")
            if not isinstance(scale, int | float) or not abs(scale) <= MOST:
                allowed = f"numbers from {-MOST:g} to {MOST:g}"
                raise OptionError(f"adapter {name} has the scale {scale}; allowed are {allowed}")

    def set(self, seq: int, scales: Mapping[str, float] | None) -> None:
        """Choose the adapters of a sequence, between two steps. Tokens that are in its cache stay as they are.

        scales: by the name of the adapter; 0 for those that are not named. None: the defaults. Errors: see check.
        """
        scales = self.defaults if scales is None else scales
        self.check(scales)
        self.values[seq] = [scales.get(name, 0.0) for name in self.defaults]
