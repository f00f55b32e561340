"""How commands show an evaluation: they load a model, go through the steps, and print what was measured.

Results go to stdout, as a table and figures or, with --json, as one object; everything else goes to stderr.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from gguf_run.runtime.cli.common import INTERRUPTED
from gguf_run.runtime.terminal.progress import progress
from gguf_run.runtime.terminal.text import message

if TYPE_CHECKING:
    from gguf_run.runtime.evaluate.choices import Task
    from gguf_run.runtime.evaluate.text import Chunk, Scorer


@dataclass(frozen=True)
class Figure:
    """One line of a result."""

    key: str  # the name in JSON
    label: str  # the name for people
    value: float
    error: float | tuple[float, float] | None = None  # standard error, or the ends of a 95 % interval
    percent: bool = False  # people see 100 * value

    def line(self) -> str:
        """The line that people see."""
        unit = " %" if self.percent else ""
        error = ""
        if isinstance(self.error, tuple):
            error = f"   95 % interval {' to '.join(map(self._number, self.error))}"
        elif self.error is not None:
            error = f" ± {self._number(self.error)}"
        return f"{self.label:<24}{self._number(self.value)}{error}{unit}"

    @property
    def cell(self) -> str:
        """The value in a table; the digits that the standard error leaves."""
        scale, unit = (100, " %") if self.percent else (1, "")
        error = f" ± {scale * self.error:.2g}" if isinstance(self.error, float) else ""
        return f"{scale * self.value:.4g}{error}{unit}"

    def _number(self, value: float) -> str:
        return f"{100 * value:.3f}" if self.percent else f"{value:.6g}"

    def json(self) -> dict[str, Any]:
        """The fields of the JSON object."""
        facts: dict[str, Any] = {self.key: self.value}
        if self.error is not None:
            facts[f"{self.key}_{'interval_95' if isinstance(self.error, tuple) else 'error'}"] = self.error
        # JSON has no word for nan, the error of a single value.
        return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in facts.items()}


@contextmanager
def load_scorer(model: str, options: Mapping[str, Any], **more: Any) -> "Iterator[Scorer]":
    """Load a model and what scores its tokens.

    options: the command's parameters.
    more: fields of LoadOptions that replace them.
    """
    from gguf_run.runtime.cli.options import load_model, to_load_options
    from gguf_run.runtime.evaluate.text import Scorer
    from gguf_run.runtime.load.machine import default_threads

    chosen = to_load_options(options, **more)
    with load_model(model, chosen) as loaded:
        with progress("scoring"):  # says so if kernels must be compiled
            scorer = Scorer(loaded, chosen.n_threads or default_threads())
        with scorer:
            yield scorer


@dataclass(frozen=True)
class Layout:
    """What is shown of a kind of evaluation."""

    unit: str  # what a step is, a plural
    head: str  # of the table of results so far
    row: Callable[[Any], str] | None  # a result's line in the table; None: there is no table
    figures: Callable[[Any], list[Figure]]  # what the last result says


class Report:
    """Goes through the steps of an evaluation and prints the results. Ctrl-C ends the steps, not the printing."""

    def __init__(self, layout: Layout, as_json: bool = False) -> None:
        self._layout, self._as_json = layout, as_json
        self._seconds, self._n_tokens = 0.0, 0
        self.done: list[Any] = []  # results of the steps
        self.interrupted = False

    def run(self, steps: Iterable[Any], items: "Sequence[Chunk | Task]") -> None:
        """Go through the steps. items: what the steps work on, one for each."""
        start, layout, done = time.perf_counter(), self._layout, self.done
        row = None if self._as_json else layout.row
        try:
            with progress("evaluating", layout.unit) as bar:
                if row is not None:
                    click.echo(layout.head)
                bar.set(0, len(items))
                for result in steps:
                    done.append(result)
                    self._seconds = time.perf_counter() - start
                    if row is not None:
                        bar.clear()
                        click.echo(row(result))
                    bar.set(len(done), len(items))
        except KeyboardInterrupt:
            self.interrupted = True
            message(f"interrupted after {len(done)} of {len(items)} {layout.unit}")
        self._n_tokens = sum(item.n_tokens for item in items[: len(done)])

    def finish(self, facts: Mapping[str, Any], where: str) -> None:
        """Print the figures of the last result; exit with INTERRUPTED if Ctrl-C came.

        facts: what JSON says before the figures.
        where: what ran on which device.
        """
        speed = self._n_tokens / self._seconds if self._seconds else 0.0
        figures = self._layout.figures(self.done[-1]) if self.done else []
        if self._as_json:
            record = {**facts, self._layout.unit: len(self.done), "interrupted": self.interrupted}
            for figure in figures:
                record |= figure.json()
            click.echo(json.dumps(record | {"seconds": self._seconds, "tokens_per_second": speed}))
        else:
            click.echo("".join(f"{figure.line()}\n" for figure in figures), nl=False)
            took = f"{self._n_tokens} tokens in {self._seconds:.2f} s, {speed:.0f}/s"
            message(f"{len(self.done)} {self._layout.unit}, {took} | {where}")
        if self.interrupted:
            click.get_current_context().exit(INTERRUPTED)


PERPLEXITY = Layout(
    unit="chunks",
    head=f"{'chunk':>5} {'perplexity':>12}",
    row=lambda done: f"{done.n_chunk:>5} {done.value:>12.4f}",
    figures=lambda done: [Figure("perplexity", "perplexity", done.value, done.error)],
)
