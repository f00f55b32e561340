"""Measures again what isa.Tuning holds for a model's main type of weights, and shows all candidates."""

from collections.abc import Iterator

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_cpu.measure.tune import measure, store
from gguf_run.kernels_cpu.panels.panels import main_panel
from gguf_run.kernels_cpu.replay.team import MAX_THREADS
from gguf_run.kernels_cpu.vector.isa import tuning_path
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.load.machine import available_memory, default_threads


def tune_again(name: str) -> Iterator[str]:
    """Measure for a model, keep the result, and yield the lines of a Markdown table. Errors are those of Model.load."""
    with GGUFFile.open(find_model(name)) as file:
        panel = main_panel((tensor.type.name, tensor.nbytes) for tensor in file.tensors.values())
    tuning, trials = measure(panel, min(default_threads(), MAX_THREADS), available_memory())
    yield "| number | candidate | ms | to the default | rounds won | |"
    yield "| --- | ---: | ---: | ---: | ---: | --- |"
    for trial in trials:
        cells = (trial.number, trial.value, f"{1e3 * trial.seconds:.2f}", f"{trial.ratio:.2f}", f"{trial.wins:.0%}")
        yield f"| {' | '.join(map(str, cells))} | {'chosen' if trial.chosen else ''} |"
    path = tuning_path(panel)
    yield store(path, tuning) if path else "not kept: there is no folder for compiled kernels"
