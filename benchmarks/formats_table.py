"""Measures what each tensor type loses, for docs/formats.md: errors of weights, and of a real model's predictions.

    python benchmarks/formats_table.py wiki.test.raw --work FOLDER [--chunks 16] [--again]
    python benchmarks/tables.py         # then: the tables of README.md and docs/, drawn from docs/data/

The model is SmolLM2-135M-Instruct as Q4_1. Its 16 levels would favour every type that can repeat them. So the rounding
is undone at random first: each weight moves by up to half a level. The result is an F16 file. gguf-quantize makes all
other files of it, and gguf-eval kl compares them with it. Each result is written to docs/data/formats.json at once, so
that a run that was stopped goes on.
"""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from gguf_run.formats import dequantize, quantize
from gguf_run.formats.blocks.types import TENSOR_TYPES, type_by_name
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.tensors import Tensor, TensorInfo
from gguf_run.formats.gguf.writer import GGUFWriter
from gguf_run.formats.quantizers.quantizer import QUANTIZERS
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.quantize.file_types import WRITABLE_FILES

RESULTS = Path(__file__).parent.parent / "docs/data/formats.json"
_NO_WEIGHTS = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")  # activations, and tables that are no weights
# Q2_K_S wants an importance matrix, MXFP4_MOE experts, and TQ1_0, TQ2_0 models trained for them (others: KL 10).
_NO_FILES = ("COPY", "F32", "Q2_K_S", "MXFP4_MOE", "TQ1_0", "TQ2_0")
_KL_FIGURES = ("kl_mean", "kl_mean_error", "kl_99", "same_top", "perplexity", "perplexity_error")


def unrounded(tensor: Tensor, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the weights float32[rows, n], each moved at random by up to half of the step d of its block."""
    blocks = tensor.blocks()
    weights = dequantize(blocks, tensor.type)
    step = np.repeat(blocks.view(tensor.type.dtype)["d"].astype(np.float32), tensor.type.block_size, axis=1)
    return weights + step * rng.uniform(-0.5, 0.5, weights.shape).astype(np.float32)


def write_base(path: Path) -> None:
    """Write the model as F16, with the rounding undone."""
    rng = np.random.default_rng(0)
    with GGUFFile.open(find_model(None)) as file:
        types = [tensor.type if len(tensor.ne) == 1 else type_by_name("F16") for tensor in file.tensors.values()]
        infos = [TensorInfo(t.name, t.ne, type) for t, type in zip(file.tensors.values(), types, strict=True)]
        metadata = {key: file.metadata.typed(key) for key in file.metadata} | {"general.file_type": 1}
        with GGUFWriter(path, metadata, infos, inputs=[file.path]) as writer:
            for tensor in file.tensors.values():
                if len(tensor.ne) == 1:
                    writer.copy(tensor)
                else:
                    writer.write(tensor.name, unrounded(tensor, rng).astype(np.float16).view(np.uint8))


def relative_error(weights: NDArray[np.float32], type: str) -> float:
    """Return the root mean square of the change by quantizing, divided by that of the weights."""
    error = dequantize(quantize(weights, type), type) - weights
    return float(np.sqrt(np.mean(np.square(error), dtype=np.float64) / np.mean(np.square(weights), dtype=np.float64)))


def type_rows(base: Path) -> dict[str, dict[str, Any]]:
    """Bits per weight of all types; errors of those that can be written: on a Gaussian, and on the model's ffn_down,
    the only matrices of the model whose rows (1,536) every type's blocks divide."""
    gaussian = np.random.default_rng(0).standard_normal((1024, 4096), np.float32)
    with GGUFFile.open(base) as file:
        named = [tensor for name, tensor in file.tensors.items() if name.endswith("ffn_down.weight")]
        real = np.concatenate([dequantize(tensor.blocks(), tensor.type) for tensor in named])
    rows: dict[str, dict[str, Any]] = {}
    for type in TENSOR_TYPES:
        if type.name in _NO_WEIGHTS:
            continue
        row: dict[str, Any] = {"bits": 8 * type.type_size / type.block_size, "block": type.block_size}
        if type.name in QUANTIZERS:
            row |= {"gaussian": relative_error(gaussian, type.name), "real": relative_error(real, type.name)}
        rows[type.name] = row
    return rows


def run(*command: str) -> str:
    """Run a command of this project. Return its stdout."""
    program = Path(sys.executable).with_name(command[0])
    return subprocess.run([program, *command[1:]], check=True, text=True, stdout=subprocess.PIPE).stdout


def file_row(base: Path, kind: str, text: Path, chunks: int, work: Path) -> dict[str, Any]:
    """Quantize the base to a file type. Return size, mixture of types, and distance of the predictions."""
    path = work / f"{kind}.gguf"
    try:
        run("gguf-quantize", str(base), str(path), kind)
        with GGUFFile.open(path) as file:
            matrices = [tensor for tensor in file.tensors.values() if len(tensor.ne) > 1]
            weights = dict.fromkeys(sorted({tensor.type.name for tensor in matrices}), 0)
            for tensor in matrices:
                weights[tensor.type.name] += tensor.n_elements
            bits = 8 * sum(tensor.nbytes for tensor in matrices) / sum(weights.values())
        output = run("gguf-eval", "kl", str(path), "--base", str(base), "-f", str(text), f"--chunks={chunks}", "--json")
        figures = json.loads(output)
        parts = {name: round(n / sum(weights.values()), 3) for name, n in weights.items()}
        return {"bits": bits, "parts": parts, "chunks": chunks} | {name: figures[name] for name in _KL_FIGURES}
    finally:
        path.unlink(missing_ok=True)


@click.command()
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--work", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for the models.")
@click.option("--chunks", default=16, show_default=True, help="Chunks of 512 tokens.")
@click.option("--again", is_flag=True, help="Measure all anew.")
def main(text: Path, work: Path, chunks: int, again: bool) -> None:
    """Measure what docs/data/formats.json lacks."""
    work.mkdir(parents=True, exist_ok=True)
    base = work / "base-F16.gguf"
    if not base.is_file():
        write_base(base)
    data: dict[str, Any] = {} if again or not RESULTS.is_file() else json.loads(RESULTS.read_text())
    data |= {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "text": text.name, "types": type_rows(base)}
    files = data.setdefault("files", {})
    for kind in WRITABLE_FILES:
        if kind not in (*_NO_FILES, *files):
            files[kind] = file_row(base, kind, text, chunks, work)
            click.echo(f"{kind}: {files[kind]}")
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
