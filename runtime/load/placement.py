"""The device that runs each part of a model, as data. fit.py chooses the devices."""

from gguf_run.formats.frozen import frozen


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
