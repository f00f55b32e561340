"""SmolLM2 cut from a width of 576 to one of 512, so that every matrix has K types: 127 million weights, no training.

    python benchmarks/originals/make_narrow.py smollm2-q4_1.gguf mixed.txt smollm2-512-f16.gguf [--chunks 32]

The residual stream x is projected: z = x B. B spans the directions of most length in x / rms(x) over all norms, and is
as near to the old channels as a base of that space can be. Of 9 heads the one that adds least goes, each of the other 8
gets keys and values of its own (copies). Then the layers are fitted in turn on the text: the narrow model runs beside
the wide one, and each matrix is the old one seen through B plus the ridge solution for what its output misses. The
weights lie on no grid; embeddings stay tied.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import torch
from make_original import floats
from torch import Tensor
from torch.nn import functional as F

from gguf_run.formats import quantize
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.writer import GGUFWriter, TensorInfo
from gguf_run.runtime.model import Model

_WIDTH, _DIM, _LENGTH, _EPS = 512, 64, 512, 1e-5
_F16 = 1  # general.file_type
Weights = dict[str, Tensor]


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + _EPS)


def attention(base: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of rows [n_chunk * 512, heads * 64], with ggml's rotation of llama: pairs side by side. base: rope_freq_base."""
    angle = torch.arange(_LENGTH)[:, None] * base ** (-torch.arange(0, _DIM, 2) / _DIM)
    cos, sin = angle.cos(), angle.sin()

    def heads(x: Tensor, rotate: bool) -> Tensor:
        x = x.view(-1, _LENGTH, x.shape[-1] // _DIM, _DIM).transpose(1, 2)
        if not rotate:
            return x
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    parts = (heads(q, True), heads(k, True), heads(v, False))
    y = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2).reshape(len(q), -1)


def ffn(y: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(y @ gate.T) * (y @ up.T)


def fitted(a: Tensor, target: Tensor, start: Tensor, weight: Tensor | None = None, ridge: float = 0.1) -> Tensor:
    """The matrix [n_out, n_in] near `start` that makes `target` of `a`. weight: of each row."""
    left = target - a @ start.T
    if weight is not None:
        a, left = a * weight, left * weight
    gram = a.T @ a
    gram.diagonal().mul_(1 + ridge)
    return start + torch.linalg.solve(gram.double(), (a.T @ left).double()).T.float()


def wide_layer(w: Weights, i: int, x: Tensor, rope: float) -> Iterator[Tensor]:
    """Of the wide model: x behind the norm, the attention's output, x between, the ffn's inner rows, x at the end."""
    of: Callable[[str], Tensor] = lambda name: w[f"blk.{i}.{name}.weight"]  # noqa: E731
    y = normed(x) * of("attn_norm")
    a = attention(rope, *(y @ of(f"attn_{part}").T for part in "qkv"))
    yield a
    x = x + a @ of("attn_output").T
    yield x
    d = ffn(normed(x) * of("ffn_norm"), of("ffn_gate"), of("ffn_up"))
    yield x + d @ of("ffn_down").T


def space(w: Weights, n_layer: int, x: Tensor, rope: float) -> tuple[Tensor, list[int]]:
    """B [576, 512], and of each layer the head that adds least."""
    cov, least = torch.zeros(x.shape[1], x.shape[1]), []
    for i in range(n_layer):
        cov += normed(x).T @ normed(x)
        a, between, x = wide_layer(w, i, x, rope)
        cov += normed(between).T @ normed(between)
        o = w[f"blk.{i}.attn_output.weight"]
        spans = [slice(h, h + _DIM) for h in range(0, o.shape[1], _DIM)]
        size = between.norm(dim=1, keepdim=True)
        adds = [float((a[:, span] @ o[:, span].T / size).norm()) for span in spans]
        least.append(adds.index(min(adds)))
    cov += normed(x).T @ normed(x)
    top = torch.linalg.eigh(cov.double())[1][:, -_WIDTH:]
    kept = torch.argsort((top**2).sum(1))[-_WIDTH:].sort().values
    near = top @ top[kept].T  # the old channels, projected
    u, _, vh = torch.linalg.svd(near, full_matrices=False)
    share = 1 - float(torch.diag(top.T @ cov.double() @ top).sum() / cov.double().trace())
    click.echo(f"left out of the stream: {share:.2e} of its squares; heads {least}")
    return (u @ vh).float(), least


def narrow(w: Weights, n_layer: int, ids: Tensor, rope: float) -> Weights:
    """The weights of the narrow model. ids: [n_chunk * 512]."""
    x = w["token_embd.weight"][ids]
    b, least = space(w, n_layer, x, rope)
    n_kv = w["blk.0.attn_k.weight"].shape[0] // _DIM
    n_head = w["blk.0.attn_q.weight"].shape[0] // _DIM
    scale = (b.shape[0] / b.shape[1]) ** 0.5
    new: Weights = {"token_embd.weight": w["token_embd.weight"] @ b}
    z = new["token_embd.weight"][ids]
    for i in range(n_layer):
        p = f"blk.{i}."

        def readers(norm: str, names: dict[str, Tensor], x: Tensor, z: Tensor, p: str = p) -> Tensor:
            g = w[f"{p}{norm}.weight"]
            new[f"{p}{norm}.weight"] = h = (b**2).T.mv(g**2).sqrt() * scale
            seen, wide = normed(z) * h, normed(x) * g
            for name, old in names.items():
                start = (old * g) @ b / h * scale
                new[f"{p}{name}.weight"] = fitted(seen, wide @ old.T, start)
            return seen

        def writer(name: str, start: Tensor, a: Tensor, x: Tensor, z: Tensor, p: str = p) -> Tensor:
            size = 1 / x.norm(dim=1, keepdim=True)
            m = new[f"{p}{name}.weight"] = fitted(a, x @ b - z, start, size)
            return z + a @ m.T

        kept = [h for h in range(n_head) if h != least[i]]
        rows = torch.cat([torch.arange(h * _DIM, (h + 1) * _DIM) for h in kept])
        kv = torch.cat([torch.arange(_DIM) + h * n_kv // n_head * _DIM for h in kept])
        _, between, end = wide_layer(w, i, x, rope)
        names = {f"attn_{part}": w[f"{p}attn_{part}.weight"][rows if part == "q" else kv] for part in "qkv"}
        seen = readers("attn_norm", names, x, z)
        a = attention(rope, *(seen @ new[f"{p}attn_{part}.weight"].T for part in "qkv"))
        z = writer("attn_output", b.T @ w[f"{p}attn_output.weight"][:, rows], a, between, z)
        seen = readers("ffn_norm", {f"ffn_{part}": w[f"{p}ffn_{part}.weight"] for part in ("gate", "up")}, between, z)
        d = ffn(seen, new[f"{p}ffn_gate.weight"], new[f"{p}ffn_up.weight"])
        z = writer("ffn_down", b.T @ w[f"{p}ffn_down.weight"], d, end, z)
        x = end
        lost = float(((x @ b - z).norm(dim=1) / x.norm(dim=1)).mean())
        click.echo(f"layer {i}: the stream differs by {lost:.3f} of its length")
    target, seen = (normed(x) * w["output_norm.weight"]) @ b, normed(z)
    new["output_norm.weight"] = (target * seen).sum(0) / (seen * seen).sum(0)
    return new


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("text", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--chunks", default=32, show_default=True, help="Of 512 tokens, to fit on.")
def main(source: Path, text: Path, output: Path, chunks: int) -> None:
    """Write OUTPUT, F16, from SmolLM2 and a text."""
    with Model.load(source, n_ctx=_LENGTH) as model:
        ids = torch.tensor(model.tokenize(text.read_text()[: chunks * 4000])[: chunks * _LENGTH])
    ids = ids[: len(ids) // _LENGTH * _LENGTH]
    with GGUFFile.open(source) as file:
        w = {name: torch.from_numpy(floats(tensor)).float() for name, tensor in file.tensors.items()}
        metadata = {key: file.metadata.typed(key) for key in file.metadata}
    n_layer, rope = int(metadata["llama.block_count"].value), float(metadata["llama.rope.freq_base"].value)
    with torch.no_grad():
        new = narrow(w, n_layer, ids, rope)
    n_head = _WIDTH // _DIM
    metadata |= {
        "general.name": Typed("string", "SmolLM2-135M-Instruct, cut to a width of 512"),
        "general.file_type": Typed("u32", _F16),
        "llama.embedding_length": Typed("u32", _WIDTH), "llama.attention.head_count": Typed("u32", n_head),
        "llama.attention.head_count_kv": Typed("u32", n_head),
    }  # fmt: skip
    types = {name: type_by_name("F32" if x.ndim == 1 else "F16") for name, x in new.items()}
    tensors = [TensorInfo(name, tuple(reversed(x.shape)), types[name]) for name, x in new.items()]
    with GGUFWriter(output, metadata, tensors, inputs=[source]) as writer:
        for name, x in new.items():
            rows = np.ascontiguousarray(x.numpy())
            writer.write(name, rows.view(np.uint8) if rows.ndim == 1 else quantize(rows, types[name].name))


if __name__ == "__main__":
    main()
