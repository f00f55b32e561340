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
from gguf_run.runtime.cli.options import PATH, RUNTIME_OPTIONS, option
from gguf_run.runtime.terminal.text import message
from gguf_run.runtime.terminal.text_input import read_text

if TYPE_CHECKING:
    from gguf_run.formats.gguf.imatrix import Imatrix
    from gguf_run.runtime.evaluate.moments import Products
    from gguf_run.runtime.evaluate.perplexity import Perplexity

_OPTIONS = [
    option("--file -f", "The text, UTF-8.  [none: only add up --in-file]", type=PATH),
    option("--output --output-file -o", "The file to write.  [default: imatrix.gguf]", type=PATH),
    option("--in-file", "Add to what this file has; may be repeated.", type=PATH, multiple=True),
    option("--ctx-size -c n_ctx", "Tokens of a chunk.  [default: as in --in-file, else 512]", type=int),
    option("--chunks n_chunk", "Read so many chunks.  [default: the whole text]", type=int),
    option("--from-chunk --chunk", "Skip so many chunks first.", type=click.IntRange(0), default=0),
    option(
        "--output-frequency -ofreq",
        "Write the file after every N chunks.",
        type=click.IntRange(1, 2**31 - 1),
        default=10,
    ),
    option("--process-output", "Collect for the output matrix too.", is_flag=True),
    option("--parse-special", "Control tokens written in the text become tokens.", is_flag=True),
    option("--full", "Add second moments, for gguf-quantize --method: a large file.", is_flag=True),
    option("--no-ppl", "Leave out the running perplexity: faster.", is_flag=True),
    option("--show-statistics", "Print figures of each tensor and layer.", is_flag=True),
    *RUNTIME_OPTIONS,
]


@tool(
    "gguf-imatrix",
    params=[click.Argument(["model"], required=False, shell_complete=complete.models), *_OPTIONS],
    examples=(
        "gguf-imatrix f16.gguf -f calibration.txt -o imatrix.gguf",
        "gguf-imatrix f16.gguf -f calibration.txt -o imatrix.gguf --chunks 100",
        "gguf-imatrix f16.gguf -f calibration.txt -o moments.gguf --full --chunks 32",
        "gguf-imatrix --in-file a.gguf --in-file b.gguf -o both.gguf",
        "gguf-imatrix --in-file imatrix.gguf --show-statistics",
    ),
)
def main(model: str | None, file: Path | None, output: Path | None, in_file: tuple[Path, ...], **options: Any) -> None:
    """Collect an importance matrix, for gguf-quantize --imatrix.

    MODEL (a GGUF file or hf:owner/repo[:Q4_K_M]) reads a text, and the squares of each matrix's inputs are added up.
    The file has llama.cpp's GGUF form. Without MODEL, the files of --in-file are added up, converted or, with
    --show-statistics, described.
    """
    if (model is None) != (file is None):
        raise OptionError("MODEL reads the text of --file: give both, or neither and --in-file")
    if model is None and not in_file:
        raise OptionError("nothing to do: give MODEL and --file, or --in-file")
    from gguf_run.runtime.evaluate.imatrix import read_all, write
    from gguf_run.runtime.evaluate.moments import Products
    from gguf_run.runtime.evaluate.text import window_size

    if options["n_ctx"] is not None:
        window_size(options["n_ctx"])
    imatrix = read_all(in_file, options["n_ctx"], options["full"])
    products = Products(in_file) if options["full"] or imatrix.inputs else None
    if model is not None and file is not None:
        imatrix = _collect(model, file, output or Path("imatrix.gguf"), imatrix, products, options)
    elif output is not None or not options["show_statistics"]:
        write(output or "imatrix.gguf", imatrix, (), products)
    if options["show_statistics"]:
        show_uses(imatrix)


def show_uses(imatrix: "Imatrix") -> None:
    """Print the use of each tensor's input channels, then each layer's means."""
    from gguf_run.runtime.evaluate.imatrix import mean_uses, tensor_uses

    uses = tensor_uses(imatrix)
    click.echo(
        f"{'Layer':>5}  {'Tensor':<20} {'Σ(Act²)':>12} {'Min':>9} {'Max':>11} {'μ':>9} {'σ':>9} {'% Active':>9} "
        f"{'N':>7} {'Entropy':>8} {'E (norm)':>9} {'ZD':>8} {'CosSim':>7}"
    )
    for use in uses:
        click.echo(
            f"{use.layer if use.layer >= 0 else '-':>5}  {use.tensor:<20} {use.total:>12.2f} {use.low:>9.4f} "
            f"{use.high:>11.4f} {use.mean:>9.2f} {use.deviation:>9.2f} {use.active:>9.2%} {use.n:>7} "
            f"{use.entropy:>8.4f} {use.normalized_entropy:>9.2%} {use.z_density:>8.2%} {use.similarity:>7.4f}"
        )
    click.echo(f"\n{'Layer':>5} {'μΣ(Act²)':>12} {'μZD':>9} {'μCosSim':>8}")
    for layer, total, z_density, similarity in mean_uses(uses):
        click.echo(f"{layer:>5} {total:>12.2f} {z_density:>9.4%} {similarity:>8.4f}")


def _collect(
    model: str, file: Path, output: Path, imatrix: "Imatrix", products: "Products | None", options: dict[str, Any]
) -> "Imatrix":
    from gguf_run.formats.gguf.writer import GGUFWriter
    from gguf_run.runtime.cli.report import PERPLEXITY, Report, load_scorer
    from gguf_run.runtime.evaluate.imatrix import Collector, write
    from gguf_run.runtime.evaluate.text import bos_of, cut_chunks, tokens_of
    from gguf_run.runtime.hub.find import find_model

    n_ctx, first, ppl = imatrix.chunk_size, options["from_chunk"], not options["no_ppl"]
    text = read_text(file)
    inputs = [find_model(model), file]
    GGUFWriter(output, {}, [], inputs=inputs).abort()  # what is wrong with the output shows now, not after hours
    with load_scorer(model, options, n_ctx=n_ctx, observe=True) as scorer:
        ids = tokens_of(scorer.model, text, options["parse_special"])
        if 0 < len(ids) // n_ctx <= first:
            raise OptionError(f"--from-chunk is {first}; the text has {len(ids) // n_ctx} chunks of {n_ctx} tokens")
        chunks = cut_chunks(ids[first * n_ctx :], n_ctx, bos_of(scorer.model), options["n_chunk"])
        collector = Collector(scorer, imatrix, str(file), options["process_output"], ppl, products)
        if products is not None:
            message(collector.keep(len(chunks) * n_ctx))

        def steps() -> "Iterator[Perplexity]":
            for done in collector.run(chunks):
                if done.n_chunk % options["output_frequency"] == 0:
                    write(output, collector.imatrix, inputs, products)
                yield done

        report = Report(PERPLEXITY if ppl else replace(PERPLEXITY, row=None, figures=lambda done: []))
        report.run(steps(), chunks)
        if report.done:
            write(output, collector.imatrix, inputs, products)
        if report.interrupted and report.done:
            message(f"{output} has them; to go on: --in-file {output} --from-chunk {first + len(report.done)}")
        report.finish({}, scorer.model.where)
    return collector.imatrix
