"""Opens a model as a GGUF file: a file, or a checkpoint that is converted while it is read; quantized if wanted."""

from pathlib import Path

from gguf_run.formats.gguf.reader import GGUFFile


def open_model(path: Path, quantize: str | None = None, activations: str = "auto") -> GGUFFile:
    """As LoadOptions of the same names say: see _open, and with_activations."""
    if activations == "auto":
        return _open(path, quantize)
    from gguf_run.runtime.convert.activations import with_activations

    return with_activations(_open(path, quantize), activations)


def _open(path: Path, quantize: str | None) -> GGUFFile:
    """Return the file at `path`, or the checkpoint in the folder `path` as a file. Nothing is written.

    quantize: a file type such as "Q4_K_M", to which weights are quantized when they are read. Errors are those of
    GGUFFile.open, open_checkpoint and gguf-quantize.
    """
    is_checkpoint = path.is_dir() and _is_checkpoint(path)
    file = None
    if not is_checkpoint:
        file = GGUFFile.open(path)
        values = (file.metadata.get(f"general.{key}") for key in ("type", "architecture"))
        type_, arch = (value if isinstance(value, str) else None for value in values)  # ModelConfig refuses others
        if type_ not in (None, "model") or arch == "clip" or not file.tensors:
            from gguf_run.formats.gguf.found import check_model

            check_model(file.path, file.metadata, len(file.tensors))
        if quantize is None:
            return file
    from gguf_run.runtime.convert.open_checkpoint import auto_type, in_memory, matrices, open_checkpoint
    from gguf_run.runtime.convert.quantized.methods import RUN
    from gguf_run.runtime.quantize.file_types import file_type
    from gguf_run.runtime.quantize.plan import Options, check_plan, make_plan

    kind = file_type(quantize, in_memory=True) if quantize else None
    keep = {kind.default} if kind else RUN
    file = file or open_checkpoint(path, keep=keep)
    if kind is None and all(tensor.type.name == "F32" for tensor in matrices(file)):
        return file
    # F32 matrices beside others were dequantized, as unusual grids are: the plan gives them the type of the others.
    plan = make_plan(file, Options(kind or auto_type(file)))
    check_plan(plan, allow_requantize=is_checkpoint)
    return in_memory(file, plan)


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, or no GGUF file either. A config.json may stand beside a GGUF file."""
    from gguf_run.runtime.convert.stored.checkpoint import has_weights

    return has_weights(folder) or not any(entry.suffix == ".gguf" for entry in folder.iterdir())
