"""SmolLM2 with weights on no grid, which computes what the quantized file computes: a turn of the residual stream.

    python benchmarks/originals/make_original.py smollm2-q4_1.gguf smollm2-off-grid-f16.gguf

The registries have SmolLM2 as Q4_1 alone, and dequantized weights lie on Q4_1's grid. A llama's function stays if all
that writes the residual stream x is multiplied by an orthogonal Q and all that reads it by Q again: RMSNorm sees only a
length, once its weights g are in the matrices behind it (W diag(g) Q diag(1 / g')). Q mixes each channel with others of
its group: 0.2 of its length is theirs, about 0.7 steps of the old grid. The tied embeddings read x behind the last norm
and cannot absorb its weights, so the channels of a group are those whose last weights are nearest, and these become
their common mean. That, and F16, are all that changes: --help says how to measure it.
"""

from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from gguf_run.formats import dequantize, quantize
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.writer import GGUFWriter, TensorInfo

Floats = NDArray[np.float64]
_READERS = {"attn_norm": ("attn_q", "attn_k", "attn_v"), "ffn_norm": ("ffn_gate", "ffn_up")}
_WRITERS = ("attn_output", "ffn_down")
_F16 = 1  # general.file_type


def groups_of(last_norm: Floats, size: int) -> list[NDArray[np.intp]]:
    """Channels that mix: so many, of weights that differ by 15 % at most; those of odd weights stay alone."""
    order, groups, start = np.argsort(last_norm), [], 0
    for end in range(1, len(order) + 1):
        low, here = last_norm[order[start]], last_norm[order[min(end, len(order) - 1)]]
        if end == len(order) or end - start == size or here - low > 0.15 * abs(low):
            groups.append(order[start:end])
            start = end
    return groups


def turn(n: int, groups: list[NDArray[np.intp]], share: float, seed: int) -> Floats:
    """An orthogonal matrix [n, n] that mixes the channels of each group. share: of a row's length, off the diagonal."""
    draw, q = np.random.default_rng(seed), np.eye(n)
    for where in groups:
        skew = np.triu(draw.standard_normal((len(where),) * 2), 1)
        skew -= skew.T
        values, vectors = np.linalg.eigh(1j * skew)  # exp(-i t values) is a rotation by t

        def rotation(t: float, values: Floats = values, vectors: Floats = vectors) -> Floats:
            return np.asarray((vectors * np.exp(-1j * t * values) @ vectors.conj().T).real)

        low, high = 0.0, 1.0
        for _ in range(40):
            t = (low + high) / 2
            off = 1 - np.mean(np.diag(rotation(t)) ** 2)
            low, high = (t, high) if off < share**2 else (low, t)
        q[np.ix_(where, where)] = rotation(low)
    return q


def turned(w: dict[str, Floats], n_layer: int, q: Floats, groups: list[NDArray[np.intp]]) -> dict[str, Floats]:
    """All weights behind the turn q. w: by name, matrices [n_out, n_in]."""
    out = dict(w)

    def read(norm: str, names: tuple[str, ...], prefix: str) -> None:
        g = w[f"{prefix}{norm}.weight"]
        new = out[f"{prefix}{norm}.weight"] = np.copysign(np.sqrt((q**2).T @ g**2), g)
        for name in names:
            out[f"{prefix}{name}.weight"] = w[f"{prefix}{name}.weight"] * g @ q / new

    for i in range(n_layer):
        for norm, names in _READERS.items():
            read(norm, names, f"blk.{i}.")
        for name in _WRITERS:
            out[f"blk.{i}.{name}.weight"] = q.T @ w[f"blk.{i}.{name}.weight"]
    out["token_embd.weight"] = w["token_embd.weight"] @ q
    last = w["output_norm.weight"]
    out["output_norm.weight"] = last.copy()
    for where in groups:
        out["output_norm.weight"][where] = last[where].mean()
    return out


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--group", default=8, show_default=True, help="Channels that mix.")
@click.option("--share", default=0.2, show_default=True, help="Of a channel's length that comes from the others.")
@click.option("--seed", default=0, show_default=True)
def main(source: Path, output: Path, group: int, share: float, seed: int) -> None:
    """Write OUTPUT, F16, from a llama SOURCE with tied embeddings.

    How far it is: gguf-eval kl OUTPUT --base SOURCE -f wiki.test.raw --chunks 10
    """
    with GGUFFile.open(source) as file:
        w = {name: floats(tensor) for name, tensor in file.tensors.items()}
        metadata = {key: file.metadata.typed(key) for key in file.metadata}
        n_layer = int(file.metadata["llama.block_count"])
        ne = {name: tensor.ne for name, tensor in file.tensors.items()}
    name = "SmolLM2-135M-Instruct, its residual stream turned off the grid of Q4_1"
    metadata |= {"general.name": Typed("string", name), "general.file_type": Typed("u32", _F16)}
    groups = groups_of(w["output_norm.weight"], group)
    new = turned(w, n_layer, turn(len(w["output_norm.weight"]), groups, share, seed), groups)
    types = {name: type_by_name("F32" if len(shape) == 1 else "F16") for name, shape in ne.items()}
    tensors = [TensorInfo(name, ne[name], types[name]) for name in ne]
    with GGUFWriter(output, metadata, tensors, inputs=[source]) as writer:
        for name in ne:
            x = np.ascontiguousarray(new[name], np.float32)
            writer.write(name, x.view(np.uint8) if x.ndim == 1 else quantize(x, types[name].name))
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_down.weight", "token_embd.weight"):
        change = np.sqrt(np.mean((new[name] - w[name]) ** 2) / np.mean(w[name] ** 2))
        click.echo(f"{name}: weights changed by {change:.3f} of their size")


def floats(tensor: object) -> Floats:
    blocks = tensor.blocks()  # type: ignore[attr-defined]
    x = dequantize(blocks, tensor.type.name).astype(np.float64)  # type: ignore[attr-defined]
    return x if len(tensor.ne) > 1 else x.ravel()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
