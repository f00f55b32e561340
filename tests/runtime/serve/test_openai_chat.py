"""/v1/chat/completions through OpenAI's client and raw sockets, on a real server."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from served import Serving, scripted, serving
from tinymodel import CHAT_TEMPLATE

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

USER = [{"role": "user", "content": "Say hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    script = {"Say hello": "Hello, world! Grüße 🙂.", "long": "x" * 400}
    with serving(scripted(script, n_ctx=512)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def test_whole(client: Any) -> None:
    answer = client.chat.completions.create(model="m0", messages=USER)
    assert answer.choices[0].message.content == "Hello, world! Grüße 🙂."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len("Hello, world! Grüße 🙂.".encode())
    assert answer.model == "m0"


def test_stream(client: Any) -> None:
    chunks = [*client.chat.completions.create(
        model="m0", messages=USER, stream=True, n=2, stream_options={"include_usage": True}
    )]  # fmt: skip
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    *chunks, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == 2 * len("Hello, world! Grüße 🙂.".encode())
    assert last.usage.prompt_tokens_details.cached_tokens <= last.usage.prompt_tokens
    firsts = [chunk.choices[0] for chunk in chunks[:2]]
    assert [(first.index, first.delta.role, first.delta.content) for first in firsts] == [
        (0, "assistant", ""), (1, "assistant", ""),
    ]  # fmt: skip
    for i in range(2):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == i]
        assert "".join(choice.delta.content or "" for choice in mine) == "Hello, world! Grüße 🙂."
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["stop"]


def test_async_client(server: Serving) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            asked = [client.chat.completions.create(model="m0", messages=USER) for _ in range(12)]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == ["Hello, world! Grüße 🙂."] * 12


def test_options(server: Serving, client: Any) -> None:
    create = client.chat.completions.create
    answer = create(model="m0", messages=USER, stop=["wor"], logprobs=True, top_logprobs=2, seed=7)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Hello, ", "stop")
    first = choice.logprobs.content[0]
    assert (first.token, first.bytes, len(first.top_logprobs)) == ("H", [72], 2)
    assert create(model="m0", messages=USER, max_completion_tokens=5).choices[0].message.content == "Hello"
    assert create(model="m0", messages=USER, max_tokens=5).choices[0].finish_reason == "length"
    id = str(server.model.tokenize("H")[0])
    biased = create(model="m0", messages=USER, logit_bias={id: -100.0}, temperature=0, max_tokens=1)
    assert biased.choices[0].message.content != "H"


@pytest.mark.parametrize("extra", [
    {"num_ctx": 5, "store": True, "metadata": {}, "service_tier": "auto", "parallel_tool_calls": True, "user": None,
     "reasoning_effort": "low", "prompt_cache_key": "x", "temperature": None, "tools": [], "stream": None},
    {"messages": [{"role": "developer", "content": "Be brief."}, *USER]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Say hello"}]}]},
    {"messages": [*USER, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "1"}]},
])  # fmt: skip
def test_what_clients_send(server: Serving, extra: dict[str, Any]) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": USER, **extra})
    assert answer.status_code == 200, answer.text
    message = answer.json()["choices"][0]["message"]
    assert message["content"] == "Hello, world! Grüße 🙂."
    assert None not in message.values()
    assert [] not in message.values()


@pytest.mark.parametrize(("body", "what"), [
    ({"messages": []}, "messages"), ({}, "messages"), ({"messages": "x"}, "messages"),
    ({"messages": USER, "n": 0}, "n"), ({"messages": USER, "n": 2**63}, "n"), ({"messages": USER, "n": "2"}, "n"),
    ({"messages": USER, "max_tokens": -1}, "max_tokens"), ({"messages": USER, "max_tokens": 0}, "max_tokens"),
    ({"messages": USER, "temperature": -1}, "temperature"), ({"messages": USER, "temperature": "1"}, "temperature"),
    ({"messages": USER, "top_p": 2}, "top_p"), ({"messages": USER, "top_k": 1e308}, "top_k"),
    ({"messages": USER, "seed": 2**64}, "seed"), ({"messages": USER, "repeat_penalty": 0}, "repeat_penalty"),
    ({"messages": USER, "logit_bias": {"99999": 1}}, "logit_bias"),
    ({"messages": USER, "logit_bias": {"x": 1}}, "logit_bias"),
    ({"messages": USER, "stop": [""]}, "stop"), ({"messages": USER, "stop": ["a"] * 99}, "stop"),
    ({"messages": USER, "top_logprobs": 999, "logprobs": True}, "top_logprobs"),
    ({"messages": USER, "tool_choice": {"name": []}}, "tool_choice"),
    ({"messages": USER, "tool_choice": "required"}, "tool_choice"), ({"messages": USER, "tools": [{}]}, "tools[0]"),
    ({"messages": USER, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"), ([], "object"),
])  # fmt: skip
def test_refused(server: Serving, body: Any, what: str) -> None:
    for stream in ({}, {"stream": True}):
        found = httpx.post(f"{server.url}/v1/chat/completions", json=body | stream if isinstance(body, dict) else body)
        assert found.status_code == 400, found.text
        assert what in found.json()["error"]["message"]
        assert found.json()["error"]["type"] == "invalid_request_error"


def test_too_long_a_prompt_is_refused_before_the_stream(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m0", messages=[{"role": "user", "content": "x" * 600}], stream=True)
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is 512 tokens" in caught.value.message


def test_numbers_that_json_has_not(server: Serving) -> None:
    for number in ("NaN", "Infinity", "1e999"):
        body = '{"messages": [{"role": "user", "content": "x"}], "temperature": ' + number + "}"
        assert httpx.post(f"{server.url}/v1/chat/completions", content=body).status_code == 400


def request(server: Serving, body: Any) -> bytes:
    text = json.dumps(body).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_answer(stream: bool) -> None:
    with serving(scripted({"": "x" * 4000}, delay_s=0.01, n_ctx=8192)) as server:
        with socket.create_connection((server.host, server.port)) as connection:
            connection.sendall(request(server, {"messages": USER, "stream": stream, "n": 2}))
            while not (rows := server.model.engine.jobs):
                time.sleep(0.005)
            if stream:
                connection.recv(100)
            assert len(rows) == 2
        until = time.monotonic() + 5
        while server.model.engine.jobs and time.monotonic() < until:
            time.sleep(0.005)
        assert server.model.engine.jobs == []
        assert all(len(job.reply.tokens) < 3000 for job in rows)


def test_a_template_without_a_place_for_tools() -> None:
    """The model is told of them in the system message, and calls them in the generic form."""
    tool = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    told = 'be brief\n\nYou can call these functions:\n{"name": "weather"'
    script = {told: '{"name": "weather", "arguments": {"city": "Rome"}}'}
    messages = [{"role": "system", "content": "be brief"}, *USER]
    body = {"messages": messages, "tools": [{"type": "function", "function": tool}]}
    with serving(scripted(script, template=CHAT_TEMPLATE)) as server:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
    call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Rome"})
