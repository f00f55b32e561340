"""The answers to what a client asks: sequences of the engine, read together, as events."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from msgspec import Struct

from gguf_run.formats.errors import OptionError
from gguf_run.runtime.chat.answer_parts import TAGS, Part, Splitter, open_tag
from gguf_run.runtime.chat.calls.tools import told
from gguf_run.runtime.engine.constraint import After, Constraint
from gguf_run.runtime.engine.reply import Request
from gguf_run.runtime.engine.sequence import Job
from gguf_run.runtime.engine.sequence import Sequence as Answering
from gguf_run.runtime.sampling.choice import TokenLogprob
from gguf_run.runtime.serve.ask import MOST_ANSWERS, Ask, texts_of
from gguf_run.runtime.serve.errors import HttpError, too_long
from gguf_run.runtime.serve.registry import Served

QUIET_S = 15.0  # seconds after which a stream without news tells that it is alive


class Event(Struct, gc=False):
    """A piece of one answer."""

    choice: int  # number of the answer: those to the first prompt come first
    kind: str  # of a Part: see chat/answer_parts.py; or "end", of which the text is "stop", "length" or "tool_calls"
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class Usage(Struct):
    """Counts of all answers to an ask: tokens, and seconds of steps."""

    n_prompt: int = 0
    n_cached: int = 0  # of the prompt, those that the cache held
    n_decoded: int = 0
    n_reasoning: int = 0  # of them, those of reasoning
    prompt_s: float = 0.0
    decode_s: float = 0.0


class Answers:
    """The answers to one ask while they are made. `async for` gives lists of events; [] means: still at work."""

    def __init__(self, served: Served, ask: Ask, n_prompt: int, splitters: Sequence[Splitter | None]) -> None:
        """n_prompt: tokens of all prompts. splitters: of each answer."""
        self.served, self.ask, self.n_prompt = served, ask, n_prompt
        self.sequences: list[Answering] = []
        self.prompt = ""  # the text of a chat's prompt
        self.note = ""  # for the log
        self.is_closed = self.is_finished = False  # closed: nobody wants more; finished: all have come to their ends
        self.n_reasoning = 0
        self.has_calls = [False] * len(splitters)
        self._splitters = splitters
        self._held: list[tuple[TokenLogprob, ...]] = [()] * len(splitters)  # of text that a splitter holds back
        self._event: asyncio.Event | None = None
        self._deadline = float("inf")  # by time.monotonic

    @classmethod
    def start(cls, served: Served, ask: Ask, key: str = "") -> "Answers":
        """Make the prompt of an ask, and begin its answers. It takes a while: call it in a thread.

        key: salt of the client's key, beside the ask's own.
        HttpError and GgufRunError as for Model.generate and chat: nothing has begun then.
        """
        model, family, prompt = served.model, served.family, ""
        if ask.messages is None:
            prompts = _prompts(served, ask)
        else:
            messages, tools = ask.messages, ask.tools
            if messages and tools and not served.shows_tools:
                messages, tools = told(messages, tools), []
            prompt = model.chat_prompt(messages, tools or None, ask.template_options)
            prompts = [model.tokenizer.encode_chat(prompt)]
        if (longest := max(map(len, prompts))) > model.engine.n_ctx:
            raise too_long(longest, model.engine.n_ctx)
        is_chat = ask.messages is not None
        splitters = [family.splitter(prompt, ask.tools) if is_chat else None for _ in range(ask.n * len(prompts))]
        answers = cls(served, ask, sum(map(len, prompts)), splitters)
        answers.prompt = prompt
        salt = f"{key}/{ask.salt}" if ask.salt else key
        request = Request.of((), {**ask.options, "salt": salt, "adapters": served.adapters})
        request = replace(request, skip_special=not (is_chat and family.shows_special))
        try:
            for ids in prompts:
                for i in range(ask.n):
                    answers.sequences.append(model.engine.add(answers._nth(replace(request, ids=ids), i)))
        except BaseException:
            answers.close()
            raise
        return answers

    def _nth(self, request: Request, i: int) -> Request:
        sampling = request.sampling
        if i and sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + i) % 2**64)
        return replace(request, sampling=sampling, constraint=self._constraint())

    def _constraint(self) -> Constraint | None:
        """Return what an answer may be: of the form that the client asks for, or with calls that are valid."""
        ask, served = self.ask, self.served
        if ask.grammar is not None:
            constraint, tag = served.constraint(*ask.grammar), open_tag(self.prompt)
            return constraint if tag is None else After(constraint, TAGS[tag], served.model.tokenizer)
        if not ask.tools:
            return None
        try:
            return self._calls(ask.tools)
        except OptionError as error:  # clients send schemas of all kinds: the arguments are JSON then, of no schema
            self.note = f"arguments of tools are not held to their schemas: {error}"
            names = [{**tool["function"], "parameters": {"type": "object"}} for tool in ask.tools]
            return self._calls([{"type": "function", "function": function} for function in names])

    def _calls(self, tools: Sequence[Mapping[str, Any]]) -> Constraint | None:
        ask, served = self.ask, self.served
        grammar = served.family.call_grammar(
            tools, ask.tool_choice, parallel=ask.parallel_calls, prompt=self.prompt, token_id=served.token_id
        )
        return None if grammar is None else served.constraint("lark", grammar)

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        jobs = [sequence.job for sequence in self.sequences]
        runner = self.served.model.engine.runner
        assert runner is not None
        event = self._event = runner.listen(jobs)
        clock = asyncio.create_task(_tick(event))
        open_jobs, told_at, has_told = dict(enumerate(jobs)), time.monotonic(), False
        try:
            while open_jobs and not self.is_closed:
                event.clear()
                events: list[Event] = []
                for i, job in [*open_jobs.items()]:
                    is_over = job.is_over  # before the pieces: the last one comes before the end
                    while job.pieces:
                        self._add(events, i, job.pieces.popleft())
                    if is_over:
                        job.raise_error()
                        del open_jobs[i]
                self.is_finished = not open_jobs
                now = time.monotonic()
                if events and has_told:
                    self.served.counts.gaps.add(now - told_at)
                has_told = has_told or bool(events)
                if events or now - told_at >= QUIET_S:
                    told_at = now
                    yield events
                elif open_jobs:
                    await event.wait()
        finally:
            clock.cancel()
            runner.unlisten(jobs)
            self.close()
        if time.monotonic() >= self._deadline:
            raise HttpError(408, "the request took longer than --request-timeout allows", "timeout")

    def _add(self, events: list[Event], i: int, piece: Any) -> None:
        """Add the events of a piece of answer i."""
        splitter, logprobs = self._splitters[i], self._held[i] + piece.logprobs
        text = str(piece)  # and no Piece
        parts = [Part("text", text)] if splitter is None else splitter.push(text)
        if piece.finish_reason and splitter is not None:
            parts += splitter.end()
        if parts and all(part.kind == "reasoning" for part in parts):
            self.n_reasoning += len(piece.ids)
        for part in parts:
            self.has_calls[i] = self.has_calls[i] or part.kind == "call"
            if part.text:
                events.append(Event(i, part.kind, part.text, logprobs))
                logprobs = ()
        self._held[i] = logprobs
        if piece.finish_reason:
            reason = "tool_calls" if self.has_calls[i] else "stop"
            events.append(Event(i, "end", reason if piece.finish_reason == "stop" else "length", logprobs))

    @property
    def usage(self) -> Usage:
        """What the answers have cost so far."""
        jobs: list[Job] = [sequence.job for sequence in self.sequences]
        firsts = jobs[:: self.ask.n]  # of each prompt
        return Usage(
            self.n_prompt,
            sum(max(0, min(job.n_prompt, job.n_reused)) for job in firsts),
            sum(len(job.reply.tokens) for job in jobs),
            self.n_reasoning,
            sum(job.prefill_s for job in firsts),
            sum(job.decode_s for job in jobs),
        )

    def stop_string(self, choice: int) -> str:
        """Return the stop string that ended an answer, "" for none."""
        return self.sequences[choice].job.reply.stop_string

    def limit(self, seconds: float) -> None:
        """Let the answers take so many seconds from now on."""
        self._deadline = time.monotonic() + seconds
        asyncio.get_running_loop().call_later(seconds, self.close)

    def close(self) -> None:
        """End the answers here: the next step is without them."""
        if not self.is_closed:
            self.is_closed = True
            for sequence in self.sequences:
                sequence.close()
            self.served.counts.ended([sequence.job for sequence in self.sequences], self.served.model.engine.clock())
            if self._event is not None:
                self._event.set()


def _prompts(served: Served, ask: Ask) -> list[list[int]]:
    """Return the ids of the prompts of an ask without messages."""
    texts, model = texts_of(ask.prompt), served.model
    if ask.n * len(texts) > MOST_ANSWERS:
        raise HttpError(400, f"{len(texts)} prompts with n {ask.n} are too many: at most {MOST_ANSWERS} answers")
    if ask.suffix is None:
        return [model.prompt_ids(text) for text in texts]
    if not all(isinstance(text, str) for text in texts):
        raise HttpError(400, "suffix is given, and the prompt is ids of tokens: allowed with suffix are texts")
    return [model.tokenizer.encode_gap(text, ask.suffix) for text in texts]


async def _tick(event: asyncio.Event) -> None:
    while True:
        await asyncio.sleep(QUIET_S)
        event.set()


class Whole:
    """One answer, put together."""

    def __init__(self) -> None:
        self.text = self.reasoning = self.finish = ""
        self.calls: list[tuple[str, str]] = []  # names and arguments, which are JSON
        self.logprobs: list[TokenLogprob] = []

    def add(self, event: Event) -> None:
        """Take the next event."""
        self.logprobs += event.logprobs
        match event.kind:
            case "text":
                self.text += event.text
            case "reasoning":
                self.reasoning += event.text
            case "call":
                self.calls.append((event.text, ""))
            case "arguments":
                name, arguments = self.calls[-1]
                self.calls[-1] = name, arguments + event.text
            case _:
                self.finish = event.text


async def wholes(answers: Answers) -> list[Whole]:
    """Return the whole answers. HttpError 499 if they were closed before their end: the client is gone."""
    found = [Whole() for _ in answers.sequences]
    async for events in answers:
        for event in events:
            found[event.choice].add(event)
    if not all(whole.finish for whole in found):
        raise HttpError(499, "the client is gone")
    return found
