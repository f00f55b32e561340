"""The Python API: load a GGUF file, generate text, chat, look at logits."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError, OptionError, check_names
from gguf_run.runtime.engine.engine import Closed, Engine
from gguf_run.runtime.engine.reply import Answer, Reply, Request
from gguf_run.runtime.engine.sequence import Job, Stats
from gguf_run.runtime.engine.sequence import Sequence as Answering
from gguf_run.runtime.load.options import LoadOptions
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.sampling.sampler import Sampler

if TYPE_CHECKING:
    from gguf_run.formats.gguf.reader import GGUFFile
    from gguf_run.runtime.chat.process import TemplateProcess
    from gguf_run.runtime.engine.batch import Batch
    from gguf_run.runtime.engine.grammar import Grammars
    from gguf_run.runtime.engine.session_file import SessionHeader
    from gguf_run.runtime.keywords import BatchOptions, LoadKeywords, ReplyOptions
    from gguf_run.runtime.load.load_model import LoadedModel
    from gguf_run.runtime.sampling.candidates import Breakers

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


class Model:
    """A language model that is ready to run. Use it as a context manager, or call close().

        with Model.load("model.gguf") as model:
            for text in model.generate("Once upon a time", max_tokens=50):
                print(text, end="")

    Threads may share a model, and several answers may be read in turns: n_seq of Model.load run together, others wait
    for them. See Engine.
    """

    def __init__(self, parts: "LoadedModel") -> None:
        """Model.load makes the parts from a file."""
        self.decoder = parts.decoder
        self.tokenizer = parts.tokenizer
        self.chat_template = parts.chat_template
        self.tool_template = parts.tool_template
        self.templates: TemplateProcess | None = None  # where chat_template runs; made when it is first needed
        self.grammars: Grammars | None = None  # for answers of a form; made when they are first needed
        self.where = parts.where
        self.about = parts.about
        self.tuning = parts.tuning
        self.load_s = 0.0  # seconds that loading took, without a download
        self._identity = parts.identity
        self._close = parts.close
        self.engine = Engine(
            parts.decoder,
            self._reply,
            deterministic=parts.deterministic,
            many=parts.many,
            speculation=parts.speculation,
        )
        self._measured: Job | Batch | None = None  # the last generation
        self._breakers: dict[tuple[str, ...], Breakers] = {}  # of dry_sequence_breakers: slow to find

    @classmethod
    def load(
        cls,
        path: "str | os.PathLike[str] | GGUFFile | None" = None,
        options: LoadOptions | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        report: Callable[[str], None] = lambda line: None,
        **keywords: "Unpack[LoadKeywords]",
    ) -> "Model":
        """Load a model.

        path: a GGUF file, a Hugging Face checkpoint's folder, `hf:owner/repo[:TYPE]`, `hf:owner/repo/file.gguf`, or
            None: the default model. Or an open file, which the model closes.
        options, keywords: what LoadOptions holds, as `n_ctx=4096, device="cpu"`. Keywords come before options.
        progress: called with the bytes that are loaded and the bytes of all weights.
        report: called with lines that say what runs where, if a GPU is used or cannot be used.

        Warns if n_ctx is more than the model was trained for. Raises GgufRunError and its kinds: OptionError for a
        value that is not allowed, FormatError for a damaged file, UnsupportedError for one that cannot be run.
        """
        start = time.perf_counter()
        check_names(keywords, (field.name for field in fields(LoadOptions)))
        options = replace(options or LoadOptions(), **keywords)
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
        if self._measured is None:
            return Stats(self.load_s)
        measured = {field.name: getattr(self._measured, field.name) for field in fields(Stats)[1:]}
        return Stats(self.load_s, **measured)

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the ids of a text.

        add_special: add the tokens that the model wants around a text (BOS).
        parse_special: special tokens that are written in the text, such as <|im_start|>, become single ids.
        """
        return self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def chat_prompt(
        self,
        messages: str | Sequence[Message],
        tools: Sequence[Tool] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text that the chat template makes of a conversation, up to where the answer begins.

        The template is the attribute chat_template: the file's, unless you set another. Warns if it has no place for a
        system message or for tools. GgufRunError if there is none, if it refuses the messages or passes a limit.
        """
        from gguf_run.runtime.chat.prompt import prompt_of

        return prompt_of(self, messages, tools, template_options)

    def tokenize_chat(
        self,
        messages: str | Sequence[Message],
        tools: Sequence[Tool] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the ids of chat_prompt."""
        return self.tokenizer.encode_chat(self.chat_prompt(messages, tools, template_options))

    def detokenize(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Return the text of ids."""
        return self.tokenizer.decode(ids, skip_special=skip_special)

    def generate(self, prompt: str | Sequence[int], **options: "Unpack[ReplyOptions]") -> Answering:
        """Continue a text; return an iterator over pieces of text, which are strings with the ids of their tokens.

        prompt: a text, or token ids, which are taken as they are.
        max_tokens: the most tokens; None: until the model ends or the context is full (finish_reason tells which).
        stop: texts that end the answer.
        context_shift: a full context does not end the answer: half of the tokens behind the first n_keep (at least
            32) are taken out, and the text goes on.
        json_schema, grammar: the form of the answer: a JSON schema; or a text in GBNF or in llguidance's Lark.
        Others (temperature, top_k, seed, logits_processors, logprobs ...): see SamplingParams.
        """
        return self._start(self.prompt_ids(prompt), options)

    def complete(self, prompt: str | Sequence[int], **options: "Unpack[ReplyOptions]") -> Answer:
        """Continue a text as generate does; return the whole answer. For a conversation: chat(...).answer()."""
        return self.generate(prompt, **options).answer()

    def generate_batch(self, prompts: Sequence[str | Sequence[int]], **options: "Unpack[BatchOptions]") -> list[Answer]:
        """Continue several texts together; return the answers in the prompts' order.

        n_seq of Model.load run together and share each step, which reads the weights once; the others wait for them.
        Tokens that several prompts begin with are computed once. Options as for generate, without context_shift;
        prompt i draws with seed + i. GgufRunError for no prompts.
        """
        if isinstance(prompts, str):
            raise OptionError(f"prompts is the text {prompts[:40]!r}; allowed: a list of texts")
        from gguf_run.runtime.engine.batch import Batch

        requests = []
        for i, prompt in enumerate(prompts):
            request = self._request(self.prompt_ids(prompt), options, without=("context_shift", "n_keep"))
            if (seed := request.sampling.seed) is not None:
                request = replace(request, sampling=replace(request.sampling, seed=(seed + i) % 2**64))
            requests.append(request)
        self._measured = batch = Batch(self.engine, requests)
        return batch.answers

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        template_options: Mapping[str, Any] | None = None,
        **options: "Unpack[ReplyOptions]",
    ) -> Answering:
        """Answer the last message of a conversation; return an iterator over pieces of text, as generate does.

        messages: {"role": "system" | "user" | "assistant" | "tool", "content": text} each, in any form of OpenAI's API;
            or a string, which is the message of a user.
        tools: JSON schemas of functions that the model may call, {"type": "function", "function": {...}}. A call
            stands in the answer, in the form that the chat template defines.
        template_options: variables for the template, as {"enable_thinking": False} for Qwen3's.
        Others as for generate.

        The beginning that this conversation shares with the one before is not computed again. GgufRunError as for
        tokenize_chat.
        """
        return self._start(self.tokenize_chat(messages, tools, template_options), options)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits f32[n_tokens, n_vocab] after each of ids, from an empty context."""
        from gguf_run.runtime.engine.scores import logits

        out = np.empty((len(ids), self.decoder.config.n_vocab), np.float32)
        n_done = 0
        for block in logits(self.engine, ids, len(ids)):
            out[n_done : n_done + len(block)] = block
            n_done += len(block)
        return out

    def embed(
        self, texts: Sequence[str | Sequence[int]], pooling: str | None = None, normalize: bool = True
    ) -> NDArray[np.float32]:
        """Return the embeddings f32[number of texts, n_embd] of texts, or of lists of ids; load with embed=True.

        pooling: "mean", "cls" (the first token's row) or "last"; None: as the file says. normalize: to the length 1.
        """
        from gguf_run.runtime.engine.embed import embed

        return embed(self.engine, self.tokenizer, texts, pooling, normalize)

    def rank(self, query: str, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the probabilities f32[number of texts] that texts answer a query, by a reranker (Qwen3-Reranker)."""
        from gguf_run.runtime.engine.embed import rank

        return rank(self.engine, self.tokenizer, query, texts)

    def reset(self) -> None:
        """Empty the context: the next text is computed as after loading, bit for bit."""
        with self.engine.working():
            self.engine.rows.forget()

    def save_session(self, path: str | os.PathLike[str], messages: Sequence[Message] = ()) -> None:
        """Save the context with its KV cache, and the conversation in it, to a file: whole or not at all."""
        from gguf_run.runtime.engine.session_file import save_row

        header = replace(self._session_header(), messages=[dict(message) for message in messages])
        save_row(Path(path), header, self.engine)

    def load_session(self, path: str | os.PathLike[str]) -> list[dict[str, Any]]:
        """Make the tokens of a saved session the context, without computing them; return its conversation.

        The next generate or chat reuses the tokens that its prompt begins with. GgufRunError if the session is of
        another model or cache type or longer than the context; FormatError if the file is damaged. After an error the
        context is empty, or as before.
        """
        from gguf_run.runtime.engine.session_file import load

        return load(Path(path), self._session_header(), self.engine)

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
        """Free the weights and the KV cache, stop the threads, close the file. The tokenizer stays usable.

        What another thread computes now is waited for; then its answer ends with GgufRunError.
        """
        if self._is_closed:
            return
        self.engine.close(self._free)
        self.decoder, self._close, self._identity, self.about = self.engine.decoder, (), None, str

    def _free(self) -> None:
        for close in (self.decoder.close, *self._close):
            close()
        for process in (self.templates, self.grammars):
            if process is not None:
                process.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, ids: list[int], options: Mapping[str, Any]) -> Answering:
        sequence = self.engine.add(self._request(ids, options))
        self._measured = sequence.job
        return sequence

    def _request(self, ids: list[int], options: Mapping[str, Any], without: Sequence[str] = ()) -> Request:
        if "json_schema" in options or "grammar" in options:
            from gguf_run.runtime.engine.grammar import constrained

            options = constrained(self, options)
        return Request.of(ids, options, without)

    def _reply(self, request: Request) -> Reply:
        sampler, stop, tokenizer = self._sampler(request.sampling), None, self.tokenizer
        if request.stop:
            from gguf_run.runtime.engine.stop import StopStrings

            stop = StopStrings(request.stop)
        stream = tokenizer.stream(skip_special=request.skip_special)
        return Reply(request.ids, sampler, stream, stop, tokenizer.stop_ids, request.max_tokens)

    def _sampler(self, params: SamplingParams) -> Sampler:
        n_vocab = self.decoder.config.n_vocab
        if (id := max(params.logit_bias, default=0)) >= n_vocab:
            raise OptionError(f"logit_bias (--logit-bias) of token {id}; allowed: ids from 0 to {n_vocab - 1}")
        if never := [*self.tokenizer.never_ids, *(self.tokenizer.stop_ids if params.ignore_eos else ())]:
            params = replace(params, logit_bias={**params.logit_bias, **dict.fromkeys(never, -math.inf)})
        if not params.dry_multiplier:
            return Sampler(params)
        from gguf_run.runtime.sampling.history import breakers

        texts = tuple(params.dry_sequence_breakers)
        if texts not in self._breakers:
            self._breakers = {texts: breakers(self.tokenizer, texts)}
        return Sampler(params, self._breakers[texts])

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the ids of a prompt. Of a text without the EOS that some models want behind it: it is to go on."""
        if isinstance(prompt, str):
            ids = self.tokenize(prompt)
            return ids[:-1] if self.tokenizer.add_eos and ids[-1:] == [self.tokenizer.eos] else ids
        n_vocab, allowed = self.decoder.config.n_vocab, "allowed: a text, or a list of token ids"
        if prompt is None or isinstance(prompt, bytes | Mapping):
            raise OptionError(f"the prompt is {prompt!r:.40}; {allowed}")
        for i, id in enumerate(prompt):
            if not isinstance(id, Integral) or not 0 <= id < n_vocab:
                raise OptionError(f"the prompt has {id!r:.40} at {i}; {allowed} from 0 to {n_vocab - 1}")
        return [int(id) for id in prompt]
