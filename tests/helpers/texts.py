"""Runs given tokens through an engine, and looks at the logits after them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from fake_decoder import reply_of

from gguf_run.runtime.engine.engine import Engine
from gguf_run.runtime.engine.reply import Request
from gguf_run.runtime.sampling.params import SamplingParams


def engine_over(decoder: Any, **options: Any) -> Engine:
    """An engine without a tokenizer."""
    return Engine(decoder, reply_of, **options)


def prefill(engine: Engine, ids: Sequence[int], n_keep: int | None = None) -> tuple[np.ndarray, int]:
    """Return the logits after a prompt and how many of its tokens were reused. n_keep: the context may be shifted."""
    seen: list[np.ndarray] = []

    def see(_: np.ndarray, logits: np.ndarray) -> np.ndarray:
        seen.append(logits.copy())
        return logits

    sampling = SamplingParams(temperature=0, logits_processors=[see])
    shifts: dict[str, Any] = {} if n_keep is None else {"context_shift": True, "n_keep": n_keep}
    sequence = engine.add(Request(list(ids), sampling, 1, **shifts))
    assert len(list(sequence)) == 1
    return seen[0], sequence.job.n_reused
