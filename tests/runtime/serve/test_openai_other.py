"""/v1/models, /v1/embeddings and /v1/rerank, with small random models that are loaded as any other."""

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import Serving, scripted, serving
from tinymodel import QKV, Tiny, write_tiny

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime import Model
from gguf_run.runtime.info.edit import edit

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

TEXTS = ["the order", "the order of another one and the other", "a"]
HEAD = {"cls.output.weight": np.random.default_rng(3).standard_normal((2, 96)).astype(np.float32)}
PROMPT = "<|im_start|>q: {query}\nd: {document}<|im_end|>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """m0 makes text, m1 embeddings, m2 scores."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder / "embed.gguf", Tiny(arch="qwen2", biases=QKV))
    write_tiny(folder / "first.gguf", Tiny(arch="qwen2", biases=QKV, metadata={"pooling_type": 4}, tensors=HEAD))
    with GGUFFile.open(folder / "first.gguf") as file:
        edit(file, [f"tokenizer.chat_template.rerank={PROMPT}"], [], folder / "rank.gguf", lambda done, total: None)
    embedder = Model.load(Path(folder / "embed.gguf"), device="cpu", n_ctx=64, embed=True)
    with serving(scripted(), embedder, Model.load(folder / "rank.gguf", device="cpu", n_ctx=64)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def post(server: Serving, path: str, body: Any) -> Any:
    return httpx.post(f"{server.url}{path}", json=body, timeout=30)


def test_models(server: Serving, client: Any) -> None:
    found = client.models.list().data
    assert [(model.id, model.object, model.owned_by) for model in found] == [
        (f"m{i}", "model", "gguf-run") for i in range(3)
    ]  # fmt: skip
    assert found[0].max_model_len == server.model.n_ctx
    assert client.models.retrieve("m0") == found[0]
    assert httpx.get(f"{server.url}/v1/models/").json() == httpx.get(f"{server.url}/v1/models").json()
    assert httpx.head(f"{server.url}/v1/models").status_code == 200
    assert httpx.post(f"{server.url}/v1/models").status_code == 405
    for name in ("other", "m0/x", "hf:owner/name:Q4_K_M", "../m0"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve(name)
        assert caught.value.code == "model_not_found"


def test_a_name_with_slashes_and_colons() -> None:
    with (
        serving(scripted(), registry={"adapters": {"": {}, "owner/name": {}}}) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client,
    ):
        assert [model.id for model in client.models.list().data] == ["m0", "m0:owner/name"]
        assert client.models.retrieve("m0:owner/name").id == "m0:owner/name"


def test_embeddings(server: Serving, client: Any) -> None:
    """The client asks for base64 unless it is told not to. Both forms are the rows of Model.embed, bit for bit."""
    ids = [[*client.embeddings.create(model="m1", input=text).data[0].embedding] for text in TEXTS]
    model = server.server.registry.loaded["m1"].model
    expected = model.embed(TEXTS)
    assert np.allclose(ids, expected, atol=1e-6)
    tokens = [model.tokenize(text) for text in TEXTS]
    for given in (TEXTS, tokens, [TEXTS[0], tokens[1], TEXTS[2]]):
        for form in ("float", "base64"):
            body = {"model": "m1", "input": given, "encoding_format": form}
            found = post(server, "/v1/embeddings", body).json()
            assert (found["object"], found["model"]) == ("list", "m1")
            assert found["usage"] == dict.fromkeys(("prompt_tokens", "total_tokens"), sum(map(len, tokens)))
            assert [(one["object"], one["index"]) for one in found["data"]] == [("embedding", i) for i in range(3)]
            rows = [one["embedding"] for one in found["data"]]
            if form == "base64":
                rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
            assert np.allclose(np.array(rows, np.float32), expected, atol=1e-6)
    for given in ("a", tokens[2]):
        assert len(client.embeddings.create(model="m1", input=given).data) == 1


def test_dimensions(client: Any) -> None:
    whole = np.array(client.embeddings.create(model="m1", input="the order").data[0].embedding)
    part = np.array(client.embeddings.create(model="m1", input="the order", dimensions=10).data[0].embedding)
    assert part == pytest.approx(whole[:10] / np.linalg.norm(whole[:10]), abs=1e-6)


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_rerank(server: Serving, path: str) -> None:
    documents = [*TEXTS, {"text": "{query}"}]
    body = {"model": "m2", "query": "the other", "documents": documents, "return_documents": True}
    found = post(server, path, body).json()
    texts = [*TEXTS, "{query}"]
    model = server.server.registry.loaded["m2"].model
    scores = model.rank("the other", texts)
    order = [result["index"] for result in found["results"]]
    assert order == [*np.argsort(-scores, kind="stable")]
    assert [result["relevance_score"] for result in found["results"]] == pytest.approx(scores[order], abs=1e-6)
    assert [result["document"]["text"] for result in found["results"]] == [texts[i] for i in order]
    n = sum(len(model.tokenize(text, add_special=False)) for text in texts + ["the other"] * 4)
    assert found["usage"] == {"prompt_tokens": n, "total_tokens": n}
    best = post(server, path, body | {"top_n": 2, "return_documents": None}).json()["results"]
    assert best == [{name: result[name] for name in ("index", "relevance_score")} for result in found["results"][:2]]


@pytest.mark.parametrize(("path", "body", "what"), [
    ("embeddings", {}, "input"), ("embeddings", {"input": None}, "input"), ("embeddings", {"input": []}, "empty"),
    ("embeddings", {"input": ""}, "empty"), ("embeddings", {"input": ["a", ""]}, "empty"),
    ("embeddings", {"input": [1, "a"]}, "'a'"), ("embeddings", {"input": [99999]}, "99999"),
    ("embeddings", {"input": ["a"] * 2049}, "2049 texts"), ("embeddings", {"input": {"a": 1}}, "$.input"),
    ("embeddings", {"input": "a", "dimensions": 0}, "dimensions"),
    ("embeddings", {"input": "a", "dimensions": 97}, "1 to 96"),
    ("embeddings", {"input": "a", "dimensions": 2**63}, "dimensions"),
    ("embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ("embeddings", {"input": "a", "model": "m0"}, "loaded to make text"),
    ("rerank", {"query": "a", "documents": ["b"], "model": "m0"}, "loaded to make text"),
    ("rerank", {"query": "a", "documents": ["b"]}, "cannot rank"), ("rerank", {"query": "a"}, "documents"),
    ("rerank", {"query": 1, "documents": ["b"]}, "query"), ("rerank", {"query": "a", "documents": []}, "0 texts"),
    ("rerank", {"query": "a", "documents": [{}]}, "documents[0]"),
    ("rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
    ("completions", {"prompt": "a"}, "to make embeddings, no text"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "to make embeddings, no text"),
])  # fmt: skip
def test_refused(server: Serving, path: str, body: Any, what: str) -> None:
    found = post(server, f"/v1/{path}", {"model": "m1"} | body)
    assert found.status_code == 400, found.text
    assert what in found.json()["error"]["message"]


def test_too_long_a_text(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="m1", input=["a", "the order " * 50])
    assert caught.value.code == "context_length_exceeded"


def test_a_client_that_goes_away_ends_its_texts(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are answered meanwhile; no more texts run once the client is gone."""
    post(server, "/v1/embeddings", {"model": "m1", "input": "a"})
    model, seen, goes_on = server.server.registry.loaded["m1"].model, [], threading.Event()
    monkeypatch.setattr(model, "embed", lambda texts: seen.append(texts) or (goes_on.wait(10) and [np.ones(4)]))
    body = json.dumps({"model": "m1", "input": ["a"] * 500}).encode()
    with socket.create_connection((server.host, server.port)) as connection:
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        connection.sendall(head % len(body) + body)
        while not seen:
            time.sleep(0.005)
        assert post(server, "/v1/completions", {"model": "m0", "prompt": "ab"}).status_code == 200
        assert httpx.get(f"{server.url}/v1/models").status_code == 200
    time.sleep(0.1)
    goes_on.set()
    until = time.monotonic() + 5
    while server.server.registry.loaded["m1"].n_users and time.monotonic() < until:
        time.sleep(0.005)
    assert server.server.registry.loaded["m1"].n_users == 0
    assert len(seen) < 5


def test_a_limit_of_time(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    post(server, "/v1/embeddings", {"model": "m1", "input": "a"})
    model = server.server.registry.loaded["m1"].model
    monkeypatch.setattr(server.server, "request_timeout", 0.05)
    monkeypatch.setattr(model, "embed", lambda texts: time.sleep(0.02) or [np.ones(4)])
    found = post(server, "/v1/embeddings", {"model": "m1", "input": ["a"] * 100})
    assert (found.status_code, found.json()["error"]["code"]) == (408, "timeout")
