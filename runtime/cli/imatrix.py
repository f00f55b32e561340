"""gguf-imatrix: which input channels matter, for gguf-quantize --imatrix.

Running perplexities and statistics go to stdout, everything else to stderr.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguf_run.formats.errors import OptionError
from gguf_run.runtime.cli import complete
from gguf_run.runtime.cli.common import tool
from gguf_run.runtime.cli.load_options import PATH, RUNTIME_OPTIONS
from gguf_run.runtime.terminal.text import message, read_text

if TYPE_CHECKING:
    from gguf_run.formats.gguf.imatrix import Imatrix
    from gguf_run.runtime.evaluate.perplexity import Perplexity

_AT_LEAST_1 = click.IntRange(1, 2**31 - 1)
_OPTIONS = (
    click.Option(["--file", "-f"], type=PATH, help="The text, UTF-8.  [none: only add up --in-file]"),
    click.Option(["--output", "--output-file", "-o"], type=PATH, help="Where to write.  [default: imatrix.gguf]"),
    click.Option(["--in-file"], type=PATH, multiple=True, help="Add to what is in this file; may be repeated."),
    click.Option(
        ["--ctx-size", "-c", "n_ctx"], type=int, help="Tokens of a chunk.  [default: as in --in-file, else 512]"
    ),
    click.Option(["--chunks", "n_chunk"], type=int, help="Stop after so many.  [default: the whole text]"),
    click.Option(["--from-chunk", "--chunk"], type=click.IntRange(0), default=0, help="Skip so many at the beginning."),
    click.Option(
        ["--output-frequency", "-ofreq"],
        type=_AT_LEAST_1,
        default=10,
        show_default=True,
        help="Write what there is after so many chunks.",
    ),
    click.Option(["--process-output"], is_flag=True, help="Collect for the output matrix too."),
    click.Option(["--parse-special"], is_flag=True, help="Control tokens written in the text become tokens."),
    click.Option(["--no-ppl"], is_flag=True, help="Leave out the running perplexity: faster."),
    click.Option(["--show-statistics"], is_flag=True, help="Print figures of each tensor and layer."),
    *RUNTIME_OPTIONS,
)


@tool(
    "gguf-imatrix",
    params=[click.Argument(["model"], required=False, shell_complete=complete.models), *_OPTIONS],
    examples=(
        "gguf-imatrix f16.gguf -f calibration.txt -o imatrix.gguf",
        "gguf-imatrix f16.gguf -f calibration.txt -o imatrix.gguf --chunks 100",
        "gguf-imatrix --in-file a.gguf --in-file b.gguf -o both.gguf",
        "gguf-imatrix --in-file imatrix.gguf --show-statistics",
    ),
)
def main(model: str | None, file: Path | None, output: Path | None, in_file: tuple[Path, ...], **options: Any) -> None:
    """Collect an importance matrix: MODEL (a GGUF file or hf:owner/repo[:Q4_K_M]) reads a text, and the squares of
    what each of its matrices reads are added up, in llama.cpp's GGUF form.

    Without MODEL, what --in-file names is added up, converted or, with --show-statistics, looked at.
    """
    if (model is None) != (file is None):
        raise OptionError("MODEL reads the text of --file: give both, or neither and --in-file")
    if model is None and not in_file:
        raise OptionError("nothing to do: give MODEL and --file, or --in-file")
    from gguf_run.runtime.evaluate.imatrix_file import read_all, write
    from gguf_run.runtime.evaluate.text import window_size

    if options["n_ctx"] is not None:
        window_size(options["n_ctx"])
    imatrix = read_all(in_file, options["n_ctx"])
    if model is not None and file is not None:
        imatrix = _collect(model, file, output or Path("imatrix.gguf"), imatrix, options)
    elif output is not None or not options["show_statistics"]:
        write(output or "imatrix.gguf", imatrix)
    if options["show_statistics"]:
        _show(imatrix)


def _show(imatrix: "Imatrix") -> None:
    from gguf_run.runtime.evaluate.imatrix_statistics import statistics, table

    for line in table(statistics(imatrix)):
        click.echo(line)


def _collect(model: str, file: Path, output: Path, imatrix: "Imatrix", options: dict[str, Any]) -> "Imatrix":
    from gguf_run.formats.gguf.writer import GGUFWriter
    from gguf_run.runtime.cli.evaluate_report import PERPLEXITY, Run, load_scorer
    from gguf_run.runtime.evaluate.imatrix import Collector
    from gguf_run.runtime.evaluate.imatrix_file import write
    from gguf_run.runtime.evaluate.text import bos_of, cut_chunks, tokens_of
    from gguf_run.runtime.hub.find import find_model

    n_ctx, first, ppl = imatrix.chunk_size, options["from_chunk"], not options["no_ppl"]
    text = read_text(file)
    inputs = [find_model(model), file]
    GGUFWriter(output, {}, [], inputs=inputs).abort()  # what is wrong with the output shows now, not after hours
    with load_scorer(model, n_ctx, options, observe=True) as scorer:
        ids = tokens_of(scorer.model, text, options["parse_special"])
        if 0 < len(ids) // n_ctx <= first:
            raise OptionError(f"--from-chunk is {first}; the text has {len(ids) // n_ctx} chunks of {n_ctx} tokens")
        chunks = cut_chunks(ids[first * n_ctx :], n_ctx, bos_of(scorer.model), options["n_chunk"])
        collector = Collector(scorer, imatrix, str(file), options["process_output"], ppl)

        def steps() -> "Iterator[Perplexity]":
            for done in collector.run(chunks):
                if done.n_chunk % options["output_frequency"] == 0:
                    write(output, collector.imatrix, inputs)
                yield done

        run = Run(PERPLEXITY if ppl else replace(PERPLEXITY, row=None, figures=lambda done: []))
        done = run.all(steps(), chunks)
        if done:
            write(output, collector.imatrix, inputs)
        if run.interrupted and done:
            message(f"{output} has them; to go on: --in-file {output} --from-chunk {first + len(done)}")
        run.finish({}, scorer.model.where)
    return collector.imatrix
