"""The three ways of `gguf-eval kl`: save a model's logits, compare with saved ones, compare with a second model."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime.cli.options import RUNTIME_OPTIONS
from gguf_run.runtime.cli.report import PERPLEXITY, Figure, Layout, Report, load_scorer
from gguf_run.runtime.evaluate.compare_files import check_vocabulary, other_vocabulary
from gguf_run.runtime.evaluate.kl import Comparison, compare
from gguf_run.runtime.evaluate.logits_file import (
    LogitsFile,
    LogitsHeader,
    hash_file,
    hash_ids,
    hash_vocabulary,
    writing_logits,
)
from gguf_run.runtime.evaluate.perplexity import perplexity
from gguf_run.runtime.evaluate.text import N_CTX, Block, Chunk, Scorer, bos_of, cut_chunks, tokens_of, window_size
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.terminal.text import message
from gguf_run.runtime.terminal.text_input import read_text

_LABELS = {  # by figure: its label, and whether it is shown in percent
    "perplexity": ("perplexity", False),
    "perplexity_base": ("perplexity of the base", False),
    "perplexity_ratio": ("ratio", False),
    "p_change_mean": ("change of p, mean", True),
    "p_change_rms": ("change of p, RMS", True),
    "same_top": ("same top token", True),
    "kl_mean": ("KL divergence, mean", False),
}
_HEAD = f"{'chunk':>5} {'perplexity':>12} {'ratio':>12} {'KL divergence':>14} {'same top':>11}"


@dataclass(frozen=True)
class KlJob:
    """`gguf-eval kl` and its parameters."""

    model: str
    file: Path  # the text
    base: str | None  # with base_logits: the model that made them, None for any
    base_options: str | None
    save_logits: Path | None
    base_logits: Path | None
    n_ctx: int | None  # None: the user did not say
    n_chunk: int | None  # None: the user did not say
    n_skip: int  # chunks to skip first
    as_json: bool
    options: dict[str, Any]  # RUNTIME_OPTIONS of the model

    def run(self) -> None:
        """Run the command; its help says what it does. OptionError for parameters that exclude each other."""
        base = (self.base, self.base_options, self.base_logits)
        if self.save_logits is not None and base != (None, None, None):
            raise OptionError(
                "--save-logits saves the logits of MODEL: leave out --base, --base-options and --base-logits"
            )
        if (self.save_logits, *base) == (None, None, None, None):
            raise OptionError("nothing to compare with: give --base, --base-options or --base-logits, or --save-logits")
        if self.base_logits is not None and self.base_options is not None:
            raise OptionError("--base-logits are what the base gave: --base-options change nothing, leave them out")
        if self.n_ctx is not None:
            window_size(self.n_ctx)
        theirs, text = read_options(self.base_options or "", self.options), read_text(self.file)
        if self.save_logits is not None:
            self._save(self.save_logits, text)
        elif self.base_logits is not None:
            self._compare_saved(self.base_logits, text)
        else:
            self._compare_live(self.base or self.model, theirs, text)

    def _save(self, path: Path, text: str) -> None:
        """Write the model's logits, and print its perplexity."""
        n_ctx = self.n_ctx or N_CTX
        with load_scorer(self.model, self.options, n_ctx=n_ctx) as scorer:
            ids = tokens_of(scorer.model, text)
            chunks = cut_chunks(ids, n_ctx, bos_of(scorer.model), self.n_chunk, n_skip=self.n_skip)
            file = find_model(self.model)
            header = LogitsHeader(
                n_vocab=scorer.model.decoder.config.n_vocab,
                n_ctx=n_ctx,
                n_chunk=len(chunks),
                n_scored=len(chunks[0].targets),
                model_hash=hash_file(file),
                vocab_hash=hash_vocabulary(file),
                text_hash=hash_ids(ids[self.n_skip * n_ctx :]),
                model=file.name,
            )
            report = Report(PERPLEXITY, self.as_json)
            with writing_logits(path, header) as writer:
                report.run(perplexity(scorer, chunks, writer.add), chunks)
            saved = writer.is_complete
            message(f"{path} holds the logits" if saved else f"{path} is not written: it would be incomplete")
            facts = self._facts(n_ctx) | {"saved_logits": str(path) if saved else None}
            report.finish(facts, scorer.model.where)

    def _compare_saved(self, path: Path, text: str) -> None:
        """Compare with a file of logits."""
        with LogitsFile(path) as saved:
            header = saved.header
            if self.n_ctx not in (None, header.n_ctx):
                raise OptionError(f"--ctx-size is {self.n_ctx}; {path} was made with {header.n_ctx}: leave it out")
            if self.base is not None and hash_file(find_model(self.base)) != header.model_hash:
                raise GgufRunError(f"{path}: holds the logits of another model, {header.model}, not of {self.base}")
            if hash_vocabulary(find_model(self.model)) != header.vocab_hash:
                raise other_vocabulary(path, self.model)
            with load_scorer(self.model, self.options, n_ctx=header.n_ctx) as scorer:
                if scorer.model.decoder.config.n_vocab != header.n_vocab:
                    raise other_vocabulary(path, self.model)
                ids = tokens_of(scorer.model, text)
                first = self._first_saved(path, header, ids)
                n_left = max(0, header.n_chunk - first)
                n_chunk = n_left if self.n_chunk is None else self.n_chunk
                if n_chunk > n_left or not n_left:
                    rest = f" behind --skip {self.n_skip}" if first else ""
                    raise OptionError(f"--chunks is {n_chunk or 'all'}; {path} holds {n_left}{rest}")
                chunks = cut_chunks(ids, header.n_ctx, bos_of(scorer.model), n_chunk, n_skip=self.n_skip)
                facts = self._facts(header.n_ctx) | {"base": header.model, "base_logits": str(path)}
                self._compare(scorer, lambda i: saved.chunk(first + i), chunks, facts, rounded=True)

    def _first_saved(self, path: Path, header: LogitsHeader, ids: list[int]) -> int:
        """Return which saved chunk is the first of the comparison: the logits may have been saved with --skip, too."""
        if hash_ids(ids) == header.text_hash:
            return self.n_skip
        if hash_ids(ids[self.n_skip * header.n_ctx :]) == header.text_hash:
            return 0
        raise GgufRunError(
            f"{path}: was made from another text than {self.file}, with another --skip, or by a model that splits it "
            "into other tokens: save the logits of this text"
        )

    def _compare_live(self, base: str, base_options: dict[str, Any], text: str) -> None:
        """Compare with a second model, which runs beside the first."""
        n_ctx = self.n_ctx or N_CTX
        check_vocabulary(find_model(base), find_model(self.model))
        with (
            load_scorer(self.model, self.options, n_ctx=n_ctx) as scorer,
            load_scorer(base, base_options, n_ctx=n_ctx) as theirs,
        ):
            if scorer.model.decoder.config.n_vocab != theirs.model.decoder.config.n_vocab:
                raise other_vocabulary(base, self.model)
            ids, bos = tokens_of(scorer.model, text), bos_of(scorer.model)
            if (tokens_of(theirs.model, text), bos_of(theirs.model)) != (ids, bos):
                raise GgufRunError(f"{base}: splits the text into other tokens than {self.model}: no comparison")
            chunks = cut_chunks(ids, n_ctx, bos, self.n_chunk, n_skip=self.n_skip)
            facts = self._facts(n_ctx) | {"base": base, "base_options": base_options}
            self._compare(scorer, lambda i: theirs.run(chunks[i].ids, chunks[i].targets), chunks, facts)

    def _compare(
        self,
        scorer: Scorer,
        base: Callable[[int], Iterator[Block]],
        chunks: Sequence[Chunk],
        facts: dict[str, Any],
        rounded: bool = False,
    ) -> None:
        report = Report(Layout("chunks", _HEAD, _row, _figures), self.as_json)
        report.run(compare(scorer, base, chunks, rounded), chunks)
        report.finish(facts, scorer.model.where)

    def _facts(self, n_ctx: int) -> dict[str, Any]:
        return {"model": self.model, "file": str(self.file), **self.options, "n_ctx": n_ctx, "skip": self.n_skip}


def _row(done: Comparison) -> str:
    found = {name: estimate.value for name, estimate in done.estimates().items()}
    ratio, same = found["perplexity_ratio"], 100 * found["same_top"]
    return f"{done.n_chunk:>5} {found['perplexity']:>12.4f} {ratio:>12.6f} {found['kl_mean']:>14.6g} {same:>9.3f} %"


def _figures(done: Comparison) -> list[Figure]:
    figures = []
    for name, estimate in done.estimates().items():
        label, percent = _LABELS[name]
        figures.append(Figure(name, label, estimate.value, estimate.error, percent))
    for p, value in done.kl_percentiles().items():
        name, label = {50.0: ("median", "median"), 100.0: ("max", "maximum")}.get(p, (f"{p:g}", f"{p:g} %"))
        figures.append(Figure(f"kl_{name}", f"  {label}", value))
    return figures


def read_options(text: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """Read --base-options. An option that the text does not name is as in `defaults`."""
    command = click.Command("--base-options", params=list(RUNTIME_OPTIONS), add_help_option=False)
    try:
        return command.make_context("--base-options", shlex.split(text), default_map=defaults).params
    except (click.UsageError, ValueError) as error:
        problem = error.format_message() if isinstance(error, click.UsageError) else str(error)
        allowed = ", ".join(option.opts[0] for option in RUNTIME_OPTIONS)
        raise OptionError(f"--base-options {text!r}: {problem.rstrip('.')}; allowed are {allowed}") from None
