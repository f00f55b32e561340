"""The Python API: load a GGUF file, generate text, chat, look at logits."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import FormatError, GgufRunError, OptionError
from gguf_run.models.backend import CacheType
from gguf_run.runtime.engine.batch import Batch
from gguf_run.runtime.engine.context import Closed, Context
from gguf_run.runtime.engine.generation import Generation
from gguf_run.runtime.engine.reply import Answer, Reply
from gguf_run.runtime.engine.stop import StopStrings
from gguf_run.runtime.sampling.history import Breakers, breakers
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.sampling.sampler import Sampler, TokenLogprob

if TYPE_CHECKING:
    from gguf_run.models.decoder import Decoder
    from gguf_run.runtime.engine.session_file import SessionHeader
    from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

MAX_N_CTX = 2**31 - 1
MAX_N_SEQ = 1024

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


@dataclass(frozen=True)
class Stats:
    """What the last generation took. Times in seconds; see Generation. load_s: loading the model."""

    load_s: float
    n_prompt: int = 0
    n_reused: int = 0
    prefill_s: float = 0.0
    n_decoded: int = 0
    decode_s: float = 0.0
    finish: str = ""
    seed: int = 0

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens computed per second (0: none)."""
        return (self.n_prompt - self.n_reused) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_speed(self) -> float:
        """Tokens decoded per second (0: none)."""
        return self.n_decoded / self.decode_s if self.decode_s else 0.0


class Model:
    """A language model that is ready to run. Use as a context manager, or call close().

        with Model.load("model.gguf") as model:
            for text in model.generate("Once upon a time", max_tokens=50):
                print(text, end="")

    A new call of generate, chat or logits takes the context: the iterator of the one before cannot go on. One thread
    at a time may use a model.
    """

    def __init__(
        self,
        decoder: "Decoder",
        tokenizer: "Tokenizer",
        *,
        chat_template: str | None = None,
        tool_template: str | None = None,
        where: str = "",
        load_s: float = 0.0,
        identity: "Callable[[], SessionHeader] | None" = None,
        close: Sequence[Callable[[], None]] = (),
    ) -> None:
        """Put a model together from its parts; Model.load does this for a file. tool_template: in place of
        chat_template for conversations with tools (some files have both). where: what runs on which device.
        identity: tells what sessions are of; None: they cannot be saved. close: called at the end, to free what the
        decoder does not own."""
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.tool_template = tool_template
        self.where = where
        self.load_s = load_s
        self._identity = identity
        self._close = close
        self._session = Context(decoder)
        self._generation: Generation | Batch | None = None
        self._breakers: dict[tuple[str, ...], Breakers] = {}

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        device: str = "auto",
        gpu_layers: str | int | None = None,
        tensor_split: str | None = None,
        cpu_moe: bool = False,
        n_cpu_moe: int | None = None,
        n_batch: int = 512,
        n_seq: int = 1,
        cache_type: str | tuple[str, str] | list[CacheType] | None = None,
        cache_rotation: bool | None = None,
        cache_scales: str | os.PathLike[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
        observe: bool = False,
        quantize: str | None = None,
        report: Callable[[str], None] | None = None,
    ) -> "Model":
        """Load a model.

        path: a GGUF file, a Hugging Face checkpoint's folder, `hf:owner/repo[:TYPE]`, `hf:owner/repo/file.gguf`, or
        None: the default model. n_ctx: positions of the KV cache (the model's own, at most 4096, if None). n_threads:
        physical cores if None. device: "cpu", "cuda", "cuda:N", several of these with commas, or "auto": a GPU if there
        is one. gpu_layers: how many of the last layers it gets, "all", or "auto": as many as fit. tensor_split: parts
        of these for each of several GPUs, as "3,1"; None: by their free memory. cpu_moe, n_cpu_moe: the experts of all,
        or of the first n layers stay on the CPU; neither: of as many as it takes for all else to be on GPUs. report:
        called with lines on what runs where, before it is loaded, if a GPU is used or cannot be. n_batch: tokens of a
        prompt that run at once. n_seq: sequences that the KV cache has room for, of n_ctx positions each: as many
        prompts as generate_batch can take. progress: called with bytes loaded and bytes in all. observe: see Decoder.
        quantize: a file type such as "Q4_K_M", in which the weights are put while they are read.

        cache_type: of the KV cache's keys and values, such as "q8_0", or a pair of two, or a list of one CacheType
        for each layer; None: what cache_scales says, else "f16". cache_rotation: of rows before they are stored, by a
        Hadamard transform; None: for types of 8 bits or less. cache_scales: a calibration file, see kv_scales.py.

        Warns if n_ctx is more than the model was trained for. Raises GgufRunError and its kinds: OptionError for a
        value that is not allowed, FormatError for a damaged file, UnsupportedError for one that cannot be run.
        """
        start = time.perf_counter()
        _check_range("n_ctx (--ctx-size)", n_ctx, 1, MAX_N_CTX)
        _check_range("n_batch", n_batch, 1, MAX_N_CTX)
        _check_range("n_seq", n_seq, 1, MAX_N_SEQ)
        from gguf_run.kernels_cpu.replay.team import MAX_THREADS
        from gguf_run.runtime.hub.find import find_model
        from gguf_run.runtime.load.machine import default_threads
        from gguf_run.runtime.load.open_model import open_model
        from gguf_run.runtime.load.parts import load_parts
        from gguf_run.runtime.load.placement import parse_wanted

        _check_range("n_threads (--threads)", n_threads, 1, MAX_THREADS)
        n_threads = n_threads or min(default_threads(), MAX_THREADS)
        wanted = parse_wanted(device, gpu_layers, tensor_split, cpu_moe, n_cpu_moe)
        before = time.perf_counter()
        found = find_model(os.fspath(path) if path is not None else None, "any")
        start += time.perf_counter() - before  # a download is not part of the load time
        file = open_model(found, quantize)
        cache = {"cache_type": cache_type, "cache_rotation": cache_rotation, "cache_scales": cache_scales}
        try:
            parts = load_parts(
                file,
                n_ctx=n_ctx,
                n_threads=n_threads,
                wanted=wanted,
                n_batch=n_batch,
                n_seq=n_seq,
                cache=cache,
                progress=progress,
                observe=observe,
                quantize=quantize,
                report=report or (lambda line: None),
            )
            return cls(**parts, load_s=time.perf_counter() - start)
        except GgufRunError as error:
            file.close()
            # Below the runtime nobody knows the name of the file.
            if str(file.path) in str(error) or isinstance(error, OptionError):
                raise
            raise type(error)(f"{file.path}: {error}") from error
        except BaseException:
            file.close()
            raise

    @property
    def n_ctx(self) -> int:
        """Positions of the context."""
        return self.decoder.n_ctx

    @property
    def stats(self) -> Stats:
        """Times and counts of the last generate or chat."""
        last = self._generation
        if last is None:
            return Stats(self.load_s)
        return Stats(
            load_s=self.load_s,
            n_prompt=last.n_prompt,
            n_reused=last.n_reused,
            prefill_s=last.prefill_s,
            n_decoded=last.n_decoded,
            decode_s=last.decode_s,
            finish=last.finish,
            seed=last.seed,
        )

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Of the tokens that the last generate or chat has chosen so far, if it was asked with logprobs=N."""
        return self._generation.sampler.logprobs if isinstance(self._generation, Generation) else []

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return ids. add_special: with the tokens that the model wants around a text (BOS). parse_special: special
        tokens written in the text become ids."""
        return self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> str:
        """Return a conversation as the chat template (`chat_template`, the file's unless you set another) writes it, up
        to where the answer begins. GgufRunError if there is no template, or it refuses the messages."""
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

        max_tokens: None goes on until the model ends or the context is full (stats.finish tells). stop: texts that end
        the answer. context_shift: a full context does not end it: half of what stands behind the first n_keep tokens
        (32 at least) is taken out, and the text may be as long as it likes. sampling: temperature, top_k, seed,
        logits_processors, logprobs and others, see SamplingParams.
        """
        shift = n_keep if context_shift else None
        return self._start(self._open_ended(self.tokenize(prompt)), max_tokens, stop, shift, sampling)

    def generate_batch(
        self, prompts: Sequence[str], *, max_tokens: int | None = None, stop: Sequence[str] = (), **sampling: Any
    ) -> list[Answer]:
        """Continue several texts together, as many as n_seq of Model.load; return the answers in the prompts' order.

        All share each step, which reads the weights once, and what the prompts begin with in common is computed once.
        Options as for generate; prompt i draws with the seed + i. GgufRunError for too many prompts, or none.
        """
        params = SamplingParams(**sampling)
        replies = []
        for i, prompt in enumerate(prompts):
            seed = None if params.seed is None else (params.seed + i) % 2**64
            ids = self._open_ended(self.tokenize(prompt))
            replies.append(self._reply(ids, replace(params, seed=seed), stop, max_tokens))
        self._generation = batch = Batch(self._session, replies)
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
        """Answer the last of `messages` ({"role": "system" | "user" | "assistant" | "tool", "content": text}); as
        generate. tools: JSON schemas of functions ({"type": "function", "function": {...}}) that the template tells the
        model of; what the model calls stands in its answer, as its template has it. template_options: what else the
        template is told, as {"enable_thinking": False} for Qwen3's.

        The start that the conversation shares with the one before is not computed again. GgufRunError as for
        tokenize_chat.
        """
        shift = n_keep if context_shift else None
        ids = self.tokenize_chat(messages, tools, template_options)
        return self._start(ids, max_tokens, stop, shift, sampling)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return f32[n_tokens, n_vocab]: what the model expects after each of ids, from an empty context."""
        out = np.empty((len(ids), self.decoder.config.n_vocab), np.float32)
        n_done = 0
        for block in self._session.logits(ids):
            out[n_done : n_done + len(block)] = block
            n_done += len(block)
        return out

    def reset(self) -> None:
        """Forget the context: what comes next is computed as after loading, to the last bit."""
        self._session.forget()

    def save_session(self, path: str | os.PathLike[str], messages: Sequence[Message] = ()) -> None:
        """Save the context with its KV cache, and the conversation that it is of, to a file, whole or not at all."""
        from gguf_run.runtime.engine.session_file import save

        header = self._session_header()
        conversation = [dict(message) for message in messages]
        self._session.save(
            lambda ids, export: save(Path(path), replace(header, ids=ids, messages=conversation), export)
        )

    def load_session(self, path: str | os.PathLike[str]) -> list[dict[str, Any]]:
        """Go on from a file: make its tokens the context, without computing them; return the conversation.

        What generate or chat are asked next reuses the tokens that it shares with them. GgufRunError if the session is
        of another model or type of cache or longer than the context, FormatError if the file is damaged; the context
        is then empty, or as it was.
        """
        from gguf_run.runtime.engine.session_file import check_session, open_session

        header = self._session_header()
        found, parts = open_session(Path(path))
        check_session(Path(path), found, header, self.n_ctx, self.decoder.config.n_vocab)
        try:
            self._session.restore(found.ids, parts)
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
        """Free the weights and the KV cache, stop the threads, close the file. The tokenizer can still be used."""
        for close in (self.decoder.close, *self._close) if not self._is_closed else ():
            close()
        self._session.close()
        self.decoder, self._close, self._identity = self._session.decoder, (), None

    def __enter__(self) -> "Model":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        self._generation = Generation(self._session, reply, n_keep)
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
        texts = tuple(params.dry_sequence_breakers)
        if texts not in self._breakers:
            self._breakers = {texts: breakers(self.tokenizer, texts)}
        return Sampler(params, self._breakers[texts])

    def _open_ended(self, ids: list[int]) -> list[int]:
        """A text that is to go on must not end with EOS, which some models want around a text."""
        return ids[:-1] if self.tokenizer.add_eos and ids[-1:] == [self.tokenizer.eos] else ids


def _check_range(name: str, value: int | None, lowest: int, highest: int) -> None:
    if value is not None and not (isinstance(value, int) and lowest <= value <= highest):
        raise OptionError(f"{name} is {value!r}; allowed: a whole number from {lowest} to {highest}")
