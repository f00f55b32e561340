"""Compares restoring a session from a file with computing it. The logits after both are compared.

python benchmarks/session.py MODEL [-p 4096] [-t 2] [-r 5] [-ct q8_0]
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import click
import numpy as np
from numpy.typing import NDArray

from gguf_run.runtime import Model


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
@click.option("-p", "--prompt", default=4096, show_default=True, help="Tokens of the session.")
@click.option("-t", "--threads", default=2, show_default=True)
@click.option("-r", "--repeat", default=5, show_default=True, help="Rounds.")
@click.option("-ct", "--cache-type", default="f16", show_default=True)
def main(path: Path, prompt: int, threads: int, repeat: int, cache_type: str) -> None:
    """Measure MODEL."""
    with Model.load(path, n_ctx=prompt + 8, n_threads=threads, cache_type=cache_type) as model:
        computed, restored, same, size = _restore(model, prompt, repeat)
    click.echo(
        f"{path.name}: {prompt} tokens computed in {computed:.2f} s, restored in {1000 * restored:.0f} ms "
        f"({size / 1e6:.0f} MB), ratio {computed / restored:.0f}, logits {'equal' if same else 'DIFFER'}"
    )


if __name__ == "__main__":
    main()
