"""The Python API: load a GGUF file, generate text, chat, look at logits."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import FormatError, GgufRunError, OptionError
from gguf_run.runtime.engine.context import Closed, Context
from gguf_run.runtime.engine.generation import Generation
from gguf_run.runtime.engine.reply import Answer, Reply, StopStrings
from gguf_run.runtime.load.options import LoadOptions
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.sampling.sampler import Sampler, TokenLogprob

if TYPE_CHECKING:
    from gguf_run.runtime.engine.batch import Batch
    from gguf_run.runtime.engine.session_file import SessionHeader
    from gguf_run.runtime.load.load_model import LoadedModel
    from gguf_run.runtime.sampling.filters import Breakers

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


@dataclass(frozen=True)
class Stats:
    """Times, in seconds, and counts of the last generation. Generation and Batch have attributes of these names."""

    load_s: float  # to load the model
    n_prompt: int = 0  # tokens of the prompt
    n_reused: int = 0  # tokens of the prompt that the cache held already
    prefill_s: float = 0.0  # to compute the other tokens of the prompt
    n_decoded: int = 0  # tokens of the answer
    decode_s: float = 0.0  # to compute the tokens of the answer
    finish: str = ""  # why the answer ended, see Reply
    seed: int = 0  # of the draws

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens computed per second (0: none)."""
        return (self.n_prompt - self.n_reused) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_speed(self) -> float:
        """Tokens decoded per second (0: none)."""
        return self.n_decoded / self.decode_s if self.decode_s else 0.0


class Model:
    """A language model that is ready to run. Use it as a context manager, or call close().

        with Model.load("model.gguf") as model:
            for text in model.generate("Once upon a time", max_tokens=50):
                print(text, end="")

    A new call of generate, chat or logits takes over the context: the iterator of the call before it ends with an
    error. Only one thread at a time may use a model.
    """

    def __init__(self, parts: "LoadedModel") -> None:
        """Model.load makes the parts from a file."""
        self.decoder = parts.decoder
        self.tokenizer = parts.tokenizer
        self.chat_template = parts.chat_template
        self.tool_template = parts.tool_template
        self.where = parts.where
        self.about = parts.about
        self.load_s = 0.0  # seconds that loading took, without a download
        self._identity = parts.identity
        self._close = parts.close
        self._context = Context(parts.decoder)
        self._generation: Generation | Batch | None = None
        self._breakers: dict[tuple[str, ...], Breakers] = {}  # of dry_sequence_breakers: slow to find

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        options: LoadOptions | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        report: Callable[[str], None] = lambda line: None,
        **keywords: Any,
    ) -> "Model":
        """Load a model.

        path: a GGUF file, a Hugging Face checkpoint's folder, `hf:owner/repo[:TYPE]`, `hf:owner/repo/file.gguf`, or
            None: the default model.
        options, keywords: what LoadOptions holds, as `n_ctx=4096, device="cpu"`. Keywords come before options.
        progress: called with the bytes that are loaded and the bytes of all weights.
        report: called with lines that say what runs where, if a GPU is used or cannot be used.

        Warns if n_ctx is more than the model was trained for. Raises GgufRunError and its kinds: OptionError for a
        value that is not allowed, FormatError for a damaged file, UnsupportedError for one that cannot be run.
        """
        options, start = replace(options or LoadOptions(), **keywords), time.perf_counter()
        from gguf_run.runtime.load.load_model import load_model

        parts = load_model(path, options, progress, report)
        model = cls(parts)
        model.load_s = time.perf_counter() - start - parts.download_s
        return model

    @property
    def n_ctx(self) -> int:
        """Positions of the context."""
        return self.decoder.n_ctx

    @property
    def stats(self) -> Stats:
        """Times and counts of the last generate or chat."""
        if self._generation is None:
            return Stats(self.load_s)
        measured = {field.name: getattr(self._generation, field.name) for field in fields(Stats)[1:]}
        return Stats(self.load_s, **measured)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Log probabilities of the tokens that the last generate or chat has chosen, if it was given logprobs=N."""
        return self._generation.sampler.logprobs if isinstance(self._generation, Generation) else []

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the ids of a text.

        add_special: add the tokens that the model wants around a text (BOS).
        parse_special: special tokens that are written in the text, such as <|im_start|>, become single ids.
        """
        return self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text that the chat template makes of a conversation, up to where the answer begins.

        The template is the attribute chat_template: the file's, unless you set another. GgufRunError if there is none,
        or if it refuses the messages.
        """
        from gguf_run.runtime.chat.template import render_chat

        template = (self.tool_template if tools else None) or self.chat_template
        if template is None:
            raise GgufRunError(
                "the model has no chat template: it continues texts (generate, or --raw); to chat, name one: "
                "--chat-template"
            )
        bos, eos = (
            None if id is None else self.tokenizer.token_text(id) for id in (self.tokenizer.bos, self.tokenizer.eos)
        )
        return render_chat(template, messages, bos_token=bos, eos_token=eos, tools=tools, options=template_options)

    def tokenize_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the ids of chat_prompt."""
        return self.tokenizer.encode_chat(self.chat_prompt(messages, tools, template_options))

    def detokenize(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Return the text of ids."""
        return self.tokenizer.decode(ids, skip_special=skip_special)

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        context_shift: bool = False,
        n_keep: int = 0,
        **sampling: Any,
    ) -> Iterator[str]:
        """Continue a text; return an iterator over pieces of text.

        max_tokens: the most tokens; None: until the model ends or the context is full (stats.finish tells which).
        stop: texts that end the answer.
        context_shift: a full context does not end the answer: half of the tokens behind the first n_keep (at least
            32) are taken out, and the text goes on.
        sampling: temperature, top_k, seed, logits_processors, logprobs and others, see SamplingParams.
        """
        ids = self._open_ended(self.tokenize(prompt))
        return self._start(ids, max_tokens, stop, n_keep if context_shift else None, sampling)

    def generate_batch(
        self, prompts: Sequence[str], *, max_tokens: int | None = None, stop: Sequence[str] = (), **sampling: Any
    ) -> list[Answer]:
        """Continue several texts together, at most n_seq of Model.load; return the answers in the prompts' order.

        All share each step, which reads the weights once. The tokens that all prompts begin with are computed once.
        Options as for generate; prompt i draws with seed + i. GgufRunError for too many prompts, or none.
        """
        from gguf_run.runtime.engine.batch import Batch

        params = SamplingParams(**sampling)
        replies = []
        for i, prompt in enumerate(prompts):
            seed = None if params.seed is None else (params.seed + i) % 2**64
            ids = self._open_ended(self.tokenize(prompt))
            replies.append(self._reply(ids, replace(params, seed=seed), stop, max_tokens))
        self._generation = batch = Batch(self._context, replies)
        return batch.run()

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        template_options: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        context_shift: bool = False,
        n_keep: int = 0,
        **sampling: Any,
    ) -> Iterator[str]:
        """Answer the last message of a conversation; return an iterator over pieces of text.

        messages: {"role": "system" | "user" | "assistant" | "tool", "content": text} each.
        tools: JSON schemas of functions that the model may call, {"type": "function", "function": {...}}. A call
            stands in the answer, in the form that the chat template defines.
        template_options: variables for the template, as {"enable_thinking": False} for Qwen3's.
        Others as for generate.

        The beginning that this conversation shares with the one before is not computed again. GgufRunError as for
        tokenize_chat.
        """
        ids = self.tokenize_chat(messages, tools, template_options)
        return self._start(ids, max_tokens, stop, n_keep if context_shift else None, sampling)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits f32[n_tokens, n_vocab] after each of ids, from an empty context."""
        out = np.empty((len(ids), self.decoder.config.n_vocab), np.float32)
        n_done = 0
        for block in self._context.logits(ids):
            out[n_done : n_done + len(block)] = block
            n_done += len(block)
        return out

    def reset(self) -> None:
        """Empty the context: the next text is computed as after loading, bit for bit."""
        self._context.forget()

    def save_session(self, path: str | os.PathLike[str], messages: Sequence[Message] = ()) -> None:
        """Save the context with its KV cache, and the conversation in it, to a file: whole or not at all."""
        from gguf_run.runtime.engine.session_file import save

        header = replace(self._session_header(), messages=[dict(message) for message in messages])
        save(Path(path), replace(header, ids=self._context.settle()), self.decoder.cache.export)

    def load_session(self, path: str | os.PathLike[str]) -> list[dict[str, Any]]:
        """Make the tokens of a saved session the context, without computing them; return its conversation.

        The next generate or chat reuses the tokens that its prompt begins with. GgufRunError if the session is of
        another model or cache type or longer than the context; FormatError if the file is damaged. After an error the
        context is empty, or as before.
        """
        from gguf_run.runtime.engine.session_file import check_session, open_session

        header = self._session_header()
        found, parts = open_session(Path(path))
        check_session(Path(path), found, header, self.n_ctx, self.decoder.config.n_vocab)
        try:
            self._context.restore(found.ids, parts)
        except GgufRunError as error:
            raise FormatError(f"{path}: {error}") from None
        return list(found.messages)

    def _session_header(self) -> "SessionHeader":
        self.decoder.config  # noqa: B018  (tells if the model is closed)
        if self._identity is None:
            raise GgufRunError("this model was not loaded from a file: its sessions cannot be saved")
        return self._identity()

    @property
    def _is_closed(self) -> bool:
        return isinstance(self.decoder, Closed)

    def __repr__(self) -> str:
        if self._is_closed:
            return "<Model, closed>"
        config, name = self.decoder.config, self.decoder.config.arch.name
        layers = f"n_layer={config.n_layer}, n_embd={config.n_embd}, n_vocab={config.n_vocab}, n_ctx={self.n_ctx}"
        return f"<Model {name}, {layers}{', ' * bool(self.where)}{self.where}>"

    def close(self) -> None:
        """Free the weights and the KV cache, stop the threads, close the file. The tokenizer stays usable."""
        for close in (self.decoder.close, *self._close) if not self._is_closed else ():
            close()
        self._context.close()
        self.decoder, self._close, self._identity = self._context.decoder, (), None

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(
        self,
        ids: list[int],
        max_tokens: int | None,
        stop: Sequence[str],
        n_keep: int | None,
        sampling: Mapping[str, Any],
    ) -> Iterator[str]:
        reply = self._reply(ids, SamplingParams(**sampling), stop, max_tokens)
        self._generation = Generation(self._context, reply, n_keep)
        return iter(self._generation)

    def _reply(self, ids: list[int], params: SamplingParams, stop: Sequence[str], max_tokens: int | None) -> Reply:
        tokenizer = self.tokenizer
        return Reply(ids, self._sampler(params), tokenizer.stream(), StopStrings(stop), tokenizer.stop_ids, max_tokens)

    def _sampler(self, params: SamplingParams) -> Sampler:
        n_vocab = self.decoder.config.n_vocab
        if (id := max(params.logit_bias, default=0)) >= n_vocab:
            raise OptionError(f"logit_bias (--logit-bias) of token {id}; allowed: ids from 0 to {n_vocab - 1}")
        if params.ignore_eos:
            never = dict.fromkeys(self.tokenizer.stop_ids, -math.inf)
            params = replace(params, logit_bias={**params.logit_bias, **never})
        if not params.dry_multiplier:
            return Sampler(params)
        from gguf_run.runtime.sampling.history import breakers

        texts = tuple(params.dry_sequence_breakers)
        if texts not in self._breakers:
            self._breakers = {texts: breakers(self.tokenizer, texts)}
        return Sampler(params, self._breakers[texts])

    def _open_ended(self, ids: list[int]) -> list[int]:
        """Return ids without the EOS that some models want behind a text: the text is to go on."""
        return ids[:-1] if self.tokenizer.add_eos and ids[-1:] == [self.tokenizer.eos] else ids
