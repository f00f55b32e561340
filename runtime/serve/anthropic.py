"""Anthropic's API: /v1/messages and /v1/messages/count_tokens."""

from collections.abc import Sequence
from secrets import token_hex
from typing import Any

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from gguf_run.runtime.serve.answers import Event, Usage, Whole
from gguf_run.runtime.serve.ask import Ask, Objects, ask_of, body_of
from gguf_run.runtime.serve.errors import HttpError
from gguf_run.runtime.serve.http import Writer, answer, in_thread, post, sse

# Claude Code begins the system message with a line of this name, which is another one in each request: the cache would
# never know the rest.
_BILLING = "x-anthropic-billing-header"
_SAME = {"model", "stream", "max_tokens", "temperature", "top_p", "top_k"}  # fields that OpenAI's API has, too
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
# Kind of an event: how a block of it begins, the type of its deltas, and their field.
_BLOCKS: dict[str, tuple[dict[str, Any], str, str]] = {
    "text": ({"type": "text", "text": ""}, "text_delta", "text"),
    "reasoning": ({"type": "thinking", "thinking": "", "signature": ""}, "thinking_delta", "thinking"),
    "arguments": ({}, "input_json_delta", "partial_json"),
}


class _Block(Struct):
    type: str
    text: str = ""
    thinking: str = ""
    id: str | None = None  # of a call
    name: str = ""
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None  # of a result
    content: "str | list[_Block] | None" = None
    tool_name: str = ""  # of a tool that a search for tools has found


class _Message(Struct):
    role: str
    content: str | list[_Block]


class _Body(Struct):
    messages: list[_Message]
    system: str | list[_Block] | None = None
    tools: Objects | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    stop_sequences: list[str] | None = None


async def messages(request: Request, json: dict[str, Any]) -> Response:
    """Answer a conversation."""
    if json.get("max_tokens") is None:
        raise HttpError(400, "max_tokens is missing: say how many tokens the answer may have")
    return await answer(request, _ask(json), _Writer)


async def count_tokens(request: Request, json: dict[str, Any]) -> dict[str, Any]:
    """Return how many tokens the prompt of a conversation has."""
    ask = _ask(json)
    async with request.app.state.server.registry.use(ask.model) as served:
        chat = served.model.tokenize_chat, ask.messages, ask.tools or None, ask.template_options
        return {"input_tokens": len(await in_thread(request, *chat))}


def arguments_of(text: str) -> dict[str, Any]:
    """Return the arguments of a call. A text that is no object, as the model broke off or erred, is one argument."""
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.MsgspecError:
        return {"arguments": text}


def _ask(json: dict[str, Any]) -> Ask:
    """Return what a body asks for. HttpError 400 names what is wrong."""
    given: _Body = body_of(json, _Body)
    if not given.messages or given.messages[-1].role == "assistant":
        raise HttpError(400, "messages must end with one of the user: an answer that is begun cannot be gone on with")
    body: dict[str, Any] = {name: json[name] for name in _SAME & json.keys()}
    lines = _text(given.system or "", "system").split("\n")
    system = "\n".join(line for line in lines if not line.startswith(_BILLING))
    body["messages"] = [{"role": "system", "content": system}] if system.strip() else []
    for i, message in enumerate(given.messages):
        body["messages"] += _messages(message, f"messages[{i}].content")
    body["tools"] = [
        {"type": "function", "function": {**tool, "parameters": tool.get("input_schema")}}
        for tool in given.tools or []
        if tool.get("type") in (None, "custom")  # others run at Anthropic's
    ]
    if choice := given.tool_choice:
        kind = str(choice.get("type"))
        body["tool_choice"] = {"any": "required", "tool": {"function": {"name": choice.get("name")}}}.get(kind, kind)
        body["parallel_tool_calls"] = not choice.get("disable_parallel_tool_use")
    body["stop"], config = given.stop_sequences, given.output_config or {}
    body["reasoning_effort"], form = config.get("effort"), config.get("format")
    if isinstance(form, dict):
        body["response_format"] = {"type": form.get("type"), "json_schema": {"schema": form.get("schema")}}
    if given.thinking:
        body["chat_template_kwargs"] = {"enable_thinking": given.thinking.get("type") != "disabled"}
    return ask_of(body)


def _messages(message: _Message, place: str) -> Objects:
    """Return a message in OpenAI's form: results of tools are messages of their own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    found: Objects = []
    texts, calls, reasoning = [], [], ""
    for i, block in enumerate(message.content):
        match block.type:
            case "tool_result":
                found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block.content)})
            case "tool_use":
                function = {"name": block.name, "arguments": block.input}
                calls.append({"id": block.id, "type": "function", "function": function})
            case "thinking" | "redacted_thinking":
                reasoning += block.thinking
            case _:
                texts.append(_text([block], f"{place}[{i}]"))
    if texts or calls or reasoning:
        own = {"role": message.role, "content": "\n".join(texts), "tool_calls": calls or None}
        found.append({**own, "reasoning_content": reasoning or None})
    return found


def _result(content: str | Sequence[_Block] | None) -> str | Objects | None:
    """Return what a tool has given in OpenAI's form. The tools that a search has found are among those of the body."""
    if content is None or isinstance(content, str):
        return content
    texts = [f"The tool {block.tool_name} is ready." if block.tool_name else block.text for block in content]
    kinds = ["text" if block.tool_name else block.type for block in content]
    return [{"type": kind, "text": text} for kind, text in zip(kinds, texts, strict=True)]


def _text(content: str | Sequence[_Block], place: str) -> str:
    """Return the text of content. HttpError 400 for what is no text."""
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text":
            found = f"{place} has the type {block.type!r:.40}"
            raise HttpError(400, f"{found}; allowed: text, the model reads nothing else")
    return "\n".join(block.text for block in content)


def _call(name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": "toolu_" + token_hex(12), "name": name, "input": {}}


def _event(name: str, **fields: Any) -> bytes:
    return sse({"type": name, **fields}, name)


class _Writer(Writer):
    quiet = _event("ping")
    _index, _kind = -1, ""  # of the block that is open

    def whole(self, found: Sequence[Whole]) -> dict[str, Any]:
        (whole,) = found
        content = [{**_BLOCKS["reasoning"][0], "thinking": whole.reasoning}] if whole.reasoning else []
        content += [{**_BLOCKS["text"][0], "text": whole.text}] if whole.text else []
        content += [{**_call(name), "input": arguments_of(arguments)} for name, arguments in whole.calls]
        return {**self._message(content), **self._stop(whole.finish)}

    def begin(self) -> bytes:
        nothing = dict.fromkeys(("stop_reason", "stop_sequence"))
        return _event("message_start", message={**self._message([]), **nothing}) + self.quiet

    def push(self, event: Event) -> bytes:
        sent = b""
        if event.kind == "call" or event.kind not in (self._kind, "arguments"):
            sent = _event("content_block_stop", index=self._index) if self._kind else b""
            self._kind = event.kind
            if event.kind == "end":
                delta = _event("message_delta", delta=self._stop(event.text), usage=_usage(self.answers.usage))
                return sent + delta + _event("message_stop")
            self._index += 1
            block = _call(event.text) if event.kind == "call" else _BLOCKS[event.kind][0]
            sent += _event("content_block_start", index=self._index, content_block=block)
        if event.kind == "call":
            return sent
        _, name, field = _BLOCKS[event.kind]
        return sent + _event("content_block_delta", index=self._index, delta={"type": name, field: event.text})

    def failed(self, error: HttpError) -> bytes:
        return sse(error.body("anthropic"), "error")

    def _message(self, content: Objects) -> dict[str, Any]:
        answers = self.answers
        kind = {"id": "msg_" + token_hex(12), "type": "message", "role": "assistant", "content": content}
        return {**kind, "model": answers.ask.model or answers.served.name, "usage": _usage(answers.usage)}

    def _stop(self, finish: str) -> dict[str, Any]:
        text = self.answers.stop_string(0) if finish == "stop" else ""
        return {"stop_reason": "stop_sequence" if text else _STOP_REASONS[finish], "stop_sequence": text or None}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.n_prompt - usage.n_cached,
        "cache_read_input_tokens": usage.n_cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.n_decoded,
    }


routes = [post("/v1/messages", messages), post("/v1/messages/count_tokens", count_tokens)]
