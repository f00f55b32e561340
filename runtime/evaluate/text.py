"""What all evaluations share: a text is cut into chunks, and a model scores their tokens, block by block.

The protocol is that of llama.cpp's perplexity tool, so that figures can be compared. The whole text is tokenized, with
BOS where the model adds one, and cut into chunks of n_ctx tokens. BOS replaces the first token of each chunk. The
tokens of a chunk's second half are scored; the model sees all tokens of the chunk before the scored one:

    position   0 ..... n_ctx/2 | n_ctx/2 + 1 ..... n_ctx - 1
               context         | scored: n_ctx - 1 - n_ctx/2

With a stride, a window of n_ctx + stride/2 tokens starts at every stride-th token, and its last `stride` tokens are
scored: every scored token has at least n_ctx - stride/2 tokens before it. (llama.cpp puts BOS into a window only after
the window has run, which has no effect. Here BOS replaces the first token of a window too.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.kernels_cpu.measure.log_softmax import LogSoftmax
from gguf_run.runtime.engine.scores import logits as row_logits
from gguf_run.runtime.model import Model

N_CTX = 512
MIN_N_CTX = 4


@dataclass(frozen=True)
class Chunk:
    """A piece of a text."""

    ids: list[int]  # the tokens to run
    targets: list[int]  # the tokens to score; the last one follows the last of ids

    @property
    def n_tokens(self) -> int:
        return len(self.ids) + 1


def window_size(n_ctx: int, stride: int | None = None) -> int:
    """Return the number of tokens in a chunk. OptionError for sizes that are not allowed."""
    if n_ctx < MIN_N_CTX:
        raise OptionError(f"--ctx-size is {n_ctx}; allowed: at least {MIN_N_CTX}")
    if stride is not None and not 1 <= stride <= n_ctx:
        raise OptionError(f"--stride is {stride}; allowed: 1 to the context size, {n_ctx}")
    return n_ctx + (stride or 0) // 2


def cut_chunks(
    ids: Sequence[int],
    n_ctx: int,
    bos: int | None,
    n_chunk: int | None = None,
    stride: int | None = None,
    n_skip: int = 0,
) -> list[Chunk]:
    """Cut a text's ids into at most n_chunk chunks, without the first n_skip.

    bos: the first token of each chunk, None: the text's own.
    GgufRunError if the text is shorter than one chunk, OptionError for sizes that are not allowed and if no chunk is
    left.
    """
    size = window_size(n_ctx, stride)
    if n_chunk is not None and n_chunk < 1:
        raise OptionError(f"--chunks is {n_chunk}; allowed: at least 1")
    if len(ids) < size + (stride is not None):
        raise GgufRunError(
            f"the text has {len(ids)} tokens, one chunk needs {size + (stride is not None)}: "
            "use a longer text or a smaller --ctx-size"
        )
    n_scored = stride or n_ctx - 1 - n_ctx // 2
    n_last = len(ids) - size + (stride is None)  # a window starts before this token
    starts = list(range(0, n_last, stride or n_ctx))
    if n_skip >= len(starts):
        raise OptionError(f"--skip is {n_skip}; the text has {len(starts)} chunks, allowed: 0 to {len(starts) - 1}")
    chunks = []
    for start in starts[n_skip:][:n_chunk]:
        window = list(ids[start : start + size])
        chunks.append(Chunk([window[0] if bos is None else bos, *window[1:-1]], window[-n_scored:]))
    return chunks


def tokens_of(model: Model, text: str, parse_special: bool = False) -> list[int]:
    """Return the ids of a text, with BOS where the model adds one, without EOS.

    parse_special: the name of a control token in the text becomes that token; else it is plain text.
    """
    ids = model.tokenizer.encode(text, parse_special=parse_special)
    return ids[:-1] if model.tokenizer.add_eos else ids


def bos_of(model: Model) -> int | None:
    """Return the token that the model adds at the start of a context, or None."""
    return model.tokenizer.bos if model.tokenizer.add_bos else None


@dataclass(frozen=True)
class Block:
    """The scores of n successive tokens."""

    logits: NDArray[np.float32]  # [n, n_vocab], valid until the next block is made
    nll: NDArray[np.float64]  # [n], -log of the probability of the token in the text
    known_top: NDArray[np.int64] | None = None  # [n], `top` if a file of logits says it

    @property
    def top(self) -> NDArray[np.int64]:
        """The most likely token of each row, i64[n]."""
        return self.logits.argmax(axis=1) if self.known_top is None else self.known_top

    def rows(self, first: int, end: int | None = None) -> "Block":
        return Block(self.logits[first:end], self.nll[first:end], self.top[first:end])


class Scorer:
    """Scores tokens with a model. Close it before the model."""

    def __init__(self, model: Model, n_threads: int) -> None:
        self.model = model
        self.reduce = LogSoftmax(n_threads)
        self.reduce.divergence(*np.zeros((2, 1, 1), np.float32))  # compile now, before results are printed

    def run(self, ids: Sequence[int], targets: Sequence[int], *, resumes: bool = False) -> Iterator[Block]:
        """Run ids as a text of their own; yield the scores of targets, in order.

        resumes: what the text before begins with too is not computed again.
        """
        at = 0
        for logits in row_logits(self.model.engine, ids, len(targets), resumes=resumes):
            wanted = targets[at : at + len(logits)]
            at += len(logits)
            yield Block(logits, self.reduce.log_sum_exp(logits) - logits[np.arange(len(wanted)), wanted])

    def close(self) -> None:
        self.reduce.close()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_finite(values: NDArray[np.float64], what: str) -> None:
    """GgufRunError, which begins with `what`, if a value is not finite."""
    if not np.isfinite(values).all():
        raise GgufRunError(f"{what}: the model's logits are not finite numbers: is its file damaged?")
