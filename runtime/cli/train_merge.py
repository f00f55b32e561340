"""gguf-train merge: writes the file, and measures what the adapter changes and what rounding leaves of it."""

from pathlib import Path

import click

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.cli.evaluate_kl import read_options
from gguf_run.runtime.cli.report import load_scorer
from gguf_run.runtime.convert.merge import plan_merge
from gguf_run.runtime.evaluate.kl import Estimate, compare
from gguf_run.runtime.evaluate.text import N_CTX, bos_of, cut_chunks, tokens_of
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.load.machine import default_threads
from gguf_run.runtime.quantize.file import quantize_file
from gguf_run.runtime.quantize.file_types import file_type
from gguf_run.runtime.terminal.progress import progress
from gguf_run.runtime.terminal.text import message
from gguf_run.runtime.terminal.text_input import read_text

_SHOWN = 3


def run(model: str, adapter: Path, output: Path, kind: str, scale: float, file: Path | None, n_chunk: int) -> None:
    """Run the command; its help says what it does."""
    text, path = read_text(file) if file else None, find_model(model)
    chosen = None if kind.lower() == "keep" else file_type(kind)
    with GGUFFile.open(path) as base, GGUFFile.open(adapter) as pairs:
        merge = plan_merge(base, pairs, chosen, scale)
        with progress("merging") as bar:
            _, losses = quantize_file(merge.plan, output, default_threads(), bar.set)
    lost = sorted(merge.lost(losses), key=lambda pair: -pair[1])
    if lost:
        shown = ", ".join(f"{name} ({times:.1f} times)" for name, times in lost[:_SHOWN])
        what = f"in {len(lost)} of {len(merge.power)} tensors rounding changes more than the adapter"
        message(f"{what}: {shown}; use --lora, or --type of more bits")
    message(f"{output} is written")
    if text is not None:
        lora = f"--lora '{adapter}:{scale}'"
        for what, one in (("without the adapter", path), ("merged", output)):
            kl = _divergence(one, path, lora, text, n_chunk)
            click.echo(f"KL divergence from the model with --lora, {what}: {kl.value:.4g} ± {kl.error:.2g}")


def _divergence(model: Path, base: Path, base_options: str, text: str, n_chunk: int) -> Estimate:
    """Return how far the predictions of a model are from those of a base with options."""
    with (
        load_scorer(str(model), read_options("", {}), n_ctx=N_CTX) as ours,
        load_scorer(str(base), read_options(base_options, {}), n_ctx=N_CTX) as theirs,
    ):
        chunks = cut_chunks(tokens_of(ours.model, text), N_CTX, bos_of(ours.model), n_chunk)
        *_, done = compare(ours, lambda i: theirs.run(chunks[i].ids, chunks[i].targets), chunks)
    return done.estimates()["kl_mean"]
