"""Measures a quantized KV cache: mean Kullback-Leibler divergence of the predictions from those of an f32 cache.

The text is cut into chunks as for perplexity, and the second half of each chunk is scored. Each engine is compared with
itself, so that only the cache differs. A type name with "+" is rotated, with "-" it is not. Without a sign, a type is
rotated if that is its default. llama.cpp's base runs without flash attention, which would make f16 of f32.

    python benchmarks/kv_quality.py MODEL TEXT [--chunks 64] [-c 512] [--types q8_0,q4_0-] [--peer] [-t 2]
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import click
import numpy as np
from numpy.typing import NDArray
from peer import CACHE_TYPES as PEER_TYPES
from peer import Peer

from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS
from gguf_run.kernels_cpu.measure.log_softmax import LogSoftmax
from gguf_run.models.backend import BLOCK, rotates
from gguf_run.runtime.evaluate.text import Chunk, bos_of, cut_chunks, tokens_of
from gguf_run.runtime.model import Model


class Engine(Protocol):
    """A loaded model, see engine.py."""

    def rewind(self, n_past: int, /) -> int: ...
    def forward(self, ids: Sequence[int], n_outputs: int = 1, /) -> Iterator[NDArray[np.float32]]: ...


@dataclass
class Row:
    """One cache."""

    name: str
    engine: Engine
    kl: list[NDArray[np.float64]] = field(default_factory=list)  # of each scored token, by chunk
    same_top: list[NDArray[np.bool_]] = field(default_factory=list)  # of each scored token, by chunk

    @property
    def mean(self) -> float:
        return float(np.concatenate(self.kl).mean())

    def line(self) -> str:
        kl, same = np.concatenate(self.kl), np.concatenate(self.same_top)
        error = kl.std() / len(kl) ** 0.5
        return (
            f"| {self.name} | {kl.mean():.3g} | {error:.1g} | {np.percentile(kl, 99):.3g} | {100 * same.mean():.2f} |"
        )


def logits_of(engine: Engine, chunk: Chunk) -> Iterator[NDArray[np.float32]]:
    engine.rewind(0)
    return engine.forward(chunk.ids, len(chunk.targets))


def compare(base: Engine, rows: Sequence[Row], chunk: Chunk, reduce: LogSoftmax) -> None:
    """Add one chunk to all rows."""
    expected = np.concatenate([block.copy() for block in logits_of(base, chunk)])
    top = expected.argmax(axis=1)
    for row in rows:
        done = 0
        for q in logits_of(row.engine, chunk):
            part = slice(done, done + len(q))
            row.kl.append(reduce.divergence(expected[part], q))
            row.same_top.append(q.argmax(axis=1) == top[part])
            done += len(q)


def parse(name: str) -> tuple[tuple[str, str], bool | None]:
    """Return the types of K and V, and whether they are rotated: "q8_0/q4_0" by default, "q8_0+" yes, "q4_0-" no."""
    k, _, v = name.rstrip("+-").partition("/")
    return (k, v or k), {"+": True, "-": False}.get(name[-1])


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--chunks", default=64, show_default=True, help="Chunks to score, from the start of the text.")
@click.option("-c", "--ctx-size", "n_ctx", default=512, show_default=True, help="Tokens in a chunk.")
@click.option(
    "--types", help='As in "q8_0,q8_0/q4_0,q4_0-": K/V; + and - are with and without rotation.  [default: all]'
)
@click.option("--scales", help="Calibration file for the fp8 types.")
@click.option("-t", "--threads", default=2, show_default=True)
@click.option("--peer", is_flag=True, help="Compute it with llama.cpp instead.")
def main(
    model: Path, text: Path, chunks: int, n_ctx: int, types: str | None, scales: str | None, threads: int, peer: bool
) -> None:
    """Print the divergence of each type of KV cache."""

    def load(kinds: tuple[str, str], rotation: bool | None) -> Engine:
        if peer:
            os.environ["LLAMA_ATTN_ROT_DISABLE"] = "1" if rotation is False else "0"
            return Peer(model, threads, n_ctx, cache_types=kinds)
        use_scales = scales if any(kind.startswith("fp8") for kind in kinds) else None
        loaded = Model.load(
            model, n_ctx=n_ctx, n_threads=threads, cache_type=kinds, cache_rotation=rotation, cache_scales=use_scales
        )
        return stack.enter_context(loaded).decoder

    every = [
        name + end
        for name, form in CACHE_FORMATS.items()
        for end in ("", "-")[: 1 + rotates(form.bits, BLOCK, None, False)]
    ]
    names = types.split(",") if types else [*PEER_TYPES] if peer else every
    with ExitStack() as stack, Model.load(model, n_ctx=n_ctx, n_threads=threads) as ours:
        cut = cut_chunks(tokens_of(ours, text.read_bytes().decode()), n_ctx, bos_of(ours), chunks)
        reduce = LogSoftmax(threads)
        base = load(("f32", "f32"), None)
        rows = [Row(name, load(*parse(name))) for name in names]
        for i, chunk in enumerate(cut):
            compare(base, rows, chunk, reduce)
            so_far = ", ".join(f"{row.name} {row.mean:.3g}" for row in rows)
            click.echo(f"{i + 1}/{len(cut)}: {so_far}", err=True)
        reduce.close()
        what = "llama.cpp" if peer else "gguf-run"
        click.echo(f"{model.name}, {text.name}, {len(cut)} chunks of {n_ctx}, {what}\n")
        click.echo("| cache | mean KL | ± | 99 % | same top token % |\n|---|---|---|---|---|")
        for row in rows:
            click.echo(row.line())


if __name__ == "__main__":
    main()
