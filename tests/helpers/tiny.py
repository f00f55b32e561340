"""Tiny random checkpoints of one row each: class of transformers, config. Their logits, however the tokens come.

A family of architectures has a table of rows in its own test file, whose test calls `check`. hf_tiny.TINY has the
architectures that other tests need too.
"""

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hf_tiny
import numpy as np
from cpu_ops import cpu, error
from numpy.typing import NDArray
from numpy_backend import NumpyBackend

from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.runtime.convert.open_checkpoint import open_checkpoint

# More tokens than a chunk of a recurrent layer (64), than the tiny windows, and than two groups of the cache.
IDS = [(7 * i * i + 3 * i + 2) % hf_tiny.N_VOCAB for i in range(90)]
# Prompts in pieces: all at once, one by one, and pieces around the sizes where layers keep a state or a group.
WAYS = {"whole": (90,), "one by one": (1,) * 90, "pieces": (1, 2, 3, 65, 4, 15), "long first": (65, 1, 1, 23)}


def make(folder: Path, class_name: str, config: dict[str, Any], change: Callable[[Any], None] | None = None) -> Any:
    """Write a random checkpoint with a tokenizer. Return transformers' model of it, in float32.

    config: beyond hf_tiny._COMMON; with "text_config", the common values go there.
    change: edits the random model before it is written.
    """
    import torch
    import transformers

    cls = getattr(transformers, class_name)
    text = config.get("text_config")
    values = {**hf_tiny._COMMON, **config} if text is None else {**config, "text_config": {**hf_tiny._COMMON, **text}}
    torch.manual_seed(zlib.crc32(class_name.encode()))
    model = cls(cls.config_class(**values)).float().eval()
    with torch.no_grad():
        randomize(model)
    if change is not None:
        change(model)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    hf_tiny.write_tokenizer(folder)
    return model


def randomize(model: Any) -> None:
    """Give random values to all that the file holds, so that nothing is 0 or 1, where an omission would not show.

    Vectors keep what they begin with and get noise: norms, biases, scalars of layers, the bias of a router (a buffer).
    Matrices are new: classes leave routers at 0 and experts uninitialized.
    """
    import torch

    for name, x in model.state_dict(keep_vars=True).items():
        if not x.dtype.is_floating_point or x.ndim == 0:
            continue
        if x.ndim == 1 or name.endswith("bias"):
            x.add_(torch.randn_like(x) * 0.2)
        else:
            x.normal_(0.0, 0.4 if x.ndim == 3 and x.shape[1] == 1 else 0.15)  # the first: taps of a convolution


@contextmanager
def opened(folder: Path, **metadata: Any) -> Iterator[tuple[ModelConfig, Any]]:
    """Convert a checkpoint. Yield the config, for which metadata replaces values, and the tensors."""
    with open_checkpoint(folder) as file:
        yield ModelConfig.from_metadata({**file.metadata, **metadata}, file.tensors), file.tensors


def logits(
    config: ModelConfig, tensors: Any, backend: Any, pieces: Sequence[int], ids: Sequence[int] = IDS
) -> NDArray[np.float32]:
    """Return the logits f32[n, n_vocab] of the first n = sum(pieces) ids, which run in pieces. The cache is of f32."""
    kinds = [CacheType("f32", "f32")] * config.n_layer
    decoder = Decoder(config, tensors, [backend] * config.n_layer, len(ids) + 6, cache_types=kinds)
    ends = itertools.accumulate(pieces)
    parts = [ids[end - n : end] for n, end in zip(pieces, ends, strict=True)]
    found = np.concatenate([block.copy() for part in parts for block in decoder.forward(part, len(part))])
    decoder.close()
    return found


def check(
    folder: Path,
    class_name: str,
    config: dict[str, Any],
    change: Callable[[Any], None] | None = None,
    limit: float = 1e-4,
    **metadata: Any,
) -> None:
    """Assert that the converted checkpoint has transformers' logits: in float64, and on the CPU in each of WAYS.

    limit: largest difference, relative to the largest logit.
    """
    expected = hf_tiny.logits(make(folder, class_name, config, change), IDS)
    assert np.isfinite(expected).all()
    assert np.abs(expected).max() > 0.1
    with opened(folder, **metadata) as (model, tensors):
        twin = logits(model, tensors, NumpyBackend(np.float64), WAYS["whole"])
        found = {"float64": error(twin, expected)}
        for way, pieces in WAYS.items():
            found[way] = error(logits(model, tensors, cpu(2), pieces), expected)
    assert max(found.values()) < limit, {way: f"{value:.1e}" for way, value in found.items()}
