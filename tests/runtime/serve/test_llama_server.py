"""The endpoints of llama-server, on a real server."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from served import BEGIN, Serving, scripted, serving

httpx = pytest.importorskip("httpx")

SECRET = "The password is swordfish."
GAP = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
PROMPT = f"Say hello{BEGIN}"  # texts that the scripted model answers


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    script = {"Say hello": "Hello, world! Grüße 🙂.", "long": "x" * 3000}
    with serving(scripted(script, n_ctx=4096, n_seq=2, special=GAP), has_slots=True) as found:
        yield found


def post(server: Serving, path: str, status: int = 200, **body: Any) -> Any:
    found = httpx.post(f"{server.url}{path}", json=body)
    assert found.status_code == status, found.text
    return found.json()


def get(server: Serving, path: str, status: int = 200) -> Any:
    found = httpx.get(f"{server.url}{path}")
    assert found.status_code == status, found.text
    return found.json()


@pytest.mark.parametrize("path", ["/health", "/v1/health"])
def test_health(server: Serving, path: str) -> None:
    assert get(server, path) == {"status": "ok"}
    engine, registry = server.model.engine, server.server.registry
    engine.n_failed = 2
    assert "failed" in get(server, path, 503)["error"]["message"]
    engine.n_failed = 0
    loaded, registry.loaded, registry.progress["m0"] = registry.loaded, {}, (25, 100)
    try:
        error = get(server, path, 503)["error"]
        assert (error["code"], error["message"]) == ("unavailable_error", "Loading model: 25 %")
    finally:
        registry.loaded = loaded
        registry.progress.clear()


def test_props(server: Serving) -> None:
    found = get(server, "/props")
    assert found["default_generation_settings"]["n_ctx"] == 4096
    assert (found["total_slots"], found["model_alias"], found["eos_token"]) == (2, "m0", "<|im_end|>")
    assert "<|im_start|>" in found["chat_template"]


@pytest.mark.parametrize("text", ["Grüße 🙂", "<|im_end|> a", ""])
def test_tokens(server: Serving, text: str) -> None:
    for parse_special in (True, False):
        asked = {"content": text, "parse_special": parse_special, "add_special": True}
        ids = post(server, "/tokenize", **asked)["tokens"]
        assert ids == server.model.tokenize(text, parse_special=parse_special)
        assert post(server, "/detokenize", tokens=ids)["content"] == text


def test_template(server: Serving) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert post(server, "/apply-template", messages=messages)["prompt"] == server.model.chat_prompt(messages)
    assert "chat_template_kwargs" in post(server, "/apply-template", 400, messages=messages, chat_template_kwargs={
        "messages": []})["error"]["message"]  # fmt: skip


@pytest.mark.parametrize("path", ["/completion", "/completions"])
def test_completion(server: Serving, path: str) -> None:
    found = post(server, path, prompt=PROMPT, n_predict=-1, n_probs=0, id_slot=0, cache_prompt=True, seed=-1)
    assert (found["content"], found["stop"], found["stop_type"]) == ("Hello, world! Grüße 🙂.", True, "eos")
    assert found["tokens_predicted"] == len(found["tokens"]) == len("Hello, world! Grüße 🙂.".encode())
    ids = server.model.tokenize(PROMPT)
    assert found["tokens_evaluated"] == len(ids)
    assert found["timings"]["predicted_n"] == found["tokens_predicted"]
    cut = post(server, path, prompt=ids, n_predict=5)
    assert (cut["content"], cut["stop_type"]) == ("Hello", "limit")
    word = post(server, path, prompt=PROMPT, stop=["wor"])
    assert (word["content"], word["stop_type"], word["stopping_word"]) == ("Hello, ", "word", "wor")
    assert post(server, path, prompt=PROMPT, n_predict=0)["content"] == ""


def test_stream(server: Serving) -> None:
    text = httpx.post(f"{server.url}/completion", json={"prompt": PROMPT, "stream": True}).text
    *chunks, last = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-1]]
    assert "".join(chunk["content"] for chunk in chunks) == "Hello, world! Grüße 🙂."
    assert {chunk["stop"] for chunk in chunks} == {False}
    assert (last["content"], last["stop"], last["stop_type"]) == ("", True, "eos")


def test_gaps(server: Serving) -> None:
    seen: list[str] = []
    model = server.model
    add = model.engine.add
    model.engine.add = lambda request: (seen.append(model.detokenize(request.ids)), add(request))[1]  # type: ignore[method-assign]
    try:
        asked: dict[str, Any] = {"input_prefix": "def f(<|im_end|>", "input_suffix": "): pass", "n_predict": 4}
        found = post(server, "/infill", **asked, prompt="a", input_extra=[{"filename": "b.py", "text": "c = 1"}])
        assert found["tokens_predicted"] == 4
    finally:
        del model.engine.add
    before, after, answer = GAP
    assert seen == [f"{before}b.py\nc = 1\ndef f(<|im_end|>{after}): pass{answer}a"]


@pytest.mark.parametrize(("path", "body", "what"), [
    ("/completion", {"prompt": ["a", "b"]}, "prompt"), ("/completion", {"prompt": 5}, "prompt"),
    ("/completion", {}, "empty"), ("/completion", {"prompt": "a", "n_predict": -2}, "max_tokens"),
    ("/completion", {"prompt": "a", "n_predict": "5"}, "n_predict"), ("/completion", {"prompt": [2**40]}, "prompt"),
    ("/completion", {"prompt": "a", "temperature": -1}, "temperature"), ("/infill", {"input_extra": [5]}, "$"),
    ("/completion", {"prompt": "x" * 5000}, "maximum context length is 4096"), ("/infill", {"prompt": [5]}, "prompt"),
    ("/tokenize", {"content": 5}, "content"), ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "-1"), ("/detokenize", {"tokens": [2**40]}, str(2**40)),
])  # fmt: skip
def test_refused(server: Serving, path: str, body: Any, what: str) -> None:
    assert what in post(server, path, 400, **body)["error"]["message"]


def test_slots_tell_counts_and_no_text(server: Serving) -> None:
    prompt = f"long {SECRET}{BEGIN}"
    with httpx.stream("POST", f"{server.url}/completion", json={"prompt": prompt, "stream": True}) as answer:
        chunks = answer.iter_bytes()
        next(chunks)
        found = [httpx.get(f"{server.url}{path}").text for path in ("/slots", "/props", "/health")]
    assert not any("swordfish" in text for text in found)
    (busy,) = [slot for slot in json.loads(found[0]) if slot["is_processing"]]
    assert busy["n_prompt_tokens"] == len(server.model.tokenize(prompt))
    while server.model.engine.jobs:
        time.sleep(0.005)
    assert [slot["is_processing"] for slot in get(server, "/slots")] == [False, False]


def test_what_is_off(server: Serving) -> None:
    server.server.has_slots = False
    assert "--slots" in get(server, "/slots", 501)["error"]["message"]
    server.server.has_slots = True
    assert get(server, "/lora-adapters") == []
    for path in ("/props", "/slots", "/lora-adapters"):
        assert post(server, path, 405)["error"]["message"].startswith(f"POST {path}")
