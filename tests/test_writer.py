"""The writer: what it writes, our reader and the gguf package read back; nothing half-written is ever left."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ggufbuild
import numpy as np
import pytest
from numpy.typing import NDArray

from gguf_run.formats.reader import GGUFFile
from gguf_run.formats.strings import StringArray
from gguf_run.formats.types import type_by_name
from gguf_run.formats.writer import GGUFWriter, MetaValue, TensorInfo, Typed


def info(name: str, ne: Sequence[int] = (32, 3), type: str = "F32") -> TensorInfo:
    return TensorInfo(name, tuple(ne), type_by_name(type))


def data_of(tensor: TensorInfo, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (tensor.n_rows, tensor.nbytes // tensor.n_rows), np.uint8)


def write(path: Path, metadata: Mapping[str, MetaValue], tensors: Sequence[TensorInfo], **options: Any) -> list[Path]:
    with GGUFWriter(path, metadata, tensors, **options) as writer:
        for i, tensor in enumerate(tensors):
            writer.write(tensor.name, data_of(tensor, i))
    assert sum(file.stat().st_size for file in writer.paths) == writer.nbytes
    return writer.paths


def plain(value: Any) -> Any:
    """A value that == compares, with the types that matter kept."""
    if isinstance(value, Typed):
        return value.type, plain(value.value)
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.tobytes()
    if isinstance(value, StringArray):
        return value.tolist()
    return [plain(item) for item in value] if isinstance(value, list) else value


# Every type at its limits, as ggufbuild (written from the format's description) encodes it.
TYPED = {
    **{f"a.{t}.min": (t, np.iinfo(c).min) for t, (_, c) in ggufbuild.SCALARS.items() if t[0] in "ui"},
    **{f"a.{t}.max": (t, np.iinfo(c).max) for t, (_, c) in ggufbuild.SCALARS.items() if t[0] in "ui"},
    "f32": ("f32", 0.1), "f64": ("f64", 0.1), "inf": ("f32", float("inf")),
    "yes": ("bool", True), "no": ("bool", False),
    "text": ("string", "naïve\n"), "empty": ("string", ""), "bytes": ("string", b"\xff"),
    "[u8]": ("[u8]", [0, 255]), "[i64]": ("[i64]", [-(2**63), 2**63 - 1]), "[u64]": ("[u64]", [0, 2**64 - 1]),
    "[f32]": ("[f32]", [0.1, float("nan")]), "[f64]": ("[f64]", [0.1]), "[bool]": ("[bool]", [True, False]),
    "[string]": ("[string]", ["a", "", "é", b"\xfe"]), "[]": ("[i16]", []), "[s]": ("[string]", []),
    "[[i32]]": ("[[i32]]", [[1, 2], [], [-3]]),
    "[[[string]]]": ("[[[string]]]", [[["a"], []], []]), "[[]]": ("[[i8]]", []),
}  # fmt: skip


@pytest.mark.parametrize("order", ["<", ">"])
def test_metadata_bytes(tmp_path: Path, order: str) -> None:
    """Explicit types: the file is byte for byte what the format's description says; so is a copy of it."""
    expected = ggufbuild.build({k: ggufbuild.Typed(*v) for k, v in TYPED.items()}, order=order)
    expected += bytes(-len(expected) % 32)
    pairs = {key: Typed(type.replace("[", "array["), value) for key, (type, value) in TYPED.items()}
    (path,) = write(tmp_path / "a.gguf", pairs, [], byte_order=order)
    assert path.read_bytes() == expected
    del pairs["bytes"]
    (path,) = write(tmp_path / "a.gguf", pairs, [], byte_order=order)
    for other in ("<", ">"):
        with GGUFFile.open(path) as file:
            (copy,) = write(
                tmp_path / "b.gguf", {k: file.metadata.typed(k) for k in file.metadata}, [], byte_order=other
            )
            with GGUFFile.open(copy) as again:
                (back,) = write(
                    tmp_path / "c.gguf", {k: again.metadata.typed(k) for k in again.metadata}, [], byte_order=order
                )
        assert back.read_bytes() == path.read_bytes()
