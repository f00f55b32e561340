"""Values of options that few prompts have: --tools and --chat-template-kwargs, --logit-bias, --grammar."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime.terminal.text import decode_text
from gguf_run.runtime.terminal.text_input import read_text

if TYPE_CHECKING:
    from gguf_run.runtime.engine.grammar import Grammar

MAX_TOOLS_BYTES = 64 << 20


def read_tools(path: Path) -> list[dict[str, Any]]:
    """Return the functions in the file that --tools names. GgufRunError if it holds anything else."""
    try:
        tools = json.loads(read_text(path, MAX_TOOLS_BYTES))
    except (ValueError, RecursionError) as error:
        raise GgufRunError(f"--tools {path}: not JSON: {error}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise GgufRunError(f'--tools {path}: must be a list of objects, as [{{"type": "function", ...}}]')
    return tools


def read_template_options(text: str) -> dict[str, Any]:
    """Return the variables that --chat-template-kwargs gives. OptionError if they are no JSON object."""
    try:
        values = json.loads(decode_text(text.encode("utf-8", "surrogateescape"), "--chat-template-kwargs"))
    except (GgufRunError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise OptionError(
            f'--chat-template-kwargs is {text:.200}; allowed: a JSON object, as {{"enable_thinking": false}}'
        )
    return values


def read_grammar(json_schema: str | None, grammar: str | None) -> "Grammar":
    """Return what --json-schema, a file or a JSON text, or --grammar, a file, asks for. OptionError for both."""
    from gguf_run.runtime.engine.grammar import MAX_BYTES, grammar_of

    if json_schema is not None and not json_schema.lstrip().startswith("{"):
        json_schema = read_text(Path(json_schema), MAX_BYTES)
    return grammar_of(json_schema, None if grammar is None else read_text(Path(grammar), MAX_BYTES))


def read_bias(text: str) -> tuple[int, float]:
    """Return the id and the number of a --logit-bias. click.UsageError for another text."""
    match = re.fullmatch(r"(\d{1,9})([+-](?:\d{1,9}(?:\.\d*)?|inf))", text)
    if match is None:
        raise click.UsageError(f"--logit-bias {text}: write a token's id and what to add, as 15043+1.5 or 15043-inf.")
    return int(match[1]), float(match[2])
