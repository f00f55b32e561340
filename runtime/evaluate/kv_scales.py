"""Calibrating a KV cache: how large keys and values get, and which layers suffer from which cache type.

The model reads a text with an f32 cache. A place is K or V of one layer. For each place and each cache type, the model
reads the text again with that type in that place alone; the KL divergence of its predictions is the cost. The costs of
several places about add up. With a budget of bits, the types of least total cost are found.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import OptionError
from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.kv_cache import GROUP
from gguf_run.models.kv_moves import export
from gguf_run.runtime.engine.scores import logits as row_logits
from gguf_run.runtime.evaluate.text import Chunk, Scorer
from gguf_run.runtime.load.kv_scales import LayerScales
from gguf_run.runtime.quantize.allocate import cheapest

N_SCORED = 64  # tokens at a chunk's end whose predictions are compared
KINDS = "kv"
EXACT = CacheType("f32", "f32")

Costs = Mapping[str, Mapping[str, Sequence[float]]]  # type, "k" or "v": the divergence of each layer


@dataclass
class Calibration:
    """What the text read so far has shown."""

    maxima: dict[str, list[NDArray[np.float64]]]  # "k" or "v": of each layer f64[n_head_kv]
    logits: list[NDArray[np.float32]]  # of each chunk that is kept f32[N_SCORED, n_vocab]
    n_chunk: int = 0
    n_tokens: int = 0

    def layers(self) -> tuple[LayerScales, ...]:
        pairs = zip(*(self.maxima[kind] for kind in KINDS), strict=True)
        return tuple(LayerScales(tuple(k.tolist()), tuple(v.tolist())) for k, v in pairs)


def calibrate(scorer: Scorer, chunks: Sequence[Chunk], n_kept: int) -> Iterator[Calibration]:
    """Run chunks on a model with an f32 cache; yield what is known after each (one object that grows).

    n_kept: the number of first chunks whose logits are kept, for `divergences`.
    """
    decoder = scorer.model.decoder
    config = decoder.config
    heads = [config.attention(il).n_head_kv for il in range(config.n_layer)]
    done = Calibration({kind: [np.zeros(n) for n in heads] for kind in KINDS}, [])
    for i, chunk in enumerate(chunks):
        logits = _logits(scorer, chunk)
        if i < n_kept:
            done.logits.append(logits)
        for il, kind, data in export(decoder.cache):
            if kind not in KINDS:  # the state of a recurrent layer
                continue
            values = np.frombuffer(data, np.float32).reshape(heads[il], -1)
            np.maximum(done.maxima[kind][il], np.abs(values).max(axis=1), out=done.maxima[kind][il])
        done.n_chunk += 1
        done.n_tokens += len(chunk.ids)
        yield done


def _logits(scorer: Scorer, chunk: Chunk) -> NDArray[np.float32]:
    """The logits at a chunk's end, f32[N_SCORED, n_vocab] or fewer rows."""
    n_scored = min(N_SCORED, len(chunk.targets))
    return np.concatenate([part.copy() for part in row_logits(scorer.model.engine, chunk.ids, n_scored)])


def trials(config: ModelConfig, types: Sequence[str]) -> list[tuple[str, str, list[CacheType]]]:
    """Return the measurements to make, layer by layer: (type, "k" or "v", cache types of all layers)."""
    found = []
    for name in types:
        for kind in KINDS:
            for il in range(config.n_layer):
                plan = [EXACT] * config.n_layer
                plan[il] = replace(EXACT, k=name) if kind == "k" else replace(EXACT, v=name)
                found.append((name, kind, plan))
    return found


def divergences(
    load: Callable[[list[CacheType]], AbstractContextManager[Scorer]],
    plans: Sequence[list[CacheType]],
    chunks: Sequence[Chunk],
    expected: Sequence[NDArray[np.float32]],
) -> Iterator[float]:
    """Load a model with each plan (cache types of all layers); yield the mean KL divergence of its predictions.

    load: loads the model. expected: the logits that `calibrate` has kept of the first chunks.
    """
    for plan in plans:
        with load(plan) as scorer:
            parts = [scorer.reduce.divergence(p, _logits(scorer, c)) for p, c in zip(expected, chunks, strict=False)]
        yield float(np.concatenate(parts).mean())


def bits_of(name: str, head_dim: int) -> float:
    """The bits that a cache type takes for each number, scales included."""
    return 8 * CACHE_FORMATS[name].group_bytes(head_dim, False) / (GROUP * head_dim)


def check_budget(types: Sequence[str], head_dim: int, budget: float) -> None:
    """OptionError if no type fits into `budget` bits a number."""
    smallest = min(types, key=lambda name: bits_of(name, head_dim))
    if (bits := bits_of(smallest, head_dim)) > budget:
        raise OptionError(f"--bits {budget:g}: the smallest of --types, {smallest}, takes {bits:g} bits a number")


def best_types(costs: Costs, config: ModelConfig, budget: float) -> list[tuple[str, str]]:
    """Return types of K and V of each layer that cost least and take at most `budget` bits a number on average.

    The budget has passed check_budget.
    """
    names, places = [*costs], [(kind, il) for il in range(config.n_layer) for kind in KINDS]
    sizes = np.array([round(bits_of(name, config.head_dim) * GROUP * config.head_dim) for name in names])
    losses = [np.array([costs[name][kind][il] for name in names]) for kind, il in places]
    most = math.floor(budget * GROUP * config.head_dim * len(places))
    types = [names[pick] for pick in cheapest([sizes] * len(places), losses, most)]
    return list(zip(types[::2], types[1::2], strict=True))
