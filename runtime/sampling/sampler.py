"""Chooses the next token: biases, logits processors, samplers, then a draw, in llama.cpp's order."""

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.frozen import frozen
from gguf_run.runtime.sampling import filters
from gguf_run.runtime.sampling.candidates import EXACT, Breakers, Candidates, State, largest
from gguf_run.runtime.sampling.filters import GREEDY
from gguf_run.runtime.sampling.params import SAMPLERS, SamplerKind, SamplingParams

if TYPE_CHECKING:
    from gguf_run.runtime.sampling.select import AdaptiveP, Mirostat

Function = Callable[[Candidates, SamplingParams, State], Candidates]

_FILTERS: Mapping[str, Function] = {
    "top_k": filters.top_k,
    "top_p": filters.top_p,
    "min_p": filters.min_p,
    "temperature": filters.temperature,
}


@frozen
class TokenLogprob:
    """Natural logarithms of probabilities where a token was chosen, before any bias, processor or sampler."""

    id: int  # the token
    logprob: float  # of the token
    top: tuple[tuple[int, float], ...]  # the most likely tokens with theirs


class Sampler:
    """Chooses tokens from logits, one after the other."""

    def __init__(self, params: SamplingParams, breakers: Breakers | None = None) -> None:
        """breakers: history.breakers of params.dry_sequence_breakers."""
        if params.mirostat:
            params = replace(params, samplers=("temperature",), dynatemp_range=0.0)
        self.params = params
        self.seed = random.getrandbits(32) if params.seed is None else int(params.seed)  # gives the same text again
        self.logprobs: list[TokenLogprob] = []  # of the tokens so far, if params.logprobs asks for them
        stages = _stages(params)
        self._functions = [function(kind.name) for kind in stages]
        self.n_top = _n_top(params, stages)  # this many of the largest logits are enough; 0: all are needed
        look_back = {"penalties": params.repeat_last_n, "dry": params.dry_penalty_last_n}
        n_recent = max((look_back.get(kind.name, 0) for kind in stages), default=0)
        self._state = State(random.Random(self.seed), deque(maxlen=n_recent), breakers or {})
        self._context: list[int] = []  # for logits processors only
        self._selector = _selector(params)

    def accept(self, ids: Iterable[int]) -> None:
        """Note tokens of the prompt or the answer: penalties and logits processors look at them."""
        if self.params.logits_processors:
            ids = list(ids)
            self._context.extend(ids)
        self._state.recent.extend(ids)

    def sample(self, logits: NDArray[np.float32] | Candidates) -> int:
        """Return the id of the next token.

        logits: f32[n_vocab], which stay as they are; or, if n_top is not 0, the n_top largest, in order.
        GgufRunError if the logits are no numbers, or no token is left to choose from.
        """
        best = logits.logits[0] if isinstance(logits, Candidates) else logits[int(logits.argmax())]
        if not np.isfinite(best):
            raise GgufRunError(
                f"the model's output for the next token is {best}, not a number: the file is damaged, or its "
                "values are too large for this computation"
            )
        with np.errstate(over="ignore"):
            if isinstance(logits, Candidates):
                candidates = logits.take(logits.logits > -np.inf, True)
            else:
                candidates = Candidates(self._processed(logits))
            for apply in self._functions:
                candidates = apply(candidates, self.params, self._state)
            candidates = self._distribution(candidates)
        i = _draw(candidates.probabilities(), self._state.random) if len(candidates.logits) > 1 else 0
        if self._selector is not None:
            self._selector.chosen(candidates, i)
        id = candidates.id(i)
        if self.params.logprobs is not None and not isinstance(logits, Candidates):
            self.logprobs.append(_logprobs(logits, id, self.params.logprobs))
        return id

    def _distribution(self, candidates: Candidates) -> Candidates:
        """Return the candidates from which one is drawn."""
        return candidates if self._selector is None else self._selector.distribution(candidates)

    def _processed(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Apply logit_bias and the logits processors, to a copy."""
        params = self.params
        if not params.logit_bias and not params.logits_processors:
            return logits
        shape, logits = logits.shape, logits.copy()
        for id, bias in params.logit_bias.items():
            logits[id] += np.float32(bias)
        for processor in params.logits_processors:
            logits = np.asarray(processor(np.array(self._context, np.intp), logits), np.float32)
            if logits.shape != shape:
                raise GgufRunError(
                    f"a logits processor returned an array of shape {logits.shape}: it must return logits of {shape}"
                )
        best = logits.max()
        if not np.isfinite(best):
            raise GgufRunError(
                f"logit_bias or a logits processor leaves no token to choose from (the largest logit is {best}): leave "
                "one finite at least, and none inf or nan"
            )
        return logits


def _stages(params: SamplingParams) -> Sequence[SamplerKind]:
    """Return the samplers that run, in order."""
    stages = [SAMPLERS[name] for name in params.samplers if SAMPLERS[name].is_on(params)]
    if "temperature" not in params.samplers or not _is_greedy(params):
        return stages
    # Samplers that keep the best token need not run, unless a sampler behind them may change it.
    n_first = max((i + 1 for i, kind in enumerate(stages) if not kind.keeps_best), default=0)
    return stages[:n_first] + [kind for kind in stages[n_first:] if kind.name == "temperature"]


def _n_top(params: SamplingParams, stages: Sequence[SamplerKind]) -> int:
    if not stages or params.logit_bias or params.logits_processors or params.logprobs is not None:
        return 0
    first = stages[0].name
    return params.top_k if first == "top_k" else int(first == "temperature" and _is_greedy(params))


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < GREEDY and not params.dynatemp_range


def function(name: str) -> Function:
    """Return the function of a sampler. Those that are off by default are imported when they are on."""
    if name in _FILTERS:
        return _FILTERS[name]
    from gguf_run.runtime.sampling.history import dry, penalties
    from gguf_run.runtime.sampling.uncommon import top_n_sigma, typical, xtc

    return {"penalties": penalties, "dry": dry, "top_n_sigma": top_n_sigma, "typ_p": typical, "xtc": xtc}[name]


def _selector(params: SamplingParams) -> "Mirostat | AdaptiveP | None":
    """Return what selects the candidates for the draw; None: the samplers alone do."""
    if not params.mirostat and (params.adaptive_target < 0 or "adaptive_p" not in params.samplers):
        return None
    from gguf_run.runtime.sampling.select import AdaptiveP, Mirostat

    if params.mirostat:
        return Mirostat(params.mirostat, params.mirostat_tau, params.mirostat_eta)
    return AdaptiveP(params.adaptive_target, params.adaptive_decay)


def _draw(probabilities: NDArray[np.floating], source: random.Random) -> int:
    """Draw an index. First a block is drawn, then one of its tokens: a float64 copy of all takes ten times as long."""
    blocks = np.add.reduceat(probabilities, np.arange(0, len(probabilities), EXACT), dtype=np.float64).cumsum()
    wanted = source.random() * blocks[-1]
    i = int(blocks.searchsorted(wanted, side="right"))
    block = probabilities[i * EXACT : (i + 1) * EXACT].astype(np.float64)
    at = int(block.cumsum().searchsorted(wanted - (blocks[i - 1] if i else 0), side="right"))
    return i * EXACT + (at if at < len(block) else int(block.argmax()))  # rounding may lead behind the block


def _logprobs(logits: NDArray[np.float32], id: int, n: int) -> TokenLogprob:
    top = largest(logits, n) if n else ()
    most = float(logits.max())
    total = most + math.log(np.exp(logits - most).sum(dtype=np.float64))
    return TokenLogprob(
        id, float(logits[id]) - total, tuple((int(other), float(logits[other]) - total) for other in top)
    )
