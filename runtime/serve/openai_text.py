"""/v1/completions: texts that go on, or whose gaps are filled."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gguf_run.runtime.sampling.choice import TokenLogprob
from gguf_run.runtime.serve.answers import Answers
from gguf_run.runtime.serve.ask import Ask, ask_of, texts_of
from gguf_run.runtime.serve.errors import HttpError
from gguf_run.runtime.serve.http import encode, json_response, read_json, stream, whole_answers
from gguf_run.runtime.serve.openai_chat import chunk_head, error_chunk, finite, frame, last_chunk, timings, usage_json

_MAX_TOKENS = 16  # where a client names none, as in OpenAI's API
_OF_CHATS = ("messages", "tools", "tool_choice", "top_logprobs")


async def completions(request: Request) -> Response:
    """Continue one text or several."""
    json = await read_json(request)
    ask, echo = _ask(json, request.scope.get("gguf_run.salt", "")), json.get("echo") is True
    if ask.is_stream:
        return await stream(request, ask, lambda answers: _chunks(_Writer(answers, echo)), error_chunk)
    answers, found = await whole_answers(request, ask)
    writer = _Writer(answers, echo)
    choices = []
    for i, whole in enumerate(found):
        choice = {"index": i, "text": writer.echoes[i] + whole.text, "finish_reason": whole.finish}
        choices.append({**choice, "logprobs": writer.logprobs(i, whole.logprobs)})
    usage = answers.usage
    counts = {"usage": usage_json(usage), "timings": timings(usage)}
    return json_response({**frame(answers, "cmpl-", "text_completion"), "choices": choices, **counts})


def _ask(json: dict[str, Any], salt: str) -> Ask:
    if json.get("prompt") is None:
        raise HttpError(400, "prompt is missing: give a text, the ids of its tokens, or a list of either")
    fields = {name: value for name, value in json.items() if value is not None and name not in _OF_CHATS}
    ask = ask_of({"max_tokens": _MAX_TOKENS, **fields}, salt)
    if fields.get("best_of", ask.n) != ask.n:
        raise HttpError(400, f"best_of is {fields['best_of']}: it is not supported, ask for n answers and choose one")
    if "logprobs" in ask.options and fields.get("echo"):
        raise HttpError(400, "echo and logprobs are both given: tokens of the prompt have no log-probabilities here")
    return ask


class _Writer:
    """What the answers of a request look like to the client."""

    def __init__(self, answers: Answers, echo: bool) -> None:
        ask, tokenizer = answers.ask, answers.served.model.tokenizer
        n = len(answers.sequences)
        self.answers, self.echoes = answers, [""] * n  # the texts before the answers
        if echo:
            texts = [one if isinstance(one, str) else tokenizer.decode(one) for one in texts_of(ask.prompt)]
            self.echoes = [text for text in texts for _ in range(ask.n)]
        self._tokenizer = tokenizer
        self._streams = [tokenizer.stream() for _ in range(n)]
        self._n_chars = [0] * n  # of the answers so far

    def logprobs(self, i: int, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Return the next log-probabilities of answer i, None if nobody asked for them."""
        if "logprobs" not in self.answers.ask.options:
            return None
        text, offsets = self._tokenizer.token_text, []
        for one in found:
            offsets.append(self._n_chars[i])
            self._n_chars[i] += len(self._streams[i].push(one.id))
        return {
            "tokens": [text(one.id) for one in found],
            "token_logprobs": [finite(one.logprob) for one in found],
            "top_logprobs": [{text(id): finite(p) for id, p in (*one.top, (one.id, one.logprob))} for one in found],
            "text_offset": offsets,
        }


async def _chunks(writer: _Writer) -> AsyncIterator[bytes]:
    answers = writer.answers
    shared = frame(answers, "cmpl-", "text_completion")
    head = chunk_head(shared) + b',"text":%b,"logprobs":%b,"finish_reason":%b}]}\n\n'
    if any(writer.echoes):
        yield b"".join(head % (i, encode(text), b"null", b"null") for i, text in enumerate(writer.echoes))
    async for events in answers:
        chunks = []
        for event in events:
            is_end = event.kind == "end"
            text, finish = ("", event.text) if is_end else (event.text, None)
            logprobs = writer.logprobs(event.choice, event.logprobs)
            chunks.append(head % (event.choice, encode(text), encode(logprobs), encode(finish)))
        yield b"".join(chunks)
    if answers.is_finished:
        yield last_chunk(answers, shared)


routes = [Route("/v1/completions", completions, methods=["POST"])]
