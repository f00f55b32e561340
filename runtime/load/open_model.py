"""Opens a model as a GGUF file: a file, or a checkpoint that is converted while it is read; quantized if wanted."""

from pathlib import Path

from gguf_run.formats.gguf.reader import GGUFFile


def open_model(path: Path, quantize: str | None = None) -> GGUFFile:
    """Return the file at `path`, or the checkpoint in the folder `path` as a file. Nothing is written.

    quantize: a file type such as "Q4_K_M", to which weights are quantized when they are read. Errors are those of
    GGUFFile.open, open_checkpoint and gguf-quantize.
    """
    if not path.is_dir() and quantize is None:
        return GGUFFile.open(path)
    from gguf_run.runtime.convert.open_checkpoint import auto_type, in_memory, matrices, open_checkpoint
    from gguf_run.runtime.convert.quantized.methods import KEPT
    from gguf_run.runtime.quantize.plan import Options, check_plan, make_plan
    from gguf_run.runtime.quantize.rules import file_type

    kind = file_type(quantize) if quantize else None
    keep = {kind.default} if kind else KEPT
    file = open_checkpoint(path, keep=keep) if path.is_dir() else GGUFFile.open(path)
    if kind is None and all(tensor.type.name == "F32" for tensor in matrices(file)):
        return file
    # F32 matrices beside others were dequantized, as FP8 must be: the plan gives them the type of the others.
    plan = make_plan(file, Options(kind or auto_type(file)[0]))
    check_plan(plan, allow_requantize=path.is_dir())
    return in_memory(file, plan)
