"""Importance matrices: collected while a model reads a text, added up, written, and described.

The procedure is llama-imatrix's. Every chunk starts from an empty context, with BOS where the model adds one, and every
token of a chunk counts. For each matrix, the squares of the inputs are added up. The sums of one chunk are made in
float64 and rounded once; the sums over chunks are float32. A file holds the whole state, so a run that continues from a
file ends with the same bits as a run that was never interrupted. formats/gguf/imatrix.py has the form of the file,
moments.py what --full adds.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.imatrix import CHUNK_COUNT, CHUNK_SIZE, COUNTS, DATASETS, INPUTS, SUMS, Imatrix, Sums
from gguf_run.formats.gguf.moments import MOMENTS
from gguf_run.formats.gguf.writer import GGUFWriter, MetaValue, TensorInfo, Typed
from gguf_run.runtime.evaluate.moments import Products, unbroken

if TYPE_CHECKING:
    from gguf_run.runtime.evaluate.perplexity import Perplexity
    from gguf_run.runtime.evaluate.text import Chunk, Scorer

_ACTIVE = 1e-5  # mean squares above this count as active


class Collector:
    """Adds chunks to `imatrix`. The scorer's model was loaded with observe=True."""

    def __init__(
        self,
        scorer: "Scorer",
        imatrix: Imatrix,
        dataset: str,
        process_output: bool,
        ppl: bool,
        products: Products | None = None,
    ) -> None:
        """Prepare a run.

        imatrix: what was collected before. dataset: the text's name. process_output: collect for the output matrix
        too. ppl: score the tokens on the way. products: add second moments to these, after `keep`. GgufRunError if
        `imatrix` is of another model.
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
        self.imatrix, self._products = imatrix, products

    def keep(self, n_tokens: int) -> str:
        """Prepare to add second moments. See Products.keep."""
        assert self._products is not None
        observed = [item for item in self._observed if item.names[0].startswith(self._prefix)]
        return self._products.keep(observed, self._n_ctx, self._scorer.model.decoder.config, n_tokens)

    def run(self, chunks: "Sequence[Chunk]") -> "Iterator[Perplexity]":
        """Add chunks of imatrix.chunk_size tokens; yield the perplexity over all chunks so far after each.

        Without ppl, the perplexity is over 0 tokens. Ctrl-C is heard while a chunk runs, not while it is added.
        GgufRunError if logits or sums are not finite.
        """
        from gguf_run.runtime.evaluate.perplexity import Perplexity  # late: statistics need no model

        done = Perplexity()
        for chunk in chunks:
            done = done.plus(self._score(chunk))
            with unbroken():
                self.imatrix = add(self.imatrix, self._take())
                if self._products is not None:
                    self._products.add_chunk()
                yield done

    def _score(self, chunk: "Chunk") -> NDArray[np.float64]:
        """Run all tokens of a chunk. Nothing follows the last token, but it counts too."""
        ids = [*chunk.ids, chunk.targets[-1]]
        targets = [*ids[1:], 0][len(ids) - self._n_rows :]
        nll = [block.nll for block in self._scorer.run(ids, targets)]
        return np.concatenate(nll)[-1 - len(chunk.targets) : -1] if self._ppl else np.zeros(0)

    def _take(self) -> Imatrix:
        """The sums of the chunk that has just run."""
        sums: dict[str, Sums] = {}
        inputs: dict[str, str] = {}
        for item in self._observed:
            squares, counts = item.squares.take()
            with np.errstate(over="ignore"):
                entry = Sums(squares.astype(np.float32), counts.astype(np.float32))
            sums |= {name: entry for name in item.names if name.startswith(self._prefix)}
            inputs |= {name: item.names[0] for name in item.names if self._products is not None and name in sums}
        return Imatrix(sums, (self._dataset,), 1, self._n_ctx, inputs)


def read_all(paths: Sequence[str | os.PathLike[str]], n_ctx: int | None, full: bool = False) -> Imatrix:
    """Read files and add them up. n_ctx: the tokens of a chunk; None: what the first file says, else 512.

    GgufRunError for a file without second moments, if `full` or if others have them.
    """
    files = [Imatrix.open(path) for path in paths]
    n_ctx = n_ctx or (files[0].chunk_size if files else 0) or 512
    total, full = Imatrix({}, (), 0, n_ctx), full or any(file.inputs for file in files)
    for path, file in zip(paths, files, strict=True):
        if full and not file.inputs:
            raise GgufRunError(f"{path}: has no second moments, so it cannot be added: make it again with --full")
        if not file.chunk_size:  # a legacy file has means of chunks, not sums of tokens
            scaled = {name: Sums(e.sums * np.float32(n_ctx), e.counts * n_ctx) for name, e in file.sums.items()}
            file = replace(file, sums=scaled)
        try:
            total = add(total, file)
        except GgufRunError as error:
            raise GgufRunError(f"{path}: {error}") from None
    return total


def add(a: Imatrix, b: Imatrix) -> Imatrix:
    """Return the sums over the texts of both, in chunks of a's size.

    GgufRunError if the two cannot be of the same model, or if sums are not finite.
    """
    sums = {**a.sums, **b.sums}
    for name in a.sums.keys() & b.sums.keys():
        sums[name] = _add(name, a.sums[name], b.sums[name])
    for name, entry in sums.items():
        if not np.isfinite(entry.sums).all():
            raise GgufRunError(f"entry {name}: its sums are not finite numbers: is the model's file damaged?")
    n_tokens = max((float(entry.counts.max()) for entry in sums.values()), default=0)
    datasets = tuple(dict.fromkeys((*a.datasets, *b.datasets)))
    return Imatrix(sums, datasets, int(n_tokens) // a.chunk_size, a.chunk_size, {**a.inputs, **b.inputs})


def _add(name: str, a: Sums, b: Sums) -> Sums:
    """Add two entries. One of them may have a single count, which is then the count of each expert."""
    n = max(len(a.counts), len(b.counts))
    if a.sums.size != b.sums.size or {len(a.counts), len(b.counts)} - {1, n}:
        raise GgufRunError(
            f"entry {name} is of {b.sums.size} input channels and {len(b.counts)} experts, not of {a.sums.size} and "
            f"{len(a.counts)}: it is another model's imatrix"
        )
    with np.errstate(over="ignore"):
        return Sums(a.sums.reshape(n, -1) + b.sums.reshape(n, -1), a.counts + b.counts)


def write(
    path: str | os.PathLike[str],
    imatrix: Imatrix,
    inputs: Iterable[str | os.PathLike[str]] = (),
    products: Products | None = None,
) -> None:
    """Write the GGUF form, tensors by name. inputs: files that must not be overwritten. Errors: see GGUFWriter."""
    metadata: dict[str, MetaValue] = {
        "general.type": "imatrix",
        DATASETS: Typed("array[string]", list(imatrix.datasets)),
        CHUNK_COUNT: Typed("u32", imatrix.chunk_count),
        CHUNK_SIZE: Typed("u32", imatrix.chunk_size),
    }
    f32 = type_by_name("F32")
    values: dict[str, NDArray[np.float32]] = {}
    for name, entry in sorted(imatrix.sums.items()):
        values |= {name + SUMS: entry.sums, name + COUNTS: entry.counts[:, None]}
    if products is not None:
        metadata[INPUTS] = Typed("array[string]", [imatrix.inputs[name] for name in sorted(imatrix.inputs)])
        values |= {first + MOMENTS: sums for first, sums in sorted(products.sums.items())}
    infos = [TensorInfo(name, rows.shape[::-1], f32) for name, rows in values.items()]
    with GGUFWriter(path, metadata, infos, inputs=inputs) as writer:
        for name, rows in values.items():
            writer.write(name, np.ascontiguousarray(rows, "<f4").view(np.uint8))


@dataclass(frozen=True)
class TensorUse:
    """How a tensor's input channels are used: figures of llama-imatrix --show-statistics.

    The figures are of n values, one for each input channel (of each expert that saw a token): the mean square of what
    the channel carries.
    """

    layer: int  # -1: the tensor is in no layer
    tensor: str  # the name without "blk.N." and ".weight"
    n: int  # values
    total: float
    low: float
    high: float
    mean: float
    deviation: float  # standard deviation
    active: float  # the share of values above 1e-5
    entropy: float  # of the values' shares of their sum, in bits
    z_density: float  # the share of values more than one deviation above the mean (Dumitru 2024, arXiv:2406.17415)
    similarity: float  # cosine of the sums with those of the same tensor one layer before; 0: there is none

    @property
    def normalized_entropy(self) -> float:
        """The entropy as a share of log2(n), the largest that n values can have."""
        return self.entropy / math.log2(self.n) if self.n > 1 else 0.0


def tensor_uses(imatrix: Imatrix) -> list[TensorUse]:
    """Return the use of each tensor, sorted by name and then by sum, the largest first.

    Tensors that saw no token are left out.
    """
    uses = [_use(name, imatrix.sums) for name, entry in imatrix.sums.items() if entry.counts.any()]
    return sorted(uses, key=lambda use: (use.tensor, -use.total))


def _use(name: str, sums: Mapping[str, Sums]) -> TensorUse:
    entry = sums[name]
    seen = entry.counts > 0
    x = (entry.sums[seen] / entry.counts[seen, None].astype(np.float64)).reshape(-1)
    total, deviation = x.sum(), x.std()
    p = x[x > 0] / total
    match = re.search(r"blk\.(\d+)\.", name)
    before = None
    if match is not None:
        before = sums.get(f"{name[: match.start(1)]}{int(match[1]) - 1}{name[match.end(1) :]}")
    return TensorUse(
        layer=-1 if match is None else int(match[1]),
        tensor=name.removesuffix(".weight").split(".")[-1],
        n=x.size,
        total=float(total),
        low=float(x.min()),
        high=float(x.max()),
        mean=float(x.mean()),
        deviation=float(deviation),
        active=float((x > _ACTIVE).mean()),
        entropy=float(-(p * np.log2(p)).sum()),
        z_density=float((x - x.mean() > deviation).mean()) if deviation else 0.0,
        similarity=_cosine(entry.sums, before.sums) if before else 0.0,
    )


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    x, y = (values.reshape(-1).astype(np.float64) for values in (a, b))
    lengths = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / lengths) if x.size == y.size and lengths else 0.0


def mean_uses(uses: Sequence[TensorUse]) -> list[tuple[int, float, float, float]]:
    """Return (layer, total, z_density, similarity) of each layer: means over its tensors, weighted by their n."""
    means = []
    for layer in sorted({use.layer for use in uses} - {-1}):
        rows = np.array([(u.n, u.total, u.z_density, u.similarity) for u in uses if u.layer == layer])
        means.append((layer, *(rows[:, 0] @ rows[:, 1:] / rows[:, 0].sum()).tolist()))
    return means
