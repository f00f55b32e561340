"""Calibrating a KV cache: how large keys and values get, and which layers suffer from which cache type.

The model reads a text with an f32 cache. For the sensitivity of a layer, its K or V alone is stored as the type in
question, and the KL divergence of the predictions is measured; those of several layers about add up. With a budget of
bits, each K and V starts with the smallest type, and the change that saves most divergence per bit comes next.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import OptionError
from gguf_run.kernels_cpu.cache_types import CACHE_FORMATS
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.kv_cache import GROUP
from gguf_run.runtime.eval_text import Chunk, Scorer
from gguf_run.runtime.kv_scales import LayerScales

N_SCORED = 64  # tokens at a chunk's end whose predictions are compared
KINDS = "kv"
EXACT = CacheType("f32", "f32")

Costs = Mapping[str, Mapping[str, Sequence[float]]]  # type, "k" or "v": divergence of each layer


@dataclass
class Calibration:
    """What one pass over a text shows. maxima: by "k" or "v", of each layer, f64[n_head_kv]; logits: of each chunk,
    f32[N_SCORED, n_vocab]."""

    maxima: dict[str, list[NDArray[np.float64]]]
    logits: list[NDArray[np.float32]]
    n_chunk: int = 0
    n_tokens: int = 0

    def layers(self) -> tuple[LayerScales, ...]:
        pairs = zip(*(self.maxima[kind] for kind in KINDS), strict=True)
        return tuple(LayerScales(tuple(k.tolist()), tuple(v.tolist())) for k, v in pairs)


def observe(scorer: Scorer, chunks: Sequence[Chunk], n_probed: int) -> Iterator[Calibration]:
    """Run chunks on a model with an f32 cache; yield what is known after each. n_probed: chunks to keep logits of."""
    decoder = scorer.model.decoder
    config = decoder.config
    heads = [config.attention(il).n_head_kv for il in range(config.n_layer)]
    done = Calibration({kind: [np.zeros(n) for n in heads] for kind in KINDS}, [])
    for i, chunk in enumerate(chunks):
        logits = _logits(scorer, chunk)
        if i < n_probed:
            done.logits.append(logits)
        for il, kind, data in decoder.cache.export():
            values = np.frombuffer(data, np.float32).reshape(heads[il], -1)
            np.maximum(done.maxima[kind][il], np.abs(values).max(axis=1), out=done.maxima[kind][il])
        done.n_chunk += 1
        done.n_tokens += len(chunk.ids)
        yield done


def _logits(scorer: Scorer, chunk: Chunk) -> NDArray[np.float32]:
    scorer.model.decoder.rewind(0)
    return np.concatenate([part.copy() for part in scorer.model.decoder.forward(chunk.ids, _n_scored(chunk))])


def _n_scored(chunk: Chunk) -> int:
    return min(N_SCORED, len(chunk.targets))


def divergence(scorer: Scorer, chunks: Sequence[Chunk], expected: Sequence[NDArray[np.float32]]) -> float:
    """Mean KL divergence of a model's predictions at the ends of chunks."""
    parts = [scorer.reduce.divergence(p, _logits(scorer, chunk)) for chunk, p in zip(chunks, expected, strict=False)]
    return float(np.concatenate(parts).mean())


def probes(config: ModelConfig, types: Sequence[str]) -> list[tuple[str, str, list[CacheType]]]:
    """(type, "k" or "v", cache types of all layers) of each measurement, layer by layer."""
    found = []
    for name in types:
        for kind in KINDS:
            for il in range(config.n_layer):
                plan = [EXACT] * config.n_layer
                plan[il] = replace(EXACT, k=name) if kind == "k" else replace(EXACT, v=name)
                found.append((name, kind, plan))
    return found


def bits_of(name: str, head_dim: int) -> float:
    """Bits of a number as stored, scales included."""
    return 8 * CACHE_FORMATS[name].group_bytes(head_dim, False) / (GROUP * head_dim)


def choose(costs: Costs, config: ModelConfig, budget: float) -> list[tuple[str, str]]:
    """Return the types of K and V of each layer, of `budget` bits a number on average. OptionError if no type fits."""
    bits = {name: bits_of(name, config.head_dim) for name in costs}
    smallest = min(bits, key=lambda name: bits[name])
    if bits[smallest] > budget:
        raise OptionError(
            f"--bits {budget:g}: the smallest of --types, {smallest}, takes {bits[smallest]:g} bits a number"
        )
    places = [(kind, il) for il in range(config.n_layer) for kind in KINDS]
    chosen = dict.fromkeys(places, smallest)
    left = (budget - bits[smallest]) * len(places)
    while True:
        gains = [
            ((costs[chosen[kind, il]][kind][il] - costs[name][kind][il]) / more, more, kind, il, name)
            for kind, il in places
            for name in costs
            if 0 < (more := bits[name] - bits[chosen[kind, il]]) <= left
        ]
        gain, more, kind, il, name = max(gains, default=(0.0, 0.0, "", 0, ""))
        if gain <= 0:
            return [(chosen["k", il], chosen["v", il]) for il in range(config.n_layer)]
        chosen[kind, il] = name
        left -= more
