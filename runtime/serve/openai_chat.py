"""/v1/chat/completions."""

import math
import time
from collections.abc import AsyncIterator, Sequence
from secrets import token_hex
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gguf_run.runtime.sampling.choice import TokenLogprob
from gguf_run.runtime.serve.answers import Answers, Usage, Whole
from gguf_run.runtime.serve.ask import ask_of
from gguf_run.runtime.serve.errors import HttpError
from gguf_run.runtime.serve.http import encode, json_response, read_json, sse, stream, whole_answers
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    json = await read_json(request)
    if not json.get("messages"):
        raise HttpError(400, "messages is missing or empty: give at least one message")
    ask = ask_of(json, request.scope.get("gguf_run.salt", ""))
    if ask.is_stream:
        return await stream(request, ask, _chunks, error_chunk)
    answers, found = await whole_answers(request, ask)
    choices = []
    for i, whole in enumerate(found):
        choice: dict[str, Any] = {"index": i, "message": _message(whole), "finish_reason": whole.finish}
        if "logprobs" in ask.options:
            choice["logprobs"] = chat_logprobs(answers.served.model.tokenizer, whole.logprobs)
        choices.append(choice)
    return json_response(
        {
            **frame(answers, "chatcmpl-", "chat.completion"),
            "choices": choices,
            "usage": usage_json(answers.usage),
            "timings": timings(answers.usage),
        }
    )


def frame(answers: Answers, prefix: str, kind: str) -> dict[str, Any]:
    """Return the fields that an answer and all chunks of a stream share."""
    served = answers.served
    return {
        "id": prefix + token_hex(12),
        "object": kind,
        "created": int(time.time()),
        "model": answers.ask.model or served.name,
        "system_fingerprint": "gguf-run",
    }


def call_id() -> str:
    """Return the id of a new call."""
    return "call_" + token_hex(12)


def _message(whole: Whole) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": whole.text}
    if whole.reasoning:
        message["reasoning_content"] = whole.reasoning
    if whole.calls:
        message["content"] = whole.text or None
        message["tool_calls"] = [
            {"id": call_id(), "type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in whole.calls
        ]
    return message


async def _chunks(answers: Answers) -> AsyncIterator[bytes]:
    shared = frame(answers, "chatcmpl-", "chat.completion.chunk")
    head = chunk_head(shared) + b',"delta":'
    tail = b',"finish_reason":null}]}\n\n'
    tokenizer, n_calls = answers.served.model.tokenizer, [0] * answers.ask.n
    for i in range(answers.ask.n):
        yield head % i + b'{"role":"assistant","content":""}' + tail
    async for events in answers:
        chunks = []
        for event in events:
            match event.kind:
                case "text":
                    delta: Any = {"content": event.text}
                case "reasoning":
                    delta = {"reasoning_content": event.text}
                case "call":
                    n_calls[event.choice] += 1
                    function = {"name": event.text, "arguments": ""}
                    call = {"index": n_calls[event.choice] - 1, "id": call_id(), "type": "function"}
                    delta = {"tool_calls": [{**call, "function": function}]}
                case "arguments":
                    function = {"arguments": event.text}
                    delta = {"tool_calls": [{"index": n_calls[event.choice] - 1, "function": function}]}
                case _:
                    delta = {}
            end = tail if event.kind != "end" else b',"finish_reason":"%b"}]}\n\n' % event.text.encode()
            if event.logprobs:
                end = b',"logprobs":' + encode(chat_logprobs(tokenizer, event.logprobs)) + end
            chunks.append(head % event.choice + encode(delta) + end)
        yield b"".join(chunks)
    if answers.is_finished:
        yield last_chunk(answers, shared)


def chunk_head(shared: dict[str, Any]) -> bytes:
    """Return the start of all chunks, up to the number of the choice, which `%` puts in."""
    return b"data: " + encode(shared)[:-1].replace(b"%", b"%%") + b',"choices":[{"index":%d'


def last_chunk(answers: Answers, shared: dict[str, Any]) -> bytes:
    """Return the end of a stream: the counts, if they were asked for, and its last line."""
    counts = {"usage": usage_json(answers.usage), "timings": timings(answers.usage)}
    return (sse({**shared, "choices": [], **counts}) if answers.ask.wants_usage else b"") + DONE


def error_chunk(error: HttpError) -> bytes:
    """Return the event of an error that comes within a stream."""
    return sse(error.body("openai"))


def usage_json(usage: Usage) -> dict[str, Any]:
    """Return the counts of tokens."""
    return {
        "prompt_tokens": usage.n_prompt,
        "completion_tokens": usage.n_decoded,
        "total_tokens": usage.n_prompt + usage.n_decoded,
        "prompt_tokens_details": {"cached_tokens": usage.n_cached},
        "completion_tokens_details": {"reasoning_tokens": usage.n_reasoning},
    }


def timings(usage: Usage) -> dict[str, Any]:
    """Return the times of an answer with llama-server's names."""
    n_prompt, n = usage.n_prompt - usage.n_cached, usage.n_decoded
    return {
        "cache_n": usage.n_cached,
        "prompt_n": n_prompt,
        "prompt_ms": 1000 * usage.prompt_s,
        "prompt_per_second": n_prompt / usage.prompt_s if usage.prompt_s else 0.0,
        "predicted_n": n,
        "predicted_ms": 1000 * usage.decode_s,
        "predicted_per_second": n / usage.decode_s if usage.decode_s else 0.0,
    }


def chat_logprobs(tokenizer: Tokenizer, found: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return log-probabilities in the form of chat completions."""

    def entry(id: int, logprob: float) -> dict[str, Any]:
        piece = tokenizer.piece(id)
        return {"token": piece.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(piece)}

    return {"content": [{**entry(o.id, o.logprob), "top_logprobs": [entry(*top) for top in o.top]} for o in found]}


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can hold."""
    return logprob if math.isfinite(logprob) else -9999.0


routes = [Route("/v1/chat/completions", chat_completions, methods=["POST"])]
