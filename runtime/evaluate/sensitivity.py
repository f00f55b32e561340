"""How much a model's predictions suffer from errors in each tensor: KL divergence with that tensor alone quantized.

The original reads a text. Then, for each tensor, a model is loaded that is the original but for this tensor, and reads
the text too. runtime/quantize/allocate.py chooses types by the figures, which a file of JSON keeps:

    {"format": "gguf-run sensitivity", "version": 1, "model": SHA-256, "text": SHA-256,
     "tensors": {name: KL divergence in nats / relative squared error of the weights}}
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gguf_run.formats.atomic import replacing
from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.mapped import read_bytes
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_cpu.measure.log_softmax import LogSoftmax
from gguf_run.runtime.convert.open_checkpoint import in_memory
from gguf_run.runtime.evaluate.logits_file import hash_file
from gguf_run.runtime.evaluate.text import bos_of, check_finite, cut_chunks, tokens_of
from gguf_run.runtime.model import Model
from gguf_run.runtime.quantize.allocate import probe_type, relative_errors, with_type
from gguf_run.runtime.quantize.item import Item
from gguf_run.runtime.quantize.plan import Plan

N_CTX, N_CHUNK = 256, 2  # few tokens will do: all tensors are compared on the same ones
_N_FIRST = 16  # tokens of a chunk that are not scored: nobody can guess what follows so few
_LARGEST_FILE = 64 << 20


@dataclass(frozen=True)
class Sensitivity:
    """What is known of a model."""

    model: str  # SHA-256 of its file and of the names of its tensors
    text: str  # SHA-256 of the text that it read
    tensors: Mapping[str, float] = field(default_factory=dict)  # by name, see above
    format: str = "gguf-run sensitivity"
    version: int = 1

    @classmethod
    def of(cls, file: GGUFFile, plan: Plan, text: str | None) -> "Sensitivity":
        """Return what is known of the model of a plan before it is probed."""
        names = str([item.source.name for item in plan.items])  # some layers may be left out
        model, read = (hashlib.sha256(one.encode()) for one in (hash_file(file.path) + names, text or ""))
        return cls(model.hexdigest(), read.hexdigest())

    def with_file(self, path: Path) -> "Sensitivity":
        """Return what a file knows. FormatError if it is none of these, GgufRunError if it is of another model."""
        try:
            facts: Any = json.loads(read_bytes(path, _LARGEST_FILE))
            known = replace(self, **facts, tensors={name: float(cost) for name, cost in facts.pop("tensors").items()})
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            known = replace(self, format="")
        if (known.format, known.version) != (self.format, self.version) or not all(
            0 <= cost < math.inf for cost in known.tensors.values()
        ):
            raise FormatError(f"{path}: is no sensitivity file of version {self.version}: name another file")
        if known.model != self.model:
            raise GgufRunError(f"{path}: is of another model: name another file")
        return known

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all. OSError if it cannot be written."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1))


def probe(file: GGUFFile, plan: Plan, todo: Sequence[Item], text: str, n_threads: int) -> Iterator[tuple[str, float]]:
    """Load the model again and again; yield name and figure of each of the items of the plan that are to do.

    text: N_CHUNK * N_CTX tokens are read. Errors are those of Model.load, cut_chunks and check_finite.
    """
    reduce = LogSoftmax(n_threads)
    original = [with_type(item, item.source.type) for item in plan.items]

    def load(items: Sequence[Item]) -> Model:
        return Model.load(in_memory(file, replace(plan, items=items)), n_ctx=N_CTX, n_threads=n_threads)

    with load(original) as model:
        chunks = cut_chunks(tokens_of(model, text), N_CTX, bos_of(model), N_CHUNK)
        expected = [model.logits(chunk.ids)[_N_FIRST:] for chunk in chunks]
    for item in todo:
        changed = with_type(item, probe_type(item))
        with load([changed if own.source is item.source else own for own in original]) as model:
            logits = (model.logits(chunk.ids)[_N_FIRST:] for chunk in chunks)
            kl = np.concatenate([reduce.divergence(p, q) for p, q in zip(expected, logits, strict=True)])
        check_finite(kl, "the text to probe with")
        error = relative_errors(item, [changed.target.type])[0]
        yield item.source.name, max(0.0, float(kl.mean())) / error if error else 0.0
    reduce.close()
