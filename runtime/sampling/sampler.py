"""Chooses the next token: biases, logits processors, samplers, then a draw, in llama.cpp's order."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.sampling import filters
from gguf_run.runtime.sampling.candidates import EXACT, Breakers, Candidates, State, uniform
from gguf_run.runtime.sampling.filters import GREEDY
from gguf_run.runtime.sampling.params import SAMPLERS, SamplerKind, SamplingParams

if TYPE_CHECKING:
    from gguf_run.runtime.sampling.choice import TokenLogprob
    from gguf_run.runtime.sampling.select import AdaptiveP, Mirostat

Function = Callable[[Candidates, SamplingParams, State], Candidates]


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
        self.stages = tuple(kind.name for kind in stages)  # the samplers that run, in order
        self._functions = [function(name) for name in self.stages]
        self.n_top = _n_top(params, stages)  # this many of the largest logits are enough; 0: all are needed
        look_back = {"penalties": params.repeat_last_n, "dry": params.dry_penalty_last_n}
        n_recent = max((look_back.get(name, 0) for name in self.stages), default=0)
        self.state = State(self.seed, 0, deque(maxlen=n_recent), breakers or {})
        self._context: list[int] = []  # for logits processors only
        self.selector = _selector(params)  # if it is there, each draw depends on those before: no drafts

    def accept(self, ids: Iterable[int]) -> None:
        """Note tokens of the prompt or the answer. Of what `sample` returned, its log-probability is noted, too."""
        ids, params = list(ids), self.params
        self.state.n_past += len(ids)
        self.state.recent.extend(ids)
        if params.logits_processors:
            self._context.extend(ids)
        if self.selector is not None or params.logprobs is not None:
            from gguf_run.runtime.sampling.choice import Choice

            for choice in (id for id in ids if isinstance(id, Choice)):
                if self.selector is not None:
                    self.selector.chosen(choice.probability)
                if choice.logprob is not None:
                    self.logprobs.append(choice.logprob)

    def sample(
        self,
        logits: NDArray[np.float32] | Candidates,
        mask: NDArray[np.uint32] | None = None,
        drafts: Sequence[int] = (),
    ) -> int:
        """Return the id of the next token, for `accept`: nothing changes until then.

        logits: f32[n_vocab], which stay as they are; or the n_top largest in order, if n_top is not 0. With a mask,
            those that may come are the first.
        mask: uint32[n_vocab / 32], rounded up: a bit for each token that may come, the lowest bit first. None: all may.
        drafts: tokens that are taken to have been accepted.
        GgufRunError if the logits are no numbers, or no token is left to choose from.
        """
        best = logits.logits[0] if isinstance(logits, Candidates) else logits[int(logits.argmax())]
        if not np.isfinite(best):
            raise GgufRunError(
                f"the model's output for the next token is {best}, not a number: the file is damaged, or its "
                "values are too large for this computation"
            )
        state, params, changed = self.state, self.params, logits
        if drafts or mask is not None or params.logit_bias or params.logits_processors:
            from gguf_run.runtime.sampling.bias import after, biased

            state = after(state, drafts)
            changed = biased(logits, params, [*self._context, *drafts], mask)
        with np.errstate(over="ignore"):
            if isinstance(changed, Candidates):
                candidates = changed.take(changed.logits > -np.inf, True)
            else:
                candidates = Candidates(changed)
            for apply in self._functions:
                candidates = apply(candidates, params, state)
            candidates, seen = (candidates, None) if self.selector is None else self.selector.distribution(candidates)
        i = _draw(candidates, uniform(state.seed, state.n_past)) if len(candidates.logits) > 1 else 0
        if seen is None and params.logprobs is None:
            return candidates.id(i)
        from gguf_run.runtime.sampling.choice import Choice

        id, n = candidates.id(i), params.logprobs
        choice = Choice(id) if n is None or isinstance(logits, Candidates) else Choice.of(logits, id, n)
        choice.probability = 0.0 if seen is None else float(seen[i])
        return choice


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
    if found := vars(filters).get(name):
        return cast(Function, found)
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


def _draw(candidates: Candidates, number: float) -> int:
    """Draw a candidate: its number. Candidates stand in the order of their ids, however they were found.

    number: in [0, 1). First a block is drawn, then one of its tokens: a float64 copy of all takes ten times as long.
    """
    probabilities, order = candidates.probabilities(), None
    if candidates.ids is not None and (candidates.is_sorted or len(probabilities) <= EXACT):
        order = candidates.ids.argsort()
        probabilities = probabilities[order]
    blocks = np.add.reduceat(probabilities, np.arange(0, len(probabilities), EXACT), dtype=np.float64).cumsum()
    wanted = number * blocks[-1]
    i = int(blocks.searchsorted(wanted, side="right"))
    block = probabilities[i * EXACT : (i + 1) * EXACT].astype(np.float64)
    at = int(block.cumsum().searchsorted(wanted - (blocks[i - 1] if i else 0), side="right"))
    at = i * EXACT + (at if at < len(block) else int(block.argmax()))  # rounding may lead behind the block
    return at if order is None else int(order[at])
