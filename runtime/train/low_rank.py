"""LoRA: pairs of small matrices are trained beside those of a model, whose blocks stay as they are."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.errors import FormatError, OptionError
from gguf_run.formats.gguf.metadata import Typed
from gguf_run.formats.gguf.reader import GGUFFile, Tensor
from gguf_run.formats.gguf.tensors import TensorInfo
from gguf_run.formats.gguf.writer import GGUFWriter
from gguf_run.models.adapters import ENDS, read_adapter
from gguf_run.runtime.load.open_model import open_model
from gguf_run.runtime.train.backend import Pair
from gguf_run.runtime.train.data import Batch
from gguf_run.runtime.train.loop import Trainer, TrainOptions, nothing
from gguf_run.runtime.train.losses import Losses, cross_entropy
from gguf_run.runtime.train.model import TorchModel


@dataclass(frozen=True)
class LoraOptions:
    """Which matrices get a pair, and how large it is. The names and defaults are those of mlx-lm."""

    rank: int = 8
    scale: float = 20.0  # factor on the product of a pair: alpha / rank of the file
    dropout: float = 0.0  # part of a pair's input that is left out in each step
    num_layers: int = 16  # so many of the last layers, -1 for all
    keys: tuple[str, ...] = ()  # names of matrices, such as attn_q; (): all but routers
    resume_adapter_file: Path | None = None  # an adapter to begin with

    def __post_init__(self) -> None:
        if self.rank < 1 or self.num_layers < -1 or not 0 <= self.dropout < 1 or not 0 < self.scale <= 1e6:
            given = f"--rank {self.rank} --num-layers {self.num_layers} --dropout {self.dropout} --scale {self.scale}"
            raise OptionError(f"{given}: allowed are a rank from 1, layers from -1, a dropout below 1, a scale above 0")


class LowRank:
    """The pairs of a model. See loop.Task."""

    def __init__(self, model: TorchModel, options: LoraOptions, seed: int) -> None:
        self.model, self._options = model, options
        generator, device = torch.Generator().manual_seed(seed), model.backend.device
        self.numbers: dict[str, torch.Tensor] = {}
        for name, tensor in self._chosen().items():
            width = tensor.ne[0] ** -0.5
            a = (torch.rand(options.rank, tensor.ne[0], generator=generator) * 2 - 1) * width
            pair = Pair(a.to(device), torch.zeros(tensor.ne[1], options.rank, device=device), options.scale)
            pair.dropout = options.dropout
            model.backend.adapted[name] = pair
            for end, half in zip(ENDS, (pair.a, pair.b), strict=True):
                self.numbers[name + end] = half.requires_grad_()
        if options.resume_adapter_file is not None:
            self._begin_with(options.resume_adapter_file)

    def _chosen(self) -> Mapping[str, Tensor]:
        options, n_layer = self._options, self.model.config.n_layer
        first = 0 if options.num_layers < 0 else max(0, n_layer - options.num_layers)
        found, known = dict[str, Tensor](), set[str]()
        for name, tensor in self.model.matrices.items():
            match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
            if match is None or len(tensor.ne) != 2:
                continue
            known.add(match[2])
            wanted = match[2] in options.keys if options.keys else not match[2].startswith("ffn_gate_inp")
            if wanted and int(match[1]) >= first:
                found[name] = tensor
        if missing := [key for key in options.keys if key not in known]:
            raise OptionError(f"--keys {missing[0]}: the model has no such matrices; it has {' '.join(sorted(known))}")
        if not found:
            raise OptionError(f"--num-layers {options.num_layers}: there is no matrix to adapt in these layers")
        return found

    def _begin_with(self, path: Path) -> None:
        file = self.model.file
        with GGUFFile.open(path) as opened:
            adapter = read_adapter(str(path), opened, self.model.config.arch.name, file.tensors)
            for name, pair in adapter.pairs.items():
                if name not in self.model.backend.adapted or pair.b.ne[0] != self._options.rank:
                    what = f"has a pair of rank {pair.b.ne[0]} for {name}"
                    raise FormatError(f"{path}: {what}: give --rank, --num-layers and --keys that it was trained with")
                a, b = (dequantize(half.blocks(), half.type) for half in (pair.a, pair.b))
                with torch.no_grad():
                    self.numbers[name + ENDS[0]].copy_(torch.from_numpy(a))
                    self.numbers[name + ENDS[1]].copy_(
                        torch.from_numpy(b * np.float32(pair.factor / self._options.scale))
                    )

    def loss(self, batch: Batch) -> torch.Tensor:
        return cross_entropy(self.model, batch)

    def stepped(self, step: int) -> None:
        """Nothing follows from the pairs."""

    def resumed(self, path: Path) -> None:
        """Nothing follows from the pairs."""

    def save(self, path: Path) -> None:
        """Write a GGUF adapter: F32, as it was trained."""
        values = {name: x.detach().cpu().numpy() for name, x in self.numbers.items()}
        alpha = self._options.scale * self._options.rank
        write_adapter(path, self.model.config.arch.name, values, alpha, [self.model.file.path])


def write_adapter(
    path: Path, arch: str, values: Mapping[str, NDArray[np.float32]], alpha: float, inputs: Sequence[Path]
) -> None:
    """Write a GGUF adapter. values: by the names of its tensors."""
    metadata: dict[str, Any] = {"general.type": "adapter", "general.architecture": arch, "adapter.type": "lora"}
    metadata |= {"general.name": path.stem, "adapter.lora.alpha": Typed("f32", alpha)}
    tensors = [TensorInfo(name, x.shape[::-1], type_by_name("F32")) for name, x in values.items()]
    with GGUFWriter(path, metadata, tensors, inputs=inputs) as writer:
        for name, x in values.items():
            writer.write(name, np.ascontiguousarray(x, np.float32).view(np.uint8))


def lora(
    model: Path | str,
    data: Path | str,
    output: Path | str,
    options: TrainOptions | None = None,
    pairs: LoraOptions | None = None,
    report: Callable[[str], None] = nothing,
    progress: Callable[[int, int], None] = nothing,
) -> Losses:
    """Train an adapter (LoRA) for a model, and write it as a GGUF file. Return the losses.

    model: a GGUF file of any types, which stays packed in memory; or a checkpoint's folder.
    data: a folder with train.jsonl and valid.jsonl, or a text file. See data.py.
    report, progress: get lines about steps; the steps that are done, and all.
    GgufRunError and its kinds, one line each.
    """
    options, output = options or TrainOptions(), Path(output)
    with open_model(Path(model)) as file:
        made = TorchModel(file, options.max_seq_length, options.where, recompute=options.grad_checkpoint)
        task = LowRank(made, pairs or LoraOptions(), options.seed)
        return Trainer(task, file, Path(data), output, options, report, progress).run()
