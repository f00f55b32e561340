"""/v1/responses through OpenAI's client and plain HTTP, on a real server."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from served import Serving, scripted, serving

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")

HELLO = "Grüße 🙂."
THOUGHT = "<think>\nA greeting?\n</think>\n\n" + HELLO
CALL = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TWO = CALL + '\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "name": "weather", "description": "Tells.", "parameters": SCHEMA, "strict": True},
    {"type": "function", "name": "clock", "parameters": {"type": "object", "properties": {}}, "strict": False},
    {"type": "web_search"}, {"type": "custom", "name": "apply_patch"}, {"type": "local_shell"},
]  # fmt: skip


class City(pydantic.BaseModel):
    name: str
    inhabitants: int


SCRIPT = {
    "mcp__sky__weather\", \"arguments\": {\"city\": \"Moon\"}}\n</tool_call><|im_end|>\n<|im_start|>tool\n"
    "[input_image left out: you read nothing but text]\nDust.": HELLO,
    "moon": '<tool_call>\n{"name": "mcp__sky__weather", "arguments": {"city": "Moon"}}\n</tool_call>',
    "Result!": HELLO, "Think": THOUGHT, "weather in Köln": CALL, "weather and time": TWO,
    "As JSON": '{"name": "Bonn", "inhabitants": 3}', "long": "x" * 100, "Say hello": HELLO,
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(scripted(SCRIPT, n_ctx=1024)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def post(server: Serving, **body: Any) -> Any:
    return httpx.post(f"{server.url}/v1/responses", json=body, timeout=30)


def events_of(server: Serving, **body: Any) -> list[dict[str, Any]]:
    """Return the events of a stream. Each says its type twice, and they are numbered."""
    found = []
    for chunk in post(server, stream=True, **body).text.removesuffix("\n\n").split("\n\n"):
        head, data = chunk.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert head == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == [*range(len(found))]
    return found


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """Return the types of events without their prefix; those in a row once."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for i, name in enumerate(names) if name != (names[i - 1] if i else "")]


PART = ["output_item.added", "content_part.added"]
TEXT = [*PART, "output_text.delta", "output_text.done", "content_part.done", "output_item.done"]
REASONING = [*PART, "reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done"]
CALLED = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]


@pytest.mark.parametrize(("text", "items"), [
    ("Say hello", [TEXT]), ("Think", [REASONING, TEXT]), ("weather in Köln", [TEXT, CALLED]),
    ("weather and time", [TEXT, CALLED, CALLED]),
])  # fmt: skip
def test_the_order_of_events(server: Serving, text: str, items: list[list[str]]) -> None:
    """Deltas add up to the items; the items are those of the response, with which the stream ends."""
    events = events_of(server, input=text, tools=TOOLS)
    assert kinds(events) == ["created", "in_progress", *(name for item in items for name in item), "completed"]
    last = events[-1]["response"]
    assert events[0]["response"] == events[1]["response"]
    assert events[0]["response"] | {"status": "completed"} == last | {"output": [], "usage": None}
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == last["output"]
    assert len({item["id"] for item in done}) == len(done)
    for i, item in enumerate(done):
        mine = [event for event in events if event.get("output_index") == i]
        assert mine[0]["item"].keys() == item.keys()
        assert mine[0]["item"]["status"] == "in_progress"
        assert {event["item_id"] for event in mine[1:-1]} == {item["id"]}
        assert "".join(event.get("delta", "") for event in mine) == (
            item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        )
        assert item["status"] == "completed"
    assert shape(post(server, input=text, tools=TOOLS).json()) == shape(last)


def shape(response: dict[str, Any]) -> dict[str, Any]:
    """Return a response without what differs from one to the next."""
    output = [{name: item[name] for name in item.keys() - {"id", "call_id"}} for item in response["output"]]
    usage = response["usage"] | {"input_tokens_details": None}
    return response | {"output": output, "usage": usage, "id": None, "created_at": None}


def test_whole(client: Any) -> None:
    found = client.responses.create(model="m0", input="Say hello", metadata={"a": "b"}, temperature=0.5, store=True)
    assert (found.output_text, found.status, found.object, found.model) == (HELLO, "completed", "response", "m0")
    assert abs(found.created_at - time.time()) < 60
    assert (found.metadata, found.temperature, found.store) == ({"a": "b"}, 0.5, False)
    assert (found.error, found.incomplete_details) == (None, None)
    usage = found.usage
    assert usage.output_tokens == len(HELLO.encode())
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    again = client.responses.create(model="m0", input="Say hello")
    assert 0 < again.usage.input_tokens_details.cached_tokens <= again.usage.input_tokens
    assert found.id != again.id


def test_reasoning(client: Any) -> None:
    found = client.responses.create(model="m0", input="Think", reasoning={"effort": "high"})
    thought, said = found.output
    assert (thought.type, thought.summary, thought.content[0].type) == ("reasoning", [], "reasoning_text")
    assert (thought.content[0].text.strip(), said.content[0].text) == ("A greeting?", HELLO)
    assert 0 < found.usage.output_tokens_details.reasoning_tokens < found.usage.output_tokens
    assert found.reasoning.effort == "high"


def test_an_answer_that_is_cut(server: Serving, client: Any) -> None:
    found = client.responses.create(model="m0", input="long", max_output_tokens=10)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (found.output_text, found.output[0].status) == ("x" * 10, "incomplete")
    last = events_of(server, input="long", max_output_tokens=10)[-1]
    assert (last["type"], last["response"]["usage"]["output_tokens"]) == ("response.incomplete", 10)


def test_a_round_of_tools(client: Any) -> None:
    """The output goes back as input, with the results of calls; so does what the client's helper makes of a stream."""
    said: list[Any] = [{"role": "user", "content": "weather and time"}]
    with client.responses.stream(model="m0", input=said, tools=TOOLS) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        streamed = stream.get_final_response()
    assert "".join(deltas) == '{"city": "Köln"}{}'
    found = client.responses.create(model="m0", input=said, tools=TOOLS)
    for response in (found, streamed):
        text, *calls = response.output
        assert text.content[0].text.strip() == "Let me see."
        assert [(call.name, call.arguments) for call in calls] == [("weather", '{"city": "Köln"}'), ("clock", "{}")]
        assert len({call.call_id for call in calls}) == 2
        outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "Result!"} for call in calls]
        answer = client.responses.create(model="m0", input=[*said, *response.output, *outputs], tools=TOOLS)
        assert answer.output_text == HELLO
    forced = client.responses.create(model="m0", input="weather and time", tools=TOOLS[:2],
                                     tool_choice={"type": "function", "name": "clock"}, temperature=0)  # fmt: skip
    assert {item.name for item in forced.output if item.type == "function_call"} == {"clock"}


def test_tools_in_a_namespace(server: Serving, client: Any) -> None:
    """Codex has one for each MCP server. It knows a call by namespace and name, apart."""
    space = {"type": "namespace", "name": "mcp__sky", "description": "Sky.", "tools": TOOLS[:2]}
    said: list[Any] = [{"role": "user", "content": "moon"}]
    found = client.responses.create(model="m0", input=said, tools=[space, TOOLS[0]])
    (item,) = found.output
    assert (item.name, item.namespace, item.arguments) == ("weather", "mcp__sky", '{"city": "Moon"}')
    done = [event["item"] for event in events_of(server, input=said, tools=[space]) if event["type"].endswith("m.done")]
    assert [(one["name"], one["namespace"]) for one in done] == [("weather", "mcp__sky")]
    output = {"type": "function_call_output", "call_id": item.call_id, "output": [
        {"type": "input_image", "image_url": "data:x"}, {"type": "input_text", "text": "Dust."}]}  # fmt: skip
    again = client.responses.create(model="m0", input=[*said, item, output], tools=[space])
    assert again.output_text == HELLO


@pytest.mark.parametrize("stream", [False, True])
def test_structured_output(client: Any, stream: bool) -> None:
    ask = {"model": "m0", "input": "As JSON", "text_format": City}
    if stream:
        with client.responses.stream(**ask) as events:
            found = events.get_final_response()
    else:
        found = client.responses.parse(**ask)
    assert found.output_parsed == City(name="Bonn", inhabitants=3)


HISTORY = [
    {"role": "developer", "content": "Two."}, {"type": "message", "role": "system", "content": [
        {"type": "input_text", "text": "Three."}]},
    {"role": "user", "content": "One?"}, {"role": "user", "content": [{"type": "input_text", "text": "Two?"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
    {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": [
        {"type": "output_text", "text": "I look.", "annotations": []}]},
    {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "x"}},
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}', "id": "fc_1"},
    {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{no"},
    {"type": "function_call_output", "call_id": "c1", "output": "1"},
    {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
    {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "So."}], "content": None,
     "encrypted_content": "x"},
    {"role": "tool", "content": "3"}, {"role": "assistant", "content": "Done."},
    {"role": "user", "content": "Say hello"},
]  # fmt: skip


def test_the_conversation_that_the_template_gets(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = server.model.chat_prompt
    monkeypatch.setattr(server.model, "chat_prompt", lambda *args: seen.append(args[0]) or real(*args))
    found = post(server, input=HISTORY, instructions="One.")
    assert found.status_code == 200, found.text
    assert found.json()["output"][0]["content"][0]["text"] == HELLO
    (messages,) = seen
    flat = [(m["role"], [p["text"] for p in m["content"]] if isinstance(m["content"], list) else m["content"])
            for m in messages]  # fmt: skip
    assert flat == [
        ("system", ["One.", "Two.", "Three."]), ("user", ["One?", "Two?"]), ("assistant", ["I look."]),
        ("tool", "1"), ("tool", ["2"]), ("assistant", []), ("tool", ["3"]), ("assistant", ["Done."]),
        ("user", ["Say hello"]),
    ]  # fmt: skip
    assert [messages[i].get("reasoning_content") for i in (2, 5)] == ["Hm.", "So."]
    assert [(call["id"], call["function"]["name"]) for call in messages[2]["tool_calls"]] == [("c1", "f"), ("c2", "g")]


@pytest.mark.parametrize(("body", "what"), [
    ({}, "input"), ({"input": []}, "input"), ({"input": 5}, "input"), ({"input": [5]}, "input[0]"),
    ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
    ({"input": "a", "conversation": {"id": "x"}}, "conversation"), ({"input": "a", "prompt": {"id": "x"}}, "prompt"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "item_reference"),
    ({"input": [{"role": "user", "content": 5}]}, "input[0].content"), ({"input": [{"content": "a"}]}, "role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
    ({"input": [{"type": "function_call", "call_id": "a", "arguments": "{}"}]}, "name"),
    ({"input": [{"type": "function_call_output", "call_id": 5, "output": "a"}]}, "call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "a", "output": {"a": 1}}]}, "content"),
    ({"input": "a", "instructions": 5}, "instructions"), ({"input": "a", "max_output_tokens": -1}, "max_output_tokens"),
    ({"input": "a", "max_output_tokens": 0}, "max_tokens"), ({"input": "a", "text": 5}, "text"),
    ({"input": "a", "text": {"format": {"type": "x"}}}, "response_format"),
    ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "schema"),
    ({"input": "a", "reasoning": {"effort": 5}}, "effort"), ({"input": "a", "temperature": -1}, "temperature"),
    ({"input": "a", "tools": TOOLS, "tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"input": "a", "tools": [{"type": "namespace", "name": "n", "tools": [5]}]}, "$[0]"),
    ({"input": "a", "tools": [{"type": "namespace", "name": "n", "tools": "f"}]}, "array"),
    ({"input": "a", "tools": [{"type": "custom", "name": [], "namespace": []}, {}]}, "tools[1]"),
    ({"input": "a", "tools": TOOLS[2:], "tool_choice": "required"}, "tool_choice"),
])  # fmt: skip
def test_refused(server: Serving, body: dict[str, Any], what: str) -> None:
    for stream in ({}, {"stream": True}):
        found = post(server, **body, **stream)
        assert found.status_code == 400, found.text
        assert what in found.json()["error"]["message"]


def test_what_clients_send(server: Serving) -> None:
    """Codex's fields, and null for those that have no value."""
    body = {"model": "m0", "input": [{"type": "message", "role": "user", "content": [
        {"type": "input_text", "text": "Say hello"}]}], "instructions": "Be brief.", "tools": TOOLS,
        "tool_choice": "auto", "parallel_tool_calls": False, "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "x", "text": None,
        "service_tier": None, "n": 5, "previous_response_id": None, "truncation": "auto", "temperature": None,
        "background": False, "max_tool_calls": 3, "top_logprobs": 2, "user": "u", "metadata": None,
        "stream_options": {"include_obfuscation": False}}  # fmt: skip
    events = events_of(server, **body)
    assert kinds(events) == ["created", "in_progress", *TEXT, "completed"]
    assert (events[-1]["response"]["metadata"], events[-1]["response"]["parallel_tool_calls"]) == ({}, False)


def test_errors(server: Serving, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One before the stream is an answer of HTTP; a later one is an event that ends it."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="m0", input="x" * 2000, stream=True)
    assert caught.value.code == "context_length_exceeded"
    monkeypatch.setattr(server.server, "request_timeout", 0.05)
    monkeypatch.setattr(server.model.decoder, "delay_s", 0.01)
    last = events_of(server, input="long")[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "timeout"


def test_async_streams(server: Serving) -> None:
    """Streams that run together do not mix."""

    async def read(client: Any, text: str) -> str:
        stream = await client.responses.create(model="m0", input=text, stream=True)
        return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            return await asyncio.gather(*(read(client, text) for text in ["Say hello", "long", "Think"] * 3))

    assert asyncio.run(ask()) == [HELLO, "x" * 100, HELLO] * 3
