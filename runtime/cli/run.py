"""gguf-run: ask a model something, continue a text, or chat.

Text goes to stdout as it comes; everything else goes to stderr.
"""

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime.cli.chat import chat as chat_with
from gguf_run.runtime.cli.chat import open_reasoning, show
from gguf_run.runtime.cli.common import Command, decode_text, message, read_text
from gguf_run.runtime.cli.device_options import device_options, placement_options
from gguf_run.runtime.cli.load_options import cache_options, load_options
from gguf_run.runtime.cli.sampling_options import sampling_options, take_sampling
from gguf_run.runtime.cli.session import Conversation, check_place, conversation
from gguf_run.runtime.sampling.params import SamplingParams

if TYPE_CHECKING:
    from gguf_run.runtime.model import Model

MAX_PROMPT_BYTES = 64 << 20


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("model", required=False)
@click.option("--prompt", "-p", help="The question, or with --raw the text to continue.")
@click.option("--file", "-f", help="Read the prompt from a UTF-8 text file; - is stdin, the default.")
@click.option("--chat", "-i", is_flag=True, help="Talk: Ctrl-C stops an answer, Ctrl-D leaves.")
@click.option("--system", help="System message for the chat template.")
@click.option("--chat-template", metavar="FILE|NAME", help="Instead of the model's own: Jinja, or chatml, llama3, ...")
@click.option("--chat-template-kwargs", metavar="JSON", help='For the template, as {"enable_thinking": false}.')
@click.option("--tools", type=click.Path(path_type=Path), help="JSON file: functions that the model may call.")
@click.option("--no-history", is_flag=True, help="Keep no lines of --chat for the arrow keys of the next one.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the model's chat template.")
@click.option("--max-tokens", "-n", type=int, help="Stop after so many tokens.  [default: when the model ends]")
@click.option("--ctx-size", "-c", type=int, help="Positions of the context.  [default: the model's, at most 4096]")
@click.option("--threads", "-t", type=int, help="Threads that compute.  [default: physical cores]")
@cache_options
@click.option(
    "--session", type=click.Path(path_type=Path), help="Go on from this file if it is there, save to it at the end."
)
@sampling_options
@device_options
@click.option("--quantize", metavar="TYPE", help="Put the weights into fewer bits while loading, such as Q4_K_M.")
@click.option("--context-shift", is_flag=True, help="When the context is full, drop half of it and go on.")
@click.option("--keep", type=int, default=0, help="Tokens at the beginning that --context-shift keeps.")
@click.option("--warm-up", is_flag=True, help="Compile what the model needs, so that the next start is quick.")
@click.option("--list", "list_models", is_flag=True, help="Show the models that are on this machine; -v: and where.")
@click.option(
    "--completion",
    type=click.Choice(("bash", "zsh", "fish")),
    help="Print what a shell needs to complete all of our commands.",
)
@click.option("--verbose", "-v", is_flag=True, help="Say more on stderr.")
@click.version_option(package_name="gguf-run", prog_name="gguf-run")
def main(
    model: str | None,
    prompt: str | None,
    file: str | None,
    chat: bool,
    system: str | None,
    chat_template: str | None,
    chat_template_kwargs: str | None,
    tools: Path | None,
    no_history: bool,
    raw: bool,
    max_tokens: int | None,
    ctx_size: int | None,
    threads: int | None,
    quantize: str | None,
    session: Path | None,
    context_shift: bool,
    keep: int,
    warm_up: bool,
    list_models: bool,
    completion: str | None,
    verbose: bool,
    **options: Any,
) -> None:
    """Run a GGUF language model.

    MODEL is a GGUF file, the folder of a Hugging Face checkpoint, or hf:owner/repo[:Q4_K_M]; without
    it a small model, SmolLM2-135M-Instruct, is fetched once.
    """
    if raw and (chat or any(value is not None for value in (system, chat_template, chat_template_kwargs, tools))):
        raise click.UsageError(
            "--raw works without a chat template: leave out --chat, --system, --tools and --chat-template(-kwargs)."
        )
    if sys.stdout is None:
        raise GgufRunError("stdout is closed: there is nowhere to write the answer")
    if completion is not None:
        from gguf_run.runtime.cli.complete import completion_script

        return click.echo(completion_script(completion))
    if list_models:
        from gguf_run.runtime.hub.listing import list_lines

        for line in list_lines(verbose):
            click.echo(line)
        return
    text = "Hello" if warm_up else _prompt(prompt, file, chat)
    if session is not None:
        check_place(session)
    if system is not None:
        system = _argument(system, "--system")
    template = None
    if chat_template is not None:
        from gguf_run.runtime.chat.named import find_template

        template = find_template(chat_template)
    functions = None if tools is None else _functions(tools)
    template_options = None if chat_template_kwargs is None else _template_options(chat_template_kwargs)
    load = {"n_ctx": ctx_size, "n_threads": threads, "quantize": quantize}
    load |= load_options(options) | placement_options(options)
    options = take_sampling(options)
    SamplingParams(**options)  # says what is wrong before a model is loaded
    with _paused_gc():
        loading = _load(model, **load)
    with loading as loaded:
        options |= {"max_tokens": max_tokens, "context_shift": context_shift, "n_keep": keep}
        if template is not None:
            loaded.chat_template, loaded.tool_template = template, None
        if verbose:
            _describe(loaded)
        if warm_up:
            for _ in loaded.generate(text or "", max_tokens=1):
                pass
        else:
            with conversation(loaded, session, system) as messages:
                if functions is not None:
                    options["tools"] = functions
                if template_options is not None:
                    options["template_options"] = template_options
                if chat:
                    chat_with(loaded, messages, text, options, not no_history)
                else:
                    _answer(loaded, messages, text or "", raw, options)
        _report(loaded, verbose)


@contextmanager
def _paused_gc() -> Iterator[None]:
    """Start 0.2 s sooner: what imports make stays, and is not searched for garbage while it grows or at the end."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _prompt(prompt: str | None, file: str | None, chat: bool) -> str | None:
    """The first text for the model; None if a chat starts without one."""
    if prompt is not None and file is not None:
        raise click.UsageError("--prompt and --file exclude each other.")
    if prompt is not None:
        text = _argument(prompt, "--prompt")
    elif file not in (None, "-"):
        with open(str(file), "rb") as stream:
            text = decode_text(_read_all(stream, str(file)), str(file))
    elif chat and file is None:
        return None
    elif sys.stdin is None or sys.stdin.isatty():
        raise click.UsageError("Nothing to answer: give --prompt, --file, --chat, or text on stdin.")
    else:
        text = decode_text(_read_all(sys.stdin.buffer, "stdin"), "stdin")
    if not text.strip():
        raise GgufRunError("the prompt is empty: write something after --prompt, into the --file or on stdin")
    return text


def _functions(path: Path) -> list[dict[str, Any]]:
    tools = _json(read_text(path), f"--tools {path}")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise GgufRunError(f'--tools {path}: must be a list of objects, as [{{"type": "function", ...}}]')
    return tools


def _template_options(text: str) -> dict[str, Any]:
    try:
        values = _json(_argument(text, "--chat-template-kwargs"), "")
    except GgufRunError:
        values = None
    if not isinstance(values, dict):
        raise OptionError(f'--chat-template-kwargs is {text}; allowed: a JSON object, as {{"enable_thinking": false}}')
    return values


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GgufRunError(f"{name}: not JSON: {error}") from None


def _argument(text: str, name: str) -> str:
    # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
    return decode_text(text.encode("utf-8", "surrogateescape"), name)


def _read_all(stream: Any, name: str) -> bytes:
    data: bytes = stream.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise GgufRunError(f"{name} is longer than {MAX_PROMPT_BYTES} bytes: no context holds that much text")
    return data


def _load(path: str | None, **options: Any) -> "Model":
    from gguf_run.formats.compiler.jit import compile_notice
    from gguf_run.runtime.model import Model
    from gguf_run.runtime.terminal.progress import Progress

    with Progress("loading") as progress:

        def notify() -> None:
            progress.clear()
            message("compiling kernels for this machine; this takes some seconds, once")

        def report(line: str) -> None:
            progress.clear()
            message(line)

        with compile_notice(notify):
            return Model.load(path, progress=progress.set, report=report, **options)


def _answer(model: "Model", messages: Conversation, text: str, raw: bool, options: dict[str, Any]) -> None:
    if raw or (model.chat_template is None and not messages and not {"tools", "template_options"} & set(options)):
        show(model, model.generate(text, **options))
    else:
        messages.append({"role": "user", "content": text})
        pieces = model.chat(messages, **options)
        tag = open_reasoning(model, messages, options)
        messages.append({"role": "assistant", "content": show(model, pieces, tag=tag)})


def _describe(model: "Model") -> None:
    config = model.decoder.config
    message(
        f"{config.arch.name}: n_layer {config.n_layer}, n_embd {config.n_embd}, n_vocab {config.n_vocab}, "
        f"n_ctx {model.n_ctx} (trained {config.n_ctx_train})"
    )


def _report(model: "Model", verbose: bool) -> None:
    """The last line: what it took, and what ran where."""
    stats = model.stats
    n_prefill = f"{stats.n_prompt - stats.n_reused}" + (f" (+ {stats.n_reused} known)" if stats.n_reused else "")
    parts = [
        f"load {stats.load_s:.2f} s",
        f"prefill {n_prefill} tokens in {stats.prefill_s:.2f} s, {stats.prefill_speed:.0f}/s",
        f"decode {stats.n_decoded} in {stats.decode_s:.2f} s, {stats.decode_speed:.0f}/s",
        model.where,
    ]
    if verbose:
        parts += [f"seed {stats.seed}", f"end: {stats.finish or 'interrupted'}"]
    message(" | ".join(parts))
