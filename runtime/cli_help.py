"""What `--help` shows: how to call a command, its options in groups, examples, exit codes, the environment.

Imported only when it is asked for. As wide as the terminal (or COLUMNS says), 100 at most; 80 in a pipe.
"""

import shutil
from collections.abc import Mapping

import click

from gguf_run.runtime import cli_cache, cli_device
from gguf_run.runtime.cli_sampling import NAMES as SAMPLING
from gguf_run.runtime.cli_style import has_colours

MOST_COLUMNS = 100
# Options by the names that commands get them under; all others stand in the first group.
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Options", ()),
    ("Sampling", SAMPLING),
    ("Context", ("context_shift", "keep", "session", *cli_cache.NAMES)),
    ("What runs where", ("threads", *cli_device.NAMES, "gpu_memory")),
    ("Change metadata", ("assignments", "remove", "in_place")),
)
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "cli": (
        'gguf-run --prompt "What is the capital of France?"',
        "gguf-run model.gguf --chat -c 16384 -ct q8_0",
        'gguf-run hf:bartowski/Llama-3.2-1B-Instruct-GGUF:Q5_K_M -p "Hello" --temp 0',
        "cat article.txt | gguf-run model.gguf --system 'Sum up in one sentence.'",
        "gguf-run model.gguf --raw --file story.txt -n 200 --seed 1",
    ),
    "cli_info": (
        "gguf-info model.gguf -c 32768",
        "gguf-info --fit model.gguf",
        "gguf-info model.gguf --tensors --match 'blk.0' --stats",
        "gguf-info f16.gguf --diff q4.gguf --json",
        "gguf-info model.gguf --set general.name='My model' -o new.gguf",
    ),
    "cli_tokenize": (
        'gguf-tokenize model.gguf "Hello world"',
        'gguf-tokenize model.gguf "Hello world" --ids',
        "gguf-tokenize model.gguf --file book.txt --count",
    ),
    "main": (
        "gguf-eval perplexity model.gguf -f wiki.test.raw --chunks 64",
        "gguf-eval kl q4.gguf --base f16.gguf -f wiki.test.raw",
        "gguf-eval hellaswag model.gguf -f hellaswag_val_400.txt --tasks 100",
    ),
    "perplexity": (
        "gguf-eval perplexity model.gguf -f wiki.test.raw",
        "gguf-eval perplexity model.gguf -f wiki.test.raw --chunks 64 -ct q8_0",
        "gguf-eval perplexity model.gguf -f wiki.test.raw -c 2048 --stride 512 --json",
    ),
    "kl": (
        "gguf-eval kl q4.gguf --base f16.gguf -f wiki.test.raw --chunks 16",
        "gguf-eval kl model.gguf --base-options '--cache-type f32' -ct q4_0 -f text.txt",
        "gguf-eval kl f16.gguf -f text.txt --save-logits f16.logits",
        "gguf-eval kl q4.gguf -f text.txt --base-logits f16.logits",
    ),
    "kv-scales": (
        "gguf-eval kv-scales model.gguf -f text.txt -o scales.json",
        "gguf-eval kv-scales model.gguf -f t.txt -o kv.json --types q4_0,q8_0 --bits 6",
        "gguf-run model.gguf --cache-scales scales.json --chat",
    ),
    "hellaswag": (
        "gguf-eval hellaswag model.gguf -f hellaswag_val_400.txt",
        "gguf-eval hellaswag model.gguf -f hellaswag_val_400.txt --tasks 100 -t 4",
        "gguf-eval hellaswag model.gguf -f hellaswag_val_400.txt --json",
    ),
    "choices": (
        "gguf-eval choices model.gguf -f questions.jsonl",
        "gguf-eval choices model.gguf -f questions.jsonl --tasks 50",
        "gguf-eval choices model.gguf -f questions.jsonl --json",
    ),
    "cli_bench": (
        "gguf-bench model.gguf",
        "gguf-bench q4.gguf q8.gguf -p 128-512*2 -n 64 -r 3",
        "gguf-bench model.gguf -t 1,2,4 -d 0,8192 -ct f16,q8_0",
        "gguf-bench model.gguf -o csv > speed.csv",
    ),
    "cli_quantize": (
        "gguf-quantize f16.gguf q4.gguf Q4_K_M",
        "gguf-quantize f16.gguf q3.gguf Q3_K_M --imatrix imatrix.gguf",
        "gguf-quantize f16.gguf Q5_K_S --dry-run",
        "gguf-quantize f16.gguf out.gguf Q4_K_M --tensor-type ffn_down=Q6_K",
    ),
    "cli_convert": (
        "gguf-convert folder",
        "gguf-convert folder -o model.gguf --type Q4_K_M",
        "gguf-convert hf:Qwen/Qwen3-0.6B --dry-run",
        "gguf-convert model.gguf -o folder --to-hf",
    ),
    "cli_imatrix": (
        "gguf-imatrix f16.gguf -f calibration.txt -o imatrix.gguf",
        "gguf-imatrix f16.gguf -f calibration.txt -o imatrix.gguf --chunks 100",
        "gguf-imatrix --in-file a.gguf --in-file b.gguf -o both.gguf",
        "gguf-imatrix --in-file imatrix.gguf --show-statistics",
    ),
}
EXIT_CODES = (
    ("0", "all went well"),
    ("1", "an error, which one line on stderr tells"),
    ("2", "wrong usage, or an option's value that is not allowed"),
    ("130", "interrupted with Ctrl-C"),
    ("141", "the reader of the output went away, as in `| head`"),
)
ENVIRONMENT = (
    ("XDG_CACHE_HOME", "where gguf-run/ with compiled kernels and downloaded models lies [default: ~/.cache]"),
    ("HF_TOKEN", "for models on the Hugging Face hub that want one; HF_HOME, HF_HUB_CACHE, HF_ENDPOINT work too"),
    ("NO_COLOR", "if set, no colours; there are none in a pipe either"),
    ("COLUMNS", "the width of this text"),
)


class _Formatter(click.HelpFormatter):
    def write_heading(self, heading: str) -> None:
        super().write_heading(click.style(heading, bold=True) if has_colours() else heading)


def example_key(command: click.Command) -> str:
    """The command's key in EXAMPLES."""
    module = getattr(command.callback, "__module__", "").rpartition(".")[2]
    return module if command.name == "main" and not isinstance(command, click.Group) else str(command.name)


def help_text(command: click.Command, context: click.Context) -> str:
    """Return all that --help shows of a command."""
    formatter = _Formatter(width=max(40, min(shutil.get_terminal_size().columns, MOST_COLUMNS) - 2))
    command.format_usage(context, formatter)
    command.format_help_text(context, formatter)
    if isinstance(command, click.Group):
        command.format_commands(context, formatter)
    options = [option for option in command.get_params(context) if isinstance(option, click.Option)]
    titles = {name: title for title, names in GROUPS for name in names}
    for title, _ in GROUPS:
        members = [option for option in options if titles.get(option.name or "", "Options") == title]
        if records := [row for option in members if (row := option.get_help_record(context))]:
            with formatter.section(title):
                formatter.write_dl(records)
    with formatter.section("Examples"):
        for line in EXAMPLES[example_key(command)]:
            formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
    for title, rows in (("Exit codes", EXIT_CODES), ("Environment", ENVIRONMENT)):
        with formatter.section(title):
            formatter.write_dl(rows)
    return formatter.getvalue().rstrip("\n")
