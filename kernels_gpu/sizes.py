"""Bytes that the GPU backend will allocate for caches and programs (buffers.py), without torch: for placement."""

from collections.abc import Sequence

from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.kernels_gpu.attention.cache_types import CACHE_FORMATS
from gguf_run.kernels_gpu.device.tuning import MOST_PROGRAMS, MOST_SUMS, SCRATCH, padded
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.operands import AttentionShape
from gguf_run.models.pages import PAGE


def cache_bytes(shape: AttentionShape, kind: CacheType, n_pages: int) -> int:
    """Return the bytes of one layer's cache, exactly."""
    forms = [CACHE_FORMATS[name] for name in (kind.k, kind.v)[: 1 if shape.n_latent else 2]]
    return shape.n_head_kv * n_pages * PAGE * sum(form.row_bytes(shape.head_dim) for form in forms)


def program_bytes(
    config: ModelConfig, tensors: Sequence[TensorInfo], n_batch: int, n_outputs: int, row_width: int
) -> int:
    """Return an upper estimate of a program's memory, in bytes, for a step of n_batch tokens and n_outputs result rows.

    row_width: columns of all buffers of a token together.
    """
    n_batch, n_outputs = padded(n_batch), padded(n_outputs)
    matrices = [tensor for tensor in tensors if len(tensor.ne) > 1]
    inner = max(tensor.ne[1] * (2 if "ffn_" in tensor.name else 1) for tensor in matrices if "blk." in tensor.name)
    # Attention's sums of parts, and what the sums are relative to: for each token, and for each part of up to 64 rows.
    attention = (n_batch * config.n_head + MOST_PROGRAMS * max(64, config.n_head)) * (config.head_dim + 2)
    # Pairs of tokens and experts: results of products, choice, weights, counts.
    n_used = config.moe.n_used if config.moe else 0
    pairs = n_used * (max(2 * config.n_ff_exp, config.n_embd) + 4) + 2 * config.n_expert
    # For each row: buffers, their int8 or f16 forms (not larger than `inner`), angles of two rotations. Of the result
    # also masks and the greatest values: together less than a fifth of it.
    rows = (n_batch + n_outputs) * (row_width + inner + 2 * config.n_rot + pairs) + n_outputs * config.n_vocab * 6 // 5
    sums = MOST_SUMS if any(tensor.ne[0] > 768 for tensor in matrices) else 0  # shorter rows are not cut into parts
    raw = max(n_batch * inner, n_outputs * config.n_vocab, sums)
    weights = min(SCRATCH, max(tensor.ne[0] * tensor.ne[1] for tensor in matrices))
    return 4 * (rows + raw + attention) + 2 * weights
