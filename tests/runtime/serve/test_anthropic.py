"""/v1/messages through Anthropic's client, on a real server."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
from served import Serving, scripted, serving

from gguf_run.models.pages import CacheFullError

httpx = pytest.importorskip("httpx")
anthropic = pytest.importorskip("anthropic")

USER = [{"role": "user", "content": "Say hello"}]
WEATHER = {"name": "weather", "description": "Tells it.", "input_schema": {"type": "object", "properties": {
    "city": {"type": "string"}}}}  # fmt: skip
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
CALLS = f"Let me see.\n{CALL}{CALL.replace('Rome', 'Oslo')}"
SCRIPT = {
    "tool\nThe tool sky is ready.<|im_end|>\n<|im_start|>tool\n[image left out: you read nothing but text]<|im_end|>\n"
    "<|im_start|>tool\n<|im_end|>\n<|im_start|>tool\n<|im_end|>": "All seen.",
    "Sunny": "It is sunny.", "CODE-7": "The code is 7.", "Weather?": CALLS, "Think": "<think>\nHm.\n</think>\n\nDone.",
    "Say hello": "Hello, world! Grüße 🙂.",
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(scripted(SCRIPT, n_ctx=1024)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as found:
        yield found


def test_whole(client: Any) -> None:
    answer = client.messages.create(model="m0", max_tokens=100, messages=USER)
    assert [(block.type, block.text) for block in answer.content] == [("text", "Hello, world! Grüße 🙂.")]
    assert (answer.role, answer.model, answer.stop_reason) == ("assistant", "m0", "end_turn")
    usage = answer.usage
    counted = client.messages.count_tokens(model="m0", messages=USER).input_tokens
    assert usage.input_tokens + usage.cache_read_input_tokens == counted
    assert usage.output_tokens == len("Hello, world! Grüße 🙂.".encode())
    short = client.beta.messages.create(model="m0", max_tokens=5, messages=USER)  # asks for ?beta=true
    assert (short.content[0].text, short.stop_reason) == ("Hello", "max_tokens")
    stopped = client.messages.create(model="m0", max_tokens=50, messages=USER, stop_sequences=["wor"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "wor")


def test_async_clients(server: Serving) -> None:
    async def ask() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="any") as client:
            asked = [client.messages.create(model="m0", max_tokens=99, messages=USER) for _ in range(8)]
            return [answer.content[0].text for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == ["Hello, world! Grüße 🙂."] * 8


def events_of(server: Serving, **body: Any) -> list[tuple[str, Any]]:
    """Return the names and data of a stream's events."""
    body = {"max_tokens": 200, "messages": USER, "stream": True, **body}
    text = httpx.post(f"{server.url}/v1/messages?beta=true", json=body).text
    found = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_order_of_events(server: Serving) -> None:
    events = events_of(server, messages=[{"role": "user", "content": "Weather?"}], tools=[WEATHER])
    assert all(name == data["type"] for name, data in events)
    names = [name for name, _ in events if name not in ("content_block_delta", "ping")]
    block = ["content_block_start", "content_block_stop"]
    assert names == ["message_start", *block * 3, "message_delta", "message_stop"]
    started = [data for name, data in events if name == "content_block_start"]
    assert [data["index"] for data in started] == [0, 1, 2]
    assert [data["content_block"]["type"] for data in started] == ["text", "tool_use", "tool_use"]
    at = None  # number of the open block: deltas are of it
    for name, data in events:
        if name == "content_block_start":
            at = data["index"]
        elif name == "content_block_delta":
            assert data["index"] == at
    end = dict(events)["message_delta"]
    assert end["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert end["usage"]["output_tokens"] > 0
    start = dict(events)["message_start"]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None)


def test_tools(client: Any) -> None:
    question = {"role": "user", "content": "Weather?"}
    asked = {"model": "m0", "max_tokens": 300, "tools": [WEATHER], "messages": [question]}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    for answer in (whole, streamed):
        assert answer.stop_reason == "tool_use"
        text, *calls = answer.content
        assert text.text.strip() == "Let me see."
        assert [(call.name, call.input) for call in calls] == [("weather", {"city": c}) for c in ("Rome", "Oslo")]
        assert len({call.id for call in calls}) == 2
    results = [
        {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Sunny"}]}
        for call in whole.content[1:]
    ]
    history = [question, {"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
    answer = client.messages.create(model="m0", max_tokens=99, messages=history, tools=[WEATHER])
    assert answer.content[0].text == "It is sunny."


def test_results_that_are_no_text(client: Any) -> None:
    """Claude Code finds tools by a tool, reads pictures with another one, and goes on."""
    contents: list[Any] = [
        [{"type": "tool_reference", "tool_name": "sky"}],
        [{"type": "image", "source": {}}],
        "",
        None,
    ]
    call = {"type": "tool_use", "id": "a", "name": "weather", "input": {}}
    results = [{"type": "tool_result", "tool_use_id": "a", "content": content} for content in contents]
    history = [*USER, {"role": "assistant", "content": [call]}, {"role": "user", "content": results}]
    assert client.messages.create(model="m0", max_tokens=99, messages=history).content[0].text == "All seen."


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "answer"}])
def test_a_call_that_must_be(client: Any, choice: Any) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"sure": {"enum": ["yes", "no"]}}, "required": ["sure"],
              "additionalProperties": False}  # fmt: skip
    tool = {"name": "answer", "input_schema": schema}
    asked = {"model": "m0", "max_tokens": 300, "tools": [tool], "messages": USER}
    answer = client.messages.create(**asked, tool_choice={**choice, "disable_parallel_tool_use": True})
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    assert (call.name, answer.stop_reason) == ("answer", "tool_use")
    assert call.input["sure"] in ("yes", "no")


def test_an_answer_of_a_schema(client: Any) -> None:
    pytest.importorskip("llguidance")
    config = {"format": {"type": "json_schema", "schema": {"enum": ["yes", "no"]}}}
    answer = client.messages.create(model="m0", max_tokens=99, messages=USER, output_config=config)
    assert json.loads(answer.content[0].text) in ("yes", "no")


def test_thinking(client: Any) -> None:
    asked = {"model": "m0", "max_tokens": 300, "messages": [{"role": "user", "content": "Think"}]}
    with client.messages.stream(**asked, thinking={"type": "enabled", "budget_tokens": 1024}) as stream:
        streamed = stream.get_final_message()
    for answer in (client.messages.create(**asked), streamed):
        thinking, text = answer.content
        assert (thinking.type, thinking.thinking.strip(), text.text.strip()) == ("thinking", "Hm.", "Done.")
    history = [*asked["messages"], {"role": "assistant", "content": streamed.content}, *USER]
    assert client.messages.create(model="m0", max_tokens=99, messages=history).content


@pytest.mark.parametrize("body", [
    {"system": "Be brief. CODE-7"},
    {"system": [{"type": "text", "text": "x-anthropic-billing-header: cch=1;"},
                {"type": "text", "text": "CODE-7", "cache_control": {"type": "ephemeral"}}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "CODE-7"}, {"type": "text", "text": "Go"}]}]},
    {"system": "CODE-7", "tools": [{"type": "web_search_20250305", "name": "web_search"}], "metadata": {"user_id": "x"},
     "thinking": {"type": "disabled"}, "tool_choice": {"type": "auto"}, "service_tier": "auto", "top_k": 1},
])  # fmt: skip
def test_what_clients_send(server: Serving, body: dict[str, Any]) -> None:
    answer = httpx.post(f"{server.url}/v1/messages", json={"max_tokens": 99, "messages": USER, **body})
    assert answer.status_code == 200, answer.text
    assert answer.json()["content"] == [{"type": "text", "text": "The code is 7."}]


def test_the_line_that_changes_is_left_out(server: Serving, client: Any) -> None:
    rest = "You are kind. " * 20
    n_cached = []
    for number in range(2):
        line = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2; cch={number * 12345};"}
        system = [line, {"type": "text", "text": rest}]
        answer = client.messages.create(model="m0", max_tokens=5, messages=USER, system=system)
        n_cached.append(answer.usage.cache_read_input_tokens)
    assert n_cached[1] >= len(rest)


@pytest.mark.parametrize(("body", "what"), [
    ({"max_tokens": None}, "max_tokens is missing"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": "5"}, "$"),
    ({"messages": []}, "messages"), ({"messages": None}, "messages"), ({"messages": [5]}, "messages[0]"),
    ({"messages": [*USER, {"role": "assistant", "content": "I"}]}, "begun"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0] has the type 'image'"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [
        {"type": "film"}]}]}]}, 'content[0].type is "film"'),
    ({"system": [{"type": "document"}]}, "system has the type"), ({"system": 5}, "$"), ({"tools": [{}]}, "tools[0]"),
    ({"tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"), ({"tool_choice": {"type": "x"}}, "tool_choice"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"), ({"stop_sequences": [""]}, "stop"), ({"thinking": 1}, "$"),
    ({"temperature": 1e999}, "JSON"), ({"output_config": {"format": {"type": "x"}}}, "response_format"),
])  # fmt: skip
def test_refused(server: Serving, body: dict[str, Any], what: str) -> None:
    for stream in ({}, {"stream": True}):
        content = json.dumps({"max_tokens": 99, "messages": USER, **body, **stream})
        found = httpx.post(f"{server.url}/v1/messages", content=content)
        assert found.status_code == 400, found.text
        assert (found.json()["type"], found.json()["error"]["type"]) == ("error", "invalid_request_error")
        assert what in found.json()["error"]["message"]


def test_too_long_a_prompt(client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 1024 maximum"):
        client.messages.create(
            model="m0", max_tokens=5, messages=[{"role": "user", "content": "x" * 2000}], stream=True
        )


def test_errors_of_the_server() -> None:
    """Within a stream an error is an event. The client raises what it retries if it may."""
    with (
        serving(scripted(n_ctx=1024)) as server,
        anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as client,
    ):
        asked = {"model": "m0", "max_tokens": 5, "messages": USER}
        engine = server.model.engine
        engine.max_queue = 0
        with pytest.raises(anthropic.RateLimitError, match="try again later"):
            client.messages.create(**asked)
        engine.max_queue = 9
        for error, what in (
            (CacheFullError("the cache is full"), "cache is full"),
            (KeyError("x"), "inside the server"),
        ):
            server.model.decoder.step = Mock(side_effect=error)  # type: ignore[method-assign]
            with pytest.raises(anthropic.APIStatusError, match=what) as caught:
                [*client.messages.create(**asked, stream=True)]
            with pytest.raises(anthropic.InternalServerError, match=what) as caught:
                client.messages.create(**asked)
            assert caught.value.status_code == (500 if isinstance(error, KeyError) else 529)
