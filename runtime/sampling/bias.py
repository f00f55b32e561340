"""What comes before the samplers, if it is asked for: logit_bias, logits processors, a mask, drafts."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.sampling.candidates import Candidates, State
from gguf_run.runtime.sampling.params import SamplingParams


def after(state: State, drafts: Sequence[int]) -> State:
    """Return the state as if `drafts` had been accepted."""
    recent = deque([*state.recent, *drafts], state.recent.maxlen)
    return replace(state, n_past=state.n_past + len(drafts), recent=recent)


def biased(
    logits: NDArray[np.float32] | Candidates,
    params: SamplingParams,
    context: Sequence[int],
    mask: NDArray[np.uint32] | None,
) -> NDArray[np.float32] | Candidates:
    """Return changed logits, a copy. Of the largest logits alone, only those that the mask forbids change.

    context: the ids of all tokens so far, for the logits processors.
    mask: see Sampler.sample.
    GgufRunError if no token is left to choose from, or a logits processor returns no logits.
    """
    if isinstance(logits, Candidates):
        if mask is not None and logits.ids is not None:
            logits = logits._replace(logits=forbid(logits.logits, logits.ids, mask))
            _check(logits.logits[0])
        return logits
    shape, logits = logits.shape, logits.copy()
    for id, bias in params.logit_bias.items():
        logits[id] += np.float32(bias)
    for processor in params.logits_processors:
        logits = np.asarray(processor(np.array(context, np.intp), logits), np.float32)
        if logits.shape != shape:
            raise GgufRunError(
                f"a logits processor returned an array of shape {logits.shape}: it must return logits of {shape}"
            )
    if mask is not None:
        bits = np.unpackbits(mask.astype("<u4").view(np.uint8), count=len(logits), bitorder="little")
        logits[bits == 0] = -np.inf
    _check(logits.max())
    return logits


def forbid(logits: NDArray[np.floating], ids: NDArray[np.intp], mask: NDArray[np.uint32]) -> NDArray[np.floating]:
    """Return the logits of some ids, -inf where the mask forbids the id. mask: see Sampler.sample."""
    return np.where(mask[ids >> 5] >> (ids & 31).astype(np.uint32) & 1, logits, np.float32(-np.inf))


def _check(best: float) -> None:
    if not np.isfinite(best):
        raise GgufRunError(
            f"logit_bias, a mask or a logits processor leaves no token to choose from (the largest logit is {best}): "
            "leave one finite at least, and none inf or nan"
        )
