"""gguf-eval: how good is a model, and what did a quantization, a cache type or a device cost?"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguf_run.formats.errors import OptionError
from gguf_run.runtime.cli import complete
from gguf_run.runtime.cli.common import Group, tool
from gguf_run.runtime.cli.options import CTX_SIZE, DEVICE_OPTIONS, PATH, RUNTIME_OPTIONS, option
from gguf_run.runtime.terminal.text_input import read_text

if TYPE_CHECKING:
    from gguf_run.runtime.evaluate.choices import Accuracy, Question

MODEL = click.Argument(["model"], shell_complete=complete.models)
JSON = option("--json as_json", "Print one JSON object.", is_flag=True)
TEXT = option("--file -f", "The text, UTF-8.", type=PATH, required=True)
CHUNK_SIZE = option("--ctx-size -c n_ctx", "Tokens of a chunk.  [default: 512]", type=int)
CHUNKS = option("--chunks n_chunk", "Read so many chunks.  [default: the whole text]", type=int)
SKIP = option("--skip n_skip", "Skip so many chunks first.", type=click.IntRange(0), default=0)
STRIDE = option("--stride", "Tokens from one window to the next.", type=int)
TASK_FILE = option("--file -f", "The tasks.", type=PATH, required=True)
TASKS = option("--tasks", "Take so many tasks, or those from A to B in their order.  [default: all]", metavar="N|A-B")
KL_OPTIONS = [
    option(
        "--base",
        "The model to compare with.  [default: MODEL itself, with --base-options]",
        shell_complete=complete.models,
    ),
    option("--base-options", 'Options that differ for the base, as in "--cache-type f32 -t 4".'),
    option("--save-logits", "Save MODEL's logits for --base-logits; compare nothing.", type=PATH),
    option("--base-logits", "Compare with saved logits. With --base: they must be of that model.", type=PATH),
]
COMPARE_OPTIONS = [
    option("--base", "The model to compare with.", required=True, shell_complete=complete.models),
    option("--file -f files", "A text, UTF-8; may be repeated.", type=PATH, multiple=True, required=True),
    CHUNK_SIZE,
    option("--chunks n_chunk", "Read so many chunks of each text.  [default: 20]", type=int),
    SKIP,
    option("--by-layer", "Show what each layer loses: the base with that layer from the file.", is_flag=True),
    option("--output -o", "Write a picture, SVG: divergence by size, or by layer.", type=PATH),
    *RUNTIME_OPTIONS,
    JSON,
]
SCALES_OPTIONS = [
    option("--output -o", "The calibration file to write, JSON.", type=PATH, required=True),
    CHUNK_SIZE,
    option("--chunks n_chunk", "Chunks to read.", type=click.IntRange(1), default=16),
    option(
        "--types",
        "Cache types to try in each layer: q4_0,q8_0",
        metavar="TYPE,...",
        shell_complete=complete.cache_types,
    ),
    option("--bits", "Choose types of so many bits a number, on average.", type=float),
    option("--probe-chunks n_probed", "Chunks for each try.", type=click.IntRange(1), default=2),
]


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


def _command(params: Sequence[click.Option], examples: Sequence[str]) -> Callable[[Callable[..., None]], click.Command]:
    return main.command(params=[MODEL, *params, *RUNTIME_OPTIONS, JSON], examples=examples)


@_command(
    [TEXT, CHUNK_SIZE, CHUNKS, SKIP, STRIDE],
    examples=(
        "gguf-eval perplexity model.gguf -f wiki.test.raw",
        "gguf-eval perplexity model.gguf -f wiki.test.raw --skip 64 -ct q8_0",
        "gguf-eval perplexity model.gguf -f wiki.test.raw -c 2048 --stride 512 --json",
    ),
)
def perplexity(
    model: str, file: Path, n_ctx: int | None, n_chunk: int | None, n_skip: int, stride: int | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Perplexity of a text, measured as llama.cpp does: the second half of each chunk of --ctx-size tokens is scored.

    With --stride N, windows of --ctx-size + N/2 tokens overlap, and the last N tokens of each window are scored.
    """
    from gguf_run.runtime.cli.report import PERPLEXITY, Report, load_scorer
    from gguf_run.runtime.evaluate.perplexity import perplexity
    from gguf_run.runtime.evaluate.text import N_CTX, bos_of, cut_chunks, tokens_of, window_size

    n_ctx = N_CTX if n_ctx is None else n_ctx
    size = window_size(n_ctx, stride)
    text = read_text(file)
    with load_scorer(model, options, n_ctx=size) as scorer:
        chunks = cut_chunks(tokens_of(scorer.model, text), n_ctx, bos_of(scorer.model), n_chunk, stride, n_skip)
        report = Report(PERPLEXITY, as_json)
        report.run(perplexity(scorer, chunks), chunks)
        facts = {"model": model, "file": str(file), **options, "n_ctx": n_ctx, "skip": n_skip, "stride": stride}
        facts["running"] = [step.value for step in report.done]
        report.finish(facts, scorer.model.where)


@_command(
    [TEXT, *KL_OPTIONS, CHUNK_SIZE, CHUNKS, SKIP],
    examples=(
        "gguf-eval kl q4.gguf --base f16.gguf -f wiki.test.raw --chunks 16",
        "gguf-eval kl model.gguf --base-options '--cache-type f32' -ct q4_0 -f text.txt",
        "gguf-eval kl f16.gguf -f text.txt --save-logits f16.logits",
        "gguf-eval kl q4.gguf -f text.txt --base-logits f16.logits",
    ),
)
def kl(**given: Any) -> None:
    """How far the predictions of MODEL over a text are from those of a base.

    The figures are the Kullback-Leibler divergence, the change of the right token's probability, how often both find
    the same token most likely, and the ratio of perplexities. The base is another model, the same model with other
    --base-options, or logits that were saved before.
    """
    from gguf_run.runtime.cli.evaluate_kl import KlJob

    options = {str(option.name): given.pop(str(option.name)) for option in RUNTIME_OPTIONS}
    KlJob(**given, options=options).run()


@main.command(
    params=[click.Argument(["models"], nargs=-1, required=True, shell_complete=complete.models), *COMPARE_OPTIONS],
    examples=(
        "gguf-eval compare q4.gguf q4-gptq.gguf --base f16.gguf -f wiki.txt -f code.txt",
        "gguf-eval compare q3.gguf q4.gguf --base f16.gguf -f wiki.txt -o quality.svg",
        "gguf-eval compare q4.gguf --base f16.gguf -f wiki.txt --chunks 64 --json",
        "gguf-eval compare q4.gguf --base f16.gguf -f wiki.txt --by-layer -o layers.svg",
    ),
)
def compare(**given: Any) -> None:
    """Compare files of one model with a base, on the same tokens: size, divergence, agreement.

    Standard errors are by chunks. The divergence of each file is also given as a part of the first one's, with the
    standard error of that ratio, which is far smaller than those of the two.
    """
    from gguf_run.runtime.cli.evaluate_compare import run

    run(**given)


@main.command(
    "kv-scales",
    params=[MODEL, TEXT, *SCALES_OPTIONS, *DEVICE_OPTIONS],
    examples=(
        "gguf-eval kv-scales model.gguf -f text.txt -o scales.json",
        "gguf-eval kv-scales model.gguf -f t.txt -o kv.json --types q4_0,q8_0 --bits 6",
        "gguf-run model.gguf --cache-scales scales.json --chat",
    ),
)
def kv_scales(**options: Any) -> None:
    """Calibrate the KV cache: find the largest keys and values of each layer and head, for static scales of fp8.

    With --types, also measure how much each layer suffers if its keys or values alone have that type. With --bits, also
    choose the types of each layer that suffer least within a budget. Calibrate the F16 form of a quantized model: the
    rounding of quantized weights hides the differences between layers, and the file serves both.
    """
    from gguf_run.runtime.cli.evaluate_kv_scales import run

    run(**options)


@_command(
    [TASK_FILE, TASKS, CTX_SIZE],
    examples=(
        "gguf-eval hellaswag model.gguf -f hellaswag_val_400.txt",
        "gguf-eval hellaswag model.gguf -f hellaswag_val_400.txt --tasks 100 -t 4",
        "gguf-eval hellaswag model.gguf -f hellaswag_val_400.txt --tasks 101-200 --json",
    ),
)
def hellaswag(file: Path, **options: Any) -> None:
    """HellaSwag: how often the right one of four endings is the most likely.

    The file has llama.cpp's form, six lines a task: the context, the number of the right ending from 0, four endings.
    Tasks are taken in the order in which llama.cpp draws them.
    """
    from gguf_run.runtime.evaluate.choices import llama_cpp_order, read_hellaswag

    questions = read_hellaswag(read_text(file), str(file))
    _answer([questions[i] for i in llama_cpp_order(len(questions))], file, **options)


@_command(
    [TASK_FILE, TASKS, CTX_SIZE],
    examples=(
        "gguf-eval choices model.gguf -f questions.jsonl",
        "gguf-eval choices model.gguf -f questions.jsonl --tasks 50",
        "gguf-eval choices model.gguf -f questions.jsonl --json",
    ),
)
def choices(file: Path, **options: Any) -> None:
    """Multiple choice: how often the right choice is the most likely.

    Each line of the file is {"prompt": text, "choices": [text, ...], "answer": number from 0, or the right text}.
    """
    from gguf_run.runtime.evaluate.choices import read_choices

    _answer(read_choices(read_text(file), str(file)), file, **options)


def _answer(
    questions: "Sequence[Question]",
    file: Path,
    model: str,
    tasks: str | None,
    n_ctx: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Let the model answer questions; print how many answers are right."""
    from gguf_run.runtime.cli.report import Figure, Layout, Report, load_scorer
    from gguf_run.runtime.evaluate.choices import accuracy, make_tasks

    chosen = _range(tasks, len(questions))

    def figures(done: "Accuracy") -> list[Figure]:
        return [
            Figure("acc_norm", "accuracy, normalized", *done.normalized, percent=True),
            Figure("acc", "accuracy by sum", *done.by_sum, percent=True),
        ]

    def row(done: "Accuracy") -> str:
        value, (low, high) = done.normalized
        return f"{done.n:>5} {100 * value:>10.3f} % {100 * low:>10.3f} to {100 * high:.3f} %"

    with load_scorer(model, options, n_ctx=n_ctx) as scorer:
        todo = make_tasks(scorer.model, questions[chosen], str(file))
        layout = Layout("tasks", f"{'task':>5} {'normalized':>12} {'95 % interval':>22}", row, figures)
        report = Report(layout, as_json)
        report.run(accuracy(scorer, todo), todo)
        report.finish({"model": model, "file": str(file), **options}, scorer.model.where)


def _range(text: str | None, n: int) -> slice:
    """Return the tasks that --tasks names: "20" the first 20, "21-40" those from the 21st to the 40th. n: all tasks."""
    match = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})", text or str(n))
    first, last = (int(match[1] or 1), int(match[2])) if match else (0, 0)
    if not 1 <= first <= min(last, n):
        raise OptionError(f"--tasks is {text}; allowed: a number from 1, or a range such as 21-40; there are {n} tasks")
    return slice(first - 1, last)
