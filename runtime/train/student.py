"""Training a quantized file so that it predicts what the model before quantizing predicts.

qat trains the weights, and with them the codes; distill trains scales, minimums and norms of a file that is there.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from gguf_run.formats.blocks.codes import unpack
from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.errors import FormatError, GgufRunError, OptionError
from gguf_run.formats.gguf.reader import GGUFFile, Tensor
from gguf_run.formats.gguf.writer import GGUFWriter
from gguf_run.runtime.load.machine import default_threads
from gguf_run.runtime.load.open_model import open_model
from gguf_run.runtime.quantize.file import quantize_file
from gguf_run.runtime.quantize.file_types import file_type
from gguf_run.runtime.quantize.plan import Options, check_plan, make_plan
from gguf_run.runtime.train.data import Batch
from gguf_run.runtime.train.grids import Rounded, Scaled
from gguf_run.runtime.train.loop import Trainer, TrainOptions, nothing
from gguf_run.runtime.train.losses import Losses, divergence
from gguf_run.runtime.train.model import TorchModel


@dataclass
class Student:
    """A quantized model that learns from a teacher. See loop.Task."""

    model: TorchModel
    teacher: TorchModel
    refresh: int = 0  # scales of Rounded are searched again after so many steps; 0: never
    numbers: dict[str, torch.Tensor] = field(default_factory=dict)
    grids: dict[str, Rounded | Scaled] = field(default_factory=dict)
    norms: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)

    def add_rounded(self) -> None:
        """Train the weights of all matrices of layers, and the norms."""
        device = self.model.backend.device
        for name, tensor in self._matrices().items():
            grid = Rounded(tensor, _values(self.teacher.file.tensors[name]), device)
            self.grids[name], self.numbers[name] = grid, grid.latent
        for name, tensor in self._norms().items():
            self.numbers[name] = torch.from_numpy(_values(tensor)).reshape(-1).to(device).requires_grad_()
            self.norms[name] = lambda x=self.numbers[name]: x  # type: ignore[misc]
        self._connect()

    def add_scaled(self) -> None:
        """Train the scales and minimums of all matrices of layers, and the norms, as parts of what they were."""
        device = self.model.backend.device
        for name, tensor in self._matrices().items():
            if Scaled.fits(tensor):
                self.grids[name] = grid = Scaled(tensor, device)
                self.numbers |= {f"{name}.{part}": x for part, x in grid.numbers.items()}
        for name, tensor in self._norms().items():
            first = torch.from_numpy(_values(tensor)).reshape(-1).to(device)
            self.numbers[name] = torch.zeros_like(first).requires_grad_()
            self.norms[name] = lambda x=self.numbers[name], first=first: first * (1 + x)  # type: ignore[misc]
        self._connect()

    def _matrices(self) -> Mapping[str, Tensor]:
        found = {}
        for name, tensor in self.model.matrices.items():
            if name.startswith("blk.") and len(tensor.ne) == 2 and tensor.type.is_quantized:
                unpack(tensor.blocks(0, 0), tensor.type)  # FormatError: there are no codes that can be written
                found[name] = tensor
        if not found:
            raise GgufRunError(f"{self.model.file.path}: no matrix of its layers is quantized: there is nothing to win")
        return found

    def _norms(self) -> Mapping[str, Tensor]:
        return {name: tensor for name, tensor in self.model.norms.items() if tensor.type.name == "F32"}

    def _connect(self) -> None:
        trained = {name: grid.values for name, grid in self.grids.items()} | self.norms
        self.model.backend.trained.update(trained)

    def loss(self, batch: Batch) -> torch.Tensor:
        return divergence(self.model, self.teacher, batch)

    def stepped(self, step: int) -> None:
        for grid in self.grids.values():
            if isinstance(grid, Rounded):
                grid.search() if self.refresh and step % self.refresh == 0 else grid.round()

    def resumed(self, path: Path) -> None:
        with GGUFFile.open(path) as written:
            for name, grid in self.grids.items():
                if isinstance(grid, Rounded):
                    known, tensor = self.model.matrices[name], written.tensors.get(name)
                    if tensor is None or (tensor.type, tensor.ne) != (known.type, known.ne):
                        raise FormatError(f"{path}: is not what its .state belongs to: leave out --resume")
                    grid.take(tensor)

    def save(self, path: Path) -> None:
        """Write the model, and check that its file has the numbers of the last step, bit for bit."""
        file = self.model.file
        metadata = {key: file.metadata.typed(key) for key in file.metadata}
        inputs = [*file.paths, *self.teacher.file.paths]
        with GGUFWriter(path, metadata, [*file.tensors.values()], inputs=inputs) as writer:
            for name, tensor in file.tensors.items():
                if name in self.grids:
                    writer.write(name, self.grids[name].blocks())
                elif name in self.norms:
                    writer.write(name, self.norms[name]().detach().cpu().numpy().view(np.uint8))
                else:
                    writer.copy(tensor)
        with GGUFFile.open(path) as written, torch.no_grad():
            for name, values in self.model.backend.trained.items():
                found, trained = _values(written.tensors[name]).reshape(-1), values().cpu().numpy().reshape(-1)
                if not np.array_equal(found.view(np.uint32), trained.view(np.uint32)):
                    raise GgufRunError(f"{path}: {name} has other numbers than training: please report this")


def _values(tensor: Tensor) -> np.ndarray:
    return dequantize(tensor.blocks(), tensor.type)


def _check_same(student: GGUFFile, teacher: GGUFFile) -> None:
    for name, tensor in student.tensors.items():
        other = teacher.tensors.get(name)
        if other is None or other.ne != tensor.ne:
            found = "no such tensor" if other is None else f"one of the shape {[*other.ne]}"
            raise FormatError(f"{student.path}: has {name} {[*tensor.ne]}, {teacher.path} has {found}: not one model")


def qat(
    model: Path | str,
    type: str,
    data: Path | str,
    output: Path | str,
    options: TrainOptions | None = None,
    report: Callable[[str], None] = nothing,
    progress: Callable[[int, int], None] = nothing,
    *,
    start: Path | str | None = None,
    refresh: int = 0,
    activations: str = "float",
) -> Losses:
    """Train a model's weights for a quantized file of it, and write that file. Return the losses.

    model: a GGUF file of floats, or a checkpoint's folder: the weights to begin with, and the teacher.
    type: a file type, such as "Q4_K_M". Each matrix gets the type that gguf-quantize gives it.
    start: a quantized file of the model to begin with, as one of --method gptq; its types count then, not `type`.
    refresh: scales are searched again after so many steps, 0: never.
    activations: "int8" rounds what quantized matrices read, as the CPU does.
    The loss is the divergence from the teacher. Others: see low_rank.lora. Experts stay as they were quantized.
    """
    if activations not in ("float", "int8") or refresh < 0:
        raise OptionError(f"--activations {activations} --refresh {refresh}: allowed are float and int8, steps from 0")
    options, output = options or TrainOptions(), Path(output)
    with ExitStack() as stack:
        original = stack.enter_context(open_model(Path(model)))
        if start is None:
            plan = make_plan(original, Options(file_type(type)))
            check_plan(plan, allow_requantize=False)
            folder = stack.enter_context(TemporaryDirectory(prefix="gguf-train-"))
            start = Path(folder) / "start.gguf"
            quantize_file(plan, start, default_threads(), nothing)
        quantized = stack.enter_context(GGUFFile.open(start))
        student = _student(quantized, original, options, refresh)
        student.model.backend.rounds_activations = activations == "int8"
        student.add_rounded()
        return Trainer(student, quantized, Path(data), output, options, report, progress).run()


def distill(
    file: Path | str,
    teacher: Path | str,
    data: Path | str,
    output: Path | str,
    options: TrainOptions | None = None,
    report: Callable[[str], None] = nothing,
    progress: Callable[[int, int], None] = nothing,
) -> Losses:
    """Train the scales, minimums and norms of a quantized file, and write it. Return the losses.

    teacher: the model before quantizing, a GGUF file or a checkpoint's folder. Others: see qat.
    """
    options = options or TrainOptions()
    with GGUFFile.open(file) as quantized, open_model(Path(teacher)) as original:
        student = _student(quantized, original, options)
        student.add_scaled()
        return Trainer(student, quantized, Path(data), Path(output), options, report, progress).run()


def _student(quantized: GGUFFile, original: GGUFFile, options: TrainOptions, refresh: int = 0) -> Student:
    _check_same(quantized, original)
    model, teacher = (
        TorchModel(file, options.max_seq_length, options.where, recompute=options.grad_checkpoint)
        for file in (quantized, original)
    )
    return Student(model, teacher, refresh)
