"""`gguf-eval kv-scales`: observe, probe, choose, write, print."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from gguf_run.formats.errors import OptionError
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.runtime.cli.evaluate_report import load_scorer
from gguf_run.runtime.evaluate.kv_scales import KINDS, Calibration, choose, divergence, observe, probes
from gguf_run.runtime.evaluate.text import N_CTX, Chunk, Scorer, bos_of, cut_chunks, tokens_of
from gguf_run.runtime.load.cache_plan import check_type
from gguf_run.runtime.load.kv_scales import KvScales
from gguf_run.runtime.terminal.progress import Progress
from gguf_run.runtime.terminal.text import read_text, table


def run(
    model: str,
    file: Path,
    output: Path,
    n_ctx: int | None,
    n_chunk: int,
    n_probed: int,
    types: Sequence[str],
    bits: float | None,
    options: Mapping[str, Any],
) -> None:
    """The command, see its help."""
    if bits is not None and not types:
        raise OptionError("--bits chooses among --types: give those too")
    n_ctx, text = n_ctx or N_CTX, read_text(file)

    def load(cache: str | list[CacheType]) -> AbstractContextManager[Scorer]:
        return load_scorer(model, n_ctx, options, cache=cache)

    with load("f32") as scorer:
        config = scorer.model.decoder.config
        for name in types:
            check_type("--types", name, config.head_dim)
        if bits is not None:
            choose({name: {kind: [0.0] * config.n_layer for kind in KINDS} for name in types}, config, bits)
        chunks = cut_chunks(tokens_of(scorer.model, text), n_ctx, bos_of(scorer.model), n_chunk)
        with Progress("observing", "chunks") as progress:
            for seen in observe(scorer, chunks, n_probed if types else 0):
                progress.set(seen.n_chunk, len(chunks))
    costs = _probe(load, config, types, chunks, seen)
    layers = seen.layers()
    if bits is not None:
        chosen = choose(costs, config, bits)
        layers = tuple(replace(layer, types=types) for layer, types in zip(layers, chosen, strict=True))
    scales = KvScales(Path(model).name, file.name, seen.n_tokens, layers, costs)
    scales.write(output)
    for line in _table(scales):
        click.echo(line)


def _probe(
    load: Callable[[list[CacheType]], AbstractContextManager[Scorer]],
    config: ModelConfig,
    types: Sequence[str],
    chunks: Sequence[Chunk],
    seen: Calibration,
) -> dict[str, dict[str, list[float]]]:
    """The divergence of each type in each layer's K and V."""
    costs: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in types}
    todo = probes(config, types)
    with Progress("probing", "caches") as progress:
        for i, (name, kind, plan) in enumerate(todo):
            progress.clear()
            with load(plan) as scorer:
                costs[name][kind].append(divergence(scorer, chunks, seen.logits))
            progress.set(i + 1, len(todo))
    return costs


def _table(scales: KvScales) -> Iterator[str]:
    """A line for each layer: the largest |K| and |V|, what each type costs, the types chosen."""
    head = ["layer", "max |K|", "max |V|", *(f"{name} {kind.upper()}" for name in scales.sensitivity for kind in KINDS)]
    rows = []
    for il, layer in enumerate(scales.layers):
        kl = [f"{costs[kind][il]:.2g}" for costs in scales.sensitivity.values() for kind in KINDS]
        chosen = ["/".join(layer.types)] if layer.types else []
        rows.append([str(il), f"{max(layer.k_max):.4g}", f"{max(layer.v_max):.4g}", *kl, *chosen])
    head += ["types"] * (len(rows[0]) - len(head))
    yield from table(head, rows, "r" * len(head))
