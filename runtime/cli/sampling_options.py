"""gguf-run's options of sampling: llama.cpp's names, for the fields of SamplingParams."""

import re
from collections.abc import Callable
from typing import Any

import click

from gguf_run.runtime.sampling.params import DEFAULT_CHAIN, SamplingParams

# (flags, field of SamplingParams, help)
_OPTIONS = (
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
    ("--dynatemp-exp", "dynatemp_exponent", "How the entropy is mapped to that range."),
    ("--mirostat", "mirostat", "Keep the surprise of the text constant: 1 or 2, instead of other samplers; 0 is off."),
    ("--mirostat-ent", "mirostat_tau", "Mirostat's surprise in bits."),
    ("--mirostat-lr", "mirostat_eta", "How fast mirostat learns."),
    ("--adaptive-target", "adaptive_target", "For the sampler adaptive_p: prefer tokens of this probability."),
    ("--adaptive-decay", "adaptive_decay", "How slowly adaptive_p forgets."),
)
_TAKEN = (*(name for _, name, _ in _OPTIONS), "seed", "samplers", "ignore_eos")  # as they are
NAMES = (*_TAKEN, "logit_bias", "dry_sequence_breakers")


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a click command."""
    for option in (
        click.option("--ignore-eos", is_flag=True, help="The model cannot end its answer: -n or the context does."),
        click.option("--seed", type=int, help="Repeat a draw.  [default: a new one each time]"),
        click.option(
            "--logit-bias", "-l", multiple=True, metavar="ID+BIAS",
            help="Add to a token's logit, as 15043+1 or 15043-inf; may be repeated.",
        ),
        click.option(
            "--dry-sequence-breaker", "dry_sequence_breakers", multiple=True, metavar="TEXT", show_default=False,
            help="DRY starts anew after this text; may be repeated; none: nowhere.  [default: line end, : \" *]",
        ),
        click.option(
            "--samplers", default=";".join(DEFAULT_CHAIN), metavar="NAMES", show_default=False,
            help="Samplers in their order: names with ; between them, or letters.  [default: edskypmxt]",
        ),
    ):  # fmt: skip
        command = option(command)
    for flags, name, text in reversed(_OPTIONS):
        default = getattr(SamplingParams, name)
        command = click.option(*flags.split(), name, type=type(default), default=default, help=text)(command)
    return command


def take_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Take them out of a command's options, as arguments of SamplingParams."""
    found = {name: options.pop(name) for name in _TAKEN}
    if biases := options.pop("logit_bias"):
        found["logit_bias"] = dict(_bias(text) for text in biases)
    if breakers := options.pop("dry_sequence_breakers"):
        found["dry_sequence_breakers"] = [text for text in breakers if text != "none"]
    return found


def _bias(text: str) -> tuple[int, float]:
    match = re.fullmatch(r"(\d{1,9})([+-](?:\d{1,9}(?:\.\d*)?|inf))", text)
    if match is None:
        raise click.UsageError(f"--logit-bias {text}: write a token's id and what to add, as 15043+1.5 or 15043-inf.")
    return int(match[1]), float(match[2])
