"""Embeddings and scores of texts: Model.embed and Model.rank."""

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import OptionError, did_you_mean
from gguf_run.models.decoder import Decoder
from gguf_run.models.embedder import Embedder
from gguf_run.models.pooling import POOLINGS
from gguf_run.runtime.engine.check import check
from gguf_run.runtime.engine.engine import Engine
from gguf_run.runtime.engine.reply import Request
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

Texts = Sequence[str | Sequence[int]]
Rows = NDArray[np.float32]


def embed(engine: Engine, tokenizer: Tokenizer, texts: Texts, pooling: str | None, normalize: bool) -> Rows:
    """Return the embeddings f32[number of texts, n_embd]. Arguments and errors: see Model.embed."""
    embedder = _embedder(engine.decoder)
    of_file = embedder.config.pooling
    name = pooling or (of_file.type if of_file is not None else "last")
    if name not in POOLINGS:
        near = did_you_mean(name, POOLINGS)
        raise OptionError(f"pooling (--pooling) is {name!r}; {near}allowed: {', '.join(POOLINGS)}")
    ids = _ids(embedder, texts, lambda text: tokenizer.encode(text) if isinstance(text, str) else [*text])
    with engine.working():
        rows = np.array([embedder.embedding(one, name) for one in ids])
    if normalize:
        rows /= np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
    return rows.astype(np.float32)


def rank(engine: Engine, tokenizer: Tokenizer, query: str, texts: Sequence[str]) -> Rows:
    """Return the probabilities f32[number of texts]. Arguments and errors: see Model.rank."""
    embedder, pooling = _embedder(engine.decoder), engine.decoder.config.pooling
    if pooling is None or pooling.template is None:
        what = "whose file has pooling_type 4, the tensor cls.output.weight and tokenizer.chat_template.rerank"
        raise OptionError(f"this model cannot rank: load a reranker, {what}")
    parts = re.split(r"(\{query\}|\{document\})", pooling.template)

    def prompt(text: str | Sequence[int]) -> list[int]:
        values = {"{query}": query, "{document}": str(text)}
        return tokenizer.encode_chat("".join(values.get(part, part) for part in parts))

    ids = _ids(embedder, texts, prompt)
    with engine.working():
        return np.array([embedder.score(one) for one in ids], np.float32)


def _embedder(decoder: Decoder) -> Embedder:
    decoder.config  # noqa: B018  (tells if the model is closed)
    if not isinstance(decoder, Embedder):
        raise OptionError("this model was loaded to make text: load it with embed=True (--embed)")
    return decoder


def _ids(embedder: Embedder, texts: Texts, encode: Callable[[str | Sequence[int]], list[int]]) -> list[list[int]]:
    """Return the ids of all texts. ContextError for a text that is too long, before anything is computed."""
    if isinstance(texts, str | bytes) or not len(texts):
        raise OptionError(f"texts is {texts!r:.40}; allowed: a list of at least one text")
    ids = [encode(text) for text in texts]
    for i, one in enumerate(ids):
        check(Request(one), embedder.n_ctx, None, f"text {i}")
    return ids
