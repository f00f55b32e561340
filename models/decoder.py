"""The decoder: loads a model's weights into backends, records its step once, and runs tokens through it."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.backend import Backend, Buffer, CacheType, Program, Run
from gguf_run.models.config import ModelConfig
from gguf_run.models.kv_cache import CacheLayer, KvCache
from gguf_run.models.layer import Layer, Loader, Observed, Step


@dataclass(frozen=True)
class _Stage:
    """A part of the model that runs on one backend, as part `i` of its program. reads: buffers that the stage before
    fills from its `leaves`: the tokens' hidden state, f32[n_batch, n_embd], and what experts read besides."""

    backend: Backend
    i: int
    reads: tuple[Buffer, ...]
    leaves: tuple[Buffer, ...]


@dataclass(frozen=True)
class _Part:
    """A layer, or a half of one whose experts are on another backend: what stands "before" them, or "experts"."""

    backend: Backend
    il: int
    what: str  # "layer", "before" or "experts"


def _parts(
    backends: Sequence[Backend], experts: Sequence[Backend], embedding: Backend
) -> list[tuple[Backend, list[_Part]]]:
    """The stages' backends and parts. The first, which looks up the embeddings, and the last, which makes the logits,
    may have none."""
    parts = []
    for il, (backend, others) in enumerate(zip(backends, experts, strict=True)):
        if others is backend:
            parts.append(_Part(backend, il, "layer"))
        else:
            parts += [_Part(backend, il, "before"), _Part(others, il, "experts")]
    runs = [[*run] for _, run in itertools.groupby(parts, key=lambda part: id(part.backend))]
    stages = [(run[0].backend, run) for run in runs]
    if embedding is not stages[0][0]:
        stages.insert(0, (embedding, []))
    if backends[-1] is not stages[-1][0]:
        stages.append((backends[-1], []))
    return stages


class Decoder:
    """A model that is ready to run. cache: the tokens of n_seq sequences, from 0 on. backends: of the layers, then of
    their experts."""

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
        experts: Sequence[Backend] | None = None,
    ) -> None:
        """Load the weights and record the step.

        config: made from the same tensors, which it has checked. backends: one for each layer; the last
        layer's has the output matrix too. embedding: which looks up the embeddings; None: the first layer's. experts:
        which have the layers' experts; None: those of the layers. Where the backend changes from layer to layer, the
        hidden state crosses over, and on the way to experts what they read. n_ctx: positions in the KV caches, for each
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
        embedding, experts_on = embedding or backends[0], backends
        if experts is not None and config.n_expert:  # a layer may have none all the same
            there = [f"blk.{il}.ffn_gate_inp.weight" in tensors for il in range(config.n_layer)]
            experts_on = [other if has else own for has, other, own in zip(there, experts, backends, strict=True)]
        self._backends = {id(backend): backend for backend in (embedding, *backends, *experts_on)}
        self.config, self.backends = config, (*backends, *experts_on)
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
        self._record(backends, experts_on, embedding, layers, load, n_batch, n_outputs)

    def _record(
        self,
        backends: Sequence[Backend],
        experts_on: Sequence[Backend],
        embedding: Backend,
        caches: Sequence[CacheLayer],
        load: Loader,
        n_batch: int,
        n_outputs: int,
    ) -> None:
        """Load the layers and record the backends' programs: embed before the first, logits after the last of all."""
        config, last = self.config, self.config.n_layer - 1
        # A model without an output matrix uses the embeddings; their table reads rows from the file when they are
        # needed, so that its pages can be released after the matrix is made.
        embd = load.tensors["token_embd.weight"]
        tied = "output.weight" not in load.tensors
        if not tied:
            load.progress(embd.nbytes)
        steps: dict[int, Step] = {}
        n_parts: Counter[int] = Counter()
        layers: dict[int, Layer] = {}
        self._stages: list[_Stage] = []
        narrowed = False
        for backend, parts in _parts(backends, experts_on, embedding):
            if id(backend) in steps:
                steps[id(backend)].rec.cut()
            else:
                steps[id(backend)] = Step(backend.recorder(n_batch, n_outputs), config, self.observed)
            step = steps[id(backend)]
            reads: tuple[Buffer, ...] = (step.x,)
            if not self._stages:
                step.rec.embed(backend.table(embd), step.x, config.embd_scale)
            for at, part in enumerate(parts):
                il = part.il
                if il not in layers:
                    cache = caches[il]
                    layers[il] = load.layer(backend, experts_on[il], config, il, cache.rope, cache.cache)
                if part.what == "experts":
                    reads = step.to_experts if at == 0 else reads
                    step.experts(layers[il])
                    continue
                step.attention(layers[il])
                if part.what == "layer" and il == last and self.observed is None:
                    step.only_outputs()
                    narrowed = True
                step.ffn(layers[il], experts=part.what == "layer")
            leaves = step.to_experts if parts and parts[-1].what == "before" else (step.x,)
            self._stages.append(_Stage(backend, n_parts[id(backend)], reads, leaves))
            n_parts[id(backend)] += 1
        if not narrowed:
            step.only_outputs()
        output_norm = load.norm(backend, "output_norm")
        output = load.matrix(backend, "token_embd" if tied else "output", bias=["output"])
        assert output_norm is not None  # config has checked it
        result = step.output(output_norm, output)
        self._programs = {key: step.rec.finish(result if key == id(backend) else step.x) for key, step in steps.items()}

    @property
    def _program(self) -> Program:
        """That of the last stage, which makes the logits."""
        return self._programs[id(self._stages[-1].backend)]

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
        top = self._program.run_top(tokens, runs, len(ids) - 1, k, self._stages[-1].i)
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
        logits = self._program.run(batch, runs, rows, self._stages[-1].i)
        self.cache.end(runs)
        return logits

    def _before_last(self, batch: NDArray[np.int32], counts: Mapping[int, int]) -> list[Run]:
        """Run all stages but the last, which is to run with what is returned."""
        runs = self.cache.begin(counts)
        for stage, following in itertools.pairwise(self._stages):
            self._programs[id(stage.backend)].run(batch, runs, (), stage.i)
            for buffer, copy in zip(stage.leaves, following.reads, strict=True):
                following.backend.copy_from(stage.backend, buffer, len(batch), copy)
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
        for program in self._programs.values():
            program.close()
