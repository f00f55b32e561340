"""Fields of all APIs with values that they are not for: an answer or a refusal, and the server goes on."""

import json
import random
from typing import Any

import pytest
from served import BEGIN, Serving, scripted, serving

httpx = pytest.importorskip("httpx")

N = 600  # requests
USER = [{"role": "user", "content": "Say hello"}]
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}
SAMPLING = {"temperature": 1, "top_k": 5, "top_p": 0.5, "seed": 1, "stop": ["a"]}
OURS = SAMPLING | {"samplers": ["top_k"], "dry_multiplier": 0.5, "dry_sequence_breakers": ["\n"], "ignore_eos": False,
                   "repeat_last_n": 5, "logit_bias": [[1, 2]], "n": 1, "logprobs": 1}  # fmt: skip
CHAT = {"messages": USER, "tools": [FUNCTION], "tool_choice": "auto", "chat_template_kwargs": {"a": 1}, "model": "m0"}
OLLAMA = {"model": "m0", "options": SAMPLING | {"num_predict": 5}, "format": "", "think": True, "keep_alive": "5m"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**CHAT, **OURS, "max_tokens": 5, "response_format": {"type": "text"}, "top_logprobs": 2},
    "/v1/completions": {**OURS, "prompt": "x", "max_tokens": 5, "suffix": None, "echo": True, "best_of": 1},
    "/v1/embeddings": {"input": ["x"], "dimensions": 5, "encoding_format": "float", "model": "m0"},
    "/v1/rerank": {"query": "x", "documents": ["y"], "top_n": 1, "model": "m0"},
    "/v1/responses": {"input": USER, "instructions": "x", "max_output_tokens": 5, "text": {}, "reasoning": {}},
    "/v1/messages": {
        "messages": USER, "max_tokens": 5, "system": "s", "tools": [{"name": "f", "input_schema": {}}], "top_k": 1,
        "tool_choice": {"type": "auto"}, "thinking": {"type": "enabled"}, "output_config": {}, "stop_sequences": ["a"],
    },
    "/v1/messages/count_tokens": {"messages": USER, "system": "x", "tools": []},
    "/api/chat": {**OLLAMA, "messages": USER, "tools": [FUNCTION]},
    "/api/generate": {**OLLAMA, "prompt": "x", "system": "s", "suffix": "", "raw": False, "template": "", "images": []},
    "/api/embed": {"model": "m0", "input": ["x"], "dimensions": 4},
    "/api/show": {"model": "m0", "name": "m0"},
    "/tokenize": {"content": "x", "add_special": True, "parse_special": True},
    "/detokenize": {"tokens": [1, 2]},
    "/apply-template": CHAT,
    "/completion": {**OURS, "prompt": "x", "n_predict": 3, "json_schema": None, "grammar": None, "n_discard": 0},
    "/infill": {"input_prefix": "a", "input_suffix": "b", "prompt": "c", "input_extra": [], "n_predict": 3},
}  # fmt: skip
VALUES: list[Any] = [
    None, -1, 0, 0.5, 2**31, 2**63, 2**70, 1e308, float("nan"), "5", "", "\0", "x" * 800, True, [], {}, [[]], [{}],
    [5], [None], [-1], ["x"], {"type": "x"}, {"type": []}, {"type": "json_schema", "schema": 5}, [{"type": "text"}],
    [{"role": 1, "content": 1}], [{"role": "user", "content": [{"type": "tool_result", "content": 5}]}],
    [{"role": "assistant", "content": [{"type": "tool_use", "input": None}]}, USER[0]], [{"type": "function"}],
    [{"type": "function", "function": {"name": 5}}], [{"type": "function_call", "arguments": 5}], {"effort": 5},
]  # fmt: skip


def changed(random: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """Return a body in which one value is another one, often within an object."""
    name = random.choice([*body])
    inner = body[name]
    if isinstance(inner, dict) and inner and random.random() < 0.8:
        return {**body, name: changed(random, inner)}
    return {**body, name: random.choice(VALUES)}


def test_no_value_breaks_anything() -> None:
    def make() -> Any:
        return scripted({}, n_ctx=256, special=("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"))

    rng, statuses = random.Random(7), set()
    server: Serving
    with serving(make) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        for _ in range(N):
            path = rng.choice([*BODIES])
            body = changed(rng, {**BODIES[path], "stream": rng.random() < 0.3})
            found = client.post(path, content=json.dumps(body))
            statuses.add(found.status_code)
            assert found.status_code < 500, (path, body)
            assert "inside the server" not in found.text, (path, body)
        assert statuses == {200, 400}
        answer = client.post("/completion", json={"prompt": f"x{BEGIN}"}).json()
        assert (answer["content"], server.model.engine.jobs) == ("Hello!", [])
