"""gguf-bench: how fast models run on this machine, and how near that comes to what the machine can do."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice, product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from gguf_run.formats.errors import OptionError
from gguf_run.runtime.cli import bench_serve, complete
from gguf_run.runtime.cli.common import Command, tool
from gguf_run.runtime.cli.numbers import MAX_TESTS, MOST, parse_values
from gguf_run.runtime.cli.options import ROTATION
from gguf_run.runtime.terminal.progress import progress

if TYPE_CHECKING:
    from gguf_run.runtime.bench.bench import Case

_FORMATS = ("md", "csv", "json", "jsonl")


def _pairs(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Return the pairs (n_prompt, n_gen) that -pg names."""
    pairs = []
    for text in texts:
        numbers = parse_values("-pg", [text], 0) if "-" not in text else []
        if len(numbers) != 2:
            raise OptionError(f"-pg {text!r}: must be two numbers, tokens of the prompt and to generate: 512,128")
        pairs.append((numbers[0], numbers[1]))
    return pairs


def _cache_types(both: Sequence[str], k: Sequence[str], v: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs (type of K, type of V): those of --cache-type, then all combinations of the other two options.

    Without any of the options, the pair is (f16, f16).
    """
    from gguf_run.kernels_cpu.attention.cache_types import CACHE_FORMATS

    named = []
    for option, texts in (("--cache-type", both), ("--cache-type-k", k), ("--cache-type-v", v)):
        named.append(list(dict.fromkeys(name for text in texts for name in text.split(","))))
        for name in named[-1]:
            if name not in CACHE_FORMATS:
                raise OptionError(f"{option} {name!r}: allowed are {', '.join(CACHE_FORMATS)}")
    alike, ks, vs = named
    pairs = product(ks or ["f16"], vs or ["f16"]) if ks or vs or not alike else ()
    return list(dict.fromkeys([*((name, name) for name in alike), *pairs]))


_numbers = partial(click.option, multiple=True, metavar="N,...")
_types = partial(click.option, multiple=True, metavar="TYPE,...", shell_complete=complete.cache_types)


class _Bench(Command):
    """gguf-bench MODEL..., or, by its first word, another command. A file that has this name is ./serve."""

    commands: Mapping[str, click.Command] = MappingProxyType({"serve": bench_serve.main})

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        if args and (command := self.commands.get(args[0])):
            return command.make_context(f"{info_name} {args[0]}", args[1:], *rest, **extra)
        return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


@tool(
    "gguf-bench",
    _Bench,
    examples=(
        "gguf-bench model.gguf",
        "gguf-bench q4.gguf q8.gguf -p 128-512*2 -n 64 -r 3",
        "gguf-bench model.gguf -t 1,2,4 -d 0,8192 -ct f16,q8_0",
        "gguf-bench model.gguf -o csv > speed.csv",
        "gguf-bench serve http://127.0.0.1:8080 --clients 1,4,16",
    ),
)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", shell_complete=complete.models)
@_numbers("-p", "--n-prompt", default=("512",), help="Tokens of a prompt (pp); 0: none.")
@_numbers("-n", "--n-gen", default=("128",), help="Tokens to generate one by one (tg); 0: none.")
@click.option("-pg", "pg", multiple=True, metavar="PP,TG", help="A prompt and then tokens to generate, in one test.")
@_numbers("-d", "--n-depth", default=("0",), help="Tokens that are in the context before.")
@_numbers("-b", "--batch-size", default=("2048",), help="Tokens of a prompt's parts, with logits after each.")
@_numbers("-ub", "--ubatch-size", default=("512",), help="Tokens that run at once, at most.")
@_types("-ct", "--cache-type", help="Type of the KV cache, for K and V alike.")
@_types("-ctk", "--cache-type-k", help="Type of K, in all combinations with V's.  [default: f16]")
@_types("-ctv", "--cache-type-v", help="Type of V.  [default: f16]")
@click.option("--cache-rotation/--no-cache-rotation", default=None, help=ROTATION.help)
@_numbers("-t", "--threads", help="Threads that compute.  [default: physical cores]")
@click.option(
    "-dev", "--device", default=("auto",), multiple=True, metavar="DEVICE,...", help="cpu, cuda:1, cuda:0/cuda:1, ..."
)
@_numbers("-ngl", "--gpu-layers", default=("auto",), help="Layers on the GPU; or all, auto.")
@_numbers("-ts", "--tensor-split", help="Parts of these for each of several GPUs: 3/1.  [default: by free memory]")
@click.option("-cmoe", "--cpu-moe", is_flag=True, help="Keep the experts of all layers on the CPU.")
@_numbers("-ncmoe", "--n-cpu-moe", help="Or of the first N layers only.  [default: as few as it takes]")
@click.option("-r", "--repetitions", default=5, type=click.IntRange(1, 100_000), help="Times each test is repeated.")
@click.option("--delay", default=0.0, type=click.FloatRange(0, 86_400), help="Seconds to wait before each test.")
@click.option("--no-warmup", is_flag=True, help="Leave out the first, unmeasured run of each test.")
@click.option("--tune", is_flag=True, help="Run no test: fit the kernels to this CPU again, and show what was tried.")
@click.option("-o", "--output", default="md", type=click.Choice(_FORMATS), help="Format of the results.")
def main(
    models: tuple[str, ...],
    repetitions: int,
    delay: float,
    no_warmup: bool,
    tune: bool,
    output: str,
    **options: Any,
) -> None:
    """Measure how fast models run: tokens per second of a prompt (pp) and of generation (tg).

    Options and the table are those of llama.cpp's llama-bench. Every option takes several values with commas
    between them, and ranges: 1-8, 128-512+128, 1-64*2; tests run in all combinations. The last column compares with the
    most that this machine can do: the speeds of its memory and of its int8 instructions are measured in the same run.

    MODEL is a GGUF file or hf:owner/repo[:Q4_K_M]. The word `serve` in its place measures a running server:
    gguf-bench serve --help.
    """
    if delay != delay:
        raise OptionError("--delay nan: allowed are numbers of seconds from 0")
    if tune:
        from gguf_run.runtime.bench.tuning import tune_again

        for name in models:
            for line in tune_again(name):
                click.echo(line)
        return
    cases = _cases(models, options)
    from gguf_run.runtime.bench.bench import Procedure, Result, run_cases
    from gguf_run.runtime.bench.output import PRINTERS

    printer = PRINTERS[output](cases)
    results: list[Result] = []
    with progress("benchmarks") as bar:

        def write(text: str) -> None:
            bar.clear()
            click.echo(text, nl=False)
            sys.stdout.flush()

        coming = run_cases(cases, Procedure(repetitions, not no_warmup, delay, bar.show))
        write(printer.head)
        try:
            for result in coming:
                results.append(result)
                write(printer.row(result))
        finally:
            write(printer.foot(results))


def _cases(models: Sequence[str], given: Mapping[str, Any]) -> "list[Case]":
    """Return all combinations, in llama-bench's order, so that a model is loaded as seldom as possible.

    given: the command's other parameters.
    """
    from gguf_run.kernels_cpu.replay.team import MAX_THREADS
    from gguf_run.runtime.bench.bench import Case
    from gguf_run.runtime.load.machine import default_threads
    from gguf_run.runtime.load.options import LoadOptions

    lengths = [(n, 0) for n in parse_values("--n-prompt", given["n_prompt"], 0)]
    lengths += [(0, n) for n in parse_values("--n-gen", given["n_gen"], 0)]
    lengths = [pair for pair in [*lengths, *_pairs(given["pg"])] if any(pair)]
    if not lengths:
        raise OptionError("--n-prompt 0 with --n-gen 0 and no -pg: there is nothing to measure")
    placements: dict[str, list[Any]] = {
        name: [part.replace("/", ",") for text in given[name] for part in text.split(",")]
        for name in ("device", "gpu_layers", "tensor_split")
    }
    placements["n_cpu_moe"] = [*parse_values("--n-cpu-moe", given["n_cpu_moe"], 0)]
    threads = given["threads"] or [str(min(default_threads(), MAX_THREADS))]
    axes = (
        models,
        product(*(values or [None] for values in placements.values())),
        parse_values("--batch-size", given["batch_size"], 1),
        parse_values("--ubatch-size", given["ubatch_size"], 1),
        _cache_types(given["cache_type"], given["cache_type_k"], given["cache_type_v"]),
        parse_values("--threads", threads, 1, MAX_THREADS),
        parse_values("--n-depth", given["n_depth"], 0),
        lengths,
    )
    cases = []
    for model, place, n_batch, n_ubatch, kinds, n_threads, depth, (pp, tg) in islice(product(*axes), MAX_TESTS + 1):
        options = {name: given[name] for name in ("cpu_moe", "cache_rotation")}
        options |= {"n_threads": n_threads, "cache_type": kinds} | dict(zip(placements, place, strict=True))
        cases.append(Case(model, pp, tg, depth, n_batch, n_ubatch, LoadOptions(**options)))
    if len(cases) > MAX_TESTS:
        raise OptionError(f"the options make more than {MAX_TESTS} tests: give fewer values")
    for case in cases:
        if case.n_ctx > MOST:
            raise OptionError(f"{case}: a context of {case.n_ctx} tokens; at most {MOST} are allowed")
    return cases
