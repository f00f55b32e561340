"""Ollama's API through its client, on a real server."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import BEGIN, Serving, scripted, serving
from tinymodel import QKV, Tiny, write_tiny

from gguf_run.runtime.model import Model

httpx = pytest.importorskip("httpx")
ollama = pytest.importorskip("ollama")

USER = [{"role": "user", "content": "Say hello"}]
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
SCRIPT = {
    "Sunny": "It is sunny.", "CODE-7": "The code is 7.", "Think": "<think>\nHm.\n</think>\n\nDone.",
    "Weather?": CALL + CALL.replace("Rome", "Oslo"), "Say hello": "Hello, world! Grüße 🙂.",
}  # fmt: skip
GAP = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(scripted(SCRIPT, n_ctx=1024, special=GAP)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[Any]:
    with closing(ollama.Client(host=server.url)) as found:
        yield found


def test_chat(client: Any) -> None:
    answer = client.chat(model="m0", messages=USER)
    assert (answer.message.role, answer.message.content) == ("assistant", "Hello, world! Grüße 🙂.")
    assert (answer.model, answer.done, answer.done_reason) == ("m0", True, "stop")
    assert answer.eval_count == len("Hello, world! Grüße 🙂.".encode())
    assert answer.prompt_eval_count > 0
    assert 0 < answer.eval_duration < answer.total_duration
    assert 0 < answer.load_duration < answer.total_duration
    short = client.chat(
        model="m0", messages=USER, options={"num_predict": 5, "num_ctx": 99999, "num_gpu": 1, "seed": 1}
    )
    assert (short.message.content, short.done_reason) == ("Hello", "length")
    assert client.chat(model="m0", messages=USER, options={"stop": ["wor"]}).message.content == "Hello, "


def test_stream(client: Any) -> None:
    chunks = [*client.chat(model="m0", messages=USER, stream=True)]
    assert "".join(chunk.message.content for chunk in chunks) == "Hello, world! Grüße 🙂."
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].eval_count == len("Hello, world! Grüße 🙂.".encode())
    assert len(chunks) > 5


def test_a_stream_is_the_default(server: Serving) -> None:
    found = httpx.post(f"{server.url}/api/chat", json={"model": "m0", "messages": USER})
    assert found.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line)["done"] for line in found.text.splitlines()][-2:] == [False, True]


def test_async_clients(server: Serving) -> None:
    async def ask() -> list[str]:
        client = ollama.AsyncClient(host=server.url)
        answers = await asyncio.gather(*(client.chat(model="m0", messages=USER) for _ in range(8)))
        await client.close()
        return [answer.message.content for answer in answers]

    assert asyncio.run(ask()) == ["Hello, world! Grüße 🙂."] * 8


def test_tools(client: Any) -> None:
    question = {"role": "user", "content": "Weather?"}
    whole = client.chat(model="m0", messages=[question], tools=[WEATHER])
    *chunks, last = client.chat(model="m0", messages=[question], tools=[WEATHER], stream=True)
    (said,) = [chunk.message for chunk in chunks if chunk.message.tool_calls]
    assert last.done_reason == "stop"
    for message in (whole.message, said):
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls]
        assert calls == [("weather", {"city": "Rome"}), ("weather", {"city": "Oslo"})]
    result = {"role": "tool", "tool_name": "weather", "content": "Sunny"}
    answer = client.chat(model="m0", messages=[question, whole.message, result], tools=[WEATHER])
    assert answer.message.content == "It is sunny."


def test_thinking(client: Any) -> None:
    asked: Any = {"model": "m0", "messages": [{"role": "user", "content": "Think"}], "think": True}
    chunks = [chunk.message for chunk in client.chat(**asked, stream=True)]
    whole = client.chat(**asked).message
    assert (whole.thinking.strip(), whole.content.strip()) == ("Hm.", "Done.")
    assert "".join(chunk.thinking or "" for chunk in chunks) == whole.thinking
    assert client.chat(model="m0", messages=[*asked["messages"], whole, *USER]).message.content


def test_format(client: Any) -> None:
    pytest.importorskip("llguidance")
    schema = {"enum": ["yes", "no"]}  # the model would say hello
    for answer in (client.chat(model="m0", messages=USER, format=schema).message.content,
                   client.generate(model="m0", prompt="Say hello", format=schema).response):  # fmt: skip
        assert json.loads(answer) in ("yes", "no")
    found = client.chat(model="m0", messages=USER, format="json", options={"num_predict": 50}).message.content
    assert found.lstrip().startswith("{")


def test_generate(client: Any) -> None:
    assert client.generate(model="m0", prompt="Say hello").response == "Hello, world! Grüße 🙂."
    assert client.generate(model="m0", prompt="Go", system="CODE-7").response == "The code is 7."
    raw = client.generate(model="m0", prompt=f"CODE-7{BEGIN}", raw=True, stream=True)
    assert "".join(chunk.response for chunk in raw) == "The code is 7."
    assert client.generate(model="m0", prompt="a", suffix="b", options={"num_predict": 6}).response in "abcabcabc"


def test_an_empty_request_loads_the_model() -> None:
    with serving(lambda: scripted(SCRIPT)) as server, closing(ollama.Client(host=server.url)) as client:
        assert client.chat(model="m0", messages=[]).done_reason == "load"
        loaded = server.server.registry.loaded
        for given, seconds in (("1.5h", 5400), ("-1", -1), (30, 30), ("250s", 250)):
            assert client.generate(model="m0", keep_alive=given).done_reason == "load"
            assert loaded["m0"].keep_alive == seconds
        assert client.generate(model="m0", keep_alive=0).done_reason == "unload"
        while loaded:
            time.sleep(0.01)
        assert client.ps().models == []
        assert client.chat(model="m0", messages=USER).message.content == "Hello, world! Grüße 🙂."


@pytest.mark.parametrize(("path", "body", "what"), [
    ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "messages[0].images"),
    ("chat", {"messages": "x"}, "messages"), ("chat", {"messages": [5]}, "messages"),
    ("chat", {"messages": USER, "options": 5}, "options"), ("chat", {"messages": USER, "format": "xml"}, "schema"),
    ("chat", {"messages": USER, "options": {"num_predict": -3}}, "max_tokens"),
    ("chat", {"messages": USER, "options": {"temperature": "hot"}}, "temperature"),
    ("chat", {"messages": USER, "keep_alive": "soon"}, "keep_alive"), ("chat", {"messages": USER, "tools": 1}, "tools"),
    ("chat", {"messages": [{"role": "user", "content": "x" * 2000}]}, "maximum context length is 1024"),
    ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, "template"), ("generate", {"prompt": ["x"]}, "prompt"),
    ("generate", {"prompt": "x", "raw": True, "system": "y"}, "system"), ("embed", {"input": "x"}, "embed"),
])  # fmt: skip
def test_refused(server: Serving, path: str, body: dict[str, Any], what: str) -> None:
    for stream in (False, True):
        found = httpx.post(f"{server.url}/api/{path}", json={"model": "m0", "stream": stream, **body})
        assert found.status_code == 400, found.text
        assert what in found.json()["error"]


def test_the_client_raises_errors(server: Serving, client: Any) -> None:
    with pytest.raises(ollama.ResponseError, match="embed"):
        client.embed(model="m0", input="x")
    step, server.model.decoder.step = server.model.decoder.step, None  # type: ignore[assignment]  # the next step fails
    with pytest.raises(ollama.ResponseError, match="inside the server"):
        [*client.chat(model="m0", messages=USER, stream=True)]
    server.model.decoder.step = step  # type: ignore[method-assign]


@pytest.mark.parametrize("path", ["pull", "push", "create", "copy", "delete", "blobs/sha256:00"])
def test_no_client_changes_the_models(server: Serving, path: str) -> None:
    for method in ("POST", "DELETE"):
        found = httpx.request(method, f"{server.url}/api/{path}", json={"model": "m0"})
        assert found.status_code == 403
        assert "started with" in found.json()["error"]


def test_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "m0"
    write_tiny(path)
    with (
        Model.load(path, n_ctx=64) as model,
        serving(model) as server,
        closing(ollama.Client(host=server.url)) as client,
    ):
        server.server.registry.paths["m0"] = path
        (entry,), (loaded,) = client.list().models, client.ps().models
        assert entry.model == loaded.model == "m0"
        assert entry.size == path.stat().st_size
        assert entry.digest
        assert loaded.context_length == 64
        found = client.show("m0")
        assert found.capabilities == ["completion"]
        assert found.modelinfo["general.architecture"] == entry.details.family == found.details.family == "llama"
        assert found.modelinfo["general.parameter_count"] > 0
        assert httpx.get(f"{server.url}/api/version").json()["version"] >= "0.13"
        assert str(tmp_path) not in httpx.get(f"{server.url}/api/tags").text
        assert client.generate(model="m0", prompt="a b", options={"num_predict": 3}).eval_count == 3


def test_embeddings(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m0", Tiny(arch="qwen2", biases=QKV))
    texts = ["the order", "a"]
    with (
        Model.load(tmp_path / "m0", n_ctx=64, embed=True) as model,
        serving(model) as server,
        closing(ollama.Client(host=server.url)) as client,
    ):
        rows = model.embed(texts)
        found = client.embed(model="m0", input=texts)
        assert np.array(found.embeddings) == pytest.approx(rows, abs=1e-6)
        assert found.prompt_eval_count == sum(len(model.tokenize(text)) for text in texts)
        assert np.linalg.norm(client.embed(model="m0", input="a", dimensions=8).embeddings) == pytest.approx(1)
        assert client.embeddings(model="m0", prompt="a").embedding == pytest.approx(rows[1], abs=1e-6)
        with pytest.raises(ollama.ResponseError, match="maximum context length is 64"):
            client.embed(model="m0", input="the order " * 50)
