"""gguf-bench serve: how fast a server answers many clients."""

import asyncio
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime.cli.common import tool
from gguf_run.runtime.cli.numbers import parse_values
from gguf_run.runtime.cli.options import PATH
from gguf_run.runtime.cli.session import check_place

if TYPE_CHECKING:
    from gguf_run.runtime.bench.serving import Outcome, Server

_WORKLOADS = ("mixed", "fixed", "shared", "intruder")
_TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}
_TITLES |= {"itl_before": "ITL before", "itl_during": "ITL meanwhile"}
_COLOURS = ("#2f81f7", "#db6d28", "#3fb950", "#a371f7", "#d29922", "#8b949e")  # both modes can show them
_MOST_CLIENTS, _MOST_RATE = 10_000, 10_000
_number = partial(click.option, type=click.IntRange(1, 1_000_000), metavar="N")


@tool(
    "gguf-bench serve",
    examples=(
        "gguf-bench serve http://127.0.0.1:8080",
        "gguf-bench serve http://127.0.0.1:8080 --clients 1,4,16 --workload fixed",
        "gguf-bench serve localhost:8080 --rate 0.5,1,2 --slo ttft:2000,tpot:100",
        "gguf-bench serve localhost:8080 -w intruder --clients 4 --json gaps.json",
    ),
)
@click.argument("url", metavar="URL")
@click.option("--clients", "-c", multiple=True, metavar="N,...", help="Clients that ask at once.  [default: 8]")
@click.option("--rate", multiple=True, metavar="R,...", help="Or requests per second, at random times.")
@click.option("--workload", "-w", default="mixed", type=click.Choice(_WORKLOADS), help="What is asked; see above.")
@_number("--prompt-tokens", "-p", help="Tokens of prompts, about.  [default: the workload's]")
@_number("--output-tokens", "-n", help="Tokens of answers.  [default: the workload's]")
@_number("--requests", "-r", help="Under each load.  [default: 4 for each client, at least 16]")
@click.option(
    "--seed", "first_seed", default=0, type=click.IntRange(0), metavar="N", help="Repeats lengths, words and times."
)
@click.option("--slo", multiple=True, metavar="NAME:MS,...", help="Count good answers: ttft, tpot, e2el are within MS.")
@click.option("--api", default="chat", type=click.Choice(["chat", "completions"]), help="What answers.")
@click.option("--model", help="The model's name there.  [default: the first that the server has]")
@click.option("--api-key", default="", metavar="KEY", help="The server's key.", show_default=False)
@click.option(
    "--ignore-eos/--no-ignore-eos", "to_length", default=True, help="Answers are as long as asked, or models end them."
)
@click.option("--json", "json_file", type=PATH, metavar="FILE", help="Write all figures, in vLLM's names.")
@click.option("--plot", type=PATH, metavar="FILE", help="Write a picture, SVG: how the times are spread.")
def main(url: str, json_file: Path | None, plot: Path | None, **given: Any) -> None:
    """Measure how fast a running server answers: gguf-serve, or any other that speaks OpenAI's API.

    Each of the --clients asks again when it has its answer. With --rate, requests come at random times instead
    (Poisson), however long answers take. Several values are measured one after the other.

    \b
    Workloads, with --prompt-tokens and --output-tokens:
      mixed     prompts of 30 to 2000 tokens, answers of 20 to 400; log-normal
      fixed     prompts of 256 tokens, answers of 128
      shared    a system prompt of 1000 tokens that all share; answers of 64
      intruder  while each client streams an answer of up to 1000 tokens,
                a prompt of 4000 arrives; this happens --requests times [3]

    \b
    Figures, in milliseconds:
      TTFT  from the request to the first text, with the time to connect
      TPOT  time of each further token: (E2E - TTFT) / (tokens - 1)
      ITL   gap between two events with text
      E2E   from the request to the last text

    Tokens are counted by the server. A first request is not measured. The client takes some time of this machine.
    """
    from gguf_run.runtime.bench.serving import WORKLOADS, Outcome, Server, first_model
    from gguf_run.runtime.bench.stream import Target
    from gguf_run.runtime.terminal.progress import Progress

    for option, path in (("--json", json_file), ("--plot", plot)):
        if path is not None:
            check_place(path, option)
    loads, slo = _loads(given), _slo(given["slo"])
    target = Target.of(url, given["api_key"])
    n_prompt, n_output, about = WORKLOADS[given["workload"]]
    sizes = (given["prompt_tokens"] or n_prompt, given["output_tokens"] or n_output)
    model = given["model"] or asyncio.run(first_model(target))
    server = Server(target, model, given["api"] == "chat", given["to_length"])
    click.echo(f"{model}: {about.format(*sizes)}")
    outcomes: list[tuple[str, Outcome]] = []
    try:
        # One loop for all: Ctrl-C while another is being made would leave half a loop.
        with asyncio.Runner() as runner, Progress("requests", "requests") as bar:
            for load in loads:
                outcome = runner.run(_measure(server, load, sizes, given, slo, bar.set))
                unit = " requests/s" if given["rate"] else " client" if load == 1 else " clients"
                outcomes.append((f"{load:g}{unit}", outcome))
                bar.clear()
                click.echo("\n".join(["", *_lines(*outcomes[-1], slo)]))
    finally:  # what is there is kept if Ctrl-C ends the rest
        if outcomes and json_file is not None:
            facts = {"url": url, "model": model, "api": given["api"], "workload": given["workload"], "slo_ms": slo}
            facts |= {"prompt_tokens": sizes[0], "output_tokens": sizes[1], "seed": given["first_seed"]}
            results = [{"load": load, **_fields(outcome)} for load, outcome in outcomes]
            json_file.write_text(json.dumps(facts | {"results": results}, indent=2) + "\n")
        if outcomes and plot is not None:
            plot.write_text(_picture(f"{model.split('/')[-1]}: {about.format(*sizes)}", outcomes))


def _loads(given: Mapping[str, Any]) -> list[float]:
    """Return numbers of clients, or requests per second. OptionError for values that are not allowed."""
    if not given["rate"]:
        return [*parse_values("--clients", given["clients"] or ["8"], 1, _MOST_CLIENTS)]
    if given["clients"] or given["workload"] == "intruder":
        raise OptionError("--rate sets when requests come: leave out --clients, and the workload intruder")
    try:
        rates = [float(part) for text in given["rate"] for part in text.split(",")]
    except ValueError:
        rates = [0.0]
    if not all(0 < rate <= _MOST_RATE for rate in rates):
        raise OptionError(
            f"--rate {','.join(given['rate'])}: must be numbers above 0, up to {_MOST_RATE}, with commas between them"
        )
    return rates


def _slo(texts: Sequence[str]) -> dict[str, float]:
    """Return milliseconds by figure, of "ttft:2000,tpot:100"."""
    found = {}
    for part in (part for text in texts for part in text.split(",")):
        name, _, number = part.partition(":")
        if name not in ("ttft", "tpot", "e2el") or re.fullmatch(r"\d{1,9}(\.\d+)?", number) is None:
            raise OptionError(f"--slo {part!r}: must be a figure and milliseconds: ttft:2000, tpot:100 or e2el:30000")
        found[name] = float(number)
    return found


async def _measure(
    server: "Server",
    load: float,
    sizes: tuple[int, int],
    given: Mapping[str, Any],
    slo: Mapping[str, float],
    show: Callable[[int, int], None],
) -> "Outcome":
    """Measure one load. The parameters are the command's."""
    from gguf_run.runtime.bench.serving import Outcome, arrivals, intrude, measure, questions
    from gguf_run.runtime.bench.stream import Record

    kind, rate, seed = given["workload"], given["rate"], given["first_seed"]
    first = Record()
    await server.ask(questions("fixed", 1, 32, 8, seed)[0], first)
    if first.error:
        raise GgufRunError(first.error)
    n_clients = 0 if rate else int(load)
    n = given["requests"] or (3 if kind == "intruder" else max(16, 4 * n_clients))
    if kind != "intruder":
        times = arrivals(load, n, seed) if rate else ()
        return await measure(server, questions(kind, n, *sizes, seed), times, n_clients, slo, show)
    figures: dict[str, list[float]] = {}
    for i, prompt in enumerate(questions("fixed", n, sizes[0], 8, seed)):
        for name, values in (await intrude(server, prompt, questions("fixed", n_clients, 32, sizes[1], seed))).items():
            figures.setdefault(name, []).extend(values)
        show(i + 1, n)
    return Outcome(figures, {"completed": n})


def _lines(load: str, outcome: "Outcome", slo: Mapping[str, float]) -> Iterator[str]:
    """Yield what people read of an outcome."""
    from gguf_run.runtime.bench.serving import STATISTICS
    from gguf_run.runtime.terminal.table import table

    totals = outcome.totals
    if "duration" in totals:
        yield f"{load}: {totals['completed']} answers in {totals['duration']:.1f} s"
        goodput = f", good {totals['request_goodput']:.2f}" if slo else ""
        yield (
            f"per second: requests {totals['request_throughput']:.2f}{goodput}, output tokens "
            f"{totals['output_throughput']:.1f}, all tokens {totals['total_token_throughput']:.1f}"
        )
        counted = "" if totals["total_input_tokens"] else " (one for each event: the server does not count)"
        yield (
            f"tokens: prompts {totals['total_input_tokens']}, answers {totals['total_output_tokens']}{counted}, "
            f"per event {totals['tokens_per_event']:.2f}"
        )
    else:
        yield f"{load}, {totals['completed']} long prompts"
    if outcome.error:
        yield f"failed: {totals['failed']}, the first by: {outcome.error}"
    rows = [
        [_TITLES[name], *(f"{statistic(values):.1f}" for statistic in STATISTICS.values())]
        for name, values in outcome.figures.items()
        if values
    ]
    yield from table(["ms", *STATISTICS], rows, "l" + "r" * len(STATISTICS))


def _fields(outcome: "Outcome") -> dict[str, Any]:
    """Return all figures in the names of vLLM's benchmark."""
    from gguf_run.runtime.bench.serving import STATISTICS

    return outcome.totals | {
        f"{statistic}_{name}_ms": round(float(compute(values)), 3)
        for name, values in outcome.figures.items()
        if values
        for statistic, compute in STATISTICS.items()
    }


def _picture(title: str, outcomes: "Sequence[tuple[str, Outcome]]") -> str:
    """Draw a panel for each figure: which part of its values is below so many milliseconds, a curve for each load."""
    import numpy as np

    from gguf_run.runtime.bench.drawing import Drawing

    names = [name for name in _TITLES if any(outcome.figures.get(name) for _, outcome in outcomes)]
    n_rows, width, height = -(-len(names) // 2), 330, 170
    drawing = Drawing(800, 60 + n_rows * (height + 70) + 8)
    drawing.text(16, 26, title)
    for i, (load, _) in enumerate(outcomes):
        drawing.curve([(16 + 130 * (i % 6), 42), (34 + 130 * (i % 6), 42)], _COLOURS[i % len(_COLOURS)])
        drawing.text(40 + 130 * (i % 6), 46, load, kind="soft")
    for i, name in enumerate(names):
        left, top = 50 + 390 * (i % 2), 80 + (height + 70) * (i // 2)
        curves = [np.percentile(values, range(101)) for _, o in outcomes if (values := o.figures[name])]
        low = math.floor(math.log10(max(0.01, min(curve[0] for curve in curves))))
        high = max(low + 1, math.ceil(math.log10(max(0.01, max(curve[-1] for curve in curves)))))
        scale = width / (high - low)
        drawing.text(left, top - 8, f"{_TITLES[name]}, ms", kind="title")
        for power in range(low, high + 1):
            x = left + (power - low) * scale
            drawing.line(x, top, x, top + height, "grid" if power > low else "axis")
            drawing.text(x, top + height + 16, f"{10.0**power:g}", "middle", "soft")
        for percent in (0, 50, 95):
            y = top + height * (1 - percent / 100)
            drawing.line(left, y, left + width, y, "grid" if percent else "axis")
            drawing.text(left - 6, y + 4, f"{percent} %", "end", "soft")
        for j, curve in enumerate(curves):
            xs = left + scale * (np.log10(np.maximum(curve, 10.0**low)) - low)
            points = [(float(x), top + height * (1 - part / 100)) for part, x in enumerate(xs)]
            drawing.curve(points, _COLOURS[j % len(_COLOURS)])
    return drawing.svg(title)
