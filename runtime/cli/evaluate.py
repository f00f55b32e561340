"""gguf-eval: how good is a model, and what did a quantization, a cache type or a device cost?

Results go to stdout, as a table and figures or, with --json, as one object; everything else goes to stderr.
"""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguf_run.formats.errors import OptionError
from gguf_run.runtime.cli import complete
from gguf_run.runtime.cli.common import Group, tool
from gguf_run.runtime.cli.load_options import CTX_SIZE, DEVICE_OPTIONS, PATH, RUNTIME_OPTIONS
from gguf_run.runtime.terminal.text import read_text

if TYPE_CHECKING:
    from gguf_run.runtime.evaluate.choices import Accuracy, Question

MODEL = click.Argument(["model"], shell_complete=complete.models)
JSON = click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object.")
TEXT = click.Option(["--file", "-f"], type=PATH, required=True, help="The text, UTF-8.")
CHUNK_SIZE = click.Option(["--ctx-size", "-c", "n_ctx"], type=int, help="Tokens of a chunk.  [default: 512]")
CHUNKS = click.Option(["--chunks", "n_chunk"], type=int, help="Stop after so many.  [default: the whole text]")
STRIDE = click.Option(["--stride"], type=int, help="Tokens from one window to the next.")
TASK_FILE = click.Option(["--file", "-f"], type=PATH, required=True, help="The tasks.")
TASKS = click.Option(["--tasks", "n_task"], type=int, help="Stop after so many.  [default: all]")
KL_OPTIONS = (
    click.Option(
        ["--base"],
        shell_complete=complete.models,
        help="The model to compare with.  [default: MODEL itself, with --base-options]",
    ),
    click.Option(["--base-options"], help='What is different for the base, as in "--cache-type f32 -t 4".'),
    click.Option(["--save-logits"], type=PATH, help="Save MODEL's logits for --base-logits; compare nothing."),
    click.Option(["--base-logits"], type=PATH, help="Saved logits of the base; with --base, checked to be its."),
)


_AT_LEAST_1 = click.IntRange(1)
SCALES_OPTIONS = (
    click.Option(["--output", "-o"], type=PATH, required=True, help="The calibration file to write, JSON."),
    CHUNK_SIZE,
    click.Option(["--chunks", "n_chunk"], type=_AT_LEAST_1, default=16, show_default=True, help="Chunks to read."),
    click.Option(
        ["--types"],
        metavar="TYPE,...",
        shell_complete=complete.cache_types,
        help="Cache types to try in each layer: q4_0,q8_0",
    ),
    click.Option(["--bits"], type=float, help="Choose each layer's types: bits a number, on average."),
    click.Option(
        ["--probe-chunks", "n_probed"], type=_AT_LEAST_1, default=2, show_default=True, help="Chunks for each try."
    ),
)


@tool(
    "gguf-eval",
    Group,
    examples=(
        "gguf-eval perplexity model.gguf -f wiki.test.raw --chunks 64",
        "gguf-eval kl q4.gguf --base f16.gguf -f wiki.test.raw",
        "gguf-eval hellaswag model.gguf -f hellaswag_val_400.txt --tasks 100",
    ),
)
def main() -> None:
    """Measure the quality of a GGUF language model. MODEL is a GGUF file or hf:owner/repo[:Q4_K_M]."""


def _command(*params: click.Option, examples: Sequence[str]) -> Callable[[Callable[..., None]], click.Command]:
    return main.command(params=[MODEL, *params, *RUNTIME_OPTIONS, JSON], examples=examples)


@_command(
    TEXT,
    CHUNK_SIZE,
    CHUNKS,
    STRIDE,
    examples=(
        "gguf-eval perplexity model.gguf -f wiki.test.raw",
        "gguf-eval perplexity model.gguf -f wiki.test.raw --chunks 64 -ct q8_0",
        "gguf-eval perplexity model.gguf -f wiki.test.raw -c 2048 --stride 512 --json",
    ),
)
def perplexity(
    model: str, file: Path, n_ctx: int | None, n_chunk: int | None, stride: int | None, as_json: bool, **options: Any
) -> None:
    """Perplexity of a text, as llama.cpp measures it: of each chunk of --ctx-size tokens, the second half is scored.

    With --stride N, windows of --ctx-size + N/2 tokens overlap; the last N tokens of each are scored.
    """
    from gguf_run.runtime.cli.evaluate_report import PERPLEXITY, Run, load_scorer
    from gguf_run.runtime.evaluate.perplexity import perplexity
    from gguf_run.runtime.evaluate.text import N_CTX, bos_of, cut_chunks, tokens_of, window_size

    n_ctx = N_CTX if n_ctx is None else n_ctx
    size = window_size(n_ctx, stride)
    text = read_text(file)
    with load_scorer(model, size, options) as scorer:
        chunks = cut_chunks(tokens_of(scorer.model, text), n_ctx, bos_of(scorer.model), n_chunk, stride)
        run = Run(PERPLEXITY, as_json)
        done = run.all(perplexity(scorer, chunks), chunks)
        facts = {"model": model, "file": str(file), **options, "n_ctx": n_ctx, "stride": stride}
        facts["running"] = [step.value for step in done]
        run.finish(facts, scorer.model.where)


@_command(
    TEXT,
    *KL_OPTIONS,
    CHUNK_SIZE,
    CHUNKS,
    examples=(
        "gguf-eval kl q4.gguf --base f16.gguf -f wiki.test.raw --chunks 16",
        "gguf-eval kl model.gguf --base-options '--cache-type f32' -ct q4_0 -f text.txt",
        "gguf-eval kl f16.gguf -f text.txt --save-logits f16.logits",
        "gguf-eval kl q4.gguf -f text.txt --base-logits f16.logits",
    ),
)
def kl(
    model: str,
    file: Path,
    base: str | None,
    base_options: str | None,
    save_logits: Path | None,
    base_logits: Path | None,
    n_ctx: int | None,
    n_chunk: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """How far MODEL's predictions over a text are from those of a base: Kullback-Leibler divergence, change of the
    right token's probability, agreement on the most likely token, ratio of perplexities.

    The base is another model, the same model with other --base-options, or logits that were saved before.
    """
    from gguf_run.runtime.cli.evaluate_kl import KlRun
    from gguf_run.runtime.evaluate.text import window_size

    if save_logits is not None and (base, base_options, base_logits) != (None, None, None):
        raise OptionError("--save-logits saves the logits of MODEL: leave out --base, --base-options and --base-logits")
    if (save_logits, base, base_options, base_logits) == (None, None, None, None):
        raise OptionError("nothing to compare with: give --base, --base-options or --base-logits, or --save-logits")
    if base_logits is not None and base_options is not None:
        raise OptionError("--base-logits are what the base gave: --base-options change nothing, leave them out")
    if n_ctx is not None:
        window_size(n_ctx)
    theirs = read_options(base_options or "", options)
    run = KlRun(model, str(file), read_text(file), n_ctx, n_chunk, options, as_json)
    if save_logits is not None:
        run.save(save_logits)
    elif base_logits is not None:
        run.compare_saved(base_logits, base)
    else:
        run.compare_live(base or model, theirs)


@main.command(
    "kv-scales",
    params=[MODEL, TEXT, *SCALES_OPTIONS, *DEVICE_OPTIONS],
    examples=(
        "gguf-eval kv-scales model.gguf -f text.txt -o scales.json",
        "gguf-eval kv-scales model.gguf -f t.txt -o kv.json --types q4_0,q8_0 --bits 6",
        "gguf-run model.gguf --cache-scales scales.json --chat",
    ),
)
def kv_scales(
    model: str,
    file: Path,
    output: Path,
    n_ctx: int | None,
    n_chunk: int,
    n_probed: int,
    types: str | None,
    bits: float | None,
    **options: Any,
) -> None:
    """Calibrate the KV cache: the largest keys and values of each layer and head, for static scales of fp8.

    With --types, also how much each layer suffers if its keys or values alone have that type, and with --bits the
    types of each layer that suffer least within a budget. Where a model's weights are quantized, rounding drowns the
    differences between layers: calibrate its F16 form, the file serves both.
    """
    from gguf_run.runtime.cli.evaluate_kv_scales import run

    run(model, file, output, n_ctx, n_chunk, n_probed, types.split(",") if types else [], bits, options)


def read_options(text: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """Read --base-options; what they do not name is as for MODEL."""
    command = click.Command("--base-options", params=list(RUNTIME_OPTIONS), add_help_option=False)
    try:
        return command.make_context("--base-options", shlex.split(text), default_map=defaults).params
    except (click.UsageError, ValueError) as error:
        problem = error.format_message() if isinstance(error, click.UsageError) else str(error)
        allowed = ", ".join(option.opts[0] for option in RUNTIME_OPTIONS)
        raise OptionError(f"--base-options {text!r}: {problem.rstrip('.')}; allowed are {allowed}") from None


@_command(
    TASK_FILE,
    TASKS,
    CTX_SIZE,
    examples=(
        "gguf-eval hellaswag model.gguf -f hellaswag_val_400.txt",
        "gguf-eval hellaswag model.gguf -f hellaswag_val_400.txt --tasks 100 -t 4",
        "gguf-eval hellaswag model.gguf -f hellaswag_val_400.txt --json",
    ),
)
def hellaswag(model: str, file: Path, n_task: int | None, n_ctx: int | None, as_json: bool, **options: Any) -> None:
    """HellaSwag: how often the right one of four endings is the most likely.

    The file has llama.cpp's form, six lines a task: context, number of the right ending from 0, four endings. Tasks are
    taken in the order in which llama.cpp draws them.
    """
    from gguf_run.runtime.evaluate.choices import llama_cpp_order, read_hellaswag

    questions = read_hellaswag(read_text(file), str(file))
    order = llama_cpp_order(len(questions))
    _choose(model, file, [questions[i] for i in order], n_task, n_ctx, as_json, options)


@_command(
    TASK_FILE,
    TASKS,
    CTX_SIZE,
    examples=(
        "gguf-eval choices model.gguf -f questions.jsonl",
        "gguf-eval choices model.gguf -f questions.jsonl --tasks 50",
        "gguf-eval choices model.gguf -f questions.jsonl --json",
    ),
)
def choices(model: str, file: Path, n_task: int | None, n_ctx: int | None, as_json: bool, **options: Any) -> None:
    """Multiple choice: how often the right choice is the most likely.

    Each line of the file is {"prompt": text, "choices": [text, ...], "answer": number from 0, or the right text}.
    """
    from gguf_run.runtime.evaluate.choices import read_choices

    _choose(model, file, read_choices(read_text(file), str(file)), n_task, n_ctx, as_json, options)


def _choose(
    model: str,
    file: Path,
    questions: "Sequence[Question]",
    n_task: int | None,
    n_ctx: int | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    from gguf_run.runtime.cli.evaluate_report import Figure, Kind, Run, load_scorer
    from gguf_run.runtime.evaluate.choices import accuracy, make_tasks

    if n_task is not None and n_task < 1:
        raise OptionError(f"--tasks is {n_task}; allowed: at least 1")

    def figures(done: "Accuracy") -> list[Figure]:
        return [
            Figure("acc_norm", "accuracy, normalized", *done.normalized, percent=True),
            Figure("acc", "accuracy by sum", *done.by_sum, percent=True),
        ]

    def row(done: "Accuracy") -> str:
        value, (low, high) = done.normalized
        return f"{done.n:>5} {100 * value:>10.3f} % {100 * low:>10.3f} to {100 * high:.3f} %"

    with load_scorer(model, n_ctx, options) as scorer:
        tasks = make_tasks(scorer.model, questions[:n_task], str(file))
        run = Run(Kind("tasks", f"{'task':>5} {'normalized':>12} {'95 % interval':>22}", row, figures), as_json)
        run.all(accuracy(scorer, tasks), tasks)
        run.finish({"model": model, "file": str(file), **options}, scorer.model.where)
