"""What the kernels of recurrent ops share: the runs of a step, which are the first axis of a grid, and softplus."""

import triton
import triton.language as tl

TILE = 1024  # numbers of a state that a program of one warp has in its registers


@triton.jit
def load_run(runs):
    """Return first token, number of tokens, whether the state is still 0, and both slots of this program's run."""
    run = runs + tl.program_id(0) * 5  # buffers.RUN_WORDS
    first = tl.load(run).to(tl.int64)
    is_new = tl.load(run + 2) == 0
    return first, tl.load(run + 1), is_new, tl.load(run + 3).to(tl.int64), tl.load(run + 4).to(tl.int64)


@triton.jit
def softplus(x):
    """Return log(1 + e^x), precise for small e^x too."""
    e = tl.exp(tl.minimum(x, 20.0))
    grown = 1.0 + e
    small = tl.where(grown == 1.0, e, tl.log(grown) * (e / tl.where(grown == 1.0, 1.0, grown - 1.0)))
    return tl.where(x > 20.0, x, small)
