"""What the commands of gguf-eval share: load a model, go through an evaluation's steps, print what was measured."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from gguf_run.runtime.cli.common import INTERRUPTED
from gguf_run.runtime.terminal.progress import Progress
from gguf_run.runtime.terminal.text import message

if TYPE_CHECKING:
    from gguf_run.models.backend import CacheType
    from gguf_run.runtime.evaluate.perplexity import Perplexity
    from gguf_run.runtime.evaluate.text import Scorer

T = TypeVar("T")


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
def load_scorer(
    model: str,
    n_ctx: int | None,
    options: Mapping[str, Any],
    observe: bool = False,
    cache: "str | list[CacheType] | None" = None,
) -> "Iterator[Scorer]":
    """Load a model and what scores its logits. options: the command's, see
    to_load_options. cache, observe: see LoadOptions."""
    from gguf_run.runtime.cli.load_options import load_model, to_load_options
    from gguf_run.runtime.evaluate.text import Scorer
    from gguf_run.runtime.load.machine import default_threads

    chosen = to_load_options(options, n_ctx=n_ctx, observe=observe, **({"cache_type": cache} if cache else {}))
    with load_model(model, chosen) as loaded, Scorer(loaded, chosen.n_threads or default_threads()) as scorer:
        yield scorer


@dataclass(frozen=True)
class Kind:
    """A kind of evaluation. unit: what a step is, a plural. head, row: a table of results so far, a line for each step
    (row None: no table). figures: what the last result says."""

    unit: str
    head: str
    row: Callable[[Any], str] | None
    figures: Callable[[Any], list[Figure]]


class Sized(Protocol):
    """What a step works on: a chunk, a task."""

    @property
    def n_tokens(self) -> int: ...


class Run:
    """Goes through the steps of an evaluation and prints what was measured: all, or what there is at Ctrl-C."""

    def __init__(self, kind: Kind, as_json: bool = False) -> None:
        self._kind, self._as_json = kind, as_json
        self._seconds = 0.0
        self._n_done = self._n_tokens = 0
        self._figures: list[Figure] = []
        self.interrupted = False

    def all(self, steps: Iterable[T], items: Sequence[Sized]) -> list[T]:
        """Return the results, one for each step that was done. items: what the steps work on."""
        start = time.perf_counter()
        done: list[T] = []
        row = None if self._as_json else self._kind.row
        try:
            with Progress("evaluating", self._kind.unit) as progress:
                if row is not None:
                    click.echo(self._kind.head)
                progress.set(0, len(items))
                for result in steps:
                    done.append(result)
                    self._seconds = time.perf_counter() - start
                    if row is not None:
                        progress.clear()
                        click.echo(row(result))
                    progress.set(len(done), len(items))
        except KeyboardInterrupt:
            self.interrupted = True
            message(f"interrupted after {len(done)} of {len(items)} {self._kind.unit}")
        self._n_done, self._n_tokens = len(done), sum(item.n_tokens for item in items[: len(done)])
        self._figures = self._kind.figures(done[-1]) if done else []
        return done

    def finish(self, facts: Mapping[str, Any], where: str) -> None:
        """Print the result; end with an interrupt's exit code if there was one.

        facts: what JSON says before the figures. where: what ran on which device.
        """
        speed = self._n_tokens / self._seconds if self._seconds else 0.0
        if self._as_json:
            record = {**facts, self._kind.unit: self._n_done, "interrupted": self.interrupted}
            for figure in self._figures:
                record |= figure.json()
            click.echo(json.dumps(record | {"seconds": self._seconds, "tokens_per_second": speed}))
        else:
            click.echo("".join(f"{figure.line()}\n" for figure in self._figures), nl=False)
            took = f"{self._n_tokens} tokens in {self._seconds:.2f} s, {speed:.0f}/s"
            message(f"{self._n_done} {self._kind.unit}, {took} | {where}")
        if self.interrupted:
            click.get_current_context().exit(INTERRUPTED)


def _perplexity_row(done: "Perplexity") -> str:
    return f"{done.n_chunk:>5} {done.value:>12.4f}"


def _perplexity_figures(done: "Perplexity") -> list[Figure]:
    return [Figure("perplexity", "perplexity", done.value, done.error)]


PERPLEXITY = Kind("chunks", f"{'chunk':>5} {'perplexity':>12}", _perplexity_row, _perplexity_figures)
