"""What a client asks for, in one form whatever API it came by: the bodies of /v1/chat/completions and /v1/completions.

Other APIs write their bodies in this form first. Fields that are not known are ignored, as clients send many.
"""

from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from gguf_run.formats.frozen import frozen
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.serve.errors import HttpError

MOST_CHOICES = 32  # `n`
MOST_ANSWERS = 128  # to all prompts of a request
MOST_LOGPROBS = 20
MOST_TOKENS = 2**31 - 1
# Fields of a body that are options of sampling, with our names, which are llama.cpp's.
SAMPLING = {one.name for one in fields(SamplingParams)} - {"logits_processors", "logprobs", "logit_bias"}
_SAME = {"repetition_penalty": "repeat_penalty"}  # vLLM's name: ours
# Variables of chat templates that a client may not set: they are ours.
_RESERVED = {"messages", "tools", "documents", "bos_token", "eos_token", "add_generation_prompt", "chat_template"}
Count = Annotated[int, Meta(ge=0, le=MOST_TOKENS)]
_Biases = Meta(max_length=1024)
Objects = list[dict[str, Any]]
Stop = Annotated[str, Meta(min_length=1, max_length=1000)]
Stops = Annotated[list[Stop], Meta(max_length=16)]
Texts = str | list[str | int | list[int]]  # a text, the ids of one, or a list of either


@frozen(eq=False)
class Ask:
    """What a client asks for, checked."""

    model: str | None = None
    messages: Objects | None = None  # of a chat
    prompt: Texts = ""  # to go on with, where there are no messages; the answers to its texts come one after the other
    suffix: str | None = None  # the answer stands between the prompt and this text
    tools: Objects = field(default_factory=list)
    tool_choice: str = "auto"  # "none", "auto", "required", or the name of a tool
    parallel_calls: bool = True
    grammar: tuple[str, str] | None = None  # a kind and a text: see engine/grammar.py
    n: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)  # of Model.generate
    template_options: Mapping[str, Any] = field(default_factory=dict)
    salt: str = ""
    is_stream: bool = False
    wants_usage: bool = False  # a stream ends with a chunk of counts


class _Format(Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None  # its "schema" is the schema
    schema: dict[str, Any] | None = None  # where llama-server's clients put it


class _Structured(Struct):
    json: dict[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None


class Body(Struct, omit_defaults=True):
    """The fields that both APIs have, with the types that are allowed."""

    model: str | None = None
    messages: Objects | None = None
    prompt: Texts | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stop: Stop | Stops | None = None
    logit_bias: Annotated[dict[str, float], _Biases] | Annotated[list[tuple[int, float | bool]], _Biases] | None = None
    logprobs: bool | Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: _Format | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
    structured_outputs: _Structured | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    # Options of sampling that are no numbers. SamplingParams checks the others.
    samplers: str | Stops | None = None
    dry_sequence_breakers: Stops | None = None
    ignore_eos: bool | None = None


def body_of(json: Any, kind: Any = Body) -> Any:
    """Return the fields of a body, an object of the class `kind`. HttpError 400 names the field that is wrong."""
    try:
        return msgspec.convert(json, kind)
    except msgspec.ValidationError as error:
        raise HttpError(400, f"the request's body: {error}") from None


def ask_of(json: Mapping[str, Any]) -> Ask:
    """Return what a body asks for. HttpError 400 names what is wrong."""
    body: Body = body_of(json)
    tools = [] if body.tool_choice == "none" else _functions(body.tools or [])
    return Ask(
        model=body.model,
        messages=body.messages,
        prompt=body.prompt or "",
        suffix=body.suffix,
        tools=tools,
        tool_choice=_choice(body.tool_choice, tools),
        parallel_calls=body.parallel_tool_calls is not False,
        grammar=_grammar(body),
        n=body.n or 1,
        options=_options(json, body),
        template_options=_template_options(body),
        salt=body.cache_salt or "",
        is_stream=bool(body.stream),
        wants_usage=bool((body.stream_options or {}).get("include_usage")),
    )


def texts_of(given: Texts) -> list[Any]:
    """Return the texts, or their ids, that a field gives. Model.prompt_ids checks each of them."""
    is_one = isinstance(given, str) or not given or any(isinstance(one, int) for one in given)
    return [given] if is_one else [*given]


def _options(json: Mapping[str, Any], body: Body) -> dict[str, Any]:
    """Return the options of Model.generate. SamplingParams checks their values."""
    options = {_SAME.get(name, name): json[name] for name in (*SAMPLING, *_SAME) if json.get(name) is not None}
    if options.get("seed") == -1:  # llama-server's word for any seed
        del options["seed"]
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if most is not None:
        options["max_tokens"] = most
    if body.stop:
        options["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    if body.logit_bias:
        options["logit_bias"] = _biases(body.logit_bias)
    # A chat says true, and how many besides; /v1/completions says how many.
    if body.logprobs is not None and body.logprobs is not False:
        options["logprobs"] = body.top_logprobs or 0 if body.logprobs is True else body.logprobs
    return options


def _biases(given: Mapping[str, float] | Sequence[tuple[int, float | bool]]) -> dict[int, float]:
    """Return biases by id. llama-server's form is a list of pairs, in which false forbids a token."""
    pairs = given.items() if isinstance(given, Mapping) else given
    try:
        return {int(id): float("-inf") if bias is False else float(bias) for id, bias in pairs}
    except ValueError:
        raise HttpError(400, "logit_bias: allowed are ids of tokens, and numbers to add to their logits") from None


def _functions(tools: Objects) -> Objects:
    """Return the tools that are functions, in the form of chat completions. Others, as web_search, run elsewhere."""
    found = []
    for i, tool in enumerate(tools):
        function = tool.get("function", tool)
        if tool.get("type", "function") != "function":
            continue
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise HttpError(400, f"tools[{i}].function.name is missing: each tool has a name")
        if not isinstance(function.get("parameters") or {}, dict):
            raise HttpError(400, f"tools[{i}].function.parameters is no object: allowed is a JSON schema")
        kept = {name: function[name] for name in ("name", "description", "parameters") if function.get(name)}
        found.append({"type": "function", "function": kept})
    return found


def _choice(choice: str | dict[str, Any] | None, tools: Objects) -> str:
    if isinstance(choice, dict):
        name = choice.get("function", choice).get("name") if isinstance(choice.get("function", {}), dict) else None
        if name not in [tool["function"]["name"] for tool in tools]:
            raise HttpError(400, f"tool_choice names {name!r:.60}, which is none of the tools")
        return str(name)
    if choice not in (None, "none", "auto", "required"):
        raise HttpError(400, f'tool_choice is {choice!r:.60}; allowed: "none", "auto", "required" or a function')
    if choice == "required" and not tools:
        raise HttpError(400, 'tool_choice is "required", and there are no tools')
    return choice or "auto"


def _grammar(body: Body) -> tuple[str, str] | None:
    """Return the grammar of the answer, from any of the fields that clients use."""
    found: list[tuple[str, Any]] = []
    form, other = body.response_format, body.structured_outputs or _Structured()
    if form is not None and form.type != "text":
        schema: Any = form.schema if form.json_schema is None else form.json_schema.get("schema")
        if form.type == "json_schema" and schema is None:
            raise HttpError(400, "response_format.json_schema.schema is missing: it is the schema of the answer")
        found.append(("json_object", "{}") if schema is None else ("json_schema", schema))
    found += [("json_schema", schema) for schema in (body.json_schema, other.json) if schema is not None]
    found += [("grammar", text) for text in (body.grammar, other.grammar) if text]
    found += [("regex", other.regex)] if other.regex else []
    if found and body.tools and body.tool_choice != "none":
        raise HttpError(400, "an answer has one form: leave out the tools, or the form (response_format, grammar)")
    if len(found) > 1:
        raise HttpError(400, f"{' and '.join(kind for kind, _ in found)} are both given: an answer has one form")
    if not found:
        return None
    kind, text = found[0]
    return kind, text if isinstance(text, str) else msgspec.json.encode(text).decode()


def _template_options(body: Body) -> dict[str, Any]:
    """Return variables for the chat template. HttpError 400 for one that is not the client's to set."""
    options = dict(body.chat_template_kwargs or {})
    if reserved := sorted(_RESERVED & options.keys()):
        raise HttpError(400, f"chat_template_kwargs.{reserved[0]} is not allowed: the server sets it")
    if body.reasoning_effort:
        options.setdefault("reasoning_effort", body.reasoning_effort)
        if body.reasoning_effort == "none":
            options.setdefault("enable_thinking", False)
    return options
