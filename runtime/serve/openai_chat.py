"""/v1/chat/completions."""

import math
import time
from collections.abc import Sequence
from secrets import token_hex
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gguf_run.runtime.sampling.choice import TokenLogprob
from gguf_run.runtime.serve.answers import Answers, Event, Usage, Whole
from gguf_run.runtime.serve.ask import ask_of
from gguf_run.runtime.serve.errors import HttpError
from gguf_run.runtime.serve.http import Writer, answer, encode, post, sse
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
_TAIL = b',"finish_reason":null}]}\n\n'


async def chat_completions(request: Request, json: dict[str, Any]) -> Response:
    """Answer a conversation."""
    if not json.get("messages"):
        raise HttpError(400, "messages is missing or empty: give at least one message")
    return await answer(request, ask_of(json), _Chat)


def call_id() -> str:
    """Return the id of a new call."""
    return "call_" + token_hex(12)


class Choices(Writer):
    """Writes answers as choices of one completion. head: the start of all chunks, up to the number of the choice."""

    def __init__(self, answers: Answers, prefix: str, kind: str) -> None:
        """prefix: of the completion's id. kind: what it calls itself."""
        super().__init__(answers)
        self._shared = {
            "id": prefix + token_hex(12),
            "object": kind,
            "created": int(time.time()),
            "model": answers.ask.model or answers.served.name,
            "system_fingerprint": "gguf-run",
        }
        self.head = b"data: " + encode(self._shared)[:-1].replace(b"%", b"%%") + b',"choices":[{"index":%d'

    def whole(self, found: Sequence[Whole]) -> dict[str, Any]:
        """Return the completion."""
        choices = [
            {"index": i, **self.choice(i, whole), "finish_reason": whole.finish} for i, whole in enumerate(found)
        ]
        return {**self._shared, "choices": choices, **self._counts()}

    def choice(self, i: int, whole: Whole) -> dict[str, Any]:
        """Return the fields of choice i that tell what it says."""
        raise NotImplementedError

    def end(self) -> bytes:
        """Return the counts, if they were asked for, and the last line."""
        return (sse({**self._shared, "choices": [], **self._counts()}) if self.answers.ask.wants_usage else b"") + DONE

    def _counts(self) -> dict[str, Any]:
        return {"usage": usage_json(self.answers.usage), "timings": timings(self.answers.usage)}


class _Chat(Choices):
    def __init__(self, answers: Answers) -> None:
        super().__init__(answers, "chatcmpl-", "chat.completion" + ".chunk" * answers.ask.is_stream)
        self.head += b',"delta":'
        self._tokenizer, self._n_calls = answers.served.model.tokenizer, [0] * answers.ask.n

    def choice(self, i: int, whole: Whole) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": whole.text}
        if whole.reasoning:
            message["reasoning_content"] = whole.reasoning
        if whole.calls:
            message["content"] = whole.text or None
            message["tool_calls"] = [
                {"id": call_id(), "type": "function", "function": {"name": name, "arguments": arguments}}
                for name, arguments in whole.calls
            ]
        if "logprobs" not in self.answers.ask.options:
            return {"message": message}
        return {"message": message, "logprobs": _logprobs(self._tokenizer, whole.logprobs)}

    def begin(self) -> bytes:
        role = b'{"role":"assistant","content":""}' + _TAIL
        return b"".join(self.head % i + role for i in range(self.answers.ask.n))

    def push(self, event: Event) -> bytes:
        delta: dict[str, Any] = {}
        match event.kind:
            case "text":
                delta["content"] = event.text
            case "reasoning":
                delta["reasoning_content"] = event.text
            case "call":
                self._n_calls[event.choice] += 1
                new = {"id": call_id(), "type": "function", "function": {"name": event.text, "arguments": ""}}
                delta["tool_calls"] = [{"index": self._n_calls[event.choice] - 1, **new}]
            case "arguments":
                more = {"arguments": event.text}
                delta["tool_calls"] = [{"index": self._n_calls[event.choice] - 1, "function": more}]
        tail = _TAIL if event.kind != "end" else b',"finish_reason":"%b"}]}\n\n' % event.text.encode()
        if event.logprobs:
            tail = b',"logprobs":' + encode(_logprobs(self._tokenizer, event.logprobs)) + tail
        return self.head % event.choice + encode(delta) + tail


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


def _logprobs(tokenizer: Tokenizer, found: Sequence[TokenLogprob]) -> dict[str, Any]:
    def entry(id: int, logprob: float) -> dict[str, Any]:
        piece = tokenizer.piece(id)
        return {"token": piece.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(piece)}

    return {"content": [{**entry(o.id, o.logprob), "top_logprobs": [entry(*top) for top in o.top]} for o in found]}


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can hold."""
    return logprob if math.isfinite(logprob) else -9999.0


routes = [post("/v1/chat/completions", chat_completions)]
