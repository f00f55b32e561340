"""/v1/completions: texts that go on, or whose gaps are filled."""

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gguf_run.runtime.sampling.choice import TokenLogprob
from gguf_run.runtime.serve.answers import Answers, Event, Whole
from gguf_run.runtime.serve.ask import Ask, ask_of, texts_of
from gguf_run.runtime.serve.errors import HttpError
from gguf_run.runtime.serve.http import answer, encode, post
from gguf_run.runtime.serve.openai_chat import Choices, finite

_MAX_TOKENS = 16  # where a client names none, as in OpenAI's API
_OF_CHATS = ("messages", "tools", "tool_choice", "top_logprobs")


async def completions(request: Request, json: dict[str, Any]) -> Response:
    """Continue one text or several."""
    return await answer(request, _ask(json), lambda answers: _Texts(answers, json.get("echo") is True))


def _ask(json: dict[str, Any]) -> Ask:
    if json.get("prompt") is None:
        raise HttpError(400, "prompt is missing: give a text, the ids of its tokens, or a list of either")
    fields = {name: value for name, value in json.items() if value is not None and name not in _OF_CHATS}
    ask = ask_of({"max_tokens": _MAX_TOKENS, **fields})
    if fields.get("best_of", ask.n) != ask.n:
        raise HttpError(400, f"best_of is {fields['best_of']}: it is not supported, ask for n answers and choose one")
    if "logprobs" in ask.options and fields.get("echo"):
        raise HttpError(400, "echo and logprobs are both given: tokens of the prompt have no log-probabilities here")
    return ask


class _Texts(Choices):
    def __init__(self, answers: Answers, echo: bool) -> None:
        super().__init__(answers, "cmpl-", "text_completion")
        self.head += b',"text":%b,"logprobs":%b,"finish_reason":%b}]}\n\n'
        self._tokenizer = answers.served.model.tokenizer
        n = len(answers.sequences)
        self._echoes = [""] * n  # the texts before the answers
        if echo:
            texts = [
                one if isinstance(one, str) else self._tokenizer.decode(one) for one in texts_of(answers.ask.prompt)
            ]
            self._echoes = [text for text in texts for _ in range(answers.ask.n)]
        self._streams = [self._tokenizer.stream() for _ in range(n)]
        self._n_chars = [0] * n  # of the answers so far

    def choice(self, i: int, whole: Whole) -> dict[str, Any]:
        return {"text": self._echoes[i] + whole.text, "logprobs": self._logprobs(i, whole.logprobs)}

    def begin(self) -> bytes:
        return b"".join(self.head % (i, encode(text), b"null", b"null") for i, text in enumerate(self._echoes) if text)

    def push(self, event: Event) -> bytes:
        text, finish = ("", event.text) if event.kind == "end" else (event.text, None)
        logprobs = self._logprobs(event.choice, event.logprobs)
        return self.head % (event.choice, encode(text), encode(logprobs), encode(finish))

    def _logprobs(self, i: int, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
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


routes = [post("/v1/completions", completions)]
