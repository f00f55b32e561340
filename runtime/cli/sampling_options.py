"""gguf-run's options of sampling: llama.cpp's names, for the fields of SamplingParams."""

import re
from typing import Any

import click

from gguf_run.runtime.cli import complete
from gguf_run.runtime.cli.load_options import option
from gguf_run.runtime.sampling.params import DEFAULT_CHAIN, SAMPLERS, SamplingParams

# (flags, field of SamplingParams, help). The field's default gives the option's default and type.
_ROWS = (
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


@complete.among
def _chains(typed: str) -> list[str]:
    """Return what is typed, with each name of a sampler behind its last semicolon."""
    before, sign, _ = typed.rpartition(";")
    return [f"{before}{sign}{name}" for name in SAMPLERS]


SAMPLING_OPTIONS = [
    *(_numeric(*row) for row in _ROWS),
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
        shell_complete=_chains,
    ),
]


def take_sampling(values: dict[str, Any]) -> dict[str, Any]:
    """Take the options out of a command's parameters; return arguments of SamplingParams."""
    sampling = {str(option.name): values.pop(str(option.name)) for option in SAMPLING_OPTIONS}
    biases, breakers = sampling.pop("logit_bias"), sampling.pop("dry_sequence_breakers")
    if biases:
        sampling["logit_bias"] = dict(_bias(text) for text in biases)
    if breakers:
        sampling["dry_sequence_breakers"] = [text for text in breakers if text != "none"]
    return sampling


def _bias(text: str) -> tuple[int, float]:
    match = re.fullmatch(r"(\d{1,9})([+-](?:\d{1,9}(?:\.\d*)?|inf))", text)
    if match is None:
        raise click.UsageError(f"--logit-bias {text}: write a token's id and what to add, as 15043+1.5 or 15043-inf.")
    return int(match[1]), float(match[2])
