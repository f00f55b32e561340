"""The options of sampling: llama.cpp's names, defaults and limits, and the table of samplers in its order.

The command line imports this file for its help, so it does without NumPy.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from gguf_run.formats.errors import OptionError
from gguf_run.formats.frozen import frozen

if TYPE_CHECKING:
    from numpy import float32, intp
    from numpy.typing import NDArray

    LogitsProcessor = Callable[[NDArray[intp], NDArray[float32]], NDArray[float32]]


@frozen
class SamplerKind:
    """A row of the table of samplers."""

    name: str
    letter: str  # for --samplers, as in llama.cpp
    parameters: tuple[str, ...]  # its options
    is_on: "Callable[[SamplingParams], bool]"  # tells whether the options ask for anything
    keeps_best: bool = True  # the most likely token stays the most likely one


SAMPLERS = {
    kind.name: kind
    for kind in (
        SamplerKind(
            "penalties", "e", ("repeat_penalty", "repeat_last_n", "frequency_penalty", "presence_penalty"),
            lambda p: bool(
                p.repeat_last_n and (p.repeat_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0)
            ),
            keeps_best=False,
        ),
        SamplerKind(
            "dry", "d", ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n"),
            lambda p: p.dry_multiplier != 0 and p.dry_base >= 1 and p.dry_penalty_last_n > 0, keeps_best=False,
        ),
        SamplerKind("top_n_sigma", "s", ("top_n_sigma",), lambda p: p.top_n_sigma > 0),
        SamplerKind("top_k", "k", ("top_k",), lambda p: p.top_k > 0),
        SamplerKind("typ_p", "y", ("typical_p",), lambda p: p.typical_p < 1, keeps_best=False),
        SamplerKind("top_p", "p", ("top_p",), lambda p: p.top_p < 1),
        SamplerKind("min_p", "m", ("min_p",), lambda p: p.min_p > 0),
        SamplerKind(
            "xtc", "x", ("xtc_probability", "xtc_threshold"),
            lambda p: p.xtc_probability > 0 and p.xtc_threshold <= 0.5, keeps_best=False,
        ),
        SamplerKind(
            "temperature", "t", ("temperature", "dynatemp_range", "dynatemp_exponent"),
            lambda p: p.temperature != 1 or p.dynatemp_range > 0,
        ),
        # It replaces the draw at the end, wherever it stands in the chain: see select.py.
        SamplerKind("adaptive_p", "a", ("adaptive_target", "adaptive_decay"), lambda p: False),
    )
}  # fmt: skip
DEFAULT_CHAIN = tuple(name for name in SAMPLERS if name != "adaptive_p")
_ALIASES = {"nucleus": "top_p", "temp": "temperature", "typ": "typ_p", "typical": "typ_p", "typicalp": "typ_p"}

# Option: (lowest, highest, whole numbers only, what is allowed in words).
_ANY = (-1e30, 1e30, False, "-1e30 to 1e30; 0 is off")
_COUNT = (0, math.inf, True, "a whole number, 0 (off) or more")
_LIMITS: dict[str, tuple[float, float, bool, str]] = {
    "temperature": (0, math.inf, False, "0 (always the most likely token) or more"),
    "dynatemp_range": (0, math.inf, False, "0 (off) or more"),
    "dynatemp_exponent": (0, math.inf, False, "0 or more"),
    "top_k": _COUNT,
    "top_p": (0, 1, False, "0 to 1 (off)"),
    "min_p": (0, 1, False, "0 (off) to 1"),
    "typical_p": (0, 1, False, "0 to 1 (off)"),
    "top_n_sigma": (-1, math.inf, False, "more than 0, or -1 to 0 (off)"),
    "xtc_probability": (0, 1, False, "0 (off) to 1"),
    "xtc_threshold": (0, 1, False, "0 to 1; more than 0.5 is off"),
    "repeat_penalty": (1e-3, 1e3, False, "0.001 to 1000; 1 is off"),
    "frequency_penalty": _ANY,
    "presence_penalty": _ANY,
    "repeat_last_n": _COUNT,
    "dry_multiplier": _ANY,
    "dry_base": (0, math.inf, False, "1 or more; less is off"),
    "dry_allowed_length": (0, math.inf, True, "a whole number, 0 or more"),
    "dry_penalty_last_n": _COUNT,
    "mirostat": (0, 2, True, "0 (off), 1 or 2"),
    "mirostat_tau": (0, math.inf, False, "0 or more"),
    "mirostat_eta": (0, math.inf, False, "0 or more"),
    "adaptive_target": (-1, 1, False, "0 to 1, less is off"),
    "adaptive_decay": (0, 0.99, False, "0 to 0.99"),
    "seed": (0, 2**64 - 1, True, "a whole number from 0 to 2^64 - 1"),
    "logprobs": (0, 1 << 20, True, "a whole number, 0 or more"),
}


@frozen
class SamplingParams:
    """How to choose tokens, with llama.cpp's names and defaults. OptionError for a value that is not allowed.

    docs/running.md tells which values turn a sampler off.
    """

    temperature: float = 0.8  # divides the logits; 0: always the most likely token
    top_k: int = 40  # keep the k most likely tokens
    top_p: float = 0.95  # keep the most likely tokens that together have this probability
    min_p: float = 0.05  # keep tokens that are at least this fraction as likely as the best one
    repeat_penalty: float = 1.0  # divides positive and multiplies negative logits of recent tokens
    repeat_last_n: int = 64  # how many tokens count as recent
    seed: int | None = None  # of the random numbers; None: another one each time
    frequency_penalty: float = 0.0  # subtracted for each time that a recent token came
    presence_penalty: float = 0.0  # subtracted once from each recent token
    dry_multiplier: float = 0.0  # DRY subtracts multiplier * base^(n - allowed_length) from the logit of a token
    dry_base: float = 1.75  # that would make a repetition of n tokens longer, see history.dry
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64  # how many tokens back DRY looks for a repetition
    dry_sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")  # a repetition ends at these texts
    top_n_sigma: float = -1.0  # keep logits within n standard deviations below the largest
    typical_p: float = 1.0  # keep tokens of typical surprise that together have this probability
    xtc_probability: float = 0.0  # how often XTC drops the most likely tokens
    xtc_threshold: float = 0.1  # XTC drops the tokens above this probability, except the least likely of them
    dynatemp_range: float = 0.0  # how far the temperature moves with the entropy, see filters.temperature
    dynatemp_exponent: float = 1.0  # the power of the entropy in this movement
    mirostat: int = 0  # 1 or 2: mirostat replaces all samplers but the temperature
    mirostat_tau: float = 5.0  # the surprise that mirostat aims at, in bits
    mirostat_eta: float = 0.1  # how fast mirostat adapts
    adaptive_target: float = -1.0  # the probability that the sampler adaptive_p aims at
    adaptive_decay: float = 0.9  # how slowly adaptive_p forgets the tokens before
    # Names of samplers in their order: a list, one text with ";" between them, or letters ("edskypmxt" is the default).
    # The object holds a tuple of names.
    samplers: str | Sequence[str] = DEFAULT_CHAIN
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of tokens; -inf forbids one
    # Called in turn, after the biases and before the samplers, with the ids of the context and the logits f32[n_vocab].
    # Each returns the logits, and may write to those that it was given.
    logits_processors: "Sequence[LogitsProcessor]" = ()
    logprobs: int | None = None  # record the log-probabilities of each token and of the n most likely; None: none
    ignore_eos: bool = False  # forbid the tokens that end an answer

    def __post_init__(self) -> None:
        for name, (lowest, highest, whole, allowed) in _LIMITS.items():
            value: Any = getattr(self, name)
            if name in ("seed", "logprobs") and value is None:
                continue
            if not _is_number(value, whole) or not lowest <= value <= highest or math.isinf(value):
                raise OptionError(f"{name} is {value!r}; allowed: {allowed}")
        for id, bias in self.logit_bias.items():
            if not _is_number(id, True) or id < 0 or not _is_number(bias, False) or not bias <= 1e30:
                raise OptionError(f"logit_bias is {id!r}: {bias!r}; allowed: token ids, and numbers to add or -inf")
        if isinstance(self.dry_sequence_breakers, str) or not all(self.dry_sequence_breakers):
            raise OptionError(
                f"dry_sequence_breakers is {self.dry_sequence_breakers!r}; allowed: a list of texts that are not empty"
            )
        object.__setattr__(self, "samplers", _chain(self.samplers))


def _is_number(value: Any, whole: bool) -> bool:
    return isinstance(value, Integral if whole else Real) and not isinstance(value, bool)


def _chain(samplers: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of samplers. A name may be written top_k, top-k or TopK; one text may hold letters."""
    flat = {name.replace("_", ""): name for name in SAMPLERS} | _ALIASES
    names = [name for name in samplers.split(";") if name.strip()] if isinstance(samplers, str) else list(samplers)
    found = [flat.get(str(name).strip().lower().replace("_", "").replace("-", "")) for name in names]
    if isinstance(samplers, str) and len(names) == 1 and found == [None]:
        letters = {kind.letter: kind.name for kind in SAMPLERS.values()}
        names, found = list(samplers), [letters.get(letter) for letter in samplers]
    if None in found:
        known = ", ".join(f"{kind.name} ({kind.letter})" for kind in SAMPLERS.values())
        unknown = names[found.index(None)]
        raise OptionError(f"samplers: {unknown!r} is not known; allowed, with ; between them, or as letters: {known}")
    return tuple(name for name in found if name is not None)
