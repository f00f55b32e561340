"""Perplexity of a model on a text, by the protocol of llama.cpp's tool, so that figures can be compared.

The whole text is tokenized and cut into chunks of n_ctx tokens. BOS replaces the first token of each chunk if the model
adds a BOS. The tokens of the second half are scored, each after all tokens before it in the chunk.

    python benchmarks/perplexity.py MODEL TEXT [--chunks 4] [-c 512] [-t 2] [--peer]
"""

import math
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from engine import Engine, Ours
from numpy.typing import NDArray
from peer import Peer


def negative_log_likelihood(logits: NDArray[np.float32], ids: list[int]) -> float:
    """Return the sum over rows of -log softmax(logits[i])[ids[i]], in f64. logits: f32[len(ids), n_vocab]."""
    total = 0.0
    for row, id in zip(logits, ids, strict=True):
        shifted = row.astype(np.float64) - row.max()
        total += math.log(np.exp(shifted).sum()) - shifted[id]
    return total


def perplexity(engine: Engine, ids: list[int], n_ctx: int, n_chunk: int) -> Iterator[float]:
    """Yield the perplexity over all chunks so far, after each of the first n_chunk chunks."""
    total, n_scored = 0.0, 0
    for start in range(0, n_chunk * n_ctx, n_ctx):
        chunk = ids[start : start + n_ctx]
        if engine.bos is not None:
            chunk = [engine.bos, *chunk[1:]]
        targets = chunk[n_ctx // 2 + 1 :]
        engine.rewind(0)
        done = 0
        # The logits of the last token of a chunk predict nothing, but forward yields those of the last tokens.
        for logits in engine.forward(chunk, len(targets) + 1):
            wanted = targets[done : done + len(logits)]
            total += negative_log_likelihood(logits[: len(wanted)], wanted)
            done += len(logits)
        n_scored += len(targets)
        yield math.exp(total / n_scored)


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--chunks", default=4, show_default=True, help="Chunks to score, from the start of the text.")
@click.option("-c", "--ctx-size", "n_ctx", default=512, show_default=True, help="Tokens in a chunk.")
@click.option("-t", "--threads", default=2, show_default=True)
@click.option("--peer", is_flag=True, help="Compute it with llama.cpp instead.")
@click.option("--cpu", default="auto", show_default=True, help="llama.cpp's CPU library, e.g. haswell.")
def main(model: Path, text: Path, chunks: int, n_ctx: int, threads: int, peer: bool, cpu: str) -> None:
    """Print the running perplexity of MODEL on TEXT."""
    engine: Engine = Peer(model, threads, n_ctx, cpu=cpu) if peer else Ours(model, threads, n_ctx)
    ids = engine.tokenize(text.read_bytes().decode())
    n_chunk = min(chunks, len(ids) // n_ctx)
    print(f"{model.name}: {len(ids)} tokens, {n_chunk} chunks of {n_ctx}, {'llama.cpp' if peer else 'gguf-run'}")
    if n_chunk == 0:
        raise click.UsageError(f"{text} has {len(ids)} tokens: one chunk needs {n_ctx}")
    for value in perplexity(engine, ids, n_ctx, n_chunk):
        print(f"{value:.4f}", end=" ", flush=True)
    print()


if __name__ == "__main__":
    main()
