"""The command gguf-serve."""

from typing import Any

import click

from gguf_run.runtime.cli.common import tool
from gguf_run.runtime.cli.options import CTX_SIZE, RUNTIME_OPTIONS, option, to_load_options


@tool(
    "gguf-serve",
    params=[
        click.Argument(["model"]),
        option("--host", "Address to listen at.", default="127.0.0.1"),
        option("--port", "Port to listen at.", type=int, default=8080),
        option("--parallel -np n_seq", "Answers that are made together; others wait.", type=int, default=16),
        option("--cache-ram", "MiB of the KV cache of all answers.", type=int),
        CTX_SIZE,
        *RUNTIME_OPTIONS,
    ],
)
def main(model: str, host: str, port: int, **values: Any) -> None:
    """Serve a model to OpenAI's clients."""
    import uvicorn

    from gguf_run.runtime.model import Model
    from gguf_run.runtime.serve.app import Server, make_app
    from gguf_run.runtime.serve.registry import Registry

    options = to_load_options(values)
    registry = Registry({model: model}, lambda path, progress: Model.load(path, options, progress=progress))
    uvicorn.run(make_app(Server(registry)), host=host, port=port, log_level="warning", access_log=False)
