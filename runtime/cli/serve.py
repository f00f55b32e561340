"""gguf-serve: offer models to programs that speak OpenAI's, Anthropic's or Ollama's API, and a page to chat in."""

import os
import re
import signal
import socket
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime.cli.common import INTERRUPTED, tool
from gguf_run.runtime.cli.describe import describe
from gguf_run.runtime.cli.options import (
    CACHE_OPTIONS,
    CHAT_TEMPLATE,
    DEVICE_OPTIONS,
    DRAFT_MODEL,
    PATH,
    SPECULATE,
    load_model,
    offer,
    option,
    to_load_options,
)
from gguf_run.runtime.terminal.text import message

if TYPE_CHECKING:
    from gguf_run.runtime.model import Model
    from gguf_run.runtime.serve.registry import Registry

_NEEDED = ("starlette", "uvicorn", "httptools", "msgspec", "llguidance")  # the extra `serve`
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
ACCESS_OPTIONS = [
    option("--host", "Address to listen at; 0.0.0.0: other machines may ask.", default="127.0.0.1"),
    option("--port", "Port to listen at; 0: any that is free.", type=click.IntRange(0, 65535), default=8080),
    option("--api-key", "Who asks must send this key; may be repeated.", multiple=True, metavar="KEY"),
    option("--api-key-file", "Keys, one on each line of a file.", type=PATH, metavar="FILE"),
    option("--allowed-host", "One more name of this server; may be repeated.", multiple=True, metavar="NAME"),
    option("--cors-origin", "Pages of this server may ask, as https://chat.example.org; may be repeated; *: of any.",
           multiple=True, metavar="ORIGIN"),
    option("--tls-cert", "Certificate of this server, a PEM file: it speaks https then.", type=PATH, metavar="FILE"),
    option("--tls-key", "Its key, if the certificate's file does not hold it.", type=PATH, metavar="FILE"),
]  # fmt: skip
MODEL_OPTIONS = [
    option("--models-dir", "All GGUF files in this folder can be asked for.", type=PATH, metavar="FOLDER"),
    option("--alias", "Name of a model, in the order of the models; may be repeated.  [default: the file's name]",
           multiple=True, metavar="NAME"),
    option("--max-models", "Models that are loaded together.  [default: as many as are named]",
           type=click.IntRange(min=1)),
    option("--keep-alive", "Unload a model that nobody has used for so long: 300, 5m or 1h; -1: never.", default="-1",
           metavar="TIME"),
    option("--lora", "An adapter of the model, which is a model of its own then: MODEL:ADAPTER; may be repeated.  "
           "[default scale: 1]", multiple=True, metavar="FILE[:SCALE]", shell_complete=offer("files")),
    CHAT_TEMPLATE,
    option("--embed", "Models make embeddings, not text; encoders and rerankers do so in any case.", is_flag=True),
]  # fmt: skip
WORK_OPTIONS = [
    option("--parallel -np n_seq", "Answers that are made together; others wait.", type=int, default=16),
    option("--ctx-size -c n_ctx", "Positions of the context of each answer.  [default: the model's, at most 32768, as "
           "memory allows]", type=int),
    option("--cache-ram", "MiB of the KV cache of all answers.  [default: whole contexts, in a quarter of the free "
           "memory]", type=int),
    option("--max-queue", "Requests that may wait; others are told to come again.", type=click.IntRange(min=1),
           default=512),
    option("--max-step-ms", "A new prompt holds up running answers for so many milliseconds at most.",
           type=click.FloatRange(min=1), default=100.0),
    option("--request-timeout", "Seconds after which an answer is given up; 0: never.", type=click.FloatRange(min=0),
           default=0.0),
    option("--metrics", "Tell counts at /metrics, for Prometheus.", is_flag=True),
    option("--slots", "Tell counts of the answers under way at /slots, for llama-server's clients.", is_flag=True),
    option("--quiet -q", "Write no line of JSON for each request to stderr.", is_flag=True),
]  # fmt: skip


@tool(
    "gguf-serve",
    params=[
        click.Argument(["models"], nargs=-1, metavar="[MODEL]...", shell_complete=offer("models")),
        *ACCESS_OPTIONS,
        *MODEL_OPTIONS,
        *WORK_OPTIONS,
        *DEVICE_OPTIONS,
        *CACHE_OPTIONS,
        SPECULATE,
        DRAFT_MODEL,
    ],
    examples=(
        "gguf-serve model.gguf",
        "gguf-serve chat.gguf coder.gguf --models-dir ~/models --keep-alive 10m",
        "gguf-serve model.gguf --host 0.0.0.0 --api-key-file keys.txt",
        "gguf-serve model.gguf -c 8192 --parallel 4 --max-step-ms 50",
    ),
)
def main(models: tuple[str, ...], **values: Any) -> None:
    """Offer models to programs that speak the API of OpenAI, Anthropic or Ollama.

    MODEL is a GGUF file, the folder of a Hugging Face checkpoint, or hf:owner/repo[:Q4_K_M]. The first one is loaded
    at once, others when they are asked for. The page to chat in is at the address that the first line tells.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise GgufRunError(f'gguf-serve needs {", ".join(missing)}: pip install "gguf-run[serve]"')
    if values["tls_key"] and not values["tls_cert"]:
        raise click.UsageError("--tls-key needs --tls-cert.")
    keep_alive, keys = seconds_of(values["keep_alive"]), _keys(values)
    make_registry = _registry_of(models, keep_alive, values)
    with _listen(values["host"], values["port"]) as opened:
        host, port = opened.getsockname()[:2]
        is_local = host in ("127.0.0.1", "::1")
        address = f"[{host}]" if ":" in host else host
        click.echo(f"{'https' if values['tls_cert'] else 'http'}://{address}:{port}")
        if not is_local and not keys:
            message(f"warning: whoever reaches {host} can use this server: give --api-key, or listen at 127.0.0.1")
        _serve(opened, make_registry(), keys, is_local, values)


def seconds_of(text: str) -> float:
    """Return the seconds that a text such as "300", "5m", "1h" or "-1" means. OptionError for another."""
    match = re.fullmatch(r"(-1|[0-9]{1,9}(?:\.[0-9]{1,9})?)([smh]?)", text, re.ASCII)
    if match is None:
        raise OptionError(f"--keep-alive {text}: allowed are seconds as 300, 5m, 1h, and -1, which is for ever")
    return float(match[1]) * _UNITS[match[2]]


def _keys(values: Mapping[str, Any]) -> list[str]:
    """Return the keys, each once. GgufRunError for a file without any."""
    keys, file = list(values["api_key"]), values["api_key_file"]
    if file is not None:
        from gguf_run.runtime.serve.guard import read_keys

        keys += read_keys(file)
    if any(not key.strip() for key in keys):
        raise OptionError("--api-key is empty: give a text that nobody guesses")
    return [*dict.fromkeys(keys)]


def _registry_of(models: tuple[str, ...], keep_alive: float, values: Mapping[str, Any]) -> "Callable[[], Registry]":
    """Check what is to be served; return what makes a registry of it, once the slow imports may come."""
    folder, aliases, loras = values["models_dir"], values["alias"], values["lora"]
    if not models and folder is None:
        raise click.UsageError("Nothing to serve: name a model, or a folder of them with --models-dir.")
    if folder is not None and not folder.is_dir():
        raise OptionError(f"--models-dir {folder}: is no folder")
    if len(aliases) > len(models):
        raise OptionError(f"--alias comes {len(aliases)} times, and there are {len(models)} models")
    if loras and (len(models) != 1 or folder is not None):
        raise OptionError("--lora goes with one model, which it was trained for: serve others apart")
    options = to_load_options(values, cache_ram=values["cache_ram"] or "auto")
    template = None
    if values["chat_template"]:
        from gguf_run.runtime.chat.named import find_template

        template = find_template(values["chat_template"])

    def load(path: str, progress: Callable[[int, int], None]) -> "Model":
        try:
            model = load_model(path, options, progress)
        except Exception as error:
            if folder is not None or len(models) > 1:  # else the command ends with it
                message(f"error: {describe(error)}")
            raise
        if template is not None:
            model.chat_template, model.tool_template = template, None
        model.engine.max_queue, model.engine.max_step_ms = values["max_queue"], values["max_step_ms"]
        return model

    def make() -> "Registry":
        from gguf_run.runtime.load.adapters import with_scales
        from gguf_run.runtime.serve.registry import Registry, name_of

        names = [*aliases, *map(name_of, models[len(aliases) :])]
        if len({*names}) < len(names):
            raise OptionError(f"the models are named {', '.join(names)}: tell them apart with --alias")
        scales = with_scales(loras)
        adapters = {name_of(path): {path: scale} for path, scale in scales.items()}
        return Registry(
            dict(zip(names, models, strict=True)),
            load,
            folder=folder,
            adapters={"": dict.fromkeys(scales, 0.0), **adapters} if loras else {},
            keep_alive=keep_alive,
            max_models=values["max_models"] or len(models),
        )

    return make


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        found = f"cannot listen at {host} port {port}: {error.strerror or error}"
        raise GgufRunError(f"{found}; --port N chooses another port, 0 any that is free") from None


def _serve(
    opened: socket.socket, registry: "Registry", keys: list[str], is_local: bool, values: Mapping[str, Any]
) -> None:
    """Serve until a signal comes and the running answers are at their ends. A second signal ends at once."""
    import uvicorn

    from gguf_run.runtime.serve.app import make_app
    from gguf_run.runtime.serve.connection import make_config
    from gguf_run.runtime.serve.server import LOOPBACK, Access, Server

    names = values["allowed_host"]
    access = Access(
        hosts=(*LOOPBACK, *names) if is_local else names or None,
        origins=values["cors_origin"],
        keys=keys,
        log=None if values["quiet"] else lambda line: click.echo(line, err=True),
    )
    timeout, metrics, slots = values["request_timeout"], values["metrics"], values["slots"]
    server = Server(registry, request_timeout=timeout, access=access, has_metrics=metrics, has_slots=slots)
    config = make_config(make_app(server), ssl_certfile=values["tls_cert"], ssl_keyfile=values["tls_key"])
    signals: list[int] = []

    class Running(uvicorn.Server):
        async def on_tick(self, counter: int) -> bool:
            is_over = server.is_stopping and not server.n_running
            return await super().on_tick(counter) or is_over or (registry.error is not None and len(registry.names) < 2)

        def handle_exit(self, sig: int, frame: Any) -> None:
            if signals:
                os._exit(128 + sig)
            signals.append(sig)
            server.is_stopping = True

    try:
        config.load()
    except OSError as error:
        raise GgufRunError(f"--tls-cert {values['tls_cert']}: {error.strerror or error}") from None
    Running(config).run([opened])
    if registry.error is not None and not signals:
        raise registry.error
    if signal.SIGINT in signals:
        click.get_current_context().exit(INTERRUPTED)
