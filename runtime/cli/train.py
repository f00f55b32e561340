"""gguf-train: adapters for a quantized model, and weights that suit the types of a file.

Lines about steps go to stderr.
"""

import ctypes
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime.cli import complete
from gguf_run.runtime.cli.common import Group, tool
from gguf_run.runtime.cli.options import PATH, option
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.terminal.progress import progress
from gguf_run.runtime.terminal.text import message

if TYPE_CHECKING:
    from gguf_run.runtime.train.losses import Losses

MODEL = click.Argument(["model"], shell_complete=complete.models)
DATA = option("--data", "Folder with train.jsonl and valid.jsonl, or a text file.", type=PATH, required=True)
OUTPUT = option("--output --adapter-path -o", "The file to write.", type=PATH, required=True)
STEPS = [
    option("--iters", "Steps.", type=int, default=1000),
    option("--batch-size", "Texts of a batch.", type=int, default=4),
    option("--learning-rate", "How far a step goes.", type=float, default=1e-5),
    option("--lr-schedule", "How the rate goes on: constant or cosine.", default="constant"),
    option("--max-seq-length", "Tokens of a text; longer ones are cut.", type=int, default=2048),
    option("--grad-accumulation-steps", "Batches of a step.", type=int, default=1),
    option("--val-batches", "Batches of a validation, -1 for all.", type=int, default=25),
    option("--steps-per-report", "Report the loss after so many steps.", type=int, default=10),
    option("--steps-per-eval", "Validate after so many steps.", type=int, default=200),
    option("--save-every", "Save after so many steps.", type=int, default=100),
    option("--seed", "Number that makes a training repeatable.", type=int, default=0),
    option("--grad-checkpoint/--no-grad-checkpoint", "Save memory: layers run again for gradients.", default=True),
    option("--device -dev", "cpu, cuda, cuda:1, or auto.", default="auto"),
    option("--resume", "Go on from the state beside the output.", is_flag=True),
]
PAIRS = [
    option("--mask-prompt", "Learn from answers alone.", is_flag=True),
    option("--rank", "Rows of the small matrices.", type=int, default=8),
    option("--scale", "Factor on their product.", type=float, default=20.0),
    option("--dropout", "Part of their input that a step leaves out.", type=float, default=0.0),
    option("--num-layers", "Adapt so many of the last layers, -1 for all.", type=int, default=16),
    option("--keys", "Adapt these matrices, such as attn_q; may be repeated.  [default: all]", multiple=True),
    option("--resume-adapter-file", "An adapter to begin with.", type=PATH),
]


# Of glibc's malloc.h: pieces of memory from 4 MiB on go back to the system at once. Else a step's leave holes of a GB.
# Smaller ones stay: to ask for them again takes a fifth of the time. torch asks for large ones in huge pages.
_M_MMAP_THRESHOLD = -3
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


@tool(
    "gguf-train",
    Group,
    examples=(
        "gguf-train lora model.gguf --data folder -o adapter.gguf --mask-prompt",
        "gguf-train qat model-f16.gguf --type Q4_0 --data text.txt -o q4.gguf",
        "gguf-run model.gguf --lora adapter.gguf",
    ),
)
def main() -> None:
    """Train a GGUF model on this machine. MODEL is a GGUF file, a checkpoint's folder or hf:owner/repo[:Q4_K_M]."""


def _made(kind: type, given: Mapping[str, Any]) -> Any:
    """Return an object of options that has those of a command."""
    return kind(**{field.name: given[field.name] for field in fields(kind) if field.name in given})


def _trained(run: "Callable[..., Losses]", data: Path, output: Path, *options: Any) -> None:
    """Train, with a bar of progress, and tell where the result is."""
    os.environ.setdefault(_HUGE_PAGES, "1")
    with suppress(AttributeError, OSError, TypeError):  # only glibc has that
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 22)
    with progress("training", "steps") as bar:
        run(data, output, *options, report=bar.message, progress=bar.set)
    message(f"{output} is written; losses: {output}.svg")


def _need_torch() -> None:
    if find_spec("torch") is None:
        raise GgufRunError("torch is not installed, which training needs: pip install 'gguf-run[train]'")


@main.command(
    params=[MODEL, DATA, OUTPUT, *STEPS, *PAIRS],
    examples=(
        "gguf-train lora model.gguf --data folder -o adapter.gguf --mask-prompt",
        "gguf-train lora model.gguf --data folder -o a.gguf --iters 300 --rank 16",
        "gguf-train lora model.gguf --data folder -o adapter.gguf --resume",
    ),
)
def lora(model: str, data: Path, output: Path, **given: Any) -> None:
    """Train an adapter (LoRA). The model may be quantized: its blocks stay as they are, in memory too.

    The names of options and the form of the data are those of mlx-lm. --output gets a GGUF adapter, for --lora.
    """
    _need_torch()
    from gguf_run.runtime.train import LoraOptions, TrainOptions, lora

    given["keys"] = tuple(given["keys"])
    run = partial(lora, find_model(model, "any"))
    _trained(run, data, output, _made(TrainOptions, given), _made(LoraOptions, given))


@main.command(
    params=[
        MODEL,
        option("--type kind", "Type of the file, as of gguf-quantize.  [default: that of --start]"),
        DATA,
        OUTPUT,
        *STEPS,
        option("--start", "A quantized file to begin with, as one of --method gptq.", type=PATH),
        option("--refresh", "Search scales again after so many steps; 0: never.", type=int, default=0),
        option("--activations", "float, or int8: round what matrices read, as the CPU does.", default="float"),
    ],
    examples=(
        "gguf-train qat model-f16.gguf --type Q4_0 --data text.txt -o model-q4.gguf",
        "gguf-train qat f16.gguf --start gptq.gguf --data text.txt -o q4.gguf",
        "gguf-train qat f16.gguf --type Q2_K --data text.txt -o q2.gguf --iters 300",
    ),
)
def qat(model: str, kind: str | None, data: Path, output: Path, start: Path | None, **given: Any) -> None:
    """Train a model for its quantized file, and write that file.

    Each step computes with the numbers that the file would have. The loss is the divergence from MODEL, which must not
    be quantized. The file is checked: it has the numbers of the last step, bit for bit.
    """
    if (kind is None) == (start is None):
        raise OptionError("--type or --start says which types the file has: give one of them")
    _need_torch()
    from gguf_run.runtime.train import TrainOptions, qat

    more = {"start": start, "refresh": given["refresh"], "activations": given["activations"]}
    run = partial(qat, find_model(model, "any"), kind or "", **more)
    _trained(run, data, output, _made(TrainOptions, given))


@main.command(
    params=[
        MODEL,
        option("--teacher", "The model before quantizing.", required=True, shell_complete=complete.models),
        DATA,
        OUTPUT,
        *STEPS,
    ],
    examples=(
        "gguf-train distill q3.gguf --teacher f16.gguf --data text.txt -o out.gguf",
        "gguf-train distill q3.gguf --teacher f16.gguf --data folder -o out.gguf",
        "gguf-eval compare q3.gguf out.gguf --base f16.gguf -f other.txt",
    ),
)
def distill(model: str, teacher: str, data: Path, output: Path, **given: Any) -> None:
    """Train the scales, minimums and norms of a quantized file. The loss is the divergence from the teacher."""
    _need_torch()
    from gguf_run.runtime.train import TrainOptions, distill

    run = partial(distill, find_model(model), find_model(teacher, "any"))
    _trained(run, data, output, _made(TrainOptions, given))


@main.command(
    params=[
        MODEL,
        click.Argument(["adapter"], type=PATH),
        OUTPUT,
        option("--type kind", "Type of the file: keep, or one of gguf-quantize.", default="keep"),
        option("--scale", "How strongly the adapter acts.", type=float, default=1.0),
        option("--file -f", "A text: tell how far predictions move, before rounding and after.", type=PATH),
        option("--chunks n_chunk", "Chunks of the text.", type=click.IntRange(1), default=8),
    ],
    examples=(
        "gguf-train merge model-f16.gguf adapter.gguf -o merged.gguf",
        "gguf-train merge q4.gguf adapter.gguf -o merged.gguf --type Q8_0",
        "gguf-train merge q4.gguf adapter.gguf -o merged.gguf -f text.txt",
    ),
)
def merge(**given: Any) -> None:
    """Write a model with an adapter in its weights.

    Each tensor keeps its type, unless --type names another one. Few bits have no room for a small change: a line names
    the tensors whose rounding is larger than what the adapter adds. Then keep the adapter (--lora), or take more bits.
    """
    from gguf_run.runtime.cli.train_merge import run

    run(**given)


@main.command(
    params=[
        click.Argument(["adapter"], type=PATH),
        option("--base", "The GGUF file of the model that is adapted.", type=PATH, required=True),
        option("--peft", "As a PEFT adapter, for transformers: the only form yet.", is_flag=True, required=True),
        option("--output -o", "The folder to write.", type=PATH, required=True),
    ],
    examples=(
        "gguf-train export adapter.gguf --base model.gguf --peft -o folder",
        "gguf-convert folder --base hf_folder -o adapter.gguf",
        "gguf-run model.gguf --lora adapter.gguf",
    ),
)
def export(adapter: Path, base: Path, peft: bool, output: Path) -> None:
    """Write a GGUF adapter in the form of another program. gguf-convert reads it back."""
    from gguf_run.formats.gguf.reader import GGUFFile
    from gguf_run.runtime.convert.back.adapter import export_peft

    with GGUFFile.open(adapter) as file, GGUFFile.open(find_model(str(base))) as model:
        export_peft(file, model, output)
    message(f"{output} is written")
