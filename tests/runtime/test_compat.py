"""gguf_run.compat.Llama: programs written for llama-cpp-python, and the shapes that its types declare."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinymodel import write_tiny

from gguf_run.compat import Llama
from gguf_run.formats.errors import GgufRunError, OptionError, UnsupportedError
from gguf_run.runtime import Model, compat

TEXT = "the order and another one"
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compat") / "tiny.gguf"
    write_tiny(path)
    return path


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[Any]:
    llm = Llama(model_path=str(path), n_ctx=128, n_threads=2, n_gpu_layers=0, verbose=False, logits_all=True)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with Model.load(path, n_ctx=128, n_threads=2) as model:
        yield model


def test_a_program_for_llama_cpp_python(path: Path, model: Model) -> None:
    """The first example of its README, with another model."""
    llm = Llama(
        model_path=str(path),
        # n_gpu_layers=-1, # Uncomment to use GPU acceleration
        seed=1337,
        n_ctx=128,
        n_batch=64,
        use_mmap=True,
        flash_attn=True,
    )
    output: Any = llm("Q: Name the planets? A: ", max_tokens=32, stop=["Q:", "\n"], echo=True)
    text = model.complete("Q: Name the planets? A: ", max_tokens=32, stop=["Q:", "\n"], seed=1337).text
    assert output["choices"][0]["text"] == "Q: Name the planets? A: " + text
    llm.close()
    with pytest.raises(GgufRunError, match="the model is closed"):
        llm("x")


def test_completion(llm: Any, model: Model) -> None:
    answer = model.complete(TEXT, max_tokens=16, temperature=0)
    found = llm.create_completion(TEXT, temperature=0)  # 16 tokens are its default
    assert found.pop("id").startswith("cmpl-")
    assert found.pop("created") > 1e9
    n = len(model.tokenize(TEXT))
    assert found == {
        "object": "text_completion",
        "model": llm.model_path,
        "choices": [{"text": answer.text, "index": 0, "logprobs": None, "finish_reason": answer.finish}],
        "usage": {"prompt_tokens": n, "completion_tokens": answer.n_decoded, "total_tokens": n + answer.n_decoded},
    }
    assert llm(llm.tokenize(TEXT.encode()), temperature=0, model="x")["choices"][0]["text"] == answer.text


def test_options_have_their_defaults_and_names(llm: Any, model: Model) -> None:
    def same(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
        answer = model.complete(TEXT, seed=3, max_tokens=12, **ours)  # type: ignore[misc]
        return bool(llm(TEXT, seed=3, max_tokens=12, **theirs)["choices"][0]["text"] == answer.text)

    assert same({}, {})
    assert same({"repeat_penalty": 1.5, "top_k": 0, "min_p": 0}, {"repeat_penalty": 1.5, "top_k": 0, "min_p": 0})
    assert same({"mirostat_mode": 2, "temperature": 2.0}, {"mirostat": 2, "temperature": 2.0})
    best = model.complete(TEXT, max_tokens=1, temperature=0).ids[0]
    assert same({"temperature": 0, "logit_bias": {str(best): -100}}, {"temperature": 0, "logit_bias": {best: -100}})
    seen: list[int] = []

    def processor(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        seen.append(len(ids))
        return -scores

    ours = {"temperature": 0, "logits_processors": [lambda ids, logits: -logits]}
    assert same({"temperature": 0, "logits_processor": [processor]}, ours)
    assert same({"temperature": 0, "logits_processor": processor}, ours)
    assert seen[0] == len(model.tokenize(TEXT))


def test_without_a_limit(llm: Any) -> None:
    for max_tokens in (None, 0, -1):
        (choice,) = llm(TEXT, max_tokens=max_tokens, temperature=0)["choices"]
        assert choice["finish_reason"] in ("stop", "length")


def test_stream(llm: Any) -> None:
    whole = llm(TEXT, temperature=0)
    chunks = list(llm(TEXT, temperature=0, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole["choices"][0]["finish_reason"]]
    assert len({(chunk["id"], chunk["created"], chunk["object"], "usage" in chunk) for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(llm: Any, model: Model, stream: bool) -> None:
    result = llm(TEXT, temperature=0, max_tokens=6, logprobs=2, stream=stream)
    parts = [part["choices"][0] for part in (result if stream else [result])]
    found = [part["logprobs"] for part in parts if part["logprobs"]]
    answer = model.complete(TEXT, temperature=0, max_tokens=6, logprobs=2)
    values = [value for part in found for value in part["token_logprobs"]]
    assert values == pytest.approx([record.logprob for record in answer.logprobs[: answer.n_decoded]], abs=1e-4)
    texts = [model.tokenizer.piece(id).decode(errors="ignore") for id in answer.ids]
    assert [token for part in found for token in part["tokens"]] == texts
    tops = [top for part in found for top in part["top_logprobs"]]
    assert all(max(top.values()) == value for top, value in zip(tops, values, strict=True))
    assert found[0]["text_offset"][0] == len(TEXT)


def test_chat(llm: Any, model: Model) -> None:
    answer = model.chat(MESSAGES, temperature=0, max_tokens=8, logprobs=1).answer()
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
    found = llm.create_chat_completion(messages=MESSAGES, logprobs=True, top_logprobs=1, **options)
    assert found["object"] == "chat.completion"
    assert found["id"].startswith("chatcmpl-")
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": answer.text}
    assert (choice["index"], choice["finish_reason"]) == (0, answer.finish)
    content = choice["logprobs"]["content"]
    assert [row["logprob"] for row in content] == [record.logprob for record in answer.logprobs[: answer.n_decoded]]
    assert content[0]["top_logprobs"] == [{key: content[0][key] for key in ("token", "bytes", "logprob")}]
    chunks = [chunk["choices"][0] for chunk in llm.create_chat_completion(MESSAGES, stream=True, **options)]
    assert chunks[0]["delta"] == {"role": "assistant"}
    assert "".join(chunk["delta"]["content"] for chunk in chunks[1:-1]) == answer.text
    assert (chunks[-1]["delta"], chunks[-1]["finish_reason"]) == ({}, answer.finish)


def test_chat_format(path: Path) -> None:
    llm = Llama(str(path), chat_format="chatml", n_ctx=0)
    prompt = llm._model.chat_prompt(MESSAGES)
    assert prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello")
    assert llm.n_ctx() == 128
    llm.close()


def test_tokens(llm: Any, model: Model) -> None:
    ids = llm.tokenize("the 😀 <|im_end|>".encode(), special=True)
    assert ids == model.tokenize("the 😀 <|im_end|>")
    assert llm.detokenize(ids) == "the 😀 ".encode()
    assert llm.detokenize(ids, special=True) == "the 😀 <|im_end|>".encode()
    assert llm.detokenize(ids[:2]) + llm.detokenize(ids[2:]) == llm.detokenize(ids)  # parts of a character are bytes
    assert llm.token_eos() == model.tokenizer.eos
    assert llm.token_bos() in (-1, model.tokenizer.bos)
    assert llm.n_vocab() == model.decoder.config.n_vocab


def test_cache_types(path: Path) -> None:
    llm = Llama(str(path), n_ctx=128, type_k=8, type_v=8)
    model = llm._model
    with Model.load(path, n_ctx=128, cache_type="f16") as wider:
        assert model.decoder.nbytes()["cache"] < wider.decoder.nbytes()["cache"]
    llm.close()
    with pytest.raises(OptionError, match="type_k or type_v is 4; allowed"):
        Llama(str(path), type_k=4)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lora_path": "x"}, r"lora_path='x' is not supported here"),
        ({"embedding": True}, "embedding=True is not supported"),
        ({"n_cxt": 5}, "n_cxt is not an option; did you mean n_ctx"),
    ],
)
def test_arguments_that_are_refused(path: Path, options: dict[str, Any], error: str) -> None:
    with pytest.raises(GgufRunError, match=error):
        Llama(str(path), **options)


def test_calls_that_are_refused(llm: Any) -> None:
    for options, error in (
        ({"grammar": object()}, "grammar=<object"), ({"suffix": "x"}, "suffix='x'"),
        ({"temprature": 1}, "temprature is not an option; did you mean temperature"),
        ({"echo": True, "stream": True}, "echo works"),
    ):  # fmt: skip
        with pytest.raises(GgufRunError, match=error):
            llm("x", **options)
    with pytest.raises(UnsupportedError, match="tool_choice is"):
        llm.create_chat_completion(MESSAGES, tool_choice={"type": "function"})
    with pytest.raises(UnsupportedError, match="embed is not supported here: use gguf_run"):
        llm.embed("x")
    assert llm("x", grammar=None, suffix=None, tfs_z=1.0, max_tokens=1)


@pytest.mark.parametrize(
    ("filename", "name"),
    [("a/b.gguf", "hf:o/r/a/b.gguf"), ("*Q4_K_M.gguf", "hf:o/r:Q4_K_M"), ("*-q8_0*", "hf:o/r:Q8_0"), (None, "hf:o/r")],
)
def test_from_pretrained(monkeypatch: pytest.MonkeyPatch, filename: str | None, name: str) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(compat.Model, "load", lambda path, options: asked.append(path))
    Llama.from_pretrained("o/r", filename, verbose=False, local_dir=None)
    assert asked == [name]


def test_layers_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs ask for them everywhere, as a llama.cpp for CPUs ignores them."""
    from gguf_run.runtime.load import machine

    found = {}
    for there in (False, True):
        monkeypatch.setattr(machine, "driver_there", lambda there=there: there)
        found[there] = [compat._devices(n) for n in (0, -1, 20)]
    assert found[False] == [{"device": "cpu"}] * 3
    assert found[True] == [{"device": "cpu"}, {"gpu_layers": "all"}, {"gpu_layers": 20}]


def test_what_langchain_and_llamaindex_pass(path: Path) -> None:
    """All parameters that their classes send, with the values that they send for a user who has set none."""
    langchain = Llama(
        str(path), rope_freq_scale=1.0, rope_freq_base=10000.0, n_ctx=128, n_parts=-1, seed=-1, f16_kv=True,
        logits_all=False, vocab_only=False, use_mlock=False, n_threads=None, n_batch=8, use_mmap=True,
        last_n_tokens_size=64, verbose=True,
    )  # fmt: skip
    with contextlib.closing(langchain):
        answer = langchain(
            prompt="ab", suffix=None, max_tokens=4, temperature=0.8, top_p=0.95, logprobs=None, echo=False, stop=[],
            repeat_penalty=1.1, top_k=-1,
        )  # fmt: skip
        assert answer["usage"]["prompt_tokens"] > 0
        assert langchain.context_params.n_ctx == langchain.n_ctx() == 128
        assert langchain.n_embd() == langchain._model.decoder.config.n_embd
    with pytest.raises(UnsupportedError, match=r"rope_freq_base=20000.0 is not supported"):
        Llama(str(path), rope_freq_base=20000.0)
