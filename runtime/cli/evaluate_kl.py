"""The three ways of `gguf-eval kl`: save a model's logits, compare with saved ones, compare with a second model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime.cli.evaluate_report import PERPLEXITY, Figure, Kind, Run, load_scorer
from gguf_run.runtime.evaluate.kl import Comparison, compare
from gguf_run.runtime.evaluate.logits_file import (
    LogitsFile,
    LogitsHeader,
    LogitsWriter,
    hash_file,
    hash_ids,
    hash_vocabulary,
)
from gguf_run.runtime.evaluate.perplexity import perplexity
from gguf_run.runtime.evaluate.text import N_CTX, Block, Chunk, Scorer, bos_of, cut_chunks, tokens_of
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.terminal.text import message

_HEAD = f"{'chunk':>5} {'perplexity':>12} {'ratio':>12} {'KL divergence':>14} {'same top':>11}"


@dataclass(frozen=True)
class KlRun:
    """What the three ways have in common. n_ctx, n_chunk: None if the user did not say."""

    model: str
    text_name: str
    text: str
    n_ctx: int | None
    n_chunk: int | None
    options: Mapping[str, Any]
    as_json: bool

    def save(self, path: Path) -> None:
        """Write MODEL's logits, and print its perplexity."""
        n_ctx = self.n_ctx or N_CTX
        with load_scorer(self.model, n_ctx, self.options) as scorer:
            ids = tokens_of(scorer.model, self.text)
            chunks = cut_chunks(ids, n_ctx, bos_of(scorer.model), self.n_chunk)
            file = find_model(self.model)
            header = LogitsHeader(
                n_vocab=scorer.model.decoder.config.n_vocab,
                n_ctx=n_ctx,
                n_chunk=len(chunks),
                n_scored=len(chunks[0].targets),
                model_hash=hash_file(file),
                vocab_hash=hash_vocabulary(file),
                text_hash=hash_ids(ids),
                model=file.name,
            )
            run = Run(PERPLEXITY, self.as_json)
            with LogitsWriter(path, header) as writer:
                run.all(perplexity(scorer, chunks, writer.add), chunks)
            saved = writer.is_complete
            message(f"{path} holds the logits" if saved else f"{path} is not written: it would be incomplete")
            facts = self._facts(n_ctx) | {"saved_logits": str(path) if saved else None}
            run.finish(facts, scorer.model.where)

    def compare_saved(self, path: Path, base: str | None) -> None:
        """Compare with a file of logits; if a base is named, they must be its."""
        with LogitsFile(path) as saved:
            header = saved.header
            if self.n_ctx not in (None, header.n_ctx):
                raise OptionError(f"--ctx-size is {self.n_ctx}; {path} was made with {header.n_ctx}: leave it out")
            if self.n_chunk is not None and self.n_chunk > header.n_chunk:
                raise OptionError(f"--chunks is {self.n_chunk}; {path} holds {header.n_chunk}")
            if base is not None and hash_file(find_model(base)) != header.model_hash:
                raise GgufRunError(f"{path}: holds the logits of another model, {header.model}, not of {base}")
            if hash_vocabulary(find_model(self.model)) != header.vocab_hash:
                raise self._other_vocabulary(str(path))
            with load_scorer(self.model, header.n_ctx, self.options) as scorer:
                if scorer.model.decoder.config.n_vocab != header.n_vocab:
                    raise self._other_vocabulary(str(path))
                ids = tokens_of(scorer.model, self.text)
                if hash_ids(ids) != header.text_hash:
                    raise GgufRunError(
                        f"{path}: was made from another text than {self.text_name}, or by a model that splits it into "
                        "other tokens: save the logits of this text"
                    )
                chunks = cut_chunks(ids, header.n_ctx, bos_of(scorer.model), self.n_chunk or header.n_chunk)
                facts = self._facts(header.n_ctx) | {"base": header.model, "base_logits": str(path)}
                self._compare(scorer, saved.chunk, chunks, facts, rounded=True)

    def compare_live(self, base: str, base_options: Mapping[str, Any]) -> None:
        """Run base beside MODEL."""
        n_ctx = self.n_ctx or N_CTX
        if hash_vocabulary(find_model(self.model)) != hash_vocabulary(find_model(base)):
            raise self._other_vocabulary(base)
        with (
            load_scorer(self.model, n_ctx, self.options) as scorer,
            load_scorer(base, n_ctx, base_options) as theirs,
        ):
            if scorer.model.decoder.config.n_vocab != theirs.model.decoder.config.n_vocab:
                raise self._other_vocabulary(base)
            ids, bos = tokens_of(scorer.model, self.text), bos_of(scorer.model)
            if (tokens_of(theirs.model, self.text), bos_of(theirs.model)) != (ids, bos):
                raise GgufRunError(f"{base}: splits the text into other tokens than {self.model}: no comparison")
            chunks = cut_chunks(ids, n_ctx, bos, self.n_chunk)
            facts = self._facts(n_ctx) | {"base": base, "base_options": dict(base_options)}
            self._compare(scorer, lambda i: theirs.run(chunks[i].ids, chunks[i].targets), chunks, facts)

    def _compare(
        self,
        scorer: Scorer,
        base: Callable[[int], Iterator[Block]],
        chunks: Sequence[Chunk],
        facts: dict[str, Any],
        rounded: bool = False,
    ) -> None:
        run = Run(Kind("chunks", _HEAD, _row, _figures), self.as_json)
        run.all(compare(scorer, base, chunks, rounded), chunks)
        run.finish(facts, scorer.model.where)

    def _facts(self, n_ctx: int) -> dict[str, Any]:
        return {"model": self.model, "file": self.text_name, **self.options, "n_ctx": n_ctx}

    def _other_vocabulary(self, base: str) -> GgufRunError:
        return GgufRunError(
            f"{base}: has another vocabulary than {self.model}: only models with the same tokens can be compared"
        )


def _row(done: Comparison) -> str:
    return (
        f"{done.n_chunk:>5} {done.perplexity().value:>12.4f} {done.ratio().value:>12.6f} "
        f"{done.mean_kl().value:>14.6g} {100 * done.agreement().value:>9.3f} %"
    )


def _figures(done: Comparison) -> list[Figure]:
    estimates = (
        ("perplexity", "perplexity", done.perplexity(), False),
        ("perplexity_base", "perplexity of the base", done.perplexity_base(), False),
        ("perplexity_ratio", "ratio", done.ratio(), False),
        ("p_change_mean", "change of p, mean", done.mean_change(), True),
        ("p_change_rms", "change of p, RMS", done.rms_change(), True),
        ("same_top", "same top token", done.agreement(), True),
        ("kl_mean", "KL divergence, mean", done.mean_kl(), False),
    )
    percentiles = done.kl_percentiles()
    names = {50.0: ("kl_median", "  median"), 100.0: ("kl_max", "  maximum")}
    return [
        *(Figure(key, label, e.value, e.error, percent) for key, label, e, percent in estimates),
        *(Figure(*names.get(p, (f"kl_{p:g}", f"  {p:g} %")), value) for p, value in percentiles.items()),
    ]
