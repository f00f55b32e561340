"""What changes logits before the samplers: logit_bias, logits processors, a mask."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.sampling.params import SamplingParams


def changed(
    logits: NDArray[np.float32], params: SamplingParams, context: Sequence[int], mask: NDArray[np.uint32] | None
) -> NDArray[np.float32]:
    """Return changed logits f32[n_vocab], a copy.

    context: the ids of all tokens so far, for the logits processors.
    mask: see Sampler.sample.
    GgufRunError if no token is left to choose from, or a logits processor returns no logits.
    """
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
    best = logits.max()
    if not np.isfinite(best):
        raise GgufRunError(
            f"logit_bias, a mask or a logits processor leaves no token to choose from (the largest logit is {best}): "
            "leave one finite at least, and none inf or nan"
        )
    return logits
