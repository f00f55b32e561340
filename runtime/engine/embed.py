"""Embeddings and scores of texts: Model.embed and Model.rank."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import OptionError, did_you_mean
from gguf_run.models.decoder import Decoder
from gguf_run.models.embedder import Embedder
from gguf_run.models.pooling import POOLINGS
from gguf_run.runtime.engine.context import check_prompt
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer


def embed(
    decoder: Decoder, tokenizer: Tokenizer, texts: Sequence[str | Sequence[int]], pooling: str | None, normalize: bool
) -> NDArray[np.float32]:
    """Return the embeddings f32[number of texts, n_embd]. Arguments and errors: see Model.embed."""
    embedder, of_file = _embedder(decoder), decoder.config.pooling
    name = pooling or (of_file.type if of_file is not None else "last")
    if name not in POOLINGS:
        near = did_you_mean(name, POOLINGS)
        raise OptionError(f"pooling (--pooling) is {name!r}; {near}allowed: {', '.join(POOLINGS)}")
    all_ids = [tokenizer.encode(text) if isinstance(text, str) else [*text] for text in _listed(texts)]
    _check(embedder, all_ids)
    rows = np.array([embedder.embedding(ids, name) for ids in all_ids])
    if normalize:
        rows /= np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
    return rows.astype(np.float32)


def rank(decoder: Decoder, tokenizer: Tokenizer, query: str, texts: Sequence[str]) -> NDArray[np.float32]:
    """Return the probabilities f32[number of texts]. Arguments and errors: see Model.rank."""
    embedder, pooling = _embedder(decoder), decoder.config.pooling
    template = pooling.template if pooling is not None and pooling.ranks and embedder.has_scores else None
    if template is None:
        raise OptionError(
            "this model cannot rank: a reranker's file has pooling_type 4, a tensor cls.output.weight and a template "
            "tokenizer.chat_template.rerank; load one"
        )
    asked = re.split(r"(\{query\}|\{document\})", template)
    all_ids = []
    for text in _listed(texts):
        values = {"{query}": query, "{document}": str(text)}
        all_ids.append(tokenizer.encode_chat("".join(values.get(part, part) for part in asked)))
    _check(embedder, all_ids)
    return np.array([embedder.score(ids) for ids in all_ids], np.float32)


def _embedder(decoder: Decoder) -> Embedder:
    decoder.config  # noqa: B018  (tells if the model is closed)
    if not isinstance(decoder, Embedder):
        raise OptionError("this model was loaded to make text: load it with embed=True")
    return decoder


def _listed(texts: Sequence[str | Sequence[int]]) -> Sequence[str | Sequence[int]]:
    if isinstance(texts, str | bytes) or not texts:
        raise OptionError(f"texts is {texts!r:.40}; allowed: a list of at least one text")
    return texts


def _check(embedder: Embedder, all_ids: Sequence[Sequence[int]]) -> None:
    """Raise ContextError or GgufRunError before anything is computed."""
    for i, ids in enumerate(all_ids):
        check_prompt(ids, None, embedder.n_ctx, f"text {i}")
