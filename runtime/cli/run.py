"""gguf-run: ask a model something, continue a text, or chat.

The answer goes to stdout as it comes; everything else goes to stderr.
"""

import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.frozen import frozen
from gguf_run.runtime.cli.common import tool
from gguf_run.runtime.cli.conversation import answer_facts, context_used, conversation, show
from gguf_run.runtime.cli.options import (
    ACTIVATIONS_OPTION,
    BATCH_OPTIONS,
    CACHE_OPTIONS,
    CHAT_TEMPLATE,
    CTX_SIZE,
    DEVICE_OPTIONS,
    DRAFT_MODEL,
    LORA,
    PATH,
    SAMPLING_OPTIONS,
    SPECULATE,
    load_model,
    offer,
    option,
    take_sampling,
    to_load_options,
)
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.terminal.text import decode_text, message, on_terminal

if TYPE_CHECKING:
    from gguf_run.runtime.chat.process import TemplateProcess
    from gguf_run.runtime.model import Model

MAX_PROMPT_BYTES = 64 << 20
_SOURCES = {"PROMPT": "text", "--prompt": "prompt", "--file": "file"}  # of a prompt, with the names of parameters
MAX_TOKENS = 2048  # of an answer, where the user names no limit: a model may never end by itself
_PARAMS = [
    click.Argument(["model"], required=False, shell_complete=offer("models")),
    click.Argument(["text"], required=False, metavar="[PROMPT]"),
    option("--prompt -p", "The question, or with --raw the text to continue."),
    option(
        "--file -f", "Read the prompt from a UTF-8 text file; - is stdin, the default.", shell_complete=offer("files")
    ),
    option("--chat -i", "Talk: Ctrl-C stops an answer, Ctrl-D leaves.  [default: without a prompt]", is_flag=True),
    option("--system", "System message for the chat template."),
    CHAT_TEMPLATE,
    option("--chat-template-kwargs", 'Variables for the template, as {"enable_thinking": false}.', metavar="JSON"),
    option("--tools", "JSON file: functions that the model may call.", type=PATH),
    option("--no-history", "Do not keep the lines typed in --chat for its next start.", is_flag=True),
    option("--raw", "Continue the prompt as it is, without the model's chat template.", is_flag=True),
    option(
        "--max-tokens -n",
        f"The most tokens of an answer; -1: what the context holds.  [default: {MAX_TOKENS}, in a chat -1]",
        type=int,
    ),
    option("--embed", "Print the embedding of the prompt, or of each line of --file or stdin, as JSON.", is_flag=True),
    option("--pooling", "Of --embed: mean, cls or last.  [default: as the file says]", metavar="TYPE"),
    option("--json-schema", "The answer is JSON of this schema.", metavar="FILE|JSON", shell_complete=offer("files")),
    option(
        "--grammar", "The answer follows this grammar, in GBNF or Lark.", metavar="FILE", shell_complete=offer("files")
    ),
    option("--stop", "Text that ends an answer; may be repeated.", multiple=True, metavar="TEXT"),
    CTX_SIZE,
    *BATCH_OPTIONS,
    *CACHE_OPTIONS,
    LORA,
    SPECULATE,
    DRAFT_MODEL,
    option("--session", "Go on from this file if it exists, and save to it at the end.", type=PATH),
    *SAMPLING_OPTIONS,
    *DEVICE_OPTIONS,
    option(
        "--quantize",
        "Quantize the weights while loading: Q4_K_M, ..., or FP8, INT8, NF4, which no file holds.",
        metavar="TYPE",
        shell_complete=offer("loadable_types"),
    ),
    ACTIVATIONS_OPTION,
    option("--context-shift", "When the context is full, drop half of it and go on.", is_flag=True),
    option("--keep n_keep", "Tokens at the beginning that --context-shift keeps.", type=int, default=0),
    option(
        "--warm-up",
        "Compile what the model needs, so that the next start is quick; all: of each model on this machine.",
        is_flag=False,
        flag_value="",
        metavar="[all]",
    ),
    option("--list list_models", "List the models on this machine; with -v also their files.", is_flag=True),
    option(
        "--completion",
        "Print what a shell needs to complete all of our commands.",
        type=click.Choice(("bash", "zsh", "fish")),
    ),
    option("--verbose -v", "Say more on stderr.", is_flag=True),
]


@tool(
    "gguf-run",
    params=_PARAMS,
    examples=(
        'gguf-run --prompt "What is the capital of Japan?"',
        "gguf-run model.gguf -c 16384 -ct q8_0",
        'gguf-run hf:bartowski/Llama-3.2-1B-Instruct-GGUF:Q5_K_M -p "Hello" --temp 0',
        "cat article.txt | gguf-run model.gguf --system 'Sum up in one sentence.'",
        "gguf-run model.gguf --raw --file story.txt -n 200 --seed 1",
    ),
)
def main(model: str | None, completion: str | None, list_models: bool, **values: Any) -> None:
    """Run a GGUF language model: answer PROMPT, or chat.

    MODEL is a GGUF file, the folder of a Hugging Face checkpoint, or hf:owner/repo[:Q4_K_M]; without
    it a small model, SmolLM2-135M-Instruct, is fetched once.
    """
    if completion is not None:
        from gguf_run.runtime.cli.help import completion_script

        click.echo(completion_script(completion))
    elif list_models:
        from gguf_run.runtime.hub.listing import list_lines

        for line in list_lines(values["verbose"]):
            click.echo(line)
    elif values["warm_up"] == "all":
        from gguf_run.runtime.cli.warm_up import warm_up_all

        warm_up_all(lambda name: _run(name, {**values, "warm_up": ""}))
    elif values["embed"]:
        from gguf_run.runtime.cli.embed import embed

        embed(model, values, _prompt(values, "embed") or "")
    else:
        _run(values["warm_up"] or model, values)  # in `--warm-up MODEL`, click takes MODEL for the option's value


def _run(model: str | None, values: dict[str, Any]) -> None:
    task = _Task.of(values)
    with _paused_gc():
        templates, loading = task.templates(), load_model(model, to_load_options(values))
    with loading as loaded:
        loaded.templates = templates
        if values["verbose"]:
            from gguf_run.runtime.cli.describe import describe_model

            describe_model(loaded)
        task.run(loaded)
        _report(loaded, values["verbose"], task.kind == "chat")


@contextmanager
def _paused_gc() -> Iterator[None]:
    """Start 0.2 s sooner: the garbage collector never looks at what imports make."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@frozen
class _Task:
    """What the model is asked to do; everything in it is checked before the model is loaded."""

    kind: str  # "raw": continue text, "ask": answer it, "chat", "warm_up"
    text: str | None  # the first text for the model; None: a chat begins without one
    system: str | None  # system message
    template: str | None  # chat template in place of the model's own
    session: Path | None  # file that the conversation comes from and goes to
    keep_history: bool  # of the lines that are typed in a chat
    generating: Mapping[str, Any]  # arguments of Model.generate
    chatting: Mapping[str, Any]  # arguments that Model.chat takes besides
    has_limit: bool  # the user has chosen max_tokens

    @classmethod
    def of(cls, values: dict[str, Any]) -> "_Task":
        """Make a task of the command's parameters. click.UsageError or GgufRunError for what they cannot mean."""
        templated = ("system", "chat_template", "chat_template_kwargs", "tools")
        if values["raw"] and (values["chat"] or any(values[name] is not None for name in templated)):
            raise click.UsageError(
                "--raw works without a chat template: leave out --chat, --system, --tools and --chat-template(-kwargs)."
            )
        warms_up = values["warm_up"] is not None
        kind = "warm_up" if warms_up else "chat" if values["chat"] else "raw" if values["raw"] else "ask"
        if kind == "ask" and all(values[name] is None for name in ("text", "prompt", "file")) and on_terminal():
            kind = "chat"
        text = "Hello" if kind == "warm_up" else _prompt(values, kind)
        if values["session"] is not None:
            from gguf_run.runtime.cli.session import check_place

            check_place(values["session"])
        system = None if values["system"] is None else _argument(values["system"], "--system")
        chatting: dict[str, Any] = {}
        if values["tools"] is not None:
            from gguf_run.runtime.cli.chat_values import read_tools

            chatting["tools"] = read_tools(values["tools"])
        if values["chat_template_kwargs"] is not None:
            from gguf_run.runtime.cli.chat_values import read_template_options

            chatting["template_options"] = read_template_options(values["chat_template_kwargs"])
        generating = take_sampling(values)
        SamplingParams(**generating)  # says what is wrong
        generating |= {name: values[name] for name in ("max_tokens", "stop", "context_shift", "n_keep")}
        if values["json_schema"] is not None or values["grammar"] is not None:
            from gguf_run.runtime.cli.chat_values import read_grammar

            generating["grammar"] = read_grammar(values["json_schema"], values["grammar"])
        has_limit = values["max_tokens"] is not None
        if not has_limit or values["max_tokens"] == -1:
            generating["max_tokens"] = None if has_limit or kind == "chat" else MAX_TOKENS
        template: str | None = values["chat_template"]
        if template is not None:
            from gguf_run.runtime.chat.named import find_template

            template = find_template(template)
        keeps = not values["no_history"]
        return cls(kind, text, system, template, values["session"], keeps, generating, chatting, has_limit)

    def templates(self) -> "TemplateProcess | None":
        """Return a process for chat templates, which starts while the model is loaded; None if none is needed."""
        if self.kind not in ("ask", "chat"):
            return None
        from gguf_run.runtime.chat.process import TemplateProcess

        return TemplateProcess().start()

    def run(self, model: "Model") -> None:
        """Do the task: write the answer to stdout."""
        if self.template is not None:
            model.chat_template, model.tool_template = self.template, None
        if self.kind == "warm_up":
            for _ in model.generate(self.text or "", max_tokens=1):
                pass
            return
        with conversation(model, self.session, self.system) as messages:
            if self.kind == "chat":
                from gguf_run.runtime.cli.chat import banner, chat

                if on_terminal():
                    banner(model)
                chat(model, messages, self.text, {**self.generating, **self.chatting}, self.keep_history)
            elif self.kind == "raw" or (model.chat_template is None and not messages and not self.chatting):
                show(model, model.generate(self.text or "", **self.generating))
            else:
                messages.append({"role": "user", "content": self.text})
                pieces = model.chat(messages, **self.generating, **self.chatting)
                from gguf_run.runtime.terminal.reasoning import open_reasoning

                answer = show(model, pieces, tag=open_reasoning(model, messages, self.chatting))
                messages.append({"role": "assistant", "content": answer})
            if self.kind != "chat" and model.stats.finish == "length" and not self.has_limit:
                message(f"the answer ends here, after {MAX_TOKENS} tokens: --max-tokens N allows more, -1 any number")


def _prompt(values: Mapping[str, Any], kind: str) -> str | None:
    """Return the first text for the model; None if a chat starts without one."""
    given = {name: values[key] for name, key in _SOURCES.items() if values[key] is not None}
    if values["text"] is not None and values["text"].endswith(".gguf"):
        raise click.UsageError(f"{values['text']}: one model at a time; put --prompt before a text of this kind.")
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} exclude each other.")
    file = values["file"]
    if given and file is None:
        text = _argument(*given.values(), *given)
    elif file not in (None, "-"):
        from gguf_run.runtime.terminal.text_input import read_text  # late: most prompts are arguments

        text = read_text(Path(str(file)), MAX_PROMPT_BYTES)
    elif kind == "chat" and file is None:
        return None
    elif sys.stdin is None or sys.stdin.isatty():
        raise click.UsageError("Nothing to answer: give PROMPT, --prompt, --file, --chat, or text on stdin.")
    else:
        from gguf_run.runtime.terminal.text_input import read_stdin

        text = read_stdin(MAX_PROMPT_BYTES)
    if not text.strip():
        raise GgufRunError("the prompt is empty: write something after --prompt, into the --file or on stdin")
    return text


def _argument(text: str, name: str) -> str:
    # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
    return decode_text(text.encode("utf-8", "surrogateescape"), name)


def _report(model: "Model", verbose: bool, with_context: bool) -> None:
    """Print the last line: times, speeds, and what ran where."""
    stats = model.stats
    parts = [f"load {stats.load_s:.2f} s", *answer_facts(model), model.where]
    if with_context:
        parts.append(context_used(model))
    if verbose:
        parts += [f"{stats.n_right} of {stats.n_guessed} guesses right"] * (stats.n_guessed > 0)
        parts += [f"seed {stats.seed}", f"end: {stats.finish or 'interrupted'}"]
    message(" | ".join(parts))
