"""The endpoints that llama-server has of its own."""

from collections.abc import Sequence
from typing import Any

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from gguf_run.runtime.model import Model
from gguf_run.runtime.serve.answers import Answers, Event, Whole
from gguf_run.runtime.serve.ask import Objects, Texts, ask_of, body_of, texts_of
from gguf_run.runtime.serve.errors import HttpError
from gguf_run.runtime.serve.http import Writer, answer, get, in_thread, post, sse
from gguf_run.runtime.serve.openai_chat import timings
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
    tokens: list[int] = []
    prompt: Texts = ""  # of /infill: begins what fills the gap
    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[_Extra] = []
    n_predict: int = -1


async def health(request: Request) -> dict[str, Any]:
    """Tell whether the server can answer. HttpError 503 while it loads, and when its steps fail."""
    registry = request.app.state.server.registry
    registry.check_ready()
    for name, served in registry.loaded.items():
        if not served.model.engine.healthy:
            raise HttpError(503, f"the last steps of model {name} failed: the log tells why", "unavailable_error")
    return {"status": "ok"}


async def about(request: Request) -> Any:
    """Tell of a model what its path asks for. No prompt is in it, and no path of a file."""
    server, tell = request.app.state.server, _ABOUT[request.url.path]
    if tell is _slots and not server.has_slots:
        raise HttpError(501, "this server shows no slots: start it with --slots", "not_supported_error")
    async with server.registry.use(request.query_params.get("model")) as served:
        return tell(served)


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


async def text(request: Request, json: dict[str, Any]) -> Any:
    """Make of a text what its path asks for: ids, the text of ids, the prompt of a conversation."""
    body: _Body = body_of(json, _Body)
    async with request.app.state.server.registry.use(body.model) as served:
        return await in_thread(request, _TEXTS[request.url.path], served.model, body, json)


def _tokenize(model: Model, body: _Body, json: Any) -> dict[str, Any]:
    return {"tokens": model.tokenize(body.content, add_special=body.add_special, parse_special=body.parse_special)}


def _template(model: Model, body: _Body, json: Any) -> dict[str, Any]:
    ask = ask_of(json)
    return {"prompt": model.chat_prompt(ask.messages or [], ask.tools or None, ask.template_options)}


async def completion(request: Request, json: dict[str, Any]) -> Response:
    """Continue a text, or fill the gap between two."""
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
    return await answer(request, ask_of(fields), lambda answers: _Writer(answers, has_text=body.n_predict != 0))


def _gap(model: Model, body: _Body) -> list[int]:
    """Return the ids of a prompt for what stands between two texts. Those of other files come first."""
    extra = "".join(f"{one.filename}\n{one.text}\n" for one in body.input_extra)
    start = model.tokenizer.encode_gap(extra + body.input_prefix, body.input_suffix)
    return start + model.tokenize(str(body.prompt), add_special=False, parse_special=False)


class _Writer(Writer):
    def __init__(self, answers: Answers, *, has_text: bool) -> None:
        super().__init__(answers)
        self._has_text = has_text

    def whole(self, found: Sequence[Whole]) -> dict[str, Any]:
        return {"content": found[0].text if self._has_text else "", **self._end()}

    def push(self, event: Event) -> bytes:
        if event.kind == "end":
            return sse({"content": "", **self._end()})
        return sse({"content": event.text, "index": 0, "stop": False})

    def _end(self) -> dict[str, Any]:
        answers, usage = self.answers, self.answers.usage
        word, job = answers.stop_string(0), answers.sequences[0].job
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


_OTHERS = {"n", "messages", "tools", "tool_choice", "logprobs", "suffix"}  # fields of the APIs of OpenAI
_ABOUT = {"/props": _props, "/slots": _slots, "/lora-adapters": _adapters}
_TEXTS = {
    "/tokenize": _tokenize,
    "/detokenize": lambda model, body, json: {"content": model.detokenize(body.tokens)},
    "/apply-template": _template,
}
routes = [
    *(get(path, health) for path in ("/health", "/v1/health")),
    *(get(path, about) for path in _ABOUT),
    *(post(path, text) for path in _TEXTS),
    *(post(path, completion) for path in ("/completion", "/completions", "/infill")),
]
