"""What a client is told when something cannot be done: a status, a message, and the form of each API."""

from collections.abc import Mapping
from typing import Any

from gguf_run.formats.errors import GgufRunError
from gguf_run.models.pages import CacheFullError
from gguf_run.runtime.engine.check import QueueFullError

# Status: type in the APIs of OpenAI and Anthropic.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
RETRY_AFTER = {"Retry-After": "1"}  # seconds


class HttpError(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        """code: a short name that programs look at. more: fields beside the message."""
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more
        self.headers = dict(headers or {})

    def body(self, api: str) -> dict[str, Any]:
        """Return the JSON of the error. api: "openai", "anthropic" or "ollama"."""
        kind, message = _TYPES.get(self.status, "api_error"), self.message
        if api == "ollama":
            return {"error": message}
        if api == "anthropic":
            if self.code == "context_length_exceeded":  # the words that its clients look for
                message = f"prompt is too long: {self.more['n_prompt_tokens']} tokens > {self.more['n_ctx']} maximum"
            return {"type": "error", "error": {"type": kind, "message": message}}
        return {"error": {"message": message, "type": kind, "param": None, "code": self.code, **self.more}}


def http_error(error: Exception) -> HttpError:
    """Return what a client is told of an error. What is no fault of the client's has no details."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, QueueFullError):
        return HttpError(429, str(error), "queue_full", RETRY_AFTER)
    if isinstance(error, CacheFullError):
        return HttpError(503, str(error), "cache_full", RETRY_AFTER)
    if isinstance(error, GgufRunError):
        return HttpError(400, str(error))
    return HttpError(500, "an error inside the server: its log tells more", "internal_error")


def too_long(n_prompt: int, n_ctx: int) -> HttpError:
    """Return the error of a prompt that the context cannot hold, in the words and with the code that clients know."""
    message = (
        f"This model's maximum context length is {n_ctx} tokens. However, you requested {n_prompt} tokens in the "
        "prompt: the request exceeds the available context size, shorten it."
    )
    return HttpError(400, message, "context_length_exceeded", n_prompt_tokens=n_prompt, n_ctx=n_ctx)


def api_of(path: str) -> str:
    """Return the API that a path belongs to."""
    if path.startswith("/v1/messages"):
        return "anthropic"
    return "ollama" if path.startswith("/api/") else "openai"
