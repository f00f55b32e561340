"""gguf-run --embed: prints the embedding of a text, or of each line of a file, as a JSON list."""

import json
from collections.abc import Mapping
from typing import Any

import click

from gguf_run.runtime.cli.options import load_model, to_load_options


def embed(model: str | None, values: Mapping[str, Any], text: str) -> None:
    """Load a model and print. text: one text if it comes from the command line, else a text in each line."""
    for name in ("chat", "raw", "session", "tools", "system", "chat_template"):
        if values[name]:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"--embed makes no text: leave out {option}.")
    is_line = values["text"] is not None or values["prompt"] is not None
    texts = [text] if is_line else [line for line in text.splitlines() if line.strip()]
    with load_model(model, to_load_options(values)) as loaded:
        for row in loaded.embed(texts, values["pooling"]):
            click.echo(json.dumps([float(f"{value:.7g}") for value in row.tolist()]))
