"""Times decoding with adapters against decoding without, in turns: python benchmarks/adapters.py MODEL [--rank 16]."""

import tempfile
import time
from pathlib import Path
from statistics import median

import click
import numpy as np

from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.formats.gguf.writer import GGUFWriter, Typed
from gguf_run.runtime.load.load_model import load_model
from gguf_run.runtime.load.options import LoadOptions

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
DEPTH = 32  # tokens of each sequence before the first one that is timed


def write_adapter(path: Path, model: Path, rank: int, seed: int) -> str:
    """Write an F16 adapter of random values for all matrices of a model's layers."""
    rng, f16 = np.random.default_rng(seed), type_by_name("F16")
    with GGUFFile.open(model) as file:
        metadata = {"general.type": "adapter", "general.architecture": str(file.metadata["general.architecture"])}
        metadata |= {"adapter.type": "lora"}
        adapted = [t for t in file.tensors.values() if t.name.split(".")[-2] in MATRICES]
        tensors = [
            TensorInfo(f"{t.name}.{end}", ne, f16)
            for t in adapted
            for end, ne in (("lora_a", (t.ne[0], rank)), ("lora_b", (rank, t.ne[1])))
        ]
    with GGUFWriter(path, {**metadata, "adapter.lora.alpha": Typed("f32", float(rank))}, tensors) as writer:
        for tensor in tensors:
            values = rng.standard_normal(tensor.n_elements).astype(np.float32) * 0.01
            writer.write(tensor.name, values.astype(np.float16).view(np.uint8))
    return str(path)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--rank", default=16)
@click.option("--n-adapter", default=1)
@click.option("--n-seq", default=2)
@click.option("--threads", default=2)
@click.option("--steps", default=12, help="Steps of a turn.")
@click.option("--turns", default=4)
def main(model: Path, rank: int, n_adapter: int, n_seq: int, threads: int, steps: int, turns: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lora = [write_adapter(Path(folder) / f"{i}.gguf", model, rank, i) for i in range(n_adapter)]
        options = {"device": "cpu", "n_ctx": 1024, "n_seq": n_seq, "n_threads": threads}
        loaded = [load_model(model, LoadOptions(**options, lora=given)) for given in ((), lora)]  # type: ignore[arg-type]
    decoders = [one.decoder for one in loaded]
    if (adapters := decoders[1].adapters) is not None and n_adapter > 1:
        for seq in range(n_seq):  # different ones side by side
            adapters.scales.set(seq, {lora[seq % n_adapter]: 1.0})
    rng = np.random.default_rng(0)
    prompt = {seq: rng.integers(0, 1000, DEPTH).tolist() for seq in range(n_seq)}
    times: list[list[float]] = [[], []]
    for decoder in decoders:
        decoder.step(prompt)
        decoder.step({key: [1] for key in prompt})
    for _ in range(turns):
        for decoder, spent in zip(decoders, times, strict=True):
            for _ in range(steps):
                start = time.perf_counter()
                decoder.step({key: [7] for key in prompt})
                spent.append(time.perf_counter() - start)
    without, with_adapters = (1000 * median(spent) for spent in times)
    click.echo(
        f"{model.name}, {n_adapter} of rank {rank}, {n_seq} sequences, {threads} threads: {without:.2f} ms a step "
        f"without, {with_adapters:.2f} ms with adapters: {with_adapters / without - 1:+.1%}"
    )


if __name__ == "__main__":
    main()
