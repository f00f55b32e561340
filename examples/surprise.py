"""How likely a model finds each word of a text, and the perplexity: python examples/surprise.py [MODEL]"""

import sys

import numpy as np

from gguf_run import Model

TEXT = "The quick brown fox jumps over the lazy umbrella."

with Model.load(sys.argv[1] if sys.argv[1:] else None, n_ctx=256) as model:
    ids = model.tokenize(TEXT)
    logits = model.logits(ids).astype(np.float64)  # [n_tokens, n_vocab], after each token
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    surprise = -logprobs[np.arange(len(ids) - 1), ids[1:]]
    for id, nats in zip(ids[1:], surprise, strict=True):
        print(f"{model.detokenize([id])!r:14} {nats:5.2f} nats {'#' * round(nats)}")
    print(f"perplexity {np.exp(surprise.mean()):.1f}")
