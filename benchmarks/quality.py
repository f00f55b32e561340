"""Makes files of one original by several methods and compares them with it: divergence at equal bytes.

    python benchmarks/quality.py ORIGINAL.gguf OUT --calibration mixed.txt --text wiki.test.raw --text code.txt \\
        --type Q4_K_S --type Q3_K_S [--variant gptq --variant target+gptq] [--chunks 20] [-t 2]

For each type, the first file is llama.cpp's: its mixture, its rounding with the importance matrix of the same text. The
variants are words of --method, and "target" for types chosen by --target-size, at most the bytes of the first file.
Ratios are of mean divergences, over the same tokens; standard errors are by chunks. OUT keeps all files, and what was
measured, for the next run. originals/ makes originals.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from gguf_run import quantize_model
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.cli.imatrix import main as imatrix
from gguf_run.runtime.evaluate.compare_files import compared, known_base, scoring
from gguf_run.runtime.evaluate.kl import Comparison, kl_ratio
from gguf_run.runtime.evaluate.text import N_CTX, Scorer
from gguf_run.runtime.load.options import LoadOptions
from gguf_run.runtime.quantize.file import bits_per_weight

_VARIANTS = ("gptq", "target", "target+gptq", "awq", "awq+gptq")
_PATH = click.Path(path_type=Path, exists=True, dir_okay=False)


@dataclass(frozen=True)
class Maker:
    """Makes the files of one original; those that exist stay."""

    original: Path
    folder: Path
    calibration: Path
    n_threads: int

    def moments(self, n_chunk: int) -> Path:
        path = self.folder / "moments.gguf"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            words = [self.original, "-f", self.calibration, "--full", "--no-ppl", "--chunks", n_chunk, "-o", path]
            imatrix([*map(str, words), "-t", str(self.n_threads)], standalone_mode=False)
        return path

    def file(self, moments: Path, type: str, variant: str = "") -> Path:
        """Return the file of a type, or of the words of a variant with at most its bytes."""
        path = self.folder / f"{type}{variant and '-'}{variant}.gguf"
        if path.exists():
            return path
        words = variant.split("+") if variant else []
        options: dict[str, Any] = {"imatrix": moments, "threads": self.n_threads}
        if "target" in words:
            options["target_size"] = str(self.file(moments, type).stat().st_size)
            options |= {"probe": self.calibration, "sensitivity": self.folder / "sensitivity.json"}
        options["method"] = [word for word in words if word != "target"]
        click.echo(f"{path.name}:", err=True)
        named = None if "target" in words else type
        quantize_model(self.original, path, named, report=lambda line: click.echo(line, err=True), **options)
        _scores(path).unlink(missing_ok=True)
        return path


def _scores(path: Path) -> Path:
    return path.with_suffix(".npy")


def measure(original: Path, paths: Sequence[Path], texts: Sequence[Path], n_chunk: int, n_threads: int) -> None:
    """Keep the scores of each file that has none, TOKEN_SCORES[len(texts), n_chunk, n_scored], beside it."""

    def load(source: Path | GGUFFile) -> AbstractContextManager[Scorer]:
        return scoring(source, LoadOptions(n_ctx=N_CTX, n_threads=n_threads, device="cpu"))

    todo = [path for path in paths if not _scores(path).exists()]
    if todo:
        with known_base(load, original, [text.read_text() for text in texts], lambda: None, n_chunk) as known:
            for path in todo:
                done = compared(load, path, known, lambda: None)
                np.save(_scores(path), np.stack([comparison.chunks for comparison in done]))
                click.echo(f"{path.name}: {', '.join(map(_cell, done))}", err=True)


def _cell(done: Comparison) -> str:
    kl = done.by_chunk().estimates()["kl_mean"]
    return f"{kl.value:.4f} +- {kl.error:.4f}"


def row(path: Path, first: Path) -> str:
    """Return the line of a file. first: the file of llama.cpp with as many bytes."""
    with GGUFFile.open(path) as file:
        bits = bits_per_weight([*file.tensors.values()])
    cells = [path.stem.replace("-", " ", 1), f"{path.stat().st_size:,}", f"{bits:.2f}"]
    for own, other in zip(np.load(_scores(path)), np.load(_scores(first)), strict=True):
        done = Comparison(tuple(own))
        ratio = kl_ratio(done, Comparison(tuple(other)))
        same, change = (done.estimates()[name].value for name in ("same_top", "perplexity_ratio"))
        share = "1" if path == first else f"{ratio.value:.3f} +- {ratio.error:.3f}"
        cells += [_cell(done), share, f"{100 * same:.1f} %", f"{change:.3f}"]
    return f"| {' | '.join(cells)} |"


@click.command()
@click.argument("original", type=_PATH)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--calibration", type=_PATH, required=True, help="The text for importance, second moments and probing.")
@click.option("--text", "texts", type=_PATH, required=True, multiple=True, help="To compare on.")
@click.option("--type", "types", required=True, multiple=True)
@click.option("--variant", "variants", multiple=True, default=_VARIANTS, show_default=True)
@click.option("--calibrate-chunks", default=32, show_default=True)
@click.option("--chunks", default=20, show_default=True, help="Of 512 tokens, of each text.")
@click.option("-t", "--threads", default=2, show_default=True)
def main(
    original: Path, out: Path, calibration: Path, texts: tuple[Path, ...], types: tuple[str, ...],
    variants: tuple[str, ...], calibrate_chunks: int, chunks: int, threads: int,
) -> None:  # fmt: skip
    """Print a table of the files of ORIGINAL, which lie in OUT."""
    maker = Maker(original, out, calibration, threads)
    moments = maker.moments(calibrate_chunks)
    files = {type: [maker.file(moments, type, variant) for variant in ("", *variants)] for type in types}
    measure(original, [path for paths in files.values() for path in paths], texts, chunks, threads)
    with GGUFFile.open(original) as file:
        click.echo(
            f"{file.metadata['general.name']}: {original.name}, {calibrate_chunks} chunks of {calibration.name}\n"
        )
    head = [f"{text.name}: KL | of the first | same top | perplexity ratio" for text in texts]
    click.echo(f"| file | bytes | bits | {' | '.join(head)} |\n|---{'|---:' * (2 + 4 * len(texts))}|")
    for paths in files.values():
        for path in paths:
            click.echo(row(path, paths[0]))


if __name__ == "__main__":
    main()
