"""`gguf-eval kv-scales`: measure the largest keys and values, try cache types, choose among them, write the file."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from gguf_run.formats.errors import OptionError
from gguf_run.models.backend import CacheType
from gguf_run.runtime.cli.report import load_scorer
from gguf_run.runtime.evaluate.kv_scales import KINDS, Costs, best_types, calibrate, check_budget, divergences, trials
from gguf_run.runtime.evaluate.text import N_CTX, Scorer, bos_of, cut_chunks, tokens_of
from gguf_run.runtime.load.cache_plan import check_type
from gguf_run.runtime.load.kv_scales import LayerScales, write_scales
from gguf_run.runtime.terminal.progress import progress
from gguf_run.runtime.terminal.table import table
from gguf_run.runtime.terminal.text_input import read_text


def run(
    model: str,
    file: Path,
    output: Path,
    n_ctx: int | None,
    n_chunk: int,
    n_probed: int,
    types: str | None,
    bits: float | None,
    **options: Any,
) -> None:
    """Run the command; its help says what it does. options: DEVICE_OPTIONS."""
    names = types.split(",") if types else []
    if bits is not None and not names:
        raise OptionError("--bits chooses among --types: give those too")
    n_ctx, text = n_ctx or N_CTX, read_text(file)

    def load(cache: str | list[CacheType]) -> AbstractContextManager[Scorer]:
        return load_scorer(model, options, n_ctx=n_ctx, cache_type=cache)

    with load("f32") as scorer:
        config = scorer.model.decoder.config
        for name in names:
            check_type("--types", name, config.head_dim)
        if bits is not None:
            check_budget(names, config.head_dim, bits)
        chunks = cut_chunks(tokens_of(scorer.model, text), n_ctx, bos_of(scorer.model), n_chunk)
        with progress("measuring", "chunks") as bar:
            for seen in calibrate(scorer, chunks, n_probed if names else 0):
                bar.set(seen.n_chunk, len(chunks))
    layers, todo = seen.layers(), trials(config, names)
    costs: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in names}
    with progress("trying", "caches") as bar:

        def load_below(plan: list[CacheType]) -> AbstractContextManager[Scorer]:
            bar.clear()  # loading has a bar of its own
            return load(plan)

        kls = divergences(load_below, [plan for _, _, plan in todo], chunks, seen.logits)
        for i, ((name, kind, _), kl) in enumerate(zip(todo, kls, strict=True), 1):
            costs[name][kind].append(kl)
            bar.set(i, len(todo))
    if bits is not None:
        chosen = best_types(costs, config, bits)
        layers = tuple(replace(layer, types=pair) for layer, pair in zip(layers, chosen, strict=True))
    name = Path(model).name
    write_scales(output, layers, model=name, text=file.name, n_tokens=seen.n_tokens, sensitivity=costs)
    for line in _table(layers, costs):
        click.echo(line)


def _table(layers: Sequence[LayerScales], sensitivity: Costs) -> Iterator[str]:
    """Yield a line for each layer: the largest |K| and |V|, what each type costs, the types chosen."""
    head = ["layer", "max |K|", "max |V|", *(f"{name} {kind.upper()}" for name in sensitivity for kind in KINDS)]
    rows = []
    for il, layer in enumerate(layers):
        kl = [f"{costs[kind][il]:.2g}" for costs in sensitivity.values() for kind in KINDS]
        chosen = ["/".join(layer.types)] if layer.types else []
        rows.append([str(il), f"{max(layer.k_max, default=0):.4g}", f"{max(layer.v_max, default=0):.4g}", *kl, *chosen])
    head += ["types"] * (len(rows[0]) - len(head))
    yield from table(head, rows, "r" * len(head))
