"""llama-cpp-python's class Llama over Model, so that programs written for it run: import it from gguf_run.compat.

Names, defaults and the shapes of results are those of llama-cpp-python 0.3, which are OpenAI's. Arguments that only
concern llama.cpp's own speed are accepted and change nothing. Others that this program lacks are refused by name.
"""

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from gguf_run.formats.errors import OptionError, UnsupportedError, check_names
from gguf_run.runtime.engine.sequence import Sequence as Answering
from gguf_run.runtime.load.options import LoadOptions
from gguf_run.runtime.model import Message, Model, Tool
from gguf_run.runtime.sampling.choice import TokenLogprob

Result = dict[str, Any]

RANDOM_SEED = 0xFFFFFFFF  # another seed each time
# Arguments of the constructor that change no result here.
_NO_EFFECT = (
    "split_mode", "main_gpu", "use_mmap", "use_mlock", "n_ubatch", "n_threads_batch", "logits_all", "offload_kqv",
    "flash_attn", "op_offload", "swa_full", "no_perf", "numa", "verbose", "n_parts", "f16_kv",
)  # fmt: skip
# What LangChain passes where its user says nothing. The model's own RoPE stays: another one would spoil its texts.
_LANGCHAIN: Result = {"rope_freq_base": 10000, "rope_freq_scale": 1}
# Arguments of the constructor, and of completions, that are allowed with this value only: it asks for nothing.
_LOAD_OFF: Result = {
    "vocab_only": False, "kv_overrides": None, "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1,
    "rope_freq_base": 0, "rope_freq_scale": 0, "yarn_ext_factor": -1, "yarn_attn_factor": 1, "yarn_beta_fast": 32,
    "yarn_beta_slow": 1, "yarn_orig_ctx": 0, "embedding": False, "lora_base": None, "lora_scale": 1, "lora_path": None,
    "chat_handler": None, "draft_model": None, "tokenizer": None, "tensor_split": None,
    "last_n_tokens_size": 64, "spm_infill": False, "additional_files": None,
    "local_dir": None, "local_dir_use_symlinks": "auto", "cache_dir": None,
}  # fmt: skip
_OFF: Result = {
    "suffix": None, "tfs_z": 1, "stopping_criteria": None, "grammar": None, "functions": None, "function_call": None,
    "response_format": {"type": "text"},
}  # fmt: skip
# Options of sampling whose names and defaults are ours.
_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "frequency_penalty", "presence_penalty",
    "mirostat_tau", "mirostat_eta",
)  # fmt: skip
_OTHERS = (
    "max_tokens", "logprobs", "echo", "stream", "stop", "seed", "model", "logits_processor", "logit_bias",
    "mirostat_mode",
)  # fmt: skip


class Llama:
    """A model with llama-cpp-python's calls."""

    def __init__(
        self,
        model_path: str,
        *,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        seed: int = RANDOM_SEED,
        chat_format: str | None = None,
        type_k: int | None = None,
        type_v: int | None = None,
        **others: Any,
    ) -> None:
        """Load a GGUF file, or whatever else Model.load takes.

        n_ctx: positions of the context; 0: as many as the model was trained for, at most 4096.
        n_gpu_layers: -1 for all. Without a GPU the CPU runs all layers, as in a llama.cpp that was built for it.
        chat_format: a name of --chat-template ("chatml", "llama-3"); None: the file's template.
        type_k, type_v: ggml's numbers of the cache's types, such as 8 for q8_0; None: f16.
        others: see the module. GgufRunError as for Model.load.
        """
        others = {name: value for name, value in others.items() if value is None or value != _LANGCHAIN.get(name)}
        _refuse(others, _LOAD_OFF, (*_NO_EFFECT, *Llama.__init__.__annotations__))
        self.model_path = str(model_path)
        self._seed = None if seed in (RANDOM_SEED, -1) else seed
        options = LoadOptions(
            n_ctx=n_ctx or None,
            n_batch=n_batch,
            n_threads=n_threads,
            cache_type=None if type_k is type_v is None else (_cache_type(type_k), _cache_type(type_v)),
            **_devices(n_gpu_layers),
        )
        template = None
        if chat_format is not None:
            from gguf_run.runtime.chat.named import find_template

            template = find_template(chat_format.replace("llama-3", "llama3"))
        self._model = Model.load(model_path, options)
        if template is not None:
            self._model.chat_template, self._model.tool_template = template, None

    @classmethod
    def from_pretrained(cls, repo_id: str, filename: str | None = None, **others: Any) -> "Llama":
        """Load a model of the Hugging Face hub. filename: in the repository, or a pattern with a type: *Q4_K_M.gguf."""
        name = f"hf:{repo_id}"
        if filename is not None and "*" in filename:
            name += ":" + filename.removesuffix(".gguf").strip("*.-_").upper()
        elif filename is not None:
            name += f"/{filename}"
        return cls(name, **others)

    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 16,
        logprobs: int | None = None,
        echo: bool = False,
        stream: bool = False,
        **options: Any,
    ) -> Result | Iterator[Result]:
        """Continue a text or token ids. Return a `text_completion`, or with stream=True an iterator over its chunks.

        max_tokens: None or 0: until the model ends the text or the context is full.
        logprobs: how many of the most likely tokens are listed with each token.
        echo: the text begins with the prompt.
        options: temperature, top_p and others of _SAMPLING; stop, seed, logits_processor, logit_bias, model (a name).
        """
        if echo and (logprobs is not None or stream or not isinstance(prompt, str)):
            raise UnsupportedError("echo works with a text as the prompt, without logprobs and stream: leave it out")
        start = str(prompt) if isinstance(prompt, str) else ""
        if prompt == "" and self._model.tokenizer.bos is not None:
            prompt = [self._model.tokenizer.bos]
        pieces = self._model.generate(prompt, **self._options(options, max_tokens, logprobs))
        head = self._head("text_completion", options)
        if stream:
            return self._chunks(pieces, head, len(start))
        return self._completion(pieces, head, len(start), start if echo else "")

    __call__ = create_completion

    def create_chat_completion(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: str | None = None,
        temperature: float = 0.2,
        max_tokens: int | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        stream: bool = False,
        **options: Any,
    ) -> Result | Iterator[Result]:
        """Answer a conversation. Return a `chat.completion`, or with stream=True an iterator over its chunks.

        tools: the chat template gets them; a call stands in the content, in the form that the template defines.
        tool_choice: "auto" or "none". Others as for create_completion.
        """
        if tool_choice not in (None, "auto", "none"):
            raise UnsupportedError(f"tool_choice is {tool_choice!r}; allowed: auto, none")
        n_top = (top_logprobs or 0) if logprobs else None
        ours = self._options(options | {"temperature": temperature}, max_tokens, n_top)
        pieces = self._model.chat(messages, tools=None if tool_choice == "none" else tools, **ours)
        head = self._head("chat.completion.chunk" if stream else "chat.completion", options)
        if stream:
            return _chat_chunks(self._chunks(pieces, head, 0))
        whole = self._completion(pieces, head, 0, "")
        (choice,) = whole["choices"]
        message = {"role": "assistant", "content": choice.pop("text")}
        return whole | {"choices": [{"message": message} | choice | {"logprobs": _chat_logprobs(choice["logprobs"])}]}

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Return the ids of a UTF-8 text. special: names of control tokens in it become these tokens."""
        return self._model.tokenize(text.decode(errors="replace"), add_special=add_bos, parse_special=special)

    def detokenize(self, tokens: Sequence[int], prev_tokens: object = None, special: bool = False) -> bytes:
        """Return the bytes of tokens, without a space behind BOS. special: with the names of control tokens."""
        tokenizer = self._model.tokenizer
        data = b"".join(tokenizer.piece(id, skip_special=not special) for id in tokens)
        return data.removeprefix(b" ") if list(tokens[:1]) == [tokenizer.bos] else data

    def embed(self, *_: object, **__: object) -> Any:
        """Raise UnsupportedError, which names what makes embeddings."""
        raise UnsupportedError("embed is not supported here: use gguf_run.Model.load(path, embed=True).embed(texts)")

    create_embedding = embed

    def reset(self) -> None:
        """Empty the context."""
        self._model.reset()

    def close(self) -> None:
        """Free the model."""
        self._model.close()

    def n_ctx(self) -> int:
        """Positions of the context."""
        return self._model.n_ctx

    @property
    def context_params(self) -> SimpleNamespace:
        """Holds n_ctx, which LlamaIndex reads here."""
        return SimpleNamespace(n_ctx=self.n_ctx())

    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return self._model.decoder.config.n_vocab

    def n_embd(self) -> int:
        """Length of the hidden state."""
        return self._model.decoder.config.n_embd

    def token_bos(self) -> int:
        """The token that begins a text, -1 if there is none."""
        return -1 if self._model.tokenizer.bos is None else self._model.tokenizer.bos

    def token_eos(self) -> int:
        """The token that ends a text, -1 if there is none."""
        return -1 if self._model.tokenizer.eos is None else self._model.tokenizer.eos

    def _options(self, options: Result, max_tokens: int | None, logprobs: int | None) -> Any:
        """Return arguments of Model.generate for those of a completion."""
        _refuse(options, _OFF, (*_SAMPLING, *_OTHERS))
        ours = {name: options[name] for name in _SAMPLING if name in options}
        if "top_k" in ours:
            ours["top_k"] = max(0, ours["top_k"])  # llama.cpp's -1 is off, too
        seed, stop, processors = options.get("seed"), options.get("stop"), options.get("logits_processor")
        return ours | {
            "mirostat": options.get("mirostat_mode", 0),
            "max_tokens": max_tokens if max_tokens is not None and max_tokens > 0 else None,
            "stop": [stop] if isinstance(stop, str) else stop or (),
            "seed": self._seed if seed is None else seed,
            "logits_processors": processors if isinstance(processors, Sequence) else [processors] if processors else (),
            "logit_bias": {int(id): bias for id, bias in (options.get("logit_bias") or {}).items()},
            "logprobs": logprobs,
        }

    def _head(self, kind: str, options: Result) -> Result:
        """Return what all chunks of a result have in common."""
        id = f"{'chat' * kind.startswith('chat')}cmpl-{uuid.uuid4()}"
        model = options.get("model") or self.model_path
        return {"id": id, "object": kind, "created": int(time.time()), "model": model}

    def _completion(self, pieces: Answering, head: Result, offset: int, start: str) -> Result:
        answer = pieces.answer()
        n_prompt, n = answer.n_prompt, answer.n_decoded
        logprobs = self._logprobs(answer.logprobs[:n], offset)  # without the end's
        choice = {"text": start + answer.text, "index": 0, "logprobs": logprobs, "finish_reason": _end(answer.finish)}
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}
        return head | {"choices": [choice], "usage": usage}

    def _chunks(self, pieces: Answering, head: Result, offset: int) -> Iterator[Result]:
        """Yield the text in chunks, then one without text that says why it ended."""
        for piece in pieces:
            logprobs = self._logprobs(piece.logprobs[: len(piece.ids)], offset)
            offset += len(piece)
            if piece:
                choice = {"text": str(piece), "index": 0, "logprobs": logprobs, "finish_reason": None}
                yield head | {"choices": [choice]}
            if piece.finish_reason:
                choice = {"text": "", "index": 0, "logprobs": None, "finish_reason": _end(piece.finish_reason)}
                yield head | {"choices": [choice]}

    def _logprobs(self, records: Sequence[TokenLogprob], offset: int) -> Result | None:
        """Return OpenAI's lists; None for no records. offset: characters before the first token."""
        if not records:
            return None
        tokens = [self._text(record.id) for record in records]
        return {
            "tokens": tokens,
            "text_offset": [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))],
            "token_logprobs": [record.logprob for record in records],
            "top_logprobs": [
                {self._text(id): logprob for id, logprob in (*record.top, (record.id, record.logprob))}
                for record in records
            ],
        }

    def _text(self, id: int) -> str:
        return self._model.tokenizer.piece(id).decode(errors="ignore")


def _chat_chunks(chunks: Iterator[Result]) -> Iterator[Result]:
    """Turn chunks of a completion into those of a chat: the role, the text, and the end."""
    for i, chunk in enumerate(chunks):
        (choice,) = chunk["choices"]
        if not i:
            role = {"index": 0, "delta": {"role": "assistant"}, "logprobs": None, "finish_reason": None}
            yield chunk | {"choices": [role]}
        text, choice["logprobs"] = choice.pop("text"), _chat_logprobs(choice["logprobs"])
        yield chunk | {"choices": [{"delta": {} if choice["finish_reason"] else {"content": text}} | choice]}


def _chat_logprobs(logprobs: Result | None) -> Result | None:
    """Turn a completion's log-probabilities into those of a chat."""
    if logprobs is None:
        return None
    rows = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    content = [
        _of_token(token, logprob) | {"top_logprobs": [_of_token(*pair) for pair in top.items()]}
        for token, logprob, top in rows
    ]
    return {"content": content, "refusal": None}


def _of_token(token: str, logprob: float) -> Result:
    return {"token": token, "bytes": None, "logprob": logprob}


def _end(finish: str) -> str:
    return "stop" if finish == "stop" else "length"


def _refuse(found: Result, off: Result, known: Iterable[str]) -> None:
    """UnsupportedError for an argument of `off` with another value, OptionError for one that is not known."""
    check_names(found, (*off, *known))
    for name, value in found.items():
        if name in off and value is not None and value != off[name]:
            raise UnsupportedError(f"{name}={value!r:.60} is not supported here: leave it out")


def _cache_type(number: int | None) -> str:
    from gguf_run.formats.blocks.types import TENSOR_TYPES

    names = {type.id: type.name.lower() for type in TENSOR_TYPES} | {None: "f16"}
    if number not in names:
        raise OptionError(
            f"type_k or type_v is {number!r}; allowed: ggml's number of a tensor type, such as 8 for q8_0"
        )
    return names[number]


def _devices(n_gpu_layers: int) -> Any:
    """Return LoadOptions' fields for the layers on GPUs: none where no GPU is."""
    from gguf_run.runtime.load.machine import driver_there

    if not n_gpu_layers or not driver_there():
        return {"device": "cpu"}
    return {"gpu_layers": "all" if n_gpu_layers < 0 else n_gpu_layers}
