"""The keywords of Model's methods, for editors and type checkers, which alone read this file.

They are the fields of LoadOptions, SamplingParams and ReplyParams, which have the defaults and the texts.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from gguf_run.models.backend import CacheType
    from gguf_run.runtime.engine.constraint import Constraint
    from gguf_run.runtime.engine.grammar import Grammar
    from gguf_run.runtime.sampling.params import LogitsProcessor


class LoadKeywords(TypedDict, total=False):
    """The fields of LoadOptions as keywords of a function, for editors and type checkers."""

    n_ctx: int | None
    n_threads: int | None
    n_batch: int
    n_seq: int
    cache_ram: int | str | None
    deterministic: bool
    device: str
    gpu_layers: str | int | None
    tensor_split: str | None
    cpu_moe: bool
    n_cpu_moe: int | None
    cache_type: "str | tuple[str, str] | list[CacheType] | None"
    cache_rotation: bool | None
    cache_scales: str | os.PathLike[str] | None
    lora: tuple[str | os.PathLike[str], ...] | list[str | os.PathLike[str]]
    speculate: bool
    draft_model: str | os.PathLike[str] | None
    quantize: str | None
    activations: str
    embed: bool
    observe: bool


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams as keywords of a function, for editors and type checkers."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    seed: int | None
    frequency_penalty: float
    presence_penalty: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: Sequence[str]
    top_n_sigma: float
    typical_p: float
    xtc_probability: float
    xtc_threshold: float
    dynatemp_range: float
    dynatemp_exponent: float
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    adaptive_target: float
    adaptive_decay: float
    samplers: str | Sequence[str]
    logit_bias: Mapping[int, float]
    logits_processors: "Sequence[LogitsProcessor]"
    logprobs: int | None
    ignore_eos: bool


class BatchOptions(SamplingOptions, total=False):
    """Keywords of Model.generate_batch."""

    max_tokens: int | None  # the most tokens of an answer; None: until the model ends it or the context is full
    stop: Sequence[str]  # texts that end an answer
    priority: int  # a greater one comes first
    adapters: Mapping[str, float] | None  # scales by name; None: as the model was loaded
    salt: str  # requests of different salts share nothing of the cache
    json_schema: "Mapping[str, Any] | str | None"  # of the JSON text that the answer is
    grammar: "Grammar | str | None"  # of the answer, in GBNF or Lark
    constraint: "Constraint | None"  # what the answer may be
    skip_special: bool  # control tokens are no part of the text


class ReplyOptions(BatchOptions, total=False):
    """Keywords of Model.generate, complete and chat."""

    context_shift: bool  # a full context drops half of its tokens, and the text goes on
    n_keep: int  # so many first tokens stay then
