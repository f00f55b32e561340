"""The decoder loads a model's weights into backends, makes the programs once, and runs tokens through the programs."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.backend import CacheType, Results, Run, Tops
from gguf_run.models.config import ModelConfig
from gguf_run.models.kv_cache import KvCache
from gguf_run.models.stages import Placed, build, cache_layers, page_tables
from gguf_run.models.step import Observed

if TYPE_CHECKING:
    from gguf_run.models.adapted_step import Adapters
    from gguf_run.models.protocol import AnyBackend


class Decoder:
    """A model that is ready to run."""

    cache: KvCache  # the tokens of n_seq sequences
    backends: "Sequence[AnyBackend]"  # one for each layer, then one for the experts of each layer
    observed: list[Observed] | None  # sums of squares of the inputs of all matmuls; None: not observed
    n_batch: int  # the most tokens of a step
    n_outputs: int  # the most tokens of a step whose logits are wanted
    has_logits = True  # False: the results are hidden states, see embedder.py

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        backends: "Sequence[AnyBackend]",
        n_ctx: int,
        n_batch: int = 512,
        n_outputs: int = 64,
        n_seq: int = 1,
        cache_types: Sequence[CacheType] | None = None,
        progress: Callable[[int], None] | None = None,
        observe: bool = False,
        embedding: "AnyBackend | None" = None,
        experts: "Sequence[AnyBackend] | None" = None,
        n_cells: int | None = None,
        adapters: "Adapters | None" = None,
    ) -> None:
        """Load the weights and make the programs.

        config: made from the same tensors, which it has checked.
        backends: one for each layer. The last one has the output matrix too. Where the backend changes between two
            layers, the hidden state is copied.
        n_ctx: the most tokens of a sequence.
        n_batch: the most tokens that run at once. Below n_seq, n_seq is used: all sequences fit into one step.
        n_outputs: rows of logits that are held at once. Below n_seq, n_seq is used.
        cache_types: one for each layer; None: f16.
        progress: called with the number of bytes of each tensor that is loaded.
        observe: fill `observed`. The matrices of layers see every token. The output matrix sees only the tokens whose
            logits are wanted.
        embedding: the backend that looks up the embeddings; None: the first layer's.
        experts: one backend for the experts of each layer; None: the backends of the layers.
        n_cells: positions that the KV cache has for all sequences together; None: n_ctx for each.
        adapters: for n_seq sequences. Their `scales` may change between steps.

        Raises GgufRunError for sizes below 1, and the backends' errors.
        """
        if n_ctx < 1 or n_batch < 1 or n_outputs < 1 or n_seq < 1:
            raise GgufRunError(
                f"n_ctx {n_ctx}, n_batch {n_batch}, n_outputs {n_outputs} and n_seq {n_seq} must be at least 1"
            )
        if len(backends) != config.n_layer:
            raise ValueError(f"{len(backends)} backends for {config.n_layer} layers")
        pairs = enumerate(zip(experts or backends, backends, strict=True))
        experts = [others if config.layers[il].has_experts else own for il, (others, own) in pairs]
        placed = Placed(backends, experts, embedding or backends[0])
        self.config, self.n_ctx, self.adapters = config, n_ctx, adapters
        self.backends = (*backends, *experts)
        self._backends = {id(backend): backend for backend in (placed.embedding, *self.backends)}
        self.observed = [] if observe else None
        self.n_batch = n_batch = max(min(n_batch, n_ctx), n_seq)
        self.n_outputs = n_outputs = max(min(n_outputs, n_batch), n_seq)
        kinds = cache_types or [CacheType()] * config.n_layer
        tables = page_tables(config, n_ctx, n_batch, n_seq, n_cells)
        layers = cache_layers(config, tensors, backends, kinds, n_ctx, tables)
        self.cache = KvCache(layers, tables, n_ctx)
        report = progress or (lambda n_bytes: None)
        ends = n_batch, n_outputs, report, self.observed, self.has_logits, adapters
        self._stages = build(config, tensors, placed, layers, *ends)
        self._program = self._stages[-1].program  # makes the logits

    @property
    def n_top(self) -> int:
        """The most values of a Top; 0: `top` takes none."""
        return self._program.n_top

    @property
    def n_past(self) -> int:
        """Tokens of sequence 0."""
        return self.cache.n_past()

    def forward(self, ids: Sequence[int], n_outputs: int = 1, seq: int = 0) -> Iterator[NDArray[np.float32]]:
        """Append tokens to a sequence. Return an iterator over the logits of the last n_outputs tokens.

        The logits come in order, in blocks f32[n, n_vocab]. The next block overwrites a block.
        Batches without wanted logits run now. Other batches run when the iterator reaches them, so exhaust the iterator
        before the next call. n_past counts the tokens of the batches that have run.

        n_outputs: 0 to len(ids).

        Raises GgufRunError for an id that is not in the vocabulary, and for more tokens than the context has room for.
        """
        if not 0 <= n_outputs <= len(ids):
            raise ValueError(f"n_outputs is {n_outputs}, must be from 0 to the number of tokens, {len(ids)}")
        self._check(ids, seq)
        self._lengthen({seq: len(ids)})
        tokens = np.asarray(ids, np.int32)
        n_batch, first = self.n_batch, len(ids) - n_outputs
        start = 0
        while start < len(ids) and (start + n_batch <= first or not n_outputs):
            self._run(tokens[start : start + n_batch], {seq: min(n_batch, len(ids) - start)}, ())
            start += n_batch
        end = len(ids) - self.cache.tail(len(ids))
        if start < end <= first:
            self._run(tokens[start:end], {seq: end - start}, ())
            start = end
        return self._logits(tokens[start:], first - start, seq)

    def _check(self, ids: Sequence[int], seq: int) -> None:
        """Raise GgufRunError if ids cannot be appended to a sequence."""
        n_past, n_vocab = self.cache.n_past(seq), self.config.n_vocab
        for i, id in enumerate(ids):
            if not 0 <= id < n_vocab:
                raise GgufRunError(f"token {i} has the id {id}: the model's ids go from 0 to {n_vocab - 1}")
        if n_past + len(ids) > self.n_ctx:
            raise GgufRunError(
                f"the context is full: {n_past} tokens are in it, {len(ids)} more do not fit into {self.n_ctx}; "
                "use a larger context size or a shorter text"
            )

    def _lengthen(self, counts: Mapping[int, int]) -> None:
        """Run the tokens of sequences again whose rotation changes when {seq: number of tokens} are appended."""
        for seq, n in counts.items() if self.cache.n_short else ():
            from gguf_run.models.kv_moves import outgrown  # late: few models have two rotations

            ids = np.array(outgrown(self.cache, seq, n), np.int32)
            for start in range(0, len(ids), self.n_batch):
                part = ids[start : start + self.n_batch]
                self._run(part, {seq: len(part)}, ())

    def _logits(self, tokens: NDArray[np.int32], first: int, seq: int) -> Iterator[NDArray[np.float32]]:
        """Run tokens in batches. Yield the logits from token `first` on, a token of the first batch."""
        program = self._program
        for start in range(0, len(tokens), self.n_batch):
            batch = tokens[start : start + self.n_batch]
            wanted = range(max(first - start, 0), len(batch))
            yield self._run(batch, {seq: len(batch)}, wanted[: program.n_outputs]).values
            for at in range(program.n_outputs, len(wanted), program.n_outputs):
                yield program.more(wanted[at : at + program.n_outputs])

    def step(self, batch: Mapping[int, Sequence[int]], rows: Mapping[int, int] | None = None) -> NDArray[np.float32]:
        """Return the logits that `top` returns without `tops`, f32[n, n_vocab]. The next call overwrites them."""
        return self.top(batch, rows).values

    def top(
        self, batch: Mapping[int, Sequence[int]], rows: Mapping[int, int] | None = None, tops: Tops = ()
    ) -> Results:
        """Append tokens to several sequences at once. Return the logits after some of them, or the greatest logits.

        batch: {seq: ids}. Each sequence gets at least one token, all sequences together at most n_batch.
        rows: {seq: the number of its last tokens whose logits are wanted}, at most n_outputs in all; None: one each.
        tops: see protocol.Program.run; of the tokens whose logits are wanted, in the order of the batch.

        Raises GgufRunError as forward does, and CacheFullError; then no sequence has changed.
        """
        for seq, ids in batch.items():
            self._check(ids, seq)
        counts = {seq: len(ids) for seq, ids in batch.items()}
        n_tokens = sum(counts.values())
        if not counts or min(counts.values()) < 1 or n_tokens > self.n_batch:
            raise ValueError(f"a step of {counts} tokens: it takes 1 or more a sequence, {self.n_batch} in all")
        self._lengthen(counts)
        tokens = np.fromiter(itertools.chain.from_iterable(batch.values()), np.int32, n_tokens)
        ends = dict(zip(counts, itertools.accumulate(counts.values()), strict=True))
        wanted = [row for seq, end in ends.items() for row in range(end - (1 if rows is None else rows[seq]), end)]
        return self._run(tokens, counts, wanted, tops)

    def _run(
        self, batch: NDArray[np.int32], counts: Mapping[int, int], rows: Sequence[int], tops: Tops = ()
    ) -> Results:
        """Run all stages for {seq: number of tokens}. rows, tops: see protocol.Program.run."""
        runs: list[Run] = self.cache.begin(counts)
        for stage, following in itertools.pairwise(self._stages):
            stage.program.run(batch, runs, (), stage.part)
            for source, target in zip(stage.leaves, following.reads, strict=True):
                following.program.copy_from(stage.program, source, len(batch), target)
        results = self._program.run(batch, runs, rows, self._stages[-1].part, tops)
        self.cache.end(runs, batch.tolist())
        return results

    def rewind(self, n_past: int, seq: int = 0) -> int:
        """Forget a sequence's tokens from position n_past on. Return how many tokens are left: see KvCache.rewind."""
        return self.cache.rewind(n_past, seq)

    def nbytes(self) -> dict[str, int]:
        """Return the bytes that the backends hold, by purpose: see protocol.Backend.nbytes."""
        held: Counter[str] = Counter()
        for backend in self._backends.values():
            held.update(backend.nbytes())
        return dict(held)

    def close(self) -> None:
        """Free the programs. The backends belong to the caller."""
        for stage in self._stages:
            stage.program.close()
