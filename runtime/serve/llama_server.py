"""The endpoints that llama-server has of its own."""

from collections.abc import AsyncIterator
from typing import Any

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gguf_run.runtime.model import Model
from gguf_run.runtime.serve.answers import Answers
from gguf_run.runtime.serve.ask import Objects, Texts, ask_of, body_of, texts_of
from gguf_run.runtime.serve.errors import HttpError
from gguf_run.runtime.serve.http import in_thread, json_response, read_json, sse, stream, whole_answers
from gguf_run.runtime.serve.openai_chat import error_chunk, timings
from gguf_run.runtime.serve.registry import Served


class _Extra(Struct):
    text: str
    filename: str = ""


class _Body(Struct):
    """The fields of all bodies."""

    model: str | None = None
    content: str = ""  # to tokenize
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False
    tokens: list[int] = []
    prompt: Texts = ""  # of /infill: begins what fills the gap
    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[_Extra] = []
    n_predict: int = -1


async def health(request: Request) -> Response:
    """Tell whether the server can answer. HttpError 503 while it loads, and when its steps fail."""
    registry = request.app.state.server.registry
    registry.check_ready()
    for name, served in registry.loaded.items():
        if not served.model.engine.healthy:
            raise HttpError(503, f"the last steps of model {name} failed: the log tells why", "unavailable_error")
    return json_response({"status": "ok"})


async def about(request: Request) -> Response:
    """Tell of a model what its path asks for. No prompt is in it, and no path of a file."""
    server, tell = request.app.state.server, _ABOUT[request.url.path]
    if tell is _slots and not server.has_slots:
        raise HttpError(501, "this server shows no slots: start it with --slots", "not_supported_error")
    async with server.registry.use(request.query_params.get("model")) as served:
        return json_response(tell(served))


def _props(served: Served) -> dict[str, Any]:
    model, tokenizer = served.model, served.model.tokenizer
    special = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    return {
        "default_generation_settings": {"n_ctx": model.n_ctx},
        "total_slots": model.decoder.cache.n_seq,
        "model_alias": served.name,
        "chat_template": model.chat_template or "",
        "modalities": {"vision": False, "audio": False},
        **{name: "" if id is None else tokenizer.token_text(id) for name, id in special.items()},
    }


def _slots(served: Served) -> Objects:
    model = served.model
    found: Objects = [{"id": i, "n_ctx": model.n_ctx, "is_processing": False} for i in range(model.decoder.cache.n_seq)]
    for job in [job for job in model.engine.jobs if job.row >= 0]:
        found[job.row] |= {"is_processing": True, "n_prompt_tokens": job.n_prompt, "n_decoded": job.n_chosen}
    return found


def _adapters(served: Served) -> Objects:
    adapters = served.model.decoder.adapters
    scales = {} if adapters is None else adapters.scales.defaults
    return [{"id": i, "path": name, "scale": scale} for i, (name, scale) in enumerate(scales.items())]


async def text(request: Request) -> Response:
    """Make of a text what its path asks for: ids, the text of ids, the prompt of a conversation."""
    json, work = await read_json(request), _TEXTS[request.url.path]
    body: _Body = body_of(json, _Body)
    async with request.app.state.server.registry.use(body.model) as served:
        return json_response(await in_thread(request, work, served.model, body, json))


def _tokenize(model: Model, body: _Body, json: Any) -> dict[str, Any]:
    ids = model.tokenize(body.content, add_special=body.add_special, parse_special=body.parse_special)
    if not body.with_pieces:
        return {"tokens": ids}
    found: Objects = []
    for id in ids:
        piece = model.tokenizer.piece(id)
        text = piece.decode(errors="replace")
        found.append({"id": id, "piece": list(piece) if "\ufffd" in text else text})  # bytes of parts of characters
    return {"tokens": found}


def _template(model: Model, body: _Body, json: Any) -> dict[str, Any]:
    ask = ask_of(json)
    return {"prompt": model.chat_prompt(ask.messages or [], ask.tools or None, ask.template_options)}


async def completion(request: Request) -> Response:
    """Continue a text, or fill the gap between two."""
    json = await read_json(request)
    body: _Body = body_of(json, _Body)
    is_gap = request.url.path == "/infill"
    if len(texts_of(body.prompt)) != 1 or (is_gap and not isinstance(body.prompt, str)):
        raise HttpError(400, "prompt: one text is allowed, and its ids where no gap is filled")
    fields: dict[str, Any] = {name: json[name] for name in json.keys() - _OTHERS}
    if is_gap:
        async with request.app.state.server.registry.use(body.model) as served:
            fields["prompt"] = await in_thread(request, _gap, served.model, body)
    # 0 asks only that the cache gets the prompt, as editors do; -1 for no limit.
    fields["max_tokens"] = {-1: json.get("max_tokens"), 0: 1}.get(body.n_predict, body.n_predict)
    ask = ask_of(fields, request.scope.get("gguf_run.salt", ""))
    if ask.is_stream:
        return await stream(request, ask, _chunks, error_chunk)
    answers, (whole,) = await whole_answers(request, ask)
    return json_response({"content": whole.text if body.n_predict else "", **_end(answers)})


def _gap(model: Model, body: _Body) -> list[int]:
    """Return the ids of a prompt for what stands between two texts. Those of other files come first."""
    extra = "".join(f"{one.filename}\n{one.text}\n" for one in body.input_extra)
    start = model.tokenizer.encode_gap(extra + body.input_prefix, body.input_suffix)
    return start + model.tokenize(str(body.prompt), add_special=False, parse_special=False)


def _end(answers: Answers) -> dict[str, Any]:
    usage, word, job = answers.usage, answers.stop_string(0), answers.sequences[0].job
    return {
        "index": 0,
        "stop": True,
        "stop_type": "word" if word else "eos" if job.finish == "stop" else "limit",
        "stopping_word": word,
        "truncated": job.finish == "context",
        "model": answers.served.name,
        "tokens": job.reply.tokens,
        "tokens_predicted": usage.n_decoded,
        "tokens_evaluated": usage.n_prompt,
        "tokens_cached": usage.n_cached,
        "timings": timings(usage),
    }


async def _chunks(answers: Answers) -> AsyncIterator[bytes]:
    async for events in answers:
        ends = [_end(answers) if event.kind == "end" else {"index": 0, "stop": False} for event in events]
        texts = ["" if event.kind == "end" else event.text for event in events]
        yield b"".join(sse({"content": text, **end}) for text, end in zip(texts, ends, strict=True))


_OTHERS = {"n", "messages", "tools", "tool_choice", "logprobs", "suffix"}  # fields of the APIs of OpenAI
_ABOUT = {"/props": _props, "/slots": _slots, "/lora-adapters": _adapters}
_TEXTS = {
    "/tokenize": _tokenize,
    "/detokenize": lambda model, body, json: {"content": model.detokenize(body.tokens)},
    "/apply-template": _template,
}
routes = [
    *(Route(path, health) for path in ("/health", "/v1/health")),
    *(Route(path, about) for path in _ABOUT),
    *(Route(path, text, methods=["POST"]) for path in _TEXTS),
    *(Route(path, completion, methods=["POST"]) for path in ("/completion", "/completions", "/infill")),
]
