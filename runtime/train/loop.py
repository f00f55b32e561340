"""The steps of training: batches, the optimizer, validation, checkpoints, and what is said of them."""

import contextlib
import hashlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from gguf_run.formats.atomic import replacing
from gguf_run.formats.errors import FormatError, GgufRunError, OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.writer import GGUFWriter
from gguf_run.runtime.train.data import Batch, Batches, Reader
from gguf_run.runtime.train.losses import Losses
from gguf_run.runtime.train.model import TorchModel

SCHEDULES = ("constant", "cosine")
_WARM_UP = 0.05  # part of the steps in which a cosine's rate rises


@dataclass(frozen=True)
class TrainOptions:
    """How to train. The names are those of mlx-lm. OptionError for a value that is not allowed."""

    iters: int = 1000  # steps
    batch_size: int = 4  # texts of a batch
    learning_rate: float = 1e-5
    lr_schedule: str = "constant"  # one of SCHEDULES
    max_seq_length: int = 2048  # tokens of a text; what is longer is cut
    grad_accumulation_steps: int = 1  # batches of a step
    mask_prompt: bool = False  # nothing is learned from prompts
    val_batches: int = 25  # batches of a validation, -1 for all
    steps_per_report: int = 10
    steps_per_eval: int = 200
    save_every: int = 100
    seed: int = 0
    grad_checkpoint: bool = True  # layers run again for their gradients, which saves memory
    device: str = "auto"  # cpu, cuda, cuda:1, or auto: a GPU where there is one
    resume: bool = False  # go on from the state beside the output

    def __post_init__(self) -> None:
        least = {"iters": 1, "batch_size": 1, "max_seq_length": 2, "grad_accumulation_steps": 1, "val_batches": -1}
        least |= {"steps_per_report": 1, "steps_per_eval": 1, "save_every": 1, "seed": 0}
        for name, low in least.items():
            if not isinstance(value := getattr(self, name), int) or value < low:
                raise OptionError(f"--{name.replace('_', '-')} is {value}; allowed: whole numbers from {low}")
        if not 0 < self.learning_rate < 1:
            raise OptionError(f"--learning-rate is {self.learning_rate}; allowed: numbers between 0 and 1")
        if self.lr_schedule not in SCHEDULES:
            raise OptionError(f"--lr-schedule is {self.lr_schedule}; allowed: {', '.join(SCHEDULES)}")

    @property
    def where(self) -> str:
        """The device, as torch names it."""
        name = self.device
        if name == "auto":
            return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        if name != "cpu" and not (name.split(":")[0] == "cuda" and torch.cuda.is_available()):
            raise OptionError(f"--device {name}: torch has no such device here; allowed: cpu and auto")
        return name

    def rate(self, step: int) -> float:
        """Return the learning rate of a step from 0 on."""
        if self.lr_schedule == "constant":
            return self.learning_rate
        n_warm = max(1, round(_WARM_UP * self.iters))
        part = min(1.0, (step + 1) / n_warm)
        return self.learning_rate * part * (1 + math.cos(math.pi * step / self.iters)) / 2


class Task(Protocol):
    """What is trained."""

    @property
    def model(self) -> TorchModel: ...
    @property
    def numbers(self) -> Mapping[str, torch.Tensor]:
        """What the optimizer changes, by name."""

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the sum of the losses of a batch's tokens."""

    def stepped(self, step: int) -> None:
        """`numbers` have changed in a step."""

    def resumed(self, path: Path) -> None:
        """`numbers` are again those with which `path` was written."""

    def save(self, path: Path) -> None:
        """Write the result so far."""


def nothing(*_: Any) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Group:
    """The processes that train together (torchrun). Each has batches of its own; gradients are added up."""

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls, device: str) -> "Group":
        """Join the processes that torchrun has started, if it has."""
        if int(os.environ.get("WORLD_SIZE", 1)) < 2:
            return cls()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reports and writes."""
        return self.rank == 0

    def sum(self, number: float) -> float:
        """Return the sum of the processes' numbers."""
        if self.size == 1:
            return number
        numbers = [0.0] * self.size
        torch.distributed.all_gather_object(numbers, number)
        return sum(numbers)

    def add_gradients(self, numbers: Iterable[torch.Tensor]) -> None:
        for x in numbers if self.size > 1 else ():
            torch.distributed.all_reduce(x.grad)


@dataclass
class Trainer:
    """One training. `output` gets the result; `output`.state what is needed to go on, `output`.svg a picture."""

    task: Task
    file: GGUFFile  # whose tokens the data becomes
    data: Path
    output: Path
    options: TrainOptions
    report: Callable[[str], None] = nothing  # gets lines
    progress: Callable[[int, int], None] = nothing  # gets the steps that are done, and all
    losses: Losses = field(default_factory=Losses)

    def __post_init__(self) -> None:
        options, n_train = self.options, self.task.model.config.n_ctx_train
        if options.max_seq_length > n_train:
            limit = f"the model was trained with {n_train} tokens"
            raise OptionError(f"--max-seq-length is {options.max_seq_length}: {limit}, which is the most")
        GGUFWriter(self.output, {}, [], inputs=self.file.paths).abort()  # what is wrong with it shows now
        reader = Reader(self.file, options.max_seq_length, options.mask_prompt)
        found = reader.read(self.data, "train")
        if not found:
            raise FormatError(f"{self.data}: has no train.jsonl: a line for each text is needed")
        self._train, self._valid, self._test = (
            Batches(examples, options.batch_size, options.seed, options.max_seq_length)
            for examples in (found, reader.read(self.data, "valid"), reader.read(self.data, "test"))
        )
        self._group = Group.joined(options.where)
        if not self._group.is_first:
            self.report = self.progress = nothing
        self._optimizer = torch.optim.Adam([*self.task.numbers.values()], options.learning_rate)
        self._of = fingerprint(self.file, self.task)
        self._done, self._stops = 0, False
        if options.resume:
            self._load()

    @property
    def state(self) -> Path:
        return self.output.with_name(f"{self.output.name}.state")

    def run(self) -> Losses:
        """Train; return the losses. Ctrl-C ends it after a step, and what was reached is kept."""
        options = self.options
        n_numbers = sum(x.numel() for x in self.task.numbers.values())
        self.report(f"{n_numbers} numbers in {len(self.task.numbers)} tensors are trained, on {options.where}")
        began, first, n_tokens, since, total = time.monotonic(), self._done, 0, self._done, 0.0
        with _interruptible(self._stop), _enough_memory(options):
            while self._done < options.iters and not self._group.sum(self._stops):
                self._validate()
                loss, n = self._step()
                n_tokens, total = n_tokens + n, total + loss
                self.progress(self._done, options.iters)
                if self._done % options.steps_per_report == 0 or self._done == options.iters:
                    self.losses.train.append((self._done, total / (self._done - since)))
                    seconds = time.monotonic() - began
                    self._say(n_tokens / seconds, seconds / (self._done - first))
                    since, total = self._done, 0.0
                if self._done % options.save_every == 0:
                    self._save()
            self._validate(at_end=True)
            if len(self._test) and not self._stops:
                self.report(f"test loss {self._mean(self._test, -1):.4f}")
        self._save()
        if self._stops:
            self.report(f"ended after step {self._done}; to go on: --resume")
        return self.losses

    def _stop(self) -> None:
        self._stops = True

    def _say(self, rate: float, seconds: float) -> None:
        left = round(seconds * (self.options.iters - self._done))
        step, loss = self.losses.train[-1]
        self.report(f"step {step}: loss {loss:.4f}, {rate:.0f} tokens/s, {left // 60}:{left % 60:02d} left")

    def _step(self) -> tuple[float, int]:
        """Do a step. Return its mean loss and its tokens."""
        options, task, group = self.options, self.task, self._group
        n_batches = options.grad_accumulation_steps * group.size
        first = self._done * n_batches
        batches = [self._train.at(i) for i in range(first + group.rank, first + n_batches, group.size)]
        n_tokens, total = round(group.sum(sum(batch.n_tokens for batch in batches))), 0.0
        self._optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(options.seed + (first + group.rank) * 1_000_003)  # for what dropout leaves out
        task.model.backend.is_training = True
        for batch in batches:
            loss = task.loss(batch) / n_tokens
            total += float(loss.detach())
            if math.isfinite(total):
                loss.backward()
        task.model.backend.is_training = False
        total = group.sum(total)
        if not math.isfinite(total):
            kept = f"{self.output} is that of an earlier step" if self.output.exists() else "nothing was written"
            raise GgufRunError(f"the loss is {total} in step {self._done + 1}: lower --learning-rate; {kept}")
        group.add_gradients(task.numbers.values())
        for settings in self._optimizer.param_groups:
            settings["lr"] = options.rate(self._done)
        self._optimizer.step()
        self._done += 1
        task.stepped(self._done)
        return total, n_tokens

    @torch.no_grad()
    def _mean(self, batches: Batches, n: int) -> float:
        """Return the mean loss of the first n batches, -1 for all."""
        some = batches.in_order(n)
        return sum(float(self.task.loss(batch)) for batch in some) / sum(batch.n_tokens for batch in some)

    def _validate(self, at_end: bool = False) -> None:
        is_due = self._done % self.options.steps_per_eval == 0 if not at_end else not self._stops
        known = {step for step, _ in self.losses.valid}
        if not is_due or not len(self._valid) or not self.options.val_batches or self._done in known:
            return
        loss = self._mean(self._valid, self.options.val_batches)
        self.losses.valid.append((self._done, loss))
        self.report(f"step {self._done}: validation loss {loss:.4f}")

    def _save(self) -> None:
        if not self._group.is_first:
            return
        self.task.save(self.output)
        numbers = {name: x.detach() for name, x in self.task.numbers.items()}
        held = {"of": self._of, "step": self._done, "numbers": numbers, "optimizer": self._optimizer.state_dict()}
        held |= {"train": self.losses.train, "valid": self.losses.valid}
        with replacing(self.state) as part:
            torch.save(held, part)
        if self.losses.train or self.losses.valid:
            picture = self.output.with_name(f"{self.output.name}.svg")
            picture.write_text(self.losses.picture(f"{self.output.name}: loss"), encoding="utf-8")

    def _load(self) -> None:
        try:
            held = torch.load(self.state, weights_only=True)
            of = held["of"]
        except OSError as error:
            raise GgufRunError(f"{self.state}: {error.strerror}: --resume goes on from there; leave it out") from None
        except Exception:  # torch names many kinds
            raise FormatError(f"{self.state}: is damaged or no state of a training: leave out --resume") from None
        if of != self._of:
            raise GgufRunError(f"{self.state}: is of another model or other options: name those, or leave out --resume")
        with torch.no_grad():
            for name, x in self.task.numbers.items():
                x.copy_(held["numbers"][name])
        self._optimizer.load_state_dict(held["optimizer"])
        self._done, self.losses = held["step"], Losses([*held["train"]], [*held["valid"]])
        self.task.resumed(self.output)


def fingerprint(file: GGUFFile, task: Task) -> str:
    """Return a text that another model, or training other numbers of it, does not have."""
    made = hashlib.sha256()
    for name, tensor in file.tensors.items():
        made.update(f"{name} {tensor.ne} {tensor.type.name} ".encode() + bytes(tensor.blocks(0, 1).reshape(-1)[:64]))
    for name, x in task.numbers.items():
        made.update(f"{name} {tuple(x.shape)} ".encode())
    return made.hexdigest()


@contextlib.contextmanager
def _interruptible(stop: Callable[[], None]) -> Iterator[None]:
    """In this block, the first Ctrl-C calls `stop`, the second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(*_: Any) -> None:
        stop()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _enough_memory(options: TrainOptions) -> Iterator[None]:
    """Turn torch's errors of memory into one line that says what to try."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not is_memory:
            raise
        size, n, length = options.batch_size, options.grad_accumulation_steps, options.max_seq_length
        less = f"--max-seq-length {length // 2}"
        less = f"--batch-size {size // 2} --grad-accumulation-steps {2 * n}" if size > 1 else less
        what = f"a batch of {size} texts of up to {length} tokens does not fit into memory"
        raise GgufRunError(f"{what}: try {less}{'' if options.grad_checkpoint else ' --grad-checkpoint'}") from None
