"""Options that commands share: those of loading a model and of sampling, and the objects that are made from them.

The options of sampling have llama.cpp's names.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguf_run.formats.errors import OptionError
from gguf_run.runtime.load.options import ACTIVATIONS, LoadOptions
from gguf_run.runtime.sampling.params import DEFAULT_CHAIN, SamplingParams
from gguf_run.runtime.terminal.text import message

if TYPE_CHECKING:
    from gguf_run.runtime.cli.compiling import Compiling
    from gguf_run.runtime.model import Model
    from gguf_run.runtime.terminal.progress import Progress

PATH = click.Path(path_type=Path)


def offer(name: str) -> Callable[..., Any]:
    """Return a shell_complete=, a function of complete.py. The file is imported when a shell asks."""

    def complete_late(*asked: Any) -> Any:
        from gguf_run.runtime.cli import complete

        return getattr(complete, name)(*asked)

    return complete_late


def option(flags: str, text: str, **settings: Any) -> click.Option:
    """Make an option. flags: as "--ctx-size -c n_ctx"; the last word without dashes names the parameter."""
    return click.Option(flags.split(), help=text, **settings)


THREADS = option("--threads -t", "Threads that compute.  [default: physical cores]", type=int)
CTX_SIZE = option("--ctx-size -c n_ctx", "Positions of the context.  [default: the model's, at most 4096]", type=int)
BATCH_OPTIONS = [
    option("--batch-size -b", "Tokens of a prompt's parts, at most.", type=int, default=2048),
    option("--ubatch-size -ub", "Tokens of a part that run at once, at most.", type=int, default=512),
]
_cache_type_option = partial(option, metavar="TYPE", shell_complete=offer("cache_types"))
ROTATION = option(
    "--cache-rotation/--no-cache-rotation",
    "Rotate keys and values by a Hadamard transform: more exact.  [default: types of 8 bits or less]",
    default=None,
)
CACHE_OPTIONS = [
    _cache_type_option("--cache-type -ct", "Type of the KV cache: f16, q8_0, int8, q4_0, ...  [default: f16]"),
    _cache_type_option("--cache-type-k -ctk", "Type of the keys alone."),
    _cache_type_option("--cache-type-v -ctv", "Type of the values alone."),
    ROTATION,
    option(
        "--cache-scales",
        "A calibration file (gguf-eval kv-scales): scales of fp8, types of each layer.",
        metavar="FILE",
        shell_complete=offer("files"),
    ),
]
_LORA = "An adapter (LoRA), and how strongly it acts; may be repeated.  [default: 1]"
LORA = option("--lora", _LORA, multiple=True, metavar="FILE[:SCALE]", shell_complete=offer("files"))
SPECULATE = option("--speculate", "Guess tokens from the text so far: faster where an answer repeats it.", is_flag=True)
DRAFT_MODEL = option(
    "--draft-model", "A small model of the same vocabulary, which guesses tokens.", shell_complete=offer("models")
)
CHAT_TEMPLATE = option(
    "--chat-template",
    "In place of the model's own: a Jinja file, or chatml, llama3, ...",
    metavar="FILE|NAME",
    shell_complete=offer("chat_templates"),
)
PLACEMENT_OPTIONS = [
    option(
        "--gpu-layers -ngl",
        "So many of the last layers run on the GPU.  [default: auto, as many as fit]",
        metavar="N|auto|all",
        shell_complete=offer("layers"),
    ),
    option("--tensor-split -ts", "How several GPUs share these layers: 3,1  [default: by free memory]", metavar="N,N"),
    option("--cpu-moe -cmoe", "Keep the experts of all layers on the CPU.", is_flag=True),
    option(
        "--n-cpu-moe -ncmoe",
        "Keep the experts of the first N layers on the CPU.  [default: as few as possible]",
        type=int,
        metavar="N",
    ),
]
DEVICE_OPTIONS = [
    THREADS,
    option(
        "--device -dev",
        "Where the model runs: cpu, cuda, cuda:1, cuda:0,cuda:1, or auto.",
        default="auto",
        show_default=True,
        shell_complete=offer("devices"),
    ),
    *PLACEMENT_OPTIONS,
]
ACTIVATIONS_OPTION = option(
    "--activations",
    "What weights are multiplied with: float as it is, dynamic or static rounded as by vLLM. All but auto: CPU only.",
    type=click.Choice(ACTIVATIONS),
    default="auto",
    show_default=True,
)
# All that may differ between two runs of one model.
RUNTIME_OPTIONS = [*DEVICE_OPTIONS, *CACHE_OPTIONS, LORA, ACTIVATIONS_OPTION]
# (flags, field of SamplingParams, help). The field's default gives the option's default and type.
_SAMPLING = (
    ("--temp --temperature", "temperature", "0 always takes the most likely token."),
    ("--top-k", "top_k", "Choose among the k most likely tokens; 0 is off."),
    ("--top-p", "top_p", "Choose among the tokens that make up this probability; 1 is off."),
    ("--min-p", "min_p", "Choose among tokens at least this likely, the best being 1; 0 is off."),
    ("--typical --typical-p", "typical_p", "Choose among the tokens of typical surprise; 1 is off."),
    ("--top-nsigma --top-n-sigma", "top_n_sigma", "Choose among logits within n standard deviations; -1 is off."),
    ("--xtc-probability", "xtc_probability", "How often to exclude the top choices; 0 is off."),
    ("--xtc-threshold", "xtc_threshold", "Top choices are at least this likely; more than 0.5 is off."),
    ("--repeat-penalty", "repeat_penalty", "Make the last tokens less likely; 1 is off."),
    ("--repeat-last-n", "repeat_last_n", "How many tokens the penalties look back."),
    ("--presence-penalty", "presence_penalty", "Take this off the logits of the last tokens."),
    ("--frequency-penalty", "frequency_penalty", "Take this off for each time that a token came."),
    ("--dry-multiplier", "dry_multiplier", "Strength of DRY, which punishes repeated sequences; 0 is off."),
    ("--dry-base", "dry_base", "The penalty grows with this power of the sequence's length."),
    ("--dry-allowed-length", "dry_allowed_length", "Sequences up to this length may repeat."),
    ("--dry-penalty-last-n", "dry_penalty_last_n", "How many tokens DRY looks back."),
    ("--dynatemp-range", "dynatemp_range", "Temperature +- this, by how unsure the model is; 0 is off."),
    ("--dynatemp-exp", "dynatemp_exponent", "Exponent that maps the entropy to that range."),
    ("--mirostat", "mirostat", "Keep the surprise of the text constant, in place of other samplers: 1 or 2; 0 is off."),
    ("--mirostat-ent", "mirostat_tau", "Mirostat's surprise in bits."),
    ("--mirostat-lr", "mirostat_eta", "How fast mirostat learns."),
    ("--adaptive-target", "adaptive_target", "For the sampler adaptive_p: prefer tokens of this probability."),
    ("--adaptive-decay", "adaptive_decay", "How slowly adaptive_p forgets."),
)


def _numeric(flags: str, name: str, text: str) -> click.Option:
    default = getattr(SamplingParams, name)
    return option(f"{flags} {name}", text, type=type(default), default=default)


SAMPLING_OPTIONS = [
    *(_numeric(*row) for row in _SAMPLING),
    option("--ignore-eos", "The model cannot end its answer: -n or a full context ends it.", is_flag=True),
    option("--seed", "Number that makes a draw repeatable.  [default: a new one each time]", type=int),
    option(
        "--logit-bias -l",
        "Add to the logit of a token, as 15043+1 or 15043-inf; may be repeated.",
        multiple=True,
        metavar="ID+BIAS",
    ),
    option(
        "--dry-sequence-breaker dry_sequence_breakers",
        'DRY starts anew after this text; may be repeated; "none": never.  [default: line end, : " *]',
        multiple=True,
        metavar="TEXT",
        show_default=False,
    ),
    option(
        "--samplers",
        "Samplers in their order: names with ; between them, or letters.  [default: edskypmxt]",
        default=";".join(DEFAULT_CHAIN),
        metavar="NAMES",
        show_default=False,
        shell_complete=offer("samplers"),
    ),
]


_FIELDS = {field.name for field in fields(LoadOptions)}


def to_load_options(values: Mapping[str, Any], **more: Any) -> LoadOptions:
    """Make LoadOptions of a command's parameters.

    values: by name; names that are no options of loading are ignored. more: fields of LoadOptions that replace them.
    OptionError for values that are not allowed, or not together.
    """
    found = {name: value for name, value in values.items() if name in _FIELDS} | {"n_threads": values.get("threads")}
    if "ubatch_size" in values:
        found["n_batch"] = min(values["batch_size"], values["ubatch_size"])
    if {"cache_type_k", "cache_type_v"} & {*values}:
        found["cache_type"] = _cache_type(*(values[f"cache_type{suffix}"] for suffix in ("", "_k", "_v")))
    return LoadOptions(**(found | more))


def _cache_type(both: str | None, k: str | None, v: str | None) -> str | tuple[str, str] | None:
    if both is not None and (k or v):
        raise OptionError(f"--cache-type {both} sets K and V: leave out --cache-type-k and --cache-type-v")
    return both if k is None and v is None else (k or "f16", v or "f16")


def load_model(path: str | None, options: LoadOptions, progress: Callable[[int, int], None] | None = None) -> "Model":
    """Load a model. Lines on stderr say what runs where if a GPU is used. On a terminal a progress bar is shown.

    If kernels must be compiled, a line says so, and a bar counts them. progress: see Model.load.
    """
    from gguf_run.formats.compiler.jit import compile_notice
    from gguf_run.runtime.model import Model

    compiling: list[Compiling] = []
    with ExitStack() as stack:
        bar: Progress | None = None
        if sys.stderr is not None and sys.stderr.isatty():
            bar = stack.enter_context(_progress())

        def begin() -> None:
            from gguf_run.runtime.cli.compiling import Compiling  # late: most starts compile nothing

            compiling.append(stack.enter_context(Compiling(path, options, bar or _progress())))

        def show(done: int, total: int) -> None:
            if progress:
                progress(done, total)
            if bar and all(line.is_over for line in compiling):
                bar.set(done, total)

        with compile_notice(begin):
            report = bar.message if bar else message
            return Model.load(path, options, progress=show if bar or progress else None, report=report)


def _progress() -> "Progress":
    from gguf_run.runtime.terminal.progress import Progress  # late: most programs that call ours have no terminal

    return Progress("loading")


def take_sampling(values: dict[str, Any]) -> dict[str, Any]:
    """Take the options out of a command's parameters; return arguments of SamplingParams."""
    sampling = {str(option.name): values.pop(str(option.name)) for option in SAMPLING_OPTIONS}
    biases, breakers = sampling.pop("logit_bias"), sampling.pop("dry_sequence_breakers")
    if biases:
        from gguf_run.runtime.cli.chat_values import read_bias

        sampling["logit_bias"] = dict(map(read_bias, biases))
    if breakers:
        sampling["dry_sequence_breakers"] = [text for text in breakers if text != "none"]
    return sampling
