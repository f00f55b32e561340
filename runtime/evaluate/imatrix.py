"""Collecting an importance matrix: a model reads a text, and the squares of what its matrices read are added up.

This is llama-imatrix's procedure. Every chunk starts from an empty context, with BOS where the model adds one, and
every token of a chunk counts. The sums of one chunk are made in float64 and rounded once; the sums over chunks are
float32. A file holds the whole state, so a run that continues from a file ends with the same bits as a run that was
never interrupted.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.imatrix import Imatrix, Sums
from gguf_run.runtime.evaluate.imatrix_file import add
from gguf_run.runtime.evaluate.perplexity import Perplexity
from gguf_run.runtime.evaluate.text import Chunk, Scorer


class Collector:
    """Adds chunks to `imatrix`. The scorer's model was loaded with observe=True."""

    def __init__(self, scorer: Scorer, imatrix: Imatrix, dataset: str, process_output: bool, ppl: bool) -> None:
        """Prepare a run.

        imatrix: what was collected before. dataset: the text's name. process_output: collect for the output matrix
        too. ppl: score the tokens on the way. GgufRunError if `imatrix` is of another model.
        """
        assert scorer.model.decoder.observed is not None
        self._scorer, self._observed, self._ppl = scorer, scorer.model.decoder.observed, ppl
        self._n_ctx, self._dataset = imatrix.chunk_size, dataset
        self._prefix = "" if process_output else "blk."
        self._n_rows = self._n_ctx if process_output else (self._n_ctx + 1) // 2 if ppl else 0
        widths = {name: item.squares.take()[0].size for item in self._observed for name in item.names}
        for name, entry in imatrix.sums.items():
            if entry.sums.size != widths.get(name, 0):
                raise GgufRunError(
                    f"--in-file has an entry {name} of {entry.sums.size} input channels, the model "
                    f"{f'has {widths[name]} there' if name in widths else 'has no such matrix'}: "
                    "it is another model's imatrix"
                )
        self.imatrix = imatrix

    def run(self, chunks: Sequence[Chunk]) -> Iterator[Perplexity]:
        """Add chunks of imatrix.chunk_size tokens; yield the perplexity over all chunks so far after each.

        Without ppl, the perplexity is over 0 tokens. GgufRunError if logits or sums are not finite.
        """
        done = Perplexity()
        for chunk in chunks:
            done = done.plus(self._score(chunk))
            self.imatrix = add(self.imatrix, self._take())
            yield done

    def _score(self, chunk: Chunk) -> NDArray[np.float64]:
        """Run all tokens of a chunk. Nothing follows the last token, but it counts too."""
        ids = [*chunk.ids, chunk.targets[-1]]
        targets = [*ids[1:], 0][len(ids) - self._n_rows :]
        nll = [block.nll for block in self._scorer.run(ids, targets)]
        return np.concatenate(nll)[-1 - len(chunk.targets) : -1] if self._ppl else np.zeros(0)

    def _take(self) -> Imatrix:
        """The sums of the chunk that has just run."""
        sums: dict[str, Sums] = {}
        for item in self._observed:
            squares, counts = item.squares.take()
            with np.errstate(over="ignore"):
                entry = Sums(squares.astype(np.float32), counts.astype(np.float32))
            sums |= {name: entry for name in item.names if name.startswith(self._prefix)}
        return Imatrix(sums, (self._dataset,), 1, self._n_ctx)
