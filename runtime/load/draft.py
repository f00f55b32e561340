"""Loads the model that guesses tokens for another one."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from gguf_run.formats.errors import OptionError
from gguf_run.runtime.engine.draft_model import DraftModel
from gguf_run.runtime.engine.speculation import Speculation
from gguf_run.runtime.load.options import LoadOptions

if TYPE_CHECKING:
    from gguf_run.models.decoder import Decoder
    from gguf_run.runtime.tokenizers.tokenizer import Tokenizer


class Loaded(Protocol):
    """What is needed of a LoadedModel."""

    @property
    def decoder(self) -> "Decoder": ...

    @property
    def tokenizer(self) -> "Tokenizer": ...

    @property
    def close(self) -> Sequence[Callable[[], None]]: ...


def speculation_of(
    load: Callable[[str, LoadOptions], Loaded],
    options: LoadOptions,
    n_ctx: int,
    tokens: Sequence[str],
    closes: list[Callable[[], None]],
) -> Speculation:
    """Return what guesses tokens, with the model that options.draft_model names.

    n_ctx, tokens: of the model that it guesses for. closes: gets what frees the draft model.
    OptionError if that one has another vocabulary or recurrent layers.
    """
    speculation = Speculation()
    if options.draft_model is None:
        return speculation
    path = os.fspath(options.draft_model)
    own = replace(
        options, n_ctx=n_ctx, draft_model=None, speculate=False, lora=(), cache_ram=None, cache_scales=None,
        quantize=None, observe=False,
    )  # fmt: skip
    parts = load(path, own)
    closes += [parts.decoder.close, *parts.close]
    found, problem = parts.tokenizer.tokens, ""
    if len(found) != len(tokens):
        problem = f"has {len(found)} tokens, the model {len(tokens)}"
    elif found != tokens:
        at = next(i for i, (ours, its) in enumerate(zip(tokens, found, strict=True)) if ours != its)
        problem = f"has {found[at]!r} as token {at}, the model {tokens[at]!r}"
    elif parts.decoder.cache.has_states:
        problem = "has recurrent layers, from which guesses cannot be taken back"
    if problem:
        for close in closes:
            close()
        raise OptionError(f"--draft-model {path}: {problem}; use a model with the same vocabulary and attention layers")
    speculation.draft = DraftModel(parts.decoder)
    return speculation
