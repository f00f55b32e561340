"""The buffers of a step on the way of a gradient: a write makes new tensors and changes none."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gguf_run.models import ops
from gguf_run.models.operands import Buffer
from gguf_run.models.rare_ops import Moe

Held = Mapping[str, tuple[tuple[int, torch.Tensor], ...]]  # by memory: first column and [rows, columns] of each piece


class Memory:
    """The buffers of a batch of sequences of equal length, one row per token, one sequence after the other."""

    def __init__(self, ids: torch.Tensor, held: Held) -> None:
        """ids: int64[n_seq, n_tokens]."""
        self.ids, self._held = ids, dict(held)

    def __getitem__(self, buffer: Buffer) -> torch.Tensor:
        """Return the columns of a buffer, [rows, width]."""
        parts = [part for _, part in self._cut(buffer.name, buffer.start, buffer.start + buffer.width)]
        assert sum(part.shape[1] for part in parts) == buffer.width, f"{buffer} is read before it is written"
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def __setitem__(self, buffer: Buffer, value: torch.Tensor) -> None:
        assert value.shape[1] == buffer.width
        end = buffer.start + buffer.width
        before = tuple(self._cut(buffer.name, 0, buffer.start))
        self._held[buffer.name] = (*before, (buffer.start, value), *self._cut(buffer.name, end, buffer.row_width))

    def _cut(self, name: str, first: int, end: int) -> Iterator[tuple[int, torch.Tensor]]:
        for start, piece in self._held.get(name, ()):
            low, high = max(start, first), min(start + piece.shape[1], end)
            if low < high:
                yield low, piece[:, low - start : high - start]

    def keep(self, cache: object, *values: torch.Tensor) -> None:
        """Keep the keys and values of a layer for later layers that have none of their own."""
        self._held[cache_name(cache)] = tuple(enumerate(values))

    def kept(self, cache: object) -> list[torch.Tensor]:
        return [value for _, value in self._held[cache_name(cache)]]

    def only(self, names: frozenset[str]) -> Held:
        """Return the memories of these names."""
        return {name: pieces for name, pieces in self._held.items() if name in names}


def cache_name(cache: object) -> str:
    return f"cache {id(cache)}"


def names_read(listed: list[Any]) -> frozenset[str]:
    """Return the memories whose earlier contents some ops read."""
    found, own = set[str](), set[str]()
    for op in listed:
        fields = {name: value for name, value in vars(op).items() if isinstance(value, Buffer)}
        if "out" in fields and not (isinstance(op, Moe) and op.accumulate):
            del fields["out"]
        reads = {buffer.name for buffer in fields.values()}
        if isinstance(op, ops.Attend) and op.k is None:
            reads.add(cache_name(op.cache))
        found |= reads - own
        if (out := ops.written(op)) is not None:
            own.add(out.name)
    return frozenset(found)
