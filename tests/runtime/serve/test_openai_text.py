"""/v1/completions through OpenAI's client and plain HTTP, on a real server."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from served import BEGIN, Serving, scripted, serving
from tinyvocab import CONTROL, USER_DEFINED, bpe_metadata, spm_metadata

from gguf_run.formats.errors import UnsupportedError
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

ASK = f"Say hello{BEGIN}"  # the script answers it
HELLO = "Grüße 🙂."
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(scripted({"Say hello": HELLO}, n_ctx=256, special=FIM)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def ids(server: Serving, text: str) -> list[int]:
    return server.model.tokenize(text)


def test_whole(client: Any) -> None:
    answer = client.completions.create(model="m0", prompt=ASK)
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "m0", "cmpl-")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (HELLO, "stop")
    assert answer.choices[0].logprobs is None
    answer = client.completions.create(model="m0", prompt="abc")
    assert (len(answer.choices[0].text), answer.choices[0].finish_reason) == (16, "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 16)


def test_prompts_of_all_forms(server: Serving, client: Any) -> None:
    """Prompts are answered as each by itself, those with ids too, in the order of prompt, then n."""
    texts = [ASK, "abc", "ab"]
    alone = [client.completions.create(model="m0", prompt=text).choices[0].text for text in texts]
    for prompt in (texts, [ids(server, text) for text in texts], [texts[0], ids(server, texts[1]), texts[2]]):
        answer = client.completions.create(model="m0", prompt=prompt, n=2, seed=5)
        assert [choice.index for choice in answer.choices] == [*range(6)]
        assert [choice.text for choice in answer.choices] == [text for text in alone for _ in range(2)]
        assert answer.usage.prompt_tokens == sum(len(ids(server, text)) for text in texts)
    assert client.completions.create(model="m0", prompt=ids(server, ASK)).choices[0].text == HELLO
    flat = {"n": 2, "seed": 3, "temperature": 1000, "top_p": 1, "extra_body": {"min_p": 0}}
    drawn = [
        [choice.text for choice in client.completions.create(model="m0", prompt=prompt, **flat).choices]
        for prompt in ("ab", "abc", ["ab", "abc"])
    ]
    assert drawn[2] == drawn[0] + drawn[1]  # the seeds of a prompt do not depend on the others
    assert drawn[0][0] != drawn[0][1]


@pytest.mark.parametrize("echo", [False, True])
def test_stream(client: Any, echo: bool) -> None:
    chunks = [*client.completions.create(
        model="m0", prompt=[ASK, "abc"], stream=True, n=2, echo=echo, stream_options={"include_usage": True}
    )]  # fmt: skip
    *chunks, last = chunks
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in (*chunks, last)}) == 1
    assert (last.choices, last.usage.completion_tokens) == ([], 2 * len(HELLO.encode()) + 32)
    expected = [(ASK, HELLO, "stop")] * 2 + [("abc", "abcabcabcabcabca", "length")] * 2
    for i, (prompt, text, finish) in enumerate(expected):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == i]
        assert "".join(choice.text for choice in mine) == prompt * echo + text
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + [finish]


def test_a_stream_is_events_of_json_and_a_last_line(server: Serving) -> None:
    """A model's name with signs of printf is a name."""
    body = {"prompt": ASK, "stream": True, "model": "100 %d %s"}
    *events, done, nothing = httpx.post(f"{server.url}/v1/completions", json=body).text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    assert {json.loads(event.removeprefix("data: "))["model"] for event in events} == {"100 %d %s"}
    body = {"messages": [{"role": "user", "content": "Say hello"}], "stream": True, "model": "100 %d %s"}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body).text.count("100 %d %s") > 3


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: Any, stream: bool) -> None:
    """The four lists tell of the same tokens; an offset counts the characters before the token."""
    found = client.completions.create(model="m0", prompt=ASK, logprobs=2, stream=stream)
    choices = [chunk.choices[0] for chunk in found] if stream else found.choices
    lists = [choice.logprobs for choice in choices if choice.logprobs]
    tokens, logprobs, tops, offsets = (
        [item for one in lists for item in getattr(one, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    )
    assert len(tokens) == len(logprobs) == len(tops) == len(offsets) == len(HELLO.encode()) + 1
    assert (tokens[:3], offsets[:5]) == (["G", "r", r"\xc3"], [0, 1, 2, 2, 3])
    assert offsets[-1] == len(HELLO)
    for token, logprob, top in zip(tokens, logprobs, tops, strict=True):
        assert -1e-6 < logprob == top[token] <= 0
        assert len(top) in (2, 3)  # the most likely ones, and the one that was chosen


def test_options(client: Any) -> None:
    create = client.completions.create
    assert create(model="m0", prompt=ASK, stop=["ße"]).choices[0].text == "Grü"
    assert create(model="m0", prompt=ASK, max_tokens=2, echo=True).choices[0].text == ASK + "Gr"
    assert create(model="m0", prompt=ASK, best_of=2, n=2).choices[1].text == HELLO
    endless = create(model="m0", prompt="ab", max_tokens=40, extra_body={"ignore_eos": True})
    assert len(endless.choices[0].text) == 40


def test_gaps_are_filled(server: Serving, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt and the suffix stand behind their tokens; names of tokens in them are text."""
    found: list[list[int]] = []
    monkeypatch.setattr(server.model.decoder, "_next", lambda ids: found.append([*ids]) or ids[0])
    client.completions.create(model="m0", prompt="def f(", suffix="): <|fim_middle|>", max_tokens=1)
    tokenizer = server.model.tokenizer
    pre, suf, mid = (tokenizer.encode(name)[0] for name in FIM)
    texts = [tokenizer.encode(text, parse_special=False) for text in ("def f(", "): <|fim_middle|>")]
    assert found == [[pre, *texts[0], suf, *texts[1], mid]]


def test_tokens_of_gaps() -> None:
    """They are found by their texts or by their keys; BOS stands before them where the model wants it."""
    scores = {"▁a": -1.0, "a": -2.0, "▁": -3.0}
    tokenizer = Tokenizer.from_metadata(spm_metadata(scores, dict.fromkeys(("<PRE>", "<SUF>", "<MID>"), CONTROL)))
    texts = [tokenizer.tokens[id] for id in tokenizer.encode_gap("a", "")]
    assert texts == ["<s>", "<PRE>", "▁a", "<SUF>", "<MID>"]
    names = {"[A]": USER_DEFINED, "[B]": USER_DEFINED, "[C]": USER_DEFINED}
    keys = {f"tokenizer.ggml.fim_{key}_token_id": 256 + i for i, key in enumerate(("suf", "mid", "pre"))}
    tokenizer = Tokenizer.from_metadata(bpe_metadata(special=names, add_bos_token=False) | keys)
    assert tokenizer.decode(tokenizer.encode_gap("x", "y")) == "[C]x[A]y[B]"
    with pytest.raises(UnsupportedError, match="fills no gaps"):
        Tokenizer.from_metadata(bpe_metadata(special=names)).encode_gap("x", "y")


@pytest.mark.parametrize(("body", "what"), [
    ({}, "prompt"), ({"prompt": None}, "prompt"), ({"prompt": ""}, "empty"), ({"prompt": []}, "empty"),
    ({"prompt": [[]]}, "empty"), ({"prompt": {}}, "$.prompt"), ({"prompt": [1.5]}, "$.prompt[0]"),
    ({"prompt": [True]}, "$.prompt[0]"), ({"prompt": [1, "a"]}, "prompt"), ({"prompt": ["a", [1], 1]}, "prompt"),
    ({"prompt": [-1]}, "-1"), ({"prompt": [2**40]}, "1099511627776"), ({"prompt": [[1, 9999]]}, "9999"),
    ({"prompt": ["a"] * 129}, "129 prompts"), ({"prompt": ["a"] * 5, "n": 32}, "5 prompts"),
    ({"prompt": "a", "best_of": 3}, "best_of"), ({"prompt": "a", "best_of": 2**63}, "best_of"),
    ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"), ({"prompt": "a", "echo": 1}, "echo"),
    ({"prompt": "a", "logprobs": 99}, "logprobs"), ({"prompt": "a", "logprobs": -1}, "logprobs"),
    ({"prompt": [1, 2], "suffix": "b"}, "suffix"), ({"prompt": "a", "suffix": 1}, "suffix"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"), ({"prompt": "a", "n": 33}, "n"),
])  # fmt: skip
def test_refused(server: Serving, body: Any, what: str) -> None:
    for stream in ({}, {"stream": True}):
        found = httpx.post(f"{server.url}/v1/completions", json=body | stream)
        assert found.status_code == 400, found.text
        assert what in found.json()["error"]["message"]
        assert found.json()["error"]["type"] == "invalid_request_error"
    assert server.model.engine.jobs == []


@pytest.mark.parametrize("prompt", ["x" * 300, ["x", "x" * 300], [[1], [1] * 300]])
def test_too_long_a_prompt(client: Any, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="m0", prompt=prompt, stream=True)
    assert (caught.value.code, caught.value.body["n_prompt_tokens"]) == ("context_length_exceeded", 300)


def test_async_streams(server: Serving) -> None:
    """Streams that run together do not mix."""

    async def read(client: Any, prompt: str) -> str:
        stream = await client.completions.create(model="m0", prompt=prompt, stream=True, max_tokens=30)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            return await asyncio.gather(*(read(client, prompt) for prompt in [ASK, "abc", "ab"] * 4))

    assert asyncio.run(ask()) == [HELLO, "abc" * 10, "cab" * 10] * 4
