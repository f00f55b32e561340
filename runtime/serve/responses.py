"""/v1/responses, without a memory: a client sends the whole conversation each time. Start with `responses`."""

import time
from collections.abc import Sequence
from secrets import token_hex
from typing import Any

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from gguf_run.runtime.serve.answers import Answers, Event, Whole
from gguf_run.runtime.serve.ask import Count, Objects, ask_of, body_of
from gguf_run.runtime.serve.errors import HttpError
from gguf_run.runtime.serve.http import Writer, answer, post, sse
from gguf_run.runtime.serve.openai_chat import call_id, usage_json

# Fields of a request that its response repeats, with their defaults.
_REPEATED: dict[str, Any] = {
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True, "reasoning": None,
    "temperature": None, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": None,
}  # fmt: skip
# Kind of an event: type of the item that it is a part of, start of its id, name of its own events.
_ITEMS = {
    "text": ("message", "msg_", "output_text"),
    "reasoning": ("reasoning", "rs_", "reasoning_text"),
    "arguments": ("function_call", "fc_", "function_call_arguments"),
}


class _Item(Struct):
    """A part of the conversation. Its type tells which fields it has."""

    type: str = "message"
    role: str | None = None
    content: str | Objects | None = None
    summary: Objects | None = None  # of reasoning
    call_id: str | None = None
    name: str | None = None  # of the function that is called
    namespace: str | None = None  # in which it is
    arguments: str | None = None
    output: Any = None  # of a call


class _Body(Struct):
    input: str | list[_Item]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    tools: Objects | None = None


async def responses(request: Request, json: dict[str, Any]) -> Response:
    """Answer a conversation."""
    chat = _chat(json)
    return await answer(request, ask_of(chat), lambda answers: _Writer(answers, json, chat["tools"]))


def _chat(json: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a chat completion that asks for the same."""
    for name in ("previous_response_id", "conversation", "prompt"):
        if json.get(name):
            raise HttpError(400, f"{name} is not supported: this server keeps nothing, send the whole conversation")
    body: _Body = body_of(json, _Body)
    items = [_Item(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    messages: Objects = []
    for item in [_Item(role="system", content=body.instructions), *items] if body.instructions else items:
        _add(messages, item)
    if not messages:
        raise HttpError(400, "input is empty: give a text, or at least one item")
    return json | {
        "messages": messages,
        "tools": _flat(body.tools or []),
        "max_completion_tokens": body.max_output_tokens,
        "response_format": (body.text or {}).get("format"),
        "reasoning_effort": (body.reasoning or {}).get("effort"),
        "n": 1,
        "logprobs": None,
    }


def _flat(tools: Objects) -> Objects:
    """Return tools with the functions of namespaces in their place. Codex makes a namespace of each MCP server."""
    found: Objects = []
    for tool in tools:
        if tool.get("type") == "namespace":
            inner, space = body_of(tool.get("tools") or [], Objects), tool.get("name")
            found += [{**one, "name": f"{space}__{one.get('name')}", "namespace": space} for one in inner]
        else:
            found.append(tool)
    return found


def _add(messages: Objects, item: _Item) -> None:
    """Add an item to the messages of a chat.

    Messages of one role that follow each other become one: templates want roles to take turns. Items of tools that run
    elsewhere are left out, as these tools are.
    """
    if item.type == "item_reference":
        raise HttpError(400, "input has an item_reference: this server keeps nothing, send the item itself")
    if item.type == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
    if item.type not in ("message", "reasoning", "function_call"):
        return
    role = item.role if item.type == "message" else "assistant"
    role = "system" if role == "developer" else role
    if not messages or messages[-1]["role"] != role or role == "tool":
        messages.append({"role": role, "content": []})
    message = messages[-1]
    if item.type == "message":
        is_text = isinstance(item.content, str)
        message["content"] += [{"type": "text", "text": item.content}] if is_text else item.content or []
    elif item.type == "reasoning":
        parts = item.content if item.content and not isinstance(item.content, str) else item.summary or []
        thought = "".join(str(part.get("text", "")) for part in parts)
        message["reasoning_content"] = message.get("reasoning_content", "") + thought
    else:
        name = f"{item.namespace}__{item.name}" if item.namespace else item.name
        function = {"name": name, "arguments": item.arguments}
        message.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})


class _Writer(Writer):
    """Writes an answer as items, and the events that tell a client of them."""

    def __init__(self, answers: Answers, json: dict[str, Any], tools: Objects) -> None:
        super().__init__(answers)
        self._spaces = {str(tool.get("name")): tool["namespace"] for tool in tools if "namespace" in tool}
        given = {name: value for name, value in json.items() if name in _REPEATED and value is not None}
        model, nothing = answers.ask.model or answers.served.name, ("error", "incomplete_details", "usage")
        own = {"id": "resp_" + token_hex(12), "object": "response", "created_at": int(time.time()), "model": model}
        more: dict[str, Any] = {"previous_response_id": None, "status": "in_progress", "output": [], "store": False}
        self.response: dict[str, Any] = {**_REPEATED, **given, **own, **dict.fromkeys(nothing), **more}
        self._n_events = 0
        self._item: dict[str, Any] | None = None  # that is being written, and of it:
        self._kind = ""  # of its events, see _ITEMS
        self._texts: list[str] = []
        self._place: dict[str, Any] = {}  # fields of its events that tell where it stands
        self._more: dict[str, Any] = {}  # fields of the events of its text

    def whole(self, found: Sequence[Whole]) -> dict[str, Any]:
        (whole,) = found
        calls = [part for name, arguments in whole.calls for part in (("call", name), ("arguments", arguments))]
        for kind, text in (("reasoning", whole.reasoning), ("text", whole.text), *calls, ("end", whole.finish)):
            if text:
                self.push(Event(0, kind, text))
        return self.response

    def begin(self) -> bytes:
        return self._event("created", response=self.response) + self._event("in_progress", response=self.response)

    def failed(self, error: HttpError) -> bytes:
        code = "rate_limit_exceeded" if error.status == 429 else error.code or "server_error"
        self.response |= {"status": "failed", "error": {"code": code, "message": error.message}}
        return self._event("failed", response=self.response)

    def push(self, event: Event) -> bytes:
        if event.kind == "end":
            status = "incomplete" if event.text == "length" else "completed"
            sent = self._close(status)
            self.response |= {"status": status, "usage": _usage(self.answers)}
            if status == "incomplete":
                self.response["incomplete_details"] = {"reason": "max_output_tokens"}
            return sent + self._event(status, response=self.response)
        sent = b""
        if self._item is None or event.kind != self._kind:
            sent = self._close("completed") + self._open(event)
        if event.kind == "call":
            return sent
        self._texts.append(event.text)
        return sent + self._event(_ITEMS[event.kind][2] + ".delta", **self._place, delta=event.text, **self._more)

    def _open(self, event: Event) -> bytes:
        n = len(self.response["output"])
        self._texts, self._kind = [], "arguments" if event.kind == "call" else event.kind
        self._more = {"logprobs": []} if event.kind == "text" else {}
        type, prefix, _ = _ITEMS[self._kind]
        space = self._spaces.get(event.text) if event.kind == "call" else None
        name = event.text.removeprefix(f"{space}__") if space else event.text
        fields: dict[str, dict[str, Any]] = {
            "text": {"role": "assistant", "content": []},
            "reasoning": {"summary": [], "content": []},
            "arguments": {"call_id": call_id(), "name": name, "arguments": ""}
            | ({"namespace": space} if space else {}),
        }
        self._item = {"type": type, "id": prefix + token_hex(12), "status": "in_progress", **fields[self._kind]}
        self._place = {"item_id": self._item["id"], "output_index": n}
        sent = self._event("output_item.added", output_index=n, item=self._item)
        if event.kind != "call":
            self._place["content_index"] = 0
            sent += self._event("content_part.added", **self._place, part=self._part(""))
        return sent

    def _close(self, status: str) -> bytes:
        if self._item is None:
            return b""
        item, text, name = self._item, "".join(self._texts), _ITEMS[self._kind][2] + ".done"
        item["status"], self._item = status, None
        if self._kind == "arguments":
            item["arguments"] = text
            sent = self._event(name, **self._place, name=item["name"], arguments=text)
        else:
            item["content"] = [self._part(text)]
            sent = self._event(name, **self._place, text=text, **self._more)
            sent += self._event("content_part.done", **self._place, part=self._part(text))
        self.response["output"].append(item)
        return sent + self._event("output_item.done", output_index=self._place["output_index"], item=item)

    def _part(self, text: str) -> dict[str, Any]:
        part = {"type": _ITEMS[self._kind][2], "text": text}
        return part if self._kind == "reasoning" else {**part, "annotations": []}

    def _event(self, kind: str, **fields: Any) -> bytes:
        kind, self._n_events = f"response.{kind}", self._n_events + 1
        return sse({"type": kind, "sequence_number": self._n_events - 1, **fields}, kind)


def _usage(answers: Answers) -> dict[str, Any]:
    counts = usage_json(answers.usage).items()
    return {name.replace("prompt", "input").replace("completion", "output"): count for name, count in counts}


routes = [post("/v1/responses", responses)]
