"""The decoder: loads a model's weights into backends, records its step once, and runs tokens through it."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import FormatError, GgufRunError, UnsupportedError
from gguf_run.formats.reader import Tensor
from gguf_run.models.backend import Backend, Program
from gguf_run.models.config import ModelConfig
from gguf_run.models.layer import Loader, Observed, Step
from gguf_run.models.rope import make_rope


def _rope_factors(tensors: Mapping[str, Tensor]) -> NDArray[np.float32] | None:
    """Return what each rotary frequency is divided by."""
    tensor = tensors.get("rope_freqs.weight")
    if tensor is None:
        return None
    if tensor.type.name != "F32":
        raise UnsupportedError(f"tensor rope_freqs.weight has the type {tensor.type.name}, must be F32")
    factors = tensor.blocks().reshape(-1).view(np.float32)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise FormatError("tensor rope_freqs.weight has values that are not positive numbers")
    return factors


@dataclass(frozen=True)
class _Stage:
    """Consecutive layers on one backend: one program."""

    backend: Backend
    layers: range


def _stages(backends: Sequence[Backend]) -> list[_Stage]:
    stages = []
    for _, group in itertools.groupby(range(len(backends)), key=lambda il: id(backends[il])):
        layers = list(group)
        stages.append(_Stage(backends[layers[0]], range(layers[0], layers[-1] + 1)))
    return stages


class Decoder:
    """A model that is ready to run, with the state of one sequence: n_past tokens stand in its KV caches."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        backends: Sequence[Backend],
        n_ctx: int,
        n_batch: int = 512,
        n_outputs: int = 64,
        progress: Callable[[int], None] | None = None,
        observe: bool = False,
    ) -> None:
        """Load the weights and record the step.

        config: made from the same tensors, which it has checked. backends: one for each layer. n_ctx: positions in the
        KV caches. n_batch: tokens that run at once. n_outputs: rows of logits that are held at once. progress: called
        with the number of bytes of each tensor that is loaded. observe: fill `observed`, the inputs of all matmuls:
        those of the layers see every token, that of the output matrix the tokens whose logits are asked for. Raises
        UnsupportedError if the layers are not all on one backend.
        """
        if n_ctx < 1 or n_batch < 1 or n_outputs < 1:
            raise GgufRunError(f"n_ctx {n_ctx}, n_batch {n_batch} and n_outputs {n_outputs} must be at least 1")
        if len(backends) != config.n_layer:
            raise ValueError(f"{len(backends)} backends for {config.n_layer} layers")
        stages = _stages(backends)
        if len(stages) > 1:
            names = ", ".join(f"{stage.backend.name} {len(stage.layers)}" for stage in stages)
            raise UnsupportedError(f"layers on more than one device ({names}): this version runs all on one")
        self._backends = {id(backend): backend for backend in backends}
        self.config = config
        self.n_ctx = n_ctx
        self.n_past = 0
        self.observed: list[Observed] | None = [] if observe else None
        n_batch = min(n_batch, n_ctx)
        self._program = self._record(stages[0], Loader(tensors, progress), n_batch, min(n_outputs, n_batch))

    def _record(self, stage: _Stage, load: Loader, n_batch: int, n_outputs: int) -> Program:
        """Load one stage and record its program: embed before the first layer, logits after the last."""
        config, backend = self.config, stage.backend
        # One object for each way to turn: backends keep one table of angles per object.
        factors = _rope_factors(load.tensors) if config.arch.rope_factors else None
        style, n_rot = config.arch.rope_style, config.n_rot
        ropes = {
            False: make_rope(style, n_rot, config.rope_freq_base, config.rope_scaling, factors),
            True: make_rope(style, n_rot, config.rope_freq_base_swa),
        }
        layers = [load.layer(backend, config, il, self.n_ctx, ropes[config.is_swa[il]]) for il in stage.layers]
        output_norm = load.norm(backend, "output_norm")
        # A model without an output matrix uses the embeddings; their table reads rows from the file when they are
        # needed, so that its pages can be released after the matrix is made.
        embd = load.tensors["token_embd.weight"]
        name = "output" if "output.weight" in load.tensors else "token_embd"
        output = load.matrix(backend, name, bias=["output"])
        if "output.weight" in load.tensors:
            load.progress(embd.nbytes)

        recorder = backend.recorder(n_batch, n_outputs)
        step = Step(recorder, config, self.observed)
        recorder.embed(backend.table(embd), step.x, config.embd_scale)
        for layer in layers:
            step.attention(layer)
            if layer is layers[-1] and self.observed is None:
                step.only_outputs()
            step.ffn(layer)
        if self.observed is not None:
            step.only_outputs()
        recorder.rms_norm(step.x, output_norm, step.h, config.rms_eps)
        logits = recorder.buffer(config.n_vocab)
        step.matmul(step.h, output, logits)
        return recorder.finish(logits)

    def forward(self, ids: Sequence[int], n_outputs: int = 1) -> Iterator[NDArray[np.float32]]:
        """Append tokens at position n_past; return an iterator over the logits of the last n_outputs of them.

        The logits come in order, in blocks f32[n, n_vocab] that are valid until the next block is asked for. Batches
        of which no logits are wanted run at once, the others when the iterator reaches them: use it up before the next
        call. n_past counts the tokens of the batches that have run. n_outputs: 0 to len(ids).

        Raises GgufRunError for an id that is not in the vocabulary and for more tokens than the context has room for.
        """
        if not 0 <= n_outputs <= len(ids):
            raise ValueError(f"n_outputs is {n_outputs}, must be from 0 to the number of tokens, {len(ids)}")
        n_vocab = self.config.n_vocab
        for i, id in enumerate(ids):
            if not 0 <= id < n_vocab:
                raise GgufRunError(f"token {i} has the id {id}: the model's ids go from 0 to {n_vocab - 1}")
        if self.n_past + len(ids) > self.n_ctx:
            raise GgufRunError(
                f"the context is full: {self.n_past} tokens are in it, {len(ids)} more do not fit into {self.n_ctx}; "
                "use a larger context size or a shorter text"
            )
        tokens = np.asarray(ids, np.int32)
        n_batch, first = self._program.n_batch, len(ids) - n_outputs
        start = 0
        while start < len(ids) and (start + n_batch <= first or not n_outputs):
            self._run(tokens[start : start + n_batch], 0, 0)
            start += n_batch
        return self._logits(tokens[start:], first - start)

    def _logits(self, tokens: NDArray[np.int32], first: int) -> Iterator[NDArray[np.float32]]:
        """Run tokens in batches and yield the logits of all from `first` on, which is in the first batch."""
        program = self._program
        for start in range(0, len(tokens), program.n_batch):
            batch = tokens[start : start + program.n_batch]
            at = max(first - start, 0)
            yield self._run(batch, at, min(program.n_outputs, len(batch) - at))
            for more in range(at + program.n_outputs, len(batch), program.n_outputs):
                yield program.more(more, min(program.n_outputs, len(batch) - more))

    def _run(self, batch: NDArray[np.int32], first: int, count: int) -> NDArray[np.float32]:
        logits = self._program.run(batch, self.n_past, first, count)
        self.n_past += len(batch)
        return logits

    def rewind(self, n_past: int) -> None:
        """Forget the tokens from position n_past on."""
        if not 0 <= n_past <= self.n_past:
            raise ValueError(f"cannot rewind to {n_past}: {self.n_past} tokens are in the context")
        self.n_past = n_past

    def nbytes(self) -> dict[str, int]:
        """Bytes that the backends hold, by purpose: see Backend.nbytes."""
        held: Counter[str] = Counter()
        for backend in self._backends.values():
            held.update(backend.nbytes())
        return dict(held)

    def close(self) -> None:
        """Free the program. The backends belong to the caller."""
        self._program.close()
