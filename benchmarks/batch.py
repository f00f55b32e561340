"""Compares Model.generate_batch with one prompt, and restoring a session with computing it, in turns.

"batch" is the tokens per second of n prompts decoded together, divided by those of one prompt. "restore" is the time of
computing a context, divided by the time of loading it from a file. The logits after both are compared.

    python benchmarks/batch.py MODEL [-b 8] [-n 32] [-p 64] [--session 4096] [-t 2] [-r 5] [-ct q8_0]
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import click
import numpy as np
from numpy.typing import NDArray

from gguf_run.runtime import Model


def _decode_speeds(model: Model, n_batch: int, n_prompt: int, n_gen: int, repeat: int) -> list[list[float]]:
    """Return tokens per second of one sequence and of n_batch sequences, one pair for each round."""
    decoder = model.decoder
    rng = np.random.default_rng(0)
    speeds: list[list[float]] = [[], []]
    for _ in range(repeat):
        for found, n_seq in zip(speeds, (1, n_batch), strict=True):
            for seq in range(n_seq):
                decoder.rewind(0, seq)
                for _ in decoder.forward(rng.integers(0, decoder.config.n_vocab, n_prompt + seq).tolist(), 0, seq):
                    pass
            ids = rng.integers(0, decoder.config.n_vocab, (n_gen + 1, n_seq)).tolist()
            decoder.step(dict(enumerate([id] for id in ids[0])))
            start = time.perf_counter()
            for row in ids[1:]:
                decoder.step(dict(enumerate([id] for id in row)))
            found.append(n_gen * n_seq / (time.perf_counter() - start))
    return speeds


def _restore(model: Model, n_tokens: int, repeat: int) -> tuple[float, float, bool, int]:
    """Return seconds to compute and to restore n_tokens, whether the logits are equal, and the bytes of the file."""
    ids = np.random.default_rng(1).integers(0, model.decoder.config.n_vocab, n_tokens).tolist()

    def after() -> NDArray[np.float32]:
        """Return the logits after one more token."""
        seen: list[NDArray[np.float32]] = []

        def see(_: NDArray[np.intp], logits: NDArray[np.float32]) -> NDArray[np.float32]:
            seen.append(logits.copy())
            return logits

        model.complete([*ids, ids[0]], max_tokens=1, logits_processors=[see])
        return seen[0]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session"
        model.reset()
        start = time.perf_counter()
        model.complete(ids, max_tokens=1)
        computed = time.perf_counter() - start
        model.save_session(path)
        expected = after()
        times = []
        for _ in range(repeat):
            model.reset()
            start = time.perf_counter()
            model.load_session(path)
            times.append(time.perf_counter() - start)
        return computed, median(times), bool((after() == expected).all()), path.stat().st_size


@click.command()
@click.argument("path", metavar="MODEL", type=click.Path(exists=True, path_type=Path))
@click.option("-b", "--batch", "n_seq", default=8, show_default=True, help="Prompts decoded together.")
@click.option("-p", "--prompt", default=64, show_default=True, help="Tokens of the first prompt; each has one more.")
@click.option("-n", "--decode", default=32, show_default=True, help="Tokens decoded for each.")
@click.option("--session", default=4096, show_default=True, help="Tokens of the session; 0: no session.")
@click.option("-t", "--threads", default=2, show_default=True)
@click.option("-r", "--repeat", default=5, show_default=True, help="Rounds.")
@click.option("-ct", "--cache-type", default="f16", show_default=True)
def main(
    path: Path, n_seq: int, prompt: int, decode: int, session: int, threads: int, repeat: int, cache_type: str
) -> None:
    """Measure MODEL."""
    options = {"n_threads": threads, "cache_type": cache_type}
    with Model.load(path, n_ctx=prompt + n_seq + decode + 8, n_seq=n_seq, **options) as model:  # type: ignore[arg-type]
        one, many = _decode_speeds(model, n_seq, prompt, decode, repeat)
    ratios = sorted(b / a for a, b in zip(one, many, strict=True))
    click.echo(
        f"{path.name}: 1 prompt {median(one):.1f} t/s, {n_seq} prompts {median(many):.1f} t/s, ratio "
        f"{median(many) / median(one):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    if session:
        with Model.load(path, n_ctx=session + 8, **options) as model:  # type: ignore[arg-type]
            computed, restored, same, size = _restore(model, session, repeat)
        click.echo(
            f"{path.name}: {session} tokens computed in {computed:.2f} s, restored in {1000 * restored:.0f} ms "
            f"({size / 1e6:.0f} MB), ratio {computed / restored:.0f}, logits {'equal' if same else 'DIFFER'}"
        )


if __name__ == "__main__":
    main()
