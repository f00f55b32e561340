"""What the commands of gguf-eval share: load a model, go through an evaluation's steps, print what was measured."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.cli_common import INTERRUPTED, message
from gguf_run.runtime.progress import Progress

if TYPE_CHECKING:
    from gguf_run.runtime.eval_perplexity import Perplexity
    from gguf_run.runtime.eval_text import Chunk, Scorer

T = TypeVar("T")
PERPLEXITY_HEAD = f"{'chunk':>5} {'perplexity':>12}"


@dataclass(frozen=True)
class Figure:
    """One line of a result. error: standard error, or the ends of an interval. percent: shown times 100."""

    key: str
    label: str
    value: float
    error: float | tuple[float, float] | None = None
    percent: bool = False

    def line(self) -> str:
        unit = " %" if self.percent else ""
        error = ""
        if isinstance(self.error, tuple):
            error = f"   95 % interval {' to '.join(map(self._number, self.error))}"
        elif self.error is not None:
            error = f" ± {self._number(self.error)}"
        return f"{self.label:<24}{self._number(self.value)}{error}{unit}"

    def _number(self, value: float) -> str:
        return f"{100 * value:.3f}" if self.percent else f"{value:.6g}"

    def json(self) -> dict[str, Any]:
        name = "interval_95" if isinstance(self.error, tuple) else "error"
        error = {} if self.error is None else {f"{self.key}_{name}": self.error}
        return {key: _or_none(value) for key, value in {self.key: self.value, **error}.items()}


def _or_none(value: Any) -> Any:
    """JSON has no word for nan (the error of a single value)."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def load_scorer(model: str, n_ctx: int | None, options: Mapping[str, Any], observe: bool = False) -> "Iterator[Scorer]":
    """Load a model and what scores its logits. options: threads, cache_type, device. observe: see Model.load."""
    if sys.stdout is None:
        raise GgufRunError("stdout is closed: there is nowhere to write the result")
    from gguf_run.formats.jit import compile_notice
    from gguf_run.runtime.eval_text import Scorer
    from gguf_run.runtime.model import Model
    from gguf_run.runtime.threads import default_threads

    threads, cache_type, device = (options[name] for name in ("threads", "cache_type", "device"))
    with Progress("loading") as progress:

        def notify() -> None:
            progress.clear()
            message("compiling kernels for this machine; this takes some seconds, once")

        with compile_notice(notify):
            loaded = Model.load(
                model,
                n_ctx=n_ctx,
                n_threads=threads,
                device=device,
                cache_type=cache_type,
                progress=progress.set,
                observe=observe,
            )
            scorer = Scorer(loaded, threads or default_threads())
    with loaded, scorer:
        yield scorer


class Run:
    """Goes through the steps of an evaluation and prints what was measured: all, or what there is at Ctrl-C.

    unit: what a step is, a plural. head, row: a table of results so far, a line for each step (row None: no table).
    """

    def __init__(self, unit: str, as_json: bool, head: str, row: Callable[[Any], str] | None) -> None:
        self._unit, self._as_json, self._head, self._row = unit, as_json, head, None if as_json else row
        self._seconds = 0.0
        self.interrupted = False

    def all(self, steps: Iterable[T], n_all: int) -> list[T]:
        """Return the results, one for each step that was done."""
        start = time.perf_counter()
        done: list[T] = []
        try:
            with Progress("evaluating", self._unit) as progress:
                if self._row is not None:
                    click.echo(self._head)
                progress.set(0, n_all)
                for result in steps:
                    done.append(result)
                    self._seconds = time.perf_counter() - start
                    if self._row is not None:
                        progress.clear()
                        click.echo(self._row(result))
                    progress.set(len(done), n_all)
        except KeyboardInterrupt:
            self.interrupted = True
            message(f"interrupted after {len(done)} of {n_all} {self._unit}")
        return done

    def finish(self, figures: Sequence[Figure], facts: Mapping[str, Any], sizes: Sequence[int], where: str) -> None:
        """Print the result; end with an interrupt's exit code if there was one.

        facts: what JSON says before the figures. sizes: tokens of each step that was done. where: what ran on which
        device.
        """
        n_tokens = sum(sizes)
        speed = n_tokens / self._seconds if self._seconds else 0.0
        if self._as_json:
            record = {**facts, self._unit: len(sizes), "interrupted": self.interrupted}
            for figure in figures:
                record |= figure.json()
            click.echo(json.dumps(record | {"seconds": self._seconds, "tokens_per_second": speed}))
        else:
            click.echo("".join(f"{figure.line()}\n" for figure in figures), nl=False)
            took = f"{n_tokens} tokens in {self._seconds:.2f} s, {speed:.0f}/s"
            message(f"{len(sizes)} {self._unit}, {took} | {where}")
        if self.interrupted:
            click.get_current_context().exit(INTERRUPTED)


def perplexity_row(done: "Perplexity") -> str:
    return f"{done.n_chunk:>5} {done.value:>12.4f}"


def perplexity_figures(done: "Sequence[Perplexity]") -> list[Figure]:
    return [Figure("perplexity", "perplexity", last.value, last.error) for last in done[-1:]]


def chunk_sizes(chunks: "Sequence[Chunk]", done: Sequence[object]) -> list[int]:
    """Tokens of each chunk that was done."""
    return [len(chunk.ids) + 1 for chunk in chunks[: len(done)]]
