"""The operands of ops: buffers, and numbers of the model. handles.py has the handles of a backend."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.frozen import frozen


@frozen
class Buffer:
    """f32[rows, width]: some columns of a memory. Buffers compare by value.

    A memory is only a name here. The backend allocates one memory for each name in the lists of a program.
    """

    name: str  # of the memory
    row_width: int  # columns of the memory
    start: int  # first column of this buffer
    width: int  # columns of this buffer
    outputs: bool = False  # rows are the tokens whose results are wanted; False: all tokens of the step

    @classmethod
    def whole(cls, name: str, width: int, *, outputs: bool = False) -> "Buffer":
        """Return all columns of a memory."""
        return cls(name, width, 0, width, outputs)

    def columns(self, start: int, width: int) -> "Buffer":
        """Return columns start .. start + width of this buffer, with the same rows."""
        if not 0 <= start < start + width <= self.width:
            raise ValueError(f"columns {start} .. {start + width} of {self.name}, which has {self.width}")
        return replace(self, start=self.start + start, width=width)


@frozen(eq=False)
class Rotation:
    """Rotary embedding: pair i of the first n_rot dimensions of a head turns by `position * inv_freq[i]`.

    Objects compare by identity. A backend keeps one table of cosines for each object, so layers with equal numbers
    share an object.
    """

    style: str  # pairs are "norm": (2i, 2i + 1), or "neox": (i, i + n_rot / 2)
    n_rot: int  # dimensions that turn; the others stay as they are
    inv_freq: NDArray[np.float64]  # [n_rot / 2], scaling and factors of the model applied
    scale: float = 1.0  # factor on the rotated values: YaRN's attention factor
    long_inv_freq: NDArray[np.float64] | None = None  # LongRoPE: inv_freq of sequences of more than n_short tokens
    n_short: int = 0

    @property
    def inv_freqs(self) -> NDArray[np.float64]:
        """f64[2, n_rot / 2]: of short sequences, and of long ones."""
        return np.stack([self.inv_freq, self.inv_freq if self.long_inv_freq is None else self.long_inv_freq])

    def of(self, is_long: bool) -> "Rotation":
        """Return the rotation of a sequence."""
        return replace(self, inv_freq=self.inv_freqs[int(is_long)], long_inv_freq=None)


@frozen
class RopeScaling:
    """How a model stretches positions to a context longer than that of its first training."""

    type: str = "none"  # one of rope_scaling.SCALING_TYPES
    factor: float = 1.0  # "linear" divides all angles by it, "yarn" only those of slow pairs, "longrope" none
    n_ctx_orig: int = 0  # context of the first training
    attn_factor: float = 1.0  # extra factor on the rotated values, for any type
    # "yarn" only:
    ext_factor: float = 1.0  # 1: fast pairs keep their angles; 0: their angles are divided too; between: a mix
    beta_fast: float = 32.0  # pairs that turn more often than this in n_ctx_orig positions are fast
    beta_slow: float = 1.0  # pairs that turn less often are slow; pairs between fast and slow are on a linear ramp
    yarn_attn_factor: float = 0.0  # the whole attention factor; 0: it follows from the factor
    log_multiplier: float = 0.0  # the attention factor is divided by 1 + 0.1 * log_multiplier * ln(factor)
    truncate: bool = True  # the ramp begins and ends at whole pairs


UNSCALED = RopeScaling()


@frozen
class AttentionShape:
    """The numbers of one layer's attention."""

    n_head: int  # heads of queries
    n_head_kv: int  # heads of keys and values, each for n_head / n_head_kv heads of queries
    head_dim: int
    scale: float  # factor on q.k
    window: int = 0  # positions that a token sees, its own included; 0: all
    softcap: float = 0.0  # scores become softcap * tanh(score / softcap); 0: they stay
    is_chunked: bool = False  # windows begin at multiples of `window`: a token sees its own one up to itself
    n_latent: int = 0  # the value of a position is the first n_latent columns of its key; 0: values have their own rows
    is_causal: bool = True  # a token sees no later one; False: also later ones of its step, nearer than any window

    @property
    def n_value(self) -> int:
        """Columns of a value, and of a head of the result."""
        return self.n_latent or self.head_dim
