"""A model whose outputs have gradients. It runs the lists of ops that inference runs, a layer at a time."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.operands import Buffer
from gguf_run.models.stages import cache_layers, page_tables
from gguf_run.models.step import step_class
from gguf_run.runtime.train.backend import TorchBackend, TorchLoader
from gguf_run.runtime.train.memory import Held, Memory, names_read
from gguf_run.runtime.train.ops import FUNCTIONS

CHUNK = 128  # tokens whose logits are in memory at once


class TorchModel:
    """A model file as functions of torch. UnsupportedError for one that cannot be trained."""

    def __init__(
        self,
        file: GGUFFile,
        n_ctx: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        recompute: bool = True,
    ) -> None:
        """n_ctx: the most tokens of a sequence. recompute: a layer runs again for its gradients, and keeps nothing."""
        self.config = config = ModelConfig.from_metadata(file.metadata, file.tensors)
        if (config.pooling is not None and config.pooling.is_only) or not config.arch.is_causal:
            raise UnsupportedError(f"{file.path}: {config.arch.name} makes embeddings: name a model that writes text")
        self.file, self.recompute = file, recompute
        self.backend = backend = TorchBackend(device, dtype)
        load = TorchLoader(backend, file.tensors)
        tables = page_tables(config, n_ctx, 1, 1, None)
        each: Any = [backend] * config.n_layer
        layers = cache_layers(config, file.tensors, each, [CacheType()] * config.n_layer, n_ctx, tables)
        step = step_class(config)(load, config, None)
        step.new_part()
        step.embed()
        cuts = [0]  # where layers begin in `after`, which has those that make the wanted rows alone
        for il in range(config.n_layer):
            if step.after:
                cuts.append(len(step.after))
            else:
                step.new_part()
            step.layer(il, layers[il], experts=True)
        step.logits()
        self.matrices, self.norms = load.matrices, load.norms  # that can be trained, by name
        last = [vars(op).get("out") for op in step.after].index(Buffer.whole("logits", config.n_vocab, outputs=True))
        cuts.append(last)
        self._segments: list[list[Any]] = [*step.parts, *(step.after[a:b] for a, b in itertools.pairwise(cuts))]
        self._head: list[Any] = step.after[last:]
        self._check(file)
        first: Any = self._head[0]
        later = frozenset[str]({first.x.name})
        self._kept = list[frozenset[str]]()  # memories that the segments behind each one read
        for segment in reversed(self._segments):
            self._kept.insert(0, later)
            later = (later - {op.out.name for op in segment if "out" in vars(op)}) | names_read(segment)

    def _check(self, file: GGUFFile) -> None:
        for op in itertools.chain(*self._segments, self._head):
            if type(op) not in FUNCTIONS:
                name = f"{self.config.arch.name} has the op {type(op).__name__}, which has no gradient"
                raise UnsupportedError(f"{file.path}: {name}: it cannot be trained")

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what the output matrix reads, [n_seq * n_tokens, n_embd]. ids: int64[n_seq, n_tokens]."""
        held: Held = {}
        recompute = self.recompute and torch.is_grad_enabled()
        for segment, kept in zip(self._segments, self._kept, strict=True):
            run = partial(_run, segment, kept, ids)
            held = checkpoint(run, held, use_reentrant=False) if recompute else run(held)
        return Memory(ids, held)[self._head[0].x]

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the logits of rows of `hidden`, [n, n_vocab]."""
        first = self._head[0]
        memory = Memory(torch.zeros(1, len(rows), dtype=torch.int64), {first.x.name: ((first.x.start, rows),)})
        _run_ops(self._head, memory)
        return memory[first.out]

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits of one sequence, [len(ids), n_vocab]."""
        return self.head(self.hidden(torch.tensor([list(ids)], device=self.backend.device)))


def _run_ops(listed: Sequence[Any], memory: Memory) -> None:
    for op in listed:
        memory[vars(op).get("out") or op.x] = FUNCTIONS[type(op)](memory, op)


def _run(listed: Sequence[Any], kept: frozenset[str], ids: torch.Tensor, held: Held) -> Held:
    memory = Memory(ids, held)
    _run_ops(listed, memory)
    return memory.only(kept)


def in_chunks(function: Callable[..., torch.Tensor], *rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of what a function makes of each chunk of rows. Gradients run it again: it keeps no logits."""
    parts = zip(*(part.split(CHUNK) for part in rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.stack([function(*part) for part in parts]).sum()
    return torch.stack([checkpoint(function, *part, use_reentrant=False) for part in parts]).sum()
