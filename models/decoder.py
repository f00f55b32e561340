"""The decoder: loads a model's weights into backends, records its step once, and runs tokens through it."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.reader import Tensor
from gguf_run.models.backend import Backend, Buffer, CacheType, Program, Run
from gguf_run.models.config import ModelConfig
from gguf_run.models.kv_cache import CacheLayer, KvCache
from gguf_run.models.layer import Loader, Observed, Step


@dataclass(frozen=True)
class _Stage:
    """A part of the model that runs on one backend, as one program. x: its tokens' hidden state, f32[n_batch, n_embd],
    which comes from the stage before and goes on to the next."""

    backend: Backend
    program: Program
    x: Buffer


def _parts(backends: Sequence[Backend], embedding: Backend) -> list[tuple[Backend, list[int]]]:
    """The stages' backends and layers. The first, which looks up the embeddings, may have no layer."""
    runs = [[*run] for _, run in itertools.groupby(range(len(backends)), key=lambda il: id(backends[il]))]
    parts = [(backends[run[0]], run) for run in runs]
    return parts if embedding is backends[0] else [(embedding, []), *parts]


class Decoder:
    """A model that is ready to run. cache: the tokens of n_seq sequences, from 0 on. backends: of the layers."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        backends: Sequence[Backend],
        n_ctx: int,
        n_batch: int = 512,
        n_outputs: int = 64,
        n_seq: int = 1,
        cache_types: Sequence[CacheType] | None = None,
        progress: Callable[[int], None] | None = None,
        observe: bool = False,
        embedding: Backend | None = None,
    ) -> None:
        """Load the weights and record the step.

        config: made from the same tensors, which it has checked. backends: one for each layer; the last
        layer's has the output matrix too. embedding: which looks up the embeddings; None: the first layer's. Where the
        backend changes from layer to layer, the hidden state crosses over. n_ctx: positions in the KV caches, for each
        sequence. n_batch: tokens that run at once. n_outputs: rows of logits that are held at once.
        Both are at least n_seq, so that all sequences fit into one step. cache_types: of each layer; None: the
        backends' own. progress: called with the number of bytes of each tensor that is loaded. observe: fill
        `observed`, the inputs of all matmuls: those of the layers see every token, that of the output matrix the tokens
        whose logits are asked for.
        """
        if n_ctx < 1 or n_batch < 1 or n_outputs < 1 or n_seq < 1:
            raise GgufRunError(
                f"n_ctx {n_ctx}, n_batch {n_batch}, n_outputs {n_outputs} and n_seq {n_seq} must be at least 1"
            )
        if len(backends) != config.n_layer:
            raise ValueError(f"{len(backends)} backends for {config.n_layer} layers")
        embedding = embedding or backends[0]
        self._backends = {id(backend): backend for backend in (embedding, *backends)}
        self.config, self.backends = config, backends
        self.n_ctx = n_ctx
        self.observed: list[Observed] | None = [] if observe else None
        n_batch = max(min(n_batch, n_ctx), n_seq)
        load = Loader(tensors, progress)
        ropes = load.ropes(config, n_ctx)
        layers = []
        kinds: Sequence[CacheType | None] = cache_types or [None] * config.n_layer
        for il, (backend, kind) in enumerate(zip(backends, kinds, strict=True)):
            shape = config.attention(il)
            cache = backend.cache(shape, n_ctx, n_batch, n_seq, kind)
            layers.append(CacheLayer(cache, shape.window, ropes[il]))
        self.cache = KvCache(layers, n_ctx, n_seq)
        n_outputs = max(min(n_outputs, n_batch), n_seq)
        self._stages: list[_Stage] = []
        for backend, part in _parts(backends, embedding):
            self._stages.append(self._record(backend, part, layers, load, n_batch, n_outputs))

    def _record(
        self,
        backend: Backend,
        part: list[int],
        caches: Sequence[CacheLayer],
        load: Loader,
        n_batch: int,
        n_outputs: int,
    ) -> _Stage:
        """Load layers and record their program: embed before the first, logits after the last of all."""
        config, first = self.config, not self._stages
        last = config.n_layer - 1 in part
        layers = [load.layer(backend, config, il, caches[il].rope, caches[il].cache) for il in part]
        # A model without an output matrix uses the embeddings; their table reads rows from the file when they are
        # needed, so that its pages can be released after the matrix is made.
        embd = load.tensors["token_embd.weight"]
        tied = "output.weight" not in load.tensors
        if last:
            output_norm = load.norm(backend, "output_norm")
            output = load.matrix(backend, "token_embd" if tied else "output", bias=["output"])
        if first and not tied:
            load.progress(embd.nbytes)

        recorder = backend.recorder(n_batch, n_outputs)
        step = Step(recorder, config, self.observed)
        x = result = step.x
        if first:
            recorder.embed(backend.table(embd), x, config.embd_scale)
        for il, layer in zip(part, layers, strict=True):
            step.attention(layer)
            if il == config.n_layer - 1 and self.observed is None:
                step.only_outputs()
            step.ffn(layer)
        if last:
            if self.observed is not None:
                step.only_outputs()
            assert output_norm is not None  # config has checked it
            result = step.output(output_norm, output)
        return _Stage(backend, recorder.finish(result), x)

    @property
    def _program(self) -> Program:
        """That of the last stage, which makes the logits."""
        return self._stages[-1].program

    @property
    def n_batch(self) -> int:
        """Tokens of a step, at most."""
        return self._program.n_batch

    @property
    def n_past(self) -> int:
        """Tokens of sequence 0."""
        return self.cache.n_past()

    def forward(self, ids: Sequence[int], n_outputs: int = 1, seq: int = 0) -> Iterator[NDArray[np.float32]]:
        """Append tokens to a sequence; return an iterator over the logits of the last n_outputs of them.

        The logits come in order, in blocks f32[n, n_vocab] that are valid until the next block is asked for. Batches
        of which no logits are wanted run at once, the others when the iterator reaches them: use it up before the next
        call. n_past counts the tokens of the batches that have run. n_outputs: 0 to len(ids).

        Raises GgufRunError for an id that is not in the vocabulary and for more tokens than the context has room for.
        """
        if not 0 <= n_outputs <= len(ids):
            raise ValueError(f"n_outputs is {n_outputs}, must be from 0 to the number of tokens, {len(ids)}")
        self._check(ids, seq)
        tokens = np.asarray(ids, np.int32)
        n_batch, first = self._program.n_batch, len(ids) - n_outputs
        start = 0
        while start < len(ids) and (start + n_batch <= first or not n_outputs):
            self._run(tokens[start : start + n_batch], {seq: min(n_batch, len(ids) - start)}, ())
            start += n_batch
        return self._logits(tokens[start:], first - start, seq)

    @property
    def n_top(self) -> int:
        """Most of the greatest logits that `top` finds, 0 where it does not."""
        return self._program.n_top

    def top(self, ids: Sequence[int], k: int, seq: int = 0) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """Append up to n_batch tokens; return the k <= n_top likeliest next tokens and their logits, see
        Program.run_top. GgufRunError as for forward."""
        self._check(ids, seq)
        tokens = np.asarray(ids, np.int32)
        runs = self._before_last(tokens, {seq: len(ids)})
        top = self._program.run_top(tokens, runs, len(ids) - 1, k)
        self.cache.end(runs)
        return top

    def _check(self, ids: Sequence[int], seq: int) -> None:
        """GgufRunError if ids cannot be appended to a sequence."""
        n_past, n_vocab = self.cache.n_past(seq), self.config.n_vocab
        for i, id in enumerate(ids):
            if not 0 <= id < n_vocab:
                raise GgufRunError(f"token {i} has the id {id}: the model's ids go from 0 to {n_vocab - 1}")
        if n_past + len(ids) > self.n_ctx:
            raise GgufRunError(
                f"the context is full: {n_past} tokens are in it, {len(ids)} more do not fit into {self.n_ctx}; "
                "use a larger context size or a shorter text"
            )

    def _logits(self, tokens: NDArray[np.int32], first: int, seq: int) -> Iterator[NDArray[np.float32]]:
        """Run tokens in batches and yield the logits of all from `first` on, which is in the first batch."""
        program = self._program
        for start in range(0, len(tokens), program.n_batch):
            batch = tokens[start : start + program.n_batch]
            wanted = range(max(first - start, 0), len(batch))
            yield self._run(batch, {seq: len(batch)}, wanted[: program.n_outputs])
            for at in range(program.n_outputs, len(wanted), program.n_outputs):
                yield program.more(wanted[at : at + program.n_outputs])

    def step(self, batch: Mapping[int, Sequence[int]]) -> NDArray[np.float32]:
        """Append tokens to several sequences at once: {seq: ids}, n_batch tokens at most, at least one for each.

        Returns the logits after the last token of each, f32[len(batch), n_vocab], valid until the next call.
        GgufRunError as for forward: then no sequence has changed.
        """
        for seq, ids in batch.items():
            self._check(ids, seq)
        counts = {seq: len(ids) for seq, ids in batch.items()}
        n_tokens, n_batch = sum(counts.values()), self._program.n_batch
        if not counts or min(counts.values()) < 1 or n_tokens > n_batch:
            raise ValueError(f"a step of {counts} tokens: it takes 1 or more a sequence, {n_batch} in all")
        tokens = np.fromiter(itertools.chain.from_iterable(batch.values()), np.int32, n_tokens)
        return self._run(tokens, counts, [end - 1 for end in itertools.accumulate(counts.values())])

    def _run(self, batch: NDArray[np.int32], counts: Mapping[int, int], rows: Sequence[int]) -> NDArray[np.float32]:
        runs = self._before_last(batch, counts)
        logits = self._program.run(batch, runs, rows)
        self.cache.end(runs)
        return logits

    def _before_last(self, batch: NDArray[np.int32], counts: Mapping[int, int]) -> list[Run]:
        """Run all stages but the last, which is to run with what is returned."""
        runs = self.cache.begin(counts)
        for stage, following in itertools.pairwise(self._stages):
            stage.program.run(batch, runs, ())
            following.backend.from_host(stage.backend.to_host(stage.x, len(batch)), following.x)
        return runs

    def rewind(self, n_past: int, seq: int = 0) -> int:
        """Forget a sequence's tokens from position n_past on; returns how many are left: see KvCache.rewind."""
        return self.cache.rewind(n_past, seq)

    def nbytes(self) -> dict[str, int]:
        """Bytes that the backends hold, by purpose: see Backend.nbytes."""
        held: Counter[str] = Counter()
        for backend in self._backends.values():
            held.update(backend.nbytes())
        return dict(held)

    def close(self) -> None:
        """Free the programs. The backends belong to the caller."""
        for stage in self._stages:
            stage.program.close()
