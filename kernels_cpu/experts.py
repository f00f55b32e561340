"""Matrices that stand in one tensor, and the experts of a layer, as panels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.gguf.parts import matrix_of
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.kernels_cpu.matmul.moe import EXPERT_ROWS, CpuExperts, ExpertMatrix
from gguf_run.kernels_cpu.panels.panels import panel_for
from gguf_run.kernels_cpu.panels.repack import floats
from gguf_run.models.experts import ExpertTensors

Store: TypeAlias = Callable[[Sequence[list[Tensor]], int], NDArray[np.uint8]]  # see CpuBackend._store


def load_experts(tensors: Sequence[Tensor], store: Store) -> CpuExperts:
    """See models.protocol.Backend.experts."""
    held = ExpertTensors.of(tensors)
    biases = [np.array(floats(bias)).reshape(held.n_expert, -1) for bias in held.biases]
    if held.is_fused:
        [both] = held.into
        shape, scales = (both.ne[0], held.down.ne[0], 2 * held.n_expert), np.repeat(both.scales, 2).tolist()
        gate = replace(load_matrices(replace(both, ne=shape, scales=tuple(scales)), store), every=2)
        parts = [gate, replace(gate, data=gate.data[gate.expert_bytes :])]
        biases[:1] = [np.ascontiguousarray(half) for bias in biases[:1] for half in np.split(bias, 2, axis=1)]
    else:
        parts = [load_matrices(tensor, store) for tensor in held.into]
    parts.append(load_matrices(held.down, store))
    if biases:
        parts = [replace(part, bias=bias) for part, bias in zip(parts, biases, strict=True)]
    return CpuExperts(held.n_expert, parts[0], parts[1] if held.is_gated else None, parts[-1], held.factors)


def load_matrices(tensor: Tensor, store: Store) -> ExpertMatrix:
    """Return the matrices of a tensor, [.., n_out, n_in]."""
    n_in, n_out, *sizes = tensor.ne
    n_expert = math.prod(sizes)
    empty = ExpertMatrix(panel_for(tensor.type.name), np.zeros(0, np.uint8), n_in, n_out, None)
    # experts of whole panels can be repacked as one tall matrix
    parts = [tensor] if n_out % EXPERT_ROWS == 0 else [matrix_of(tensor, e) for e in range(n_expert)]
    return replace(empty, data=store([[part] for part in parts], n_expert * empty.expert_bytes))
