"""Replicas on a local Ray of two workers, and a file of prompts through Ray Data.

The extra `cluster` is not among those of the tests: pip install "gguf-run[cluster]" first.
"""

import asyncio
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from tinymodel import write_tiny

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.models.pages import PAGE
from gguf_run.runtime.batch_ray import answer_file, main
from gguf_run.runtime.model import Model

ray = pytest.importorskip("ray", reason='needs Ray: pip install "gguf-run[cluster]"')
with warnings.catch_warnings(action="ignore"):
    from gguf_run.runtime.serve.ray import _BLOCK, _MOST_BLOCKS, Router, app_builder, beginnings
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own
KEY = {"Authorization": "Bearer right"}
N_CTX = 32768  # a model without an end fills it in half a minute


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ray") / "tiny.gguf"
    write_tiny(path)
    return str(path)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def client(cluster: None, model: str) -> Iterator[httpx.Client]:
    """A client of two replicas, which make one answer each at a time."""
    from ray import serve

    keys = Path(model).with_name("keys.txt")
    keys.write_text("# of this test\nright\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"port": port})
    load = {"n_seq": 1, "n_ctx": N_CTX, "cache_ram": None}
    serve.run(app_builder({"model": model, "replicas": "2", "load": load, "api_key_file": str(keys)}))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=KEY, timeout=15) as client:
        yield client
    serve.shutdown()


def text_of(line: str) -> str:
    """The text in a line of a stream."""
    return "" if line in ("", "data: [DONE]") else json.loads(line.removeprefix("data: "))["choices"][0]["text"]


def test_streams_come_piece_by_piece(client: httpx.Client, model: str) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        texts = [text_of(line) for line in answer.iter_lines()]
    with Model.load(model) as alone:
        expected = alone.complete("Once upon a time", max_tokens=40, temperature=0).text
    assert "".join(texts) == expected == client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert len([text for text in texts if text]) > 5


def test_conversations_return_to_their_replica(client: httpx.Client) -> None:
    """Each turn finds all whole pages of the turn before in the cache."""
    talks: list[list[dict[str, str]]] = [[{"role": "user", "content": f"{i} talks " * 80}] for i in range(6)]
    before = [0] * len(talks)
    for turn in range(3):
        for i, messages in enumerate(talks):
            answer = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4}).json()
            usage = answer["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] >= before[i] // PAGE * PAGE
            assert not turn or before[i] > 5 * PAGE
            before[i] = usage["prompt_tokens"]
            messages += [{"role": "assistant", "content": "so"}, {"role": "user", "content": f"and {turn} " * 80}]


def test_clients_that_go_away_free_their_rows(client: httpx.Client) -> None:
    """Both replicas are full of answers that take longer than the client waits, and others wait before them."""
    body = {"prompt": "x", "max_tokens": N_CTX - 10, "ignore_eos": True, "stream": True}
    with ExitStack() as stack:
        for _ in range(2):
            answer = stack.enter_context(client.stream("POST", "/v1/completions", json=body))
            assert text_of(next(answer.iter_lines())) is not None
    for _ in range(4):
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "method", "path", "content", "status", "words"),
    [
        ({"Authorization": ""}, "POST", "/v1/completions", b"{}", 401, "key is missing or wrong"),
        ({"Authorization": "Bearer #"}, "POST", "/v1/completions", b"{}", 401, "key is missing or wrong"),
        ({}, "POST", "/v1/completions", b'{"prompt', 400, "no JSON"),
        ({}, "POST", "/v1/completions", b"x" * (33 << 20), 413, "bytes"),
        ({}, "GET", "/nowhere", b"", 404, "/nowhere"),
    ],
)
def test_errors_are_the_servers_own(
    client: httpx.Client, headers: dict[str, str], method: str, path: str, content: bytes, status: int, words: str
) -> None:
    answer = client.request(method, path, content=content, headers=headers)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def conversation(*contents: str) -> bytes:
    return json.dumps({"stream": True, "messages": [{"role": "user", "content": text} for text in contents]}).encode()


def test_beginnings() -> None:
    first, second = beginnings(conversation("a" * 2000)), beginnings(conversation("a" * 2000, "b" * 2000))
    assert len(first) - 2000 // _BLOCK in (0, 1)  # quotes, names and braces come to the text
    assert second[: 2000 // _BLOCK] == first[: 2000 // _BLOCK]
    assert len({*second}) == len(second) > 4000 // _BLOCK - 1
    assert beginnings(json.dumps({"temperature": 1, **json.loads(conversation("a" * 2000))}).encode()) == first
    other = beginnings(conversation("b" + "a" * 1999))
    assert len(other) == len(first)
    assert not {*other} & {*first}
    assert len(beginnings(conversation("a" * 10**6))) == _MOST_BLOCKS
    for body in (b"", b"[]", b"{", b"\xff", b"[" * 10**6, b'{"prompt": 7}', conversation("short")):
        assert beginnings(body) == []


def chosen(router: Router, numbers: list[int], loads: dict[str, int]) -> list[str]:
    """The replicas that a router prefers to all others."""
    router._replica_queue_len_cache = loads  # type: ignore[assignment]
    asked: Any = SimpleNamespace(args=[numbers], routing_context=SimpleNamespace(should_backoff=False))
    replicas: Any = [SimpleNamespace(replica_id=id) for id in loads]
    first, everyone = asyncio.run(router.choose_replicas(replicas, asked))
    assert {one.replica_id for one in everyone} == {*loads}
    assert asked.routing_context.should_backoff
    return [one.replica_id for one in first]


def test_router(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf_run.runtime.serve.ray._MOST_KNOWN", 5)
    router: Any = object.__new__(Router)
    router.initialize_state(most_ahead=2)
    for numbers, id in (([1, 2], "a"), ([1, 3, 4], "b")):
        router.on_request_routed(SimpleNamespace(args=[numbers]), id, None)
    assert chosen(router, [1, 2, 9], {"a": 2, "b": 0}) == ["a"]  # the longest beginning counts
    assert chosen(router, [1, 9], {"a": 0, "b": 0}) == ["b"]  # the last one that had it
    assert chosen(router, [1, 2], {"a": 3, "b": 0}) == []  # too busy
    assert chosen(router, [1, 2], {"b": 0, "c": 0}) == ["b"]  # a is gone
    assert chosen(router, [7], {"a": 0}) == chosen(router, [], {"a": 0}) == []
    router.on_request_routed(SimpleNamespace(args=[[1, 5, 6]]), "c", None)
    assert list(router.holders) == [3, 4, 1, 5, 6]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "model"),
        ({"model": "m", "replica": 2}, "replica"),
        ({"model": "m", "replicas": "many"}, "replicas"),
        ({"model": "m", "load": {"n_context": 1}}, "n_context"),
        ({"model": "m", "load": {"n_ctx": 0}}, "n_ctx"),
    ],
)
def test_settings_are_checked(args: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        app_builder(args)


def test_a_file_of_prompts(cluster: None, model: str, tmp_path: Path) -> None:
    """Two models answer as one does, in order, and a line that fails ends no other."""
    prompts = [f"{i} \u2028 bottles" for i in range(20)]
    rows: list[Any] = [{"prompt": text} for text in prompts]
    rows[3] = {"id": "three", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    bad = {
        5: {"prompt": "x", "max_tokens": "many"},
        6: {"text": "x"},
        7: {"prompt": "x" * 5000},
        8: [],
        9: {"prompt": 1},
    }
    bad |= {10: {"prompt": "x", "temperature": -1}, 11: {"prompt": "x", "logits_processors": []}}
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    lines = [json.dumps(bad.get(i, row), ensure_ascii=False) for i, row in enumerate(rows)]
    source.write_text("\n".join([*lines[:12], "{", "", *lines[12:]]), "utf-8")
    shared = {"max_tokens": 6, "temperature": 0, "seed": 1}
    assert answer_file(source, target, model, n_workers=2, load={"n_seq": 4}, options=shared) == (21, len(bad) + 1)
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in found] == [1, 2, 3, "three", *range(5, 14), *range(15, 23)]
    assert [i for i, row in enumerate(found) if "error" in row] == [*bad, 12]
    with Model.load(model) as alone:
        expected = {text: alone.complete(text, max_tokens=6, temperature=0).text for text in prompts}
    good = [i for i in range(20) if i not in bad and i != 3]
    assert [found[i + (i >= 12)]["text"] for i in good] == [expected[prompts[i]] for i in good]
    assert found[3]["n_decoded"] <= 2


def test_a_model_that_is_missing_is_told_in_a_line(cluster: None, tmp_path: Path) -> None:
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text('{"prompt": "x"}')
    with pytest.raises(GgufRunError, match=r"^a worker failed: [^\n]*missing\.gguf[^\n]*$"):
        answer_file(source, target, str(tmp_path / "missing.gguf"), n_workers=1, load={}, options={})
    assert not target.exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [(["--load", "{"], "--load"), (["--load", '{"n_context": 1}'], "n_context"), (["--options", "[]"], "--options")],
)
def test_command_line_errors(tmp_path: Path, more: list[str], words: str) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "x"}')
    done = CliRunner().invoke(main, [str(source), str(tmp_path / "out"), "--model", "m.gguf", *more])
    assert done.exit_code in (1, 2)
    assert words in done.output.splitlines()[-1]
