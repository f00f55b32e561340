"""Ollama's API: chat, texts, embeddings, and what there is to know of the models."""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.chat.calls.family import family_of
from gguf_run.runtime.quantize.file_types import model_type, stated_file_type
from gguf_run.runtime.serve.answers import Answers, Event, Whole
from gguf_run.runtime.serve.anthropic import arguments_of
from gguf_run.runtime.serve.ask import MOST_TOKENS, SAMPLING, ask_of, body_of
from gguf_run.runtime.serve.errors import HttpError
from gguf_run.runtime.serve.http import Writer, answer, encode, get, in_thread, post
from gguf_run.runtime.serve.openai_chat import call_id
from gguf_run.runtime.serve.openai_other import Embeddings, embed_texts
from gguf_run.runtime.serve.registry import Registry


def _said(
    model: str, is_chat: bool, text: str = "", thinking: str = "", calls: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """Return an object of an answer. The APIs differ in where it stands. calls: names and arguments, which are JSON."""
    said: dict[str, Any] = {"role": "assistant", "content": text} if is_chat else {"response": text}
    if thinking:
        said["thinking"] = thinking
    if calls:
        functions = [{"index": i, "name": f, "arguments": arguments_of(x)} for i, (f, x) in enumerate(calls)]
        said["tool_calls"] = [{"id": call_id(), "function": function} for function in functions]
    shared = {"model": model, "created_at": _time(time.time()), "done": False}
    return {**shared, **({"message": said} if is_chat else said)}


class _Writer(Writer):
    media_type, quiet = "application/x-ndjson", b""

    def __init__(self, answers: Answers, said: Callable[..., dict[str, Any]], begun: float) -> None:
        """said: makes an object of an answer. begun: when the client asked, by time.perf_counter."""
        super().__init__(answers)
        self._said, self._begun = said, begun
        self._rest = Whole()  # for the calls: they come in one object, which is not the last one, as clients expect

    def whole(self, found: Sequence[Whole]) -> dict[str, Any]:
        (whole,) = found
        return self._said(whole.text, whole.reasoning, whole.calls) | self._end(whole.finish)

    def push(self, event: Event) -> bytes:
        self._rest.add(event)
        match event.kind:
            case "text":
                return _line(self._said(event.text))
            case "reasoning":
                return _line(self._said(thinking=event.text))
            case "end":
                calls = _line(self._said(calls=self._rest.calls)) if self._rest.calls else b""
                return calls + _line(self._said() | self._end(event.text))
        return b""

    def failed(self, error: HttpError) -> bytes:
        return _line(error.body("ollama"))

    def _end(self, finish: str) -> dict[str, Any]:
        """Return the fields of the last object. Durations are in nanoseconds; loading lasts until there is a prompt."""
        usage, job = self.answers.usage, self.answers.sequences[0].job
        return {
            "done": True,
            "done_reason": "length" if finish == "length" else "stop",
            "total_duration": int(1e9 * (time.perf_counter() - self._begun)),
            "load_duration": int(1e9 * (job.arrived - self._begun)),
            "prompt_eval_count": usage.n_prompt,
            "prompt_eval_duration": int(1e9 * usage.prompt_s),
            "eval_count": usage.n_decoded,
            "eval_duration": int(1e9 * usage.decode_s),
        }


def _line(content: Any) -> bytes:
    return encode(content) + b"\n"


async def chat(request: Request, json: dict[str, Any]) -> Any:
    """Answer a conversation. One without messages loads the model."""
    messages = json.get("messages") or []
    for i, message in enumerate(messages if isinstance(messages, list) else []):
        if isinstance(message, dict):
            if message.pop("images", None):
                raise HttpError(400, f"messages[{i}].images is given: the model reads text only")
            message["reasoning_content"] = message.pop("thinking", None)
            message["name"] = message.pop("tool_name", None)
    return await _answer(request, json, messages)


async def generate(request: Request, json: dict[str, Any]) -> Any:
    """Answer a prompt, or go on with it where it is raw or the model knows no chats. None loads the model."""
    prompt, system, is_chat = json.get("prompt") or "", json.get("system"), not (json.get("raw") or json.get("suffix"))
    async with request.app.state.server.registry.use(str(json.get("model"))) as served:
        is_chat = is_chat and served.model.chat_template is not None
    for name in ("template", "context", "images", *([] if is_chat else ["system"])):
        if json.get(name):
            raise HttpError(400, f"{name} is not supported: leave it out, /api/chat takes conversations")
    if not isinstance(prompt, str):
        raise HttpError(400, "prompt: a text is allowed")
    messages = [{"role": "system", "content": system}] if system else []
    messages = [*messages, {"role": "user", "content": prompt}] if prompt else []
    return await _answer(request, json, messages if is_chat or not prompt else None)


async def _answer(request: Request, json: dict[str, Any], messages: Any) -> Any:
    """Answer messages, or go on with the prompt where they are None."""
    name, kept, begun = str(json.get("model")), json.get("keep_alive"), time.perf_counter()
    said = partial(_said, name, request.url.path == "/api/chat")
    async with request.app.state.server.registry.use(name) as served:
        if kept is not None:
            served.base.keep_alive = _seconds(kept)
    if messages == []:
        return said() | {"done": True, "done_reason": "load" if kept != 0 else "unload"}
    return await answer(request, ask_of(_openai(json, messages)), lambda answers: _Writer(answers, said, begun))


def _seconds(kept: Any) -> float:
    """Return the seconds that a model stays loaded: of a number of them, or of a text as "5m". -1: for ever."""
    match = re.fullmatch(r"(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|)", str(kept), re.ASCII)
    if match is None:
        raise HttpError(400, f'keep_alive is {kept!r:.40}; allowed: seconds, or a text as "5m" or "-1"')
    return float(match[1]) * {"ms": 0.001, "m": 60, "h": 3600}.get(match[2], 1)


def _openai(json: dict[str, Any], messages: Any) -> dict[str, Any]:
    """Return a body in the form of OpenAI's API."""
    options, form, think = json.get("options") or {}, json.get("format"), json.get("think")
    if not isinstance(options, dict):
        raise HttpError(400, "options: an object is allowed")
    # num_ctx is no matter: a prompt that is too long for the server's context is refused, and never cut.
    body = {name: value for name, value in options.items() if name in SAMPLING or name == "stop"}
    if body.get("repeat_last_n") == -1:
        body["repeat_last_n"] = MOST_TOKENS
    if (n := options.get("num_predict", -1)) not in (-1, -2):  # both: no limit
        body["max_tokens"] = n
    body |= {name: json.get(name) or None for name in ("model", "tools", "prompt", "suffix")}
    body |= {"messages": messages, "stream": json.get("stream") is not False}
    if form:
        body["response_format"] = {"type": "json_schema", "schema": form} if form != "json" else {"type": "json_object"}
    if isinstance(think, str):
        body["reasoning_effort"] = think
    elif think is not None:
        body["chat_template_kwargs"] = {"enable_thinking": think}
    return body


async def embed(request: Request, json: dict[str, Any]) -> dict[str, Any]:
    """Return embeddings of texts, or of the one text of /api/embeddings. One that is too long is refused, never cut."""
    is_old = request.url.path == "/api/embeddings"
    body = {"input": json.get("prompt" if is_old else "input"), "model": json.get("model")}
    shared, rows = await embed_texts(request, body_of({**body, "dimensions": json.get("dimensions")}, Embeddings))
    counts = {"model": shared["model"], "prompt_eval_count": shared["usage"]["prompt_tokens"]}
    return {"embedding": rows[0]} if is_old else {"embeddings": rows, **counts}


async def tags(request: Request) -> dict[str, Any]:
    """List all models, or for /api/ps those that are loaded."""
    registry = request.app.state.server.registry
    names = registry.names if request.url.path == "/api/tags" else registry.loaded
    found = [await in_thread(request, _entry, registry, name) for name in names]
    return {"models": [{**entry, "template": None, "model_info": None} for entry in found]}


async def show(request: Request, json: dict[str, Any]) -> dict[str, Any]:
    """Describe a model. It is not loaded."""
    registry = request.app.state.server.registry
    entry = await in_thread(request, _entry, registry, registry.find(str(json.get("model") or json.get("name"))))
    can = ["embedding" if any(key.endswith(".pooling_type") for key in entry["model_info"]) else "completion"]
    can += ["tools"] * ("tools" in entry["template"]) + ["thinking"] * (family_of(entry["template"]).tag is not None)
    return {**entry, "capabilities": can}


async def version(request: Request) -> dict[str, Any]:
    """Return the version of Ollama whose API this is: clients refuse older ones."""
    return {"version": "0.13.3"}


async def refused(request: Request) -> Response:
    """Refuse to change the models of this machine."""
    raise HttpError(403, "gguf-serve offers the models that it was started with: clients bring, copy and delete none")


def _entry(registry: Registry, name: str) -> dict[str, Any]:
    """Describe a model by its file. digest: tells files apart, it is no hash of what they hold."""
    path, served = Path(registry.paths.get(name) or registry.paths[name.rpartition(":")[0]]), registry.loaded.get(name)
    found: dict[str, Any] = {"name": name, "model": name, "template": "", "model_info": {}, "details": {}, "size": 0}
    with suppress(GgufRunError, OSError):  # no file, or none of a model
        changed = path.stat().st_mtime
        digest = sha256(f"{path} {changed}".encode()).hexdigest()
        found |= {**_facts(path, changed), "modified_at": _time(changed), "digest": digest}
    if served is not None:
        found |= {"template": served.model.chat_template or "", "context_length": served.model.n_ctx}
    return found


@lru_cache(maxsize=256)
def _facts(path: Path, changed: float) -> dict[str, Any]:
    """Return what a file tells of a model. changed: when it was written."""
    with GGUFFile.open(path) as file:
        kind, (arch, size, other) = stated_file_type(file), model_type(file).split(" ", 2)
        info = {key: value for key, value in file.metadata.items() if isinstance(value, str | int | float)}
        details = {"format": "gguf", "family": arch, "families": [arch], "parameter_size": size}
        return {
            "size": file.nbytes,
            "details": {**details, "quantization_level": kind.name if kind else other},
            "template": info.pop("tokenizer.chat_template", ""),
            "model_info": info | {"general.parameter_count": sum(t.n_elements for t in file.tensors.values())},
        }


def _time(seconds: float) -> str:
    """Return a time, in seconds since 1970, in the form of RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


_REFUSED = ("pull", "push", "create", "copy", "delete", "blobs/{digest}")
routes = [
    *(post(f"/api/{handler.__name__}", handler) for handler in (chat, generate, embed, show)),
    post("/api/embeddings", embed),
    *(get(path, handler) for path, handler in (("/api/tags", tags), ("/api/ps", tags), ("/api/version", version))),
    *(Route(f"/api/{name}", refused, methods=["GET", "POST", "DELETE"]) for name in _REFUSED),
]
