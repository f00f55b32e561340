"""Adapters for tiny models, with random values: files that the gguf package writes, and decoders that use them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tinymodel import Tiny, quantize, random_weights, vocabulary

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.adapted_step import Adapters
from gguf_run.models.adapters import read_adapter
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder

IDS = [(7 * i * i + 3 * i + 1) % 270 for i in range(24)]
ALPHA = 12.0


def weights_of(tiny: Tiny) -> dict[str, np.ndarray]:
    """The weights that write_tiny writes, before they get the types of the file."""
    weights = random_weights(tiny, len(vocabulary(tiny)["tokens"])) | dict(tiny.tensors)
    return {name: values for name, values in weights.items() if values is not None}


def random_pairs(
    tiny: Tiny, ranks: Mapping[str, int], seed: int = 0, type: str = "F32"
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return a and b, [rank, n_in] and [n_out, rank], by the name of the model's tensor, as `type` can hold them.

    ranks: by the last part of a tensor's name ("attn_q"), for all layers.
    """
    rng, pairs = np.random.default_rng(seed), {}
    for name, w in weights_of(tiny).items():
        if w.ndim == 2 and (rank := ranks.get(name.split(".")[-2], 0)):
            a, b = rng.standard_normal((rank, w.shape[1])) / 16, rng.standard_normal((w.shape[0], rank)) / 4
            pairs[name] = as_type(a, type), as_type(b, type)
    return pairs


def as_type(values: np.ndarray, type: str) -> np.ndarray:
    values = values.astype(np.float32)
    return gguf.quants.dequantize(quantize(values, type), gguf.GGMLQuantizationType[type]).astype(np.float32)


def write_adapter(
    path: Path,
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    arch: str = "llama",
    type: str = "F32",
    alpha: float | None = ALPHA,
    **metadata: Any,
) -> Path:
    """Write a GGUF adapter. metadata: "general_type" and "adapter_type" replace what an adapter has."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("general.type", metadata.get("general_type", "adapter"))
    writer.add_string("adapter.type", metadata.get("adapter_type", "lora"))
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, halves in pairs.items():
        for end, half in zip(("lora_a", "lora_b"), halves, strict=False):  # one may be missing
            blocks = quantize(half.astype(np.float32), type)
            raw = None if type in ("F32", "F16") else gguf.GGMLQuantizationType[type]
            writer.add_tensor(f"{name}.{end}", blocks, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merged(
    tiny: Tiny, added: Mapping[float, Mapping[str, tuple[np.ndarray, np.ndarray]]], alpha: float = ALPHA
) -> dict[str, np.ndarray]:
    """Return the model's weights with adapters added, computed in float64. added: pairs by their scale."""
    weights, changed = weights_of(tiny), dict[str, np.ndarray]()
    for scale, pairs in added.items():
        for name, (a, b) in pairs.items():
            w = changed.get(name, weights[name].astype(np.float64))
            changed[name] = w + scale * alpha / len(a) * b.astype(np.float64) @ a.astype(np.float64)
    return {name: values.astype(np.float32) for name, values in changed.items()}


def decoder(path: Path, backend: Any, adapters: Sequence[tuple[Path, float]] = (), n_seq: int = 1) -> Decoder:
    file = GGUFFile.open(path)
    config, arch = ModelConfig.from_metadata(file.metadata, file.tensors), file.metadata["general.architecture"]
    loaded = [(read_adapter(one.stem, GGUFFile.open(one), arch, file.tensors), scale) for one, scale in adapters]
    held = Adapters(loaded, n_seq) if loaded else None
    kinds = [CacheType("f32", "f32")] * config.n_layer
    backends = backend if isinstance(backend, list) else [backend] * config.n_layer
    return Decoder(config, file.tensors, backends, 64, 18, 16, n_seq, kinds, adapters=held)


def logits(made: Decoder, seq: int = 0) -> np.ndarray:
    """Of a prompt in two batches, and of tokens one by one."""
    first = [block.copy() for block in made.forward(IDS[:20], 20, seq)]
    return np.concatenate([*first, *(made.step({seq: [id]}).copy() for id in IDS[20:])])
