"""What a user asks for when a model is loaded: LoadOptions. And the devices that run its parts, as data."""

import os
import re
from typing import TYPE_CHECKING

from gguf_run.formats.errors import OptionError
from gguf_run.formats.frozen import frozen

if TYPE_CHECKING:
    from gguf_run.models.backend import CacheType

MAX_N_CTX = 2**31 - 1
MAX_N_SEQ = 1024
DEFAULT_N_CTX = 4096  # unless the model was trained with less


@frozen
class Device:
    """Where a part of a model runs."""

    kind: str  # "cpu" or "cuda"
    index: int = 0  # which one of several GPUs

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


CPU = Device("cpu")


@frozen
class Placement:
    """The device of each part of a model. The output is with the last layer."""

    embedding: Device
    layers: tuple[Device, ...]  # of each layer
    n_cpu_moe: int = 0  # the experts of the first n_cpu_moe layers are on the CPU, wherever the layer is

    @property
    def n_gpu(self) -> int:
        """Layers on GPUs: the last ones."""
        return sum(device != CPU for device in self.layers)

    @property
    def devices(self) -> tuple[Device, ...]:
        """All devices that are used, each once."""
        return tuple(dict.fromkeys((self.embedding, *self.layers, *self.experts)))

    @property
    def experts(self) -> tuple[Device, ...]:
        """The device of each layer's experts, if the layer has any."""
        return tuple(CPU if il < self.n_cpu_moe else device for il, device in enumerate(self.layers))


def cpu_only(n_layer: int) -> Placement:
    """Return the placement of all parts on the CPU."""
    return Placement(CPU, (CPU,) * n_layer)


ACTIVATIONS = ("auto", "float", "dynamic", "static")


@frozen
class Wanted:
    """The options that say what runs where, checked."""

    devices: tuple[Device, ...] = ()  # empty: as few of the machine's GPUs as hold the model
    n_gpu: int | None = None  # layers on GPUs; None: as many as fit, -1: all
    split: tuple[float, ...] = ()  # each GPU's part of the layers; empty: by free memory
    n_cpu_moe: int | None = None  # first layers whose experts are on the CPU; -1: all layers, None: as few as possible

    @property
    def cpu_only(self) -> bool:
        return self.devices == (CPU,) or self.n_gpu == 0

    @property
    def insists(self) -> bool:
        """Whether a missing GPU is an error."""
        return not self.cpu_only and (bool(self.devices) or self.n_gpu is not None)


@frozen
class LoadOptions:
    """Everything that a user can choose when a model is loaded. OptionError for a value that is not allowed."""

    n_ctx: int | None = None  # positions of the KV cache for each sequence; None: the model's own, at most 4096
    n_threads: int | None = None  # CPU threads that compute; None: one for each physical core
    n_batch: int = 512  # tokens of a prompt that run at once
    n_seq: int = 1  # sequences that run together; others wait
    # MiB of the KV cache of all sequences. None: n_ctx positions for each. "auto": as many, if a quarter of the free
    # memory holds them; n_ctx may be up to 32768 then, see fit_cache.
    cache_ram: int | str | None = None
    deterministic: bool = False  # a text gets the same bits alone, among others and after a known prefix; CPU only
    device: str = "auto"  # "cpu", "cuda", "cuda:1", several GPUs with commas, or "auto": a GPU if there is one
    gpu_layers: str | int | None = None  # so many of the last layers run on GPUs; "all"; "auto" or None: what fits
    tensor_split: str | None = None  # each GPU's part of these layers, as "3,1"; None: by free memory
    cpu_moe: bool = False  # the experts of all layers stay on the CPU
    n_cpu_moe: int | None = None  # the experts of the first n layers stay on the CPU; None: as few as possible
    # Type of the KV cache: one name such as "q8_0", a pair (K, V), or a CacheType for each layer. None: what
    # cache_scales says, else "f16".
    cache_type: "str | tuple[str, str] | list[CacheType] | None" = None
    cache_rotation: bool | None = None  # Hadamard transform of stored rows; None: for types of 8 bits or less
    cache_scales: str | os.PathLike[str] | None = None  # a calibration file, see kv_scales.py
    lora: tuple[str | os.PathLike[str], ...] | list[str | os.PathLike[str]] = ()  # adapters: FILE or FILE:SCALE
    speculate: bool = False  # guess tokens from the text before them: faster where an answer repeats what is there
    draft_model: str | os.PathLike[str] | None = None  # a small model of the same vocabulary, which guesses tokens
    quantize: str | None = None  # a file type such as "Q4_K_M", to which weights are quantized while they are read
    activations: str = "auto"  # what products take: one of ACTIVATIONS, see convert/activations.py
    embed: bool = False  # for Model.embed and rank, not for text; encoders and rerankers are loaded so in any case
    observe: bool = False  # the decoder can collect the squares of what its matrices read, for an importance matrix

    def __post_init__(self) -> None:
        _check_range("n_ctx (--ctx-size)", self.n_ctx, MAX_N_CTX)
        _check_range("n_batch", self.n_batch, MAX_N_CTX)
        _check_range("n_seq", self.n_seq, MAX_N_SEQ)
        if self.cache_ram != "auto":
            _check_range("cache_ram", self.cache_ram, MAX_N_CTX)
        if self.deterministic and not self.wanted.cpu_only:
            raise OptionError('deterministic runs on the CPU only: give device="cpu" (--device cpu)')
        if self.activations not in ACTIVATIONS:
            raise OptionError(f"--activations {self.activations}: allowed are {', '.join(ACTIVATIONS)}")
        if self.activations != "auto" and not self.wanted.cpu_only:
            raise OptionError(f"--activations {self.activations} runs on the CPU only: give --device cpu")
        if self.n_threads is not None:
            from gguf_run.kernels_cpu.replay.team import MAX_THREADS

            _check_range("n_threads (--threads)", self.n_threads, MAX_THREADS)
        self.wanted  # noqa: B018  (checks what it reads)

    @property
    def guesses(self) -> bool:
        """Whether tokens are guessed."""
        return self.speculate or self.draft_model is not None

    @property
    def wanted(self) -> Wanted:
        """What device, gpu_layers, tensor_split, cpu_moe and n_cpu_moe ask for."""
        if self.n_cpu_moe is not None and (self.cpu_moe or self.n_cpu_moe < 0):
            raise OptionError(f"--n-cpu-moe {self.n_cpu_moe}: must be a number of layers from 0, without --cpu-moe")
        names = self.device.split(",")
        devices = tuple(device for name in names if (device := _parse_device(name)))
        if len(names) > 1 and (len({*devices}) < len(names) or CPU in devices):
            raise OptionError(f"--device {self.device}: several devices must be different GPUs, such as cuda:0,cuda:1")
        n_gpu = _parse_gpu_layers("auto" if self.gpu_layers is None else str(self.gpu_layers))
        if devices == (CPU,) and n_gpu:
            raise OptionError(f"--gpu-layers {self.gpu_layers} with --device cpu: name a GPU, such as --device cuda")
        split = _parse_split(self.tensor_split) if self.tensor_split else ()
        if split and len(split) != max(len(devices), 1):
            raise OptionError(
                f"--tensor-split {self.tensor_split} has {len(split)} parts, --device {self.device} {len(names)}"
            )
        return Wanted(devices, n_gpu, split if len(split) > 1 else (), -1 if self.cpu_moe else self.n_cpu_moe)


def _check_range(name: str, value: int | str | None, highest: int) -> None:
    if value is not None and not (isinstance(value, int) and 1 <= value <= highest):
        raise OptionError(f"{name} is {value!r}; allowed: a whole number from 1 to {highest}")


def _parse_device(text: str) -> Device | None:
    """Return the device that one part of --device names, None for "auto"."""
    if text == "auto":
        return None
    match = re.fullmatch(r"(cpu|cuda)(?::([0-9]{1,3}))?", text, re.ASCII)
    if match is None or (match[1] == "cpu" and match[2]):
        raise OptionError(f"--device {text!r}: allowed are cpu, cuda, cuda:0, cuda:1, ..., cuda:0,cuda:1 and auto")
    return Device(match[1], int(match[2] or 0))


def _parse_gpu_layers(text: str) -> int | None:
    if text in ("auto", "all"):
        return None if text == "auto" else -1
    if not re.fullmatch("[0-9]{1,9}", text, re.ASCII):
        raise OptionError(f"--gpu-layers {text}: allowed are a number of layers from 0, all and auto")
    return int(text)


def _parse_split(text: str) -> tuple[float, ...]:
    numbers = text.split(",")
    is_number = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII).fullmatch
    if not all(map(is_number, numbers)) or not any(map(float, numbers)):
        raise OptionError(f"--tensor-split {text}: must be a number for each GPU, not all 0, such as 3,1")
    return tuple(map(float, numbers))
