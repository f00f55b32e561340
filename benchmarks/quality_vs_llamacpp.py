"""Measures files of one model in gguf-run and in llama.cpp: their divergence from the original, in that runtime.

    python benchmarks/quality_vs_llamacpp.py ORIGINAL.gguf TEXT FILE.gguf ... [--chunks 4] [-t 2]

The tokens are those of gguf-eval. The last column is the divergence of llama.cpp's run of a file from gguf-run's.
llama.cpp is release v0.5.0, see peer.py.
"""

from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from engine import Ours
from kv_quality import Engine, Row, compare
from peer import Peer

from gguf_run.kernels_cpu.measure.log_softmax import LogSoftmax
from gguf_run.runtime.evaluate.text import bos_of, cut_chunks, tokens_of
from gguf_run.runtime.model import Model

_N_CTX = 512
_PATH = click.Path(exists=True, path_type=Path)


@click.command()
@click.argument("original", type=_PATH)
@click.argument("text", type=_PATH)
@click.argument("files", type=_PATH, nargs=-1, required=True)
@click.option("--chunks", default=4, show_default=True, help="Of 512 tokens, from the start of the text.")
@click.option("-t", "--threads", default=2, show_default=True)
def main(original: Path, text: Path, files: tuple[Path, ...], chunks: int, threads: int) -> None:
    """Print the divergence of FILES from ORIGINAL in both runtimes."""
    with Model.load(original, n_ctx=_N_CTX, n_threads=threads) as model:
        cut = cut_chunks(tokens_of(model, text.read_text()), _N_CTX, bos_of(model), chunks)
    reduce = LogSoftmax(threads)
    kinds: tuple[Callable[[Path], Engine], ...] = (
        lambda path: Ours(path, threads, _N_CTX), lambda path: Peer(path, threads, _N_CTX)
    )  # fmt: skip
    bases = [kind(original) for kind in kinds]
    click.echo("| file | gguf-run: KL | llama.cpp: KL | between them |\n|---|---|---|---|")
    for path in (original, *files):
        engines = [kind(path) for kind in kinds]
        rows = [Row("own", engine) for engine in engines]
        between = Row("between", engines[1])
        for chunk in cut:
            for base, row in zip(bases, rows, strict=True):
                compare(base, [row], chunk, reduce)
            compare(engines[0], [between], chunk, reduce)
        means = [[kl.mean() for kl in row.kl] for row in (*rows, between)]
        cells = [f"{np.mean(row):.4f} +- {np.std(row) / max(1, len(row) - 1) ** 0.5:.4f}" for row in means]
        click.echo(f"| {path.stem} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
