"""The ops of models with several streams of hidden states, in one step."""

import numpy as np
from cpu_ops import Step

from gguf_run.models.ops import MatchRms, Mix, Threshold


def streams(step: Step, width: int) -> Step:
    """Three streams are mixed in place of others, then one differs from them; parts are matched; a part is sparse."""
    values = np.random.default_rng(3).standard_normal((5, 6 * width + 9)).astype(np.float32)
    values[2, :width] = 0.0
    values[3, width : 2 * width] *= 1e-6
    every = step.input(values)
    streams, like, coef = every.columns(0, 3 * width), every.columns(3 * width, width), every.columns(6 * width, 9)
    out = step.buffer(4 * width)
    mixed = out.columns(0, 3 * width)
    step.add(Mix(streams, streams, mixed, width, coef))
    step.add(Mix(mixed, like, mixed, width, coef.columns(3, 3), streams.columns(width, width), 1.0))
    step.add(MatchRms(streams, like, 1e-5))
    step.add(Mix(like, streams, out.columns(3 * width, width), width, shift=0.5))
    step.add(Threshold(mixed.columns(width, width), 0.7))
    return step.finish(out)
