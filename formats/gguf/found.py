"""What stands where a GGUF model was expected: a folder, a piece of a file, an unfinished download, another file."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf_run.formats.errors import FormatError, GgufRunError, UnsupportedError
from gguf_run.formats.gguf.mapped import MappedFile, quoted

# How files begin that people open by mistake.
_BEGINNINGS = (
    (b"<", "a web page: the download went wrong, get the file itself"),
    (b"PK", "a zip archive (a PyTorch checkpoint?): convert it to GGUF"),
    (b"lmgg", "a GGML file from before GGUF: get the model as GGUF"),
    (b"tjgg", "a GGJT file from before GGUF: get the model as GGUF"),
    (b"fmgg", "a GGMF file from before GGUF: get the model as GGUF"),
)
# Names of files that were cut with `split`: a.gguf.part1of2, a.gguf-split-a, a.gguf.part-aa, a.gguf.001.
_PIECE = re.compile(r"(.*\.gguf)[.-](?:split-?[a-z]+|part-?(?:\d+(?:of\d+)?|[a-z]{1,2})|\d{3})", re.IGNORECASE)
_UNFINISHED = re.compile(r".*\.(?:part|partial|crdownload|download|incomplete|aria2|tmp)", re.IGNORECASE)
# general.type of files that hold no model.
_TYPES = {
    "adapter": "an adapter (LoRA), which changes another model: name that model, and this file with --lora",
    "imatrix": "an importance matrix: it is for `gguf-quantize --imatrix`",
    "mmproj": "a projector for images or sound: name the language model's file",
    "vocab": "a vocabulary without weights",
}


def model_in(folder: Path) -> Path:
    """Return the one GGUF model in a folder, of a split model the first file. GgufRunError if there is not one."""
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(".gguf"))
    models = [name for name in names if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", name)]
    models = [name for name in models if "mmproj" not in name.lower()] or models
    if not models:
        raise GgufRunError(f"{folder}: is a directory without GGUF files: give the path of a GGUF file")
    if len(models) > 1:
        shown = ", ".join(map(quoted, models[:8])) + (", ..." if len(models) > 8 else "")
        raise GgufRunError(f"{folder}: is a directory with {len(models)} GGUF models: name one of them: {shown}")
    return folder / models[0]


def not_whole(path: Path, reason: FormatError) -> FormatError:
    """Return (not raise) the error of a file that is no whole GGUF file. reason: what the reader found wrong."""
    if piece := _PIECE.fullmatch(path.name):
        others = path.parent.glob(f"{piece[1]}[.-]*") if path.parent.is_dir() else ()
        names = sorted(other.name for other in others if _PIECE.fullmatch(other.name))
        join = f"cat {' '.join(names)} > {piece[1]}"
        what = f"is a piece of {piece[1]}, which was cut: get all pieces and join them with `{join}`"
    elif _UNFINISHED.fullmatch(path.name):
        what = "is an unfinished download: get the whole file"
    else:
        return reason
    return FormatError(f"{path}: {what} ({str(reason).removeprefix(f'{path}: ')})")


def not_gguf(file: MappedFile) -> FormatError:
    """Return (not raise) the error of a file that does not begin with "GGUF"."""
    for start, hint in _BEGINNINGS:
        if file.map[: len(start)] == start:
            return FormatError(f"{file.path}: is not a GGUF file but {hint}")
    if file.map[8:10] in (b'{"', b"{ ", b"{}", b"{\n") and int.from_bytes(file.map[:8], "little") < file.size:
        hint = f"a safetensors file: name its folder, {file.path.absolute().parent}"
        return FormatError(f"{file.path}: is not a GGUF file but {hint}")
    return FormatError(f'{file.path}: is not a GGUF file: it begins with {file.map[:4]!r}, not "GGUF"')


def check_model(path: Path, metadata: Mapping[str, Any], n_tensors: int) -> None:
    """UnsupportedError if a GGUF file holds something else than a model."""
    kind = str(metadata.get("general.type", "model"))  # damaged files have arrays here
    if str(metadata.get("general.architecture")) == "clip":
        kind = "mmproj"
    elif kind == "model" and not n_tensors:
        kind = "vocab"
    if kind != "model":
        what = _TYPES.get(kind, f"a file of the type {quoted(kind)}")
        raise UnsupportedError(f"{path}: is not a model but {what}")
