"""Compares the speed of any models with llama.cpp, in turns (pair.py). sweep.py measures the README's table.

"ratio" compares the medians over the rounds, "best" the fastest round of each. "range" is the lowest and the highest
ratio of single rounds.

    python benchmarks/vs_llamacpp.py MODEL... [-t 1,2] [-p 512] [-n 128] [-d 0] [-r 5] [-ct f16,q8_0,...]
"""

from itertools import product
from pathlib import Path

import click
from pair import Test, Worker, compare


def _numbers(context: click.Context, option: click.Parameter, value: str) -> list[int]:
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} must be numbers with commas between them") from None


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("-t", "--threads", default="2", show_default=True, callback=_numbers, help="Numbers of threads.")
@click.option("-p", "--prefill", default="512", show_default=True, callback=_numbers, help="Lengths of pp; 0: none.")
@click.option("-n", "--decode", default="128", show_default=True, callback=_numbers, help="Lengths of tg; 0: none.")
@click.option("-d", "--depth", default="0", show_default=True, callback=_numbers, help="Tokens in the context before.")
@click.option("-r", "--repeat", default=5, show_default=True, type=click.IntRange(1), help="Pairs per test.")
@click.option(
    "-ct", "--cache-type", default="", help="Types of the KV cache; both use flash attention.  [default: f16]"
)
@click.option("--cpu", default="auto", show_default=True, help="llama.cpp's CPU library, e.g. haswell.")
def main(
    models: tuple[Path, ...],
    threads: list[int],
    prefill: list[int],
    decode: list[int],
    depth: list[int],
    repeat: int,
    cache_type: str,
    cpu: str,
) -> None:
    """Print a table of speeds in tokens per second, llama.cpp's and ours."""
    lengths = [("pp", n) for n in prefill if n] + [("tg", n) for n in decode if n]
    tests = [Test(kind, n, d) for d in depth for kind, n in lengths]
    n_ctx = -(-max(test.n + test.depth for test in tests) // 256) * 256
    cpus = set()
    print("| model | threads | test | llama.cpp t/s | gguf-run t/s | ratio | range | best |")
    print("|---" * 8 + "|")
    for model, kind in product(models, cache_type.split(",")):
        for n_threads in threads:
            with (
                Worker("peer", model, n_threads, n_ctx, cpu, cache_type=kind) as peer,
                Worker("ours", model, n_threads, n_ctx, cache_type=kind) as ours,
            ):
                cpus.add(f"llama.cpp's CPU library: {peer.cpu}, gguf-run's kernels: {ours.cpu}")
                for test in tests:
                    rounds = compare(test, peer, ours, repeat)
                    low, high = rounds.range
                    speeds = f"{rounds.peer_speed:.1f} | {rounds.ours_speed:.1f} | {rounds.ratio:.2f}"
                    cells = f"{speeds} | {low:.2f} to {high:.2f} | {rounds.best:.2f}"
                    print(f"| {model.stem} {kind} | {n_threads} | {test} | {cells} |", flush=True)
    print("", *sorted(cpus), sep="\n")


if __name__ == "__main__":
    main()
