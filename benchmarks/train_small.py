"""A small model for the figures of docs/training.md, trained from nothing by the functions that gguf-train has.

    python benchmarks/train_small.py train.txt small.gguf --steps 600

A llama of 3 million weights whose rows are multiples of 256, which K types need; tokens are bytes and a few pairs. The
embeddings stay random. On one core 600 steps take some minutes.
"""

import math
import time
from pathlib import Path

import click
import numpy as np
import torch

from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.formats.gguf.writer import GGUFWriter
from gguf_run.runtime.train.data import Batches, Reader
from gguf_run.runtime.train.losses import cross_entropy
from gguf_run.runtime.train.model import TorchModel

N_LAYER, N_EMBD, N_FF, N_HEAD, LENGTH = 4, 256, 768, 4, 128
_RATE = 2e-3


def write_random(path: Path) -> None:
    """Write the model before training."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    chars = [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]
    tokens, merges = ["<|endoftext|>", *chars, "th", "Ġt"], ["t h", "Ġ t"]
    metadata = {
        "general.architecture": "llama", "general.type": "model", "llama.context_length": Typed("u32", 512),
        "llama.block_count": Typed("u32", N_LAYER), "llama.embedding_length": Typed("u32", N_EMBD),
        "llama.feed_forward_length": Typed("u32", N_FF), "llama.attention.head_count": Typed("u32", N_HEAD),
        "llama.attention.layer_norm_rms_epsilon": Typed("f32", 1e-5), "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": Typed("array[i32]", [3] + [1] * 258), "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": Typed("u32", 0),
    }  # fmt: skip
    matrices = {"attn_q": (N_EMBD, N_EMBD), "attn_k": (N_EMBD, N_EMBD), "attn_v": (N_EMBD, N_EMBD)}
    matrices |= {"attn_output": (N_EMBD, N_EMBD), "ffn_gate": (N_FF, N_EMBD), "ffn_up": (N_FF, N_EMBD)}
    matrices |= {"ffn_down": (N_EMBD, N_FF)}
    shapes = {f"blk.{il}.{name}.weight": shape for il in range(N_LAYER) for name, shape in matrices.items()}
    shapes |= {"token_embd.weight": (len(tokens), N_EMBD), "output.weight": (len(tokens), N_EMBD)}
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape) * shape[1] ** -0.5 for name, shape in shapes.items()}
    norms = [
        "output_norm.weight",
        *(f"blk.{il}.{name}_norm.weight" for il in range(N_LAYER) for name in ("attn", "ffn")),
    ]
    weights |= {name: np.ones(N_EMBD) for name in norms}
    save(path, metadata, weights)


def save(path: Path, metadata: dict, weights: dict) -> None:
    infos = [TensorInfo(name, x.shape[::-1], type_by_name("F32")) for name, x in weights.items()]
    with GGUFWriter(path, metadata, infos) as writer:
        for name, x in weights.items():
            writer.write(name, np.ascontiguousarray(x, np.float32).view(np.uint8))


@click.command()
@click.argument("text", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--steps", default=600)
@click.option("--threads", default=1)
def main(text: Path, output: Path, steps: int, threads: int) -> None:
    torch.set_num_threads(threads)
    write_random(output)
    with GGUFFile.open(output) as file:
        model = TorchModel(file, LENGTH, recompute=False)
        values = {name: model.backend.read(file.tensors[name]) for name in (*model.matrices, *model.norms)}
        numbers = {name: (x.reshape(-1) if name in model.norms else x).requires_grad_() for name, x in values.items()}
        model.backend.trained.update({name: lambda x=x: x for name, x in numbers.items()})  # type: ignore[misc]
        batches = Batches(Reader(file, LENGTH + 1).read(text, "train"), 16, 0, LENGTH + 1)
        optimizer, start = torch.optim.AdamW(numbers.values(), _RATE, (0.9, 0.95), weight_decay=0.1), time.monotonic()
        for step in range(steps):
            batch = batches.at(step)
            loss = cross_entropy(model, batch) / batch.n_tokens
            optimizer.zero_grad()
            loss.backward()
            rate = _RATE * min(1, (step + 1) / 30) * (1 + math.cos(math.pi * step / steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            if step % 20 == 19:
                print(f"step {step + 1}: loss {float(loss.detach()):.3f}, {time.monotonic() - start:.0f} s", flush=True)
        metadata = {key: file.metadata.typed(key) for key in file.metadata}
        weights = {
            name: tensor.blocks().view(np.float32).reshape(tensor.ne[::-1]) for name, tensor in file.tensors.items()
        }
        weights |= {name: x.detach().numpy() for name, x in numbers.items()}
    save(output, metadata, weights)


if __name__ == "__main__":
    main()
