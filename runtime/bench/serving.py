"""Measuring a server: what is asked, how it arrives, and the figures, by the definitions of vLLM's benchmark.

Clients ask again when they have their answer (a closed loop), or requests come at a rate whatever the server does
(Poisson arrivals). In the workload "intruder", long prompts arrive while answers stream.
"""

import asyncio
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.frozen import frozen
from gguf_run.runtime.bench.stream import Record, Target, ask, exchange

WORKLOADS = {  # by name: tokens of a prompt and of an answer, and what they are, for people
    "mixed": (2000, 400, "prompts of 30 to {} tokens, answers of 20 to {}"),
    "fixed": (256, 128, "prompts of {} tokens, answers of {}"),
    "shared": (1000, 64, "a system prompt of {} tokens that all share, answers of {}"),
    "intruder": (4000, 1000, "prompts of {} tokens arrive while clients stream answers of up to {}"),
}
STATISTICS: Mapping[str, Callable[[Sequence[float]], Any]] = {
    "mean": np.mean,
    "median": np.median,
    "p95": lambda values: np.percentile(values, 95),
    "p99": lambda values: np.percentile(values, 99),
    "max": np.max,
}
# Nearly every vocabulary has a token for each of these words with the space before it.
_WORDS = (
    "time year people way day man thing life child world school state family group country problem hand part place "
    "case week company system work night point home water room mother area money"
)
_N_NEW = 8  # first words of a prompt, which no earlier run has used: no cache knows what follows
_N_OWN = 32  # words behind a shared prompt, and in the prompts of streams
_N_BEGUN = 16  # events of each stream before a long prompt comes


@frozen
class Question:
    """What a client asks. Texts are of common words, each about a token."""

    shared: str  # what all questions begin with: the system prompt of a chat
    own: str
    n_output: int  # tokens of the answer


@frozen
class Server:
    """How questions are put to a server."""

    target: Target
    model: str
    is_chat: bool = True  # else plain completions
    ignore_eos: bool = True  # answers have the length that is asked for; OpenAI's own server refuses this field
    clock: Callable[[], float] = time.perf_counter

    async def ask(self, question: Question, record: Record) -> None:
        """Ask, and fill in the record."""
        body: dict[str, Any] = {"model": self.model, "max_tokens": question.n_output, "stream": True}
        body |= {"stream_options": {"include_usage": True}} | ({"ignore_eos": True} if self.ignore_eos else {})
        if self.is_chat:
            texts = {"system": question.shared, "user": question.own}
            body["messages"] = [{"role": role, "content": text} for role, text in texts.items() if text]
        else:
            body["prompt"] = f"{question.shared} {question.own}".strip()
        await ask(self.target, "/chat/completions" if self.is_chat else "/completions", body, record, self.clock)


async def first_model(target: Target) -> str:
    """Return the first model that a server names. GgufRunError: it names none, or does not answer."""
    try:
        body = b"".join([piece async for piece in exchange(target, target.request("/models"))])
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, TypeError, LookupError, EOFError):
        raise GgufRunError(f"{target.host}:{target.port} names no model: give one by --model") from None


def questions(kind: str, n: int, n_prompt: int, n_output: int, seed: int, new: int | None = None) -> list[Question]:
    """Return n questions of a workload. seed: of lengths and words; new: of the first words, None: by chance."""
    rng, fresh, known = np.random.default_rng(seed), np.random.default_rng(new), _WORDS.split()

    def words(count: int) -> str:
        return " ".join([*fresh.choice(known, min(count, _N_NEW)), *rng.choice(known, count)][:count])

    prompts, outputs = [n_prompt] * n, [n_output] * n
    if kind == "mixed":
        prompts, outputs = (_lognormal(rng, low, high, n) for low, high in ((30, n_prompt), (20, n_output)))
    shared = words(n_prompt) if kind == "shared" else ""
    return [Question(shared, words(_N_OWN if shared else p), o) for p, o in zip(prompts, outputs, strict=True)]


def _lognormal(rng: np.random.Generator, low: int, high: int, n: int) -> list[int]:
    """Draw log-normal numbers: 95 % lie between low and high, the others become low or high."""
    low = min(low, high)
    drawn = rng.lognormal(math.log(low * high) / 2, math.log(high / low) / 4, n)
    return [int(number) for number in np.clip(np.rint(drawn), low, high)]


def arrivals(rate: float, n: int, seed: int) -> list[float]:
    """Return the seconds at which n requests come. Gaps are exponential; the last comes after n / rate, as in vLLM."""
    times = np.cumsum(np.random.default_rng(seed).exponential(size=n))
    return [float(at) for at in times * (n / rate / times[-1])]


@dataclass
class Outcome:
    """What was measured under a load."""

    figures: dict[str, list[float]]  # milliseconds, by vLLM's name
    totals: dict[str, float]  # by vLLM's name
    error: str = ""  # of the first answer that failed


def outcome(records: Sequence[Record], seconds: float, slo: Mapping[str, float]) -> Outcome:
    """Return the figures of all answers. seconds: from the first request to the end of the last answer.

    slo: milliseconds that a good answer may take, by figure. GgufRunError: all answers failed.
    """
    whole, failed = ([r for r in records if bool(r.error) == has_error] for has_error in (False, True))
    if not whole:
        raise GgufRunError(f"all answers failed, the first by: {failed[0].error}")
    each = [record.figures() for record in whole]
    n_good = sum(all(max(one[name], default=0) <= most for name, most in slo.items()) for one in each)
    n_in, n_out = sum(r.n_prompt for r in whole), sum(r.n_output or len(r.parts) for r in whole)
    totals = {
        "duration": seconds,
        "completed": len(whole),
        "failed": len(failed),
        "total_input_tokens": n_in,
        "total_output_tokens": n_out,
        "request_throughput": len(whole) / seconds,
        "output_throughput": n_out / seconds,
        "total_token_throughput": (n_in + n_out) / seconds,
        "tokens_per_event": n_out / sum(len(r.parts) for r in whole),
    } | ({"request_goodput": n_good / seconds} if slo else {})
    figures = {name: [value for one in each for value in one[name]] for name in each[0]}
    return Outcome(figures, totals, failed[0].error if failed else "")


async def measure(
    server: Server,
    asked: Sequence[Question],
    times: Sequence[float] = (),
    n_clients: int = 0,
    slo: Mapping[str, float] = MappingProxyType({}),
    show: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Ask all questions: each at its time, in seconds from now, or n_clients the next one when an answer is over.

    slo: see outcome. show: gets how many answers are over, and the number of all. GgufRunError: all answers failed.
    """
    records = [Record() for _ in asked]
    pairs, n_over = zip(asked, records, strict=True), itertools.count(1)

    async def one(question: Question, record: Record, at: float = 0.0) -> None:
        await asyncio.sleep(at)
        await server.ask(question, record)
        show(next(n_over), len(records))

    async def client() -> None:
        for pair in pairs:
            await one(*pair)

    start = server.clock()
    jobs = [client() for _ in range(n_clients)] or [one(*pair, at) for pair, at in zip(pairs, times, strict=True)]
    await asyncio.gather(*jobs)
    return outcome(records, server.clock() - start, slo)


async def intrude(server: Server, prompt: Question, streams: Sequence[Question]) -> dict[str, list[float]]:
    """Let a prompt arrive while answers stream. Return milliseconds: the prompt's ttft, and gaps before and meanwhile.

    GgufRunError: an answer failed, or all streams ended before the prompt's first token.
    """
    records, long = [Record() for _ in streams], Record()
    tasks = [asyncio.create_task(server.ask(*pair)) for pair in zip(streams, records, strict=True)]

    async def until(n_parts: Sequence[int]) -> None:
        """Wait until each stream has had more than so many parts, or is over."""
        while any(len(r.parts) <= n and not t.done() for r, n, t in zip(records, n_parts, tasks, strict=True)):
            await asyncio.sleep(0.002)

    try:
        await until([_N_BEGUN] * len(records))
        await server.ask(prompt, long)
        await until([len(record.parts) for record in records])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if errors := [record.error for record in [long, *records] if record.error]:
        raise GgufRunError(errors[0])
    gaps = [pair for record in records for pair in itertools.pairwise(record.parts)]
    during = [1e3 * (b - a) for a, b in gaps if b > long.sent and a < long.parts[0]]
    if not during:
        raise GgufRunError("the streams ended before the long prompt came: give them more by --output-tokens")
    before = [1e3 * (b - a) for a, b in gaps if b <= long.sent]
    return {"ttft": long.figures()["ttft"], "itl_before": before, "itl_during": during}
