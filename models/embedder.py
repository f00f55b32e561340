"""A decoder of hidden states in place of logits: it makes embeddings and scores of texts."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.models.pooling import DENSE, SCORES


class Embedder(Decoder):
    """Runs one text at a time, in sequence 0. It has no output matrix, so that forward, top and step raise errors."""

    has_logits = False

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        backends: Sequence[Any],
        n_ctx: int,
        n_batch: int = 512,
        **more: Any,
    ) -> None:
        """Arguments and errors: see Decoder. An encoder runs a whole text at once: n_batch becomes n_ctx."""
        if not config.arch.is_causal:
            n_ctx = n_batch = more["n_outputs"] = min(n_ctx, config.n_ctx_train)
        super().__init__(config, tensors, backends, n_ctx, n_batch, **more)
        self._heads = {  # matrices f32[n_out, n_in], and their biases
            name: dequantize(tensor.blocks(), tensor.type).reshape(tensor.ne[::-1])
            for name, tensor in tensors.items()
            if name.rpartition(".")[0] in (*DENSE, SCORES)
        }

    def hidden(self, ids: Sequence[int], n_last: int = 1) -> NDArray[np.float32]:
        """Return the hidden states f32[n_last, n_embd] of a text's last tokens. GgufRunError: see Decoder.forward."""
        self.rewind(0)
        blocks = super().forward(ids, n_last)
        return np.concatenate([block.copy() for block in blocks])

    def embedding(self, ids: Sequence[int], pooling: str, heads: Sequence[str] = DENSE) -> NDArray[np.float64]:
        """Return the embedding f64[n_embd] of a text.

        pooling: one of POOLINGS. heads: matrices that it is multiplied with, where the file has them.
        """
        rows = self.hidden(ids, 1 if pooling == "last" else len(ids))
        x: NDArray[np.float64] = rows.mean(axis=0, dtype=np.float64) if pooling == "mean" else rows[0].astype(float)
        for name in heads:
            if (weight := self._heads.get(f"{name}.weight")) is not None:
                x = weight @ x + self._heads.get(f"{name}.bias", 0.0)
        return x

    def score(self, ids: Sequence[int]) -> float:
        """Return the probability of the first label after a text, "yes" in the rerankers that there are."""
        logits = self.embedding(ids, "last", (SCORES,))
        odds = np.exp(logits - logits.max())
        return float(odds[0] / odds.sum())

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        what = "use Model.embed or rank (--embed), or load a model for text without embed=True"
        raise GgufRunError(f"this {self.config.arch.name} model is loaded to make embeddings, no text: {what}")

    top = step = forward
