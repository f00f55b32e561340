"""Builds small GGUF files in memory for tests: any version, byte order and alignment, and any lie in the header.

This code follows the description of the format and shares nothing with the reader.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# type name -> (id, struct code)
SCALARS = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i"), "f32": (6, "f"),
    "bool": (7, "?"), "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d"),
}  # fmt: skip
STRING, ARRAY = 8, 9

# name -> (id, block_size, type_size): written out again here on purpose
TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q8_1": (9, 32, 36), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "Q8_K": (15, 256, 292),
    "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74), "IQ3_XXS": (18, 256, 98), "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18), "IQ3_S": (21, 256, 110), "IQ2_S": (22, 256, 82), "IQ4_XS": (23, 256, 136), "I8": (24, 1, 1),
    "I16": (25, 1, 2), "I32": (26, 1, 4), "I64": (27, 1, 8), "F64": (28, 1, 8), "IQ1_M": (29, 256, 56),
    "BF16": (30, 1, 2), "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36),
    "Q1_0": (41, 128, 18), "Q2_0": (42, 64, 18),
}  # fmt: skip


@dataclass(frozen=True)
class Typed:
    """A metadata value with its stored type: "u8" ... "string", "[u8]" (array), "[[u8]]" (array of arrays)."""

    type: str
    value: Any


@dataclass(frozen=True)
class Raw:
    """A metadata value as a type number and bytes, which need not fit together."""

    type: int
    data: bytes


@dataclass(frozen=True)
class T:
    """A tensor."""

    name: str | bytes
    ne: Sequence[int]
    type: str | int = "F32"  # a name, or a number; a number needs `data`
    data: bytes | np.ndarray[Any, Any] | None = None  # the bytes in the file; None: zeros
    offset: int | None = None  # in place of the true one
    n_dims: int | None = None  # in place of the true one


def string(text: str | bytes, order: str = "<") -> bytes:
    """A string as GGUF stores it. bytes need not be UTF-8."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(order + "Q", len(data)) + data


def guess_type(value: Any) -> str:
    """The type that a writer would choose for a Python value."""
    if isinstance(value, np.ndarray):
        return f"[{value.dtype.name.replace('uint', 'u').replace('int', 'i').replace('float', 'f')}]"
    if isinstance(value, list | tuple):
        return f"[{guess_type(value[0]) if value else 'u32'}]"
    if isinstance(value, int) and not isinstance(value, bool):
        return "i32" if value < 0 else "u32" if value < 1 << 32 else "u64"
    return {str: "string", bytes: "string", bool: "bool", float: "f32"}[type(value)]


def type_id(type: str) -> int:
    """The number of a metadata value type."""
    return ARRAY if type.startswith("[") else STRING if type == "string" else SCALARS[type][0]


def encode(type: str, value: Any, order: str = "<") -> bytes:
    """The bytes of a metadata value, without its type number."""
    if type.startswith("["):
        items = type[1:-1]
        head = struct.pack(order + "IQ", type_id(items), len(value))
        return head + b"".join(encode(items, item, order) for item in value)
    if type == "string":
        return string(value, order)
    return struct.pack(order + SCALARS[type][1], value)


def encode_pair(key: str | bytes, value: Any, order: str = "<") -> bytes:
    """A metadata pair; value: a Python value, Typed or Raw."""
    if isinstance(value, Raw):
        type, data = value.type, value.data
    else:
        typed = value if isinstance(value, Typed) else Typed(guess_type(value), value)
        type, data = type_id(typed.type), encode(typed.type, typed.value, order)
    return string(key, order) + struct.pack(order + "I", type) + data


def tensor_data(tensor: T) -> bytes:
    """The bytes of a tensor; zeros if none are given."""
    if tensor.data is not None:
        return tensor.data.tobytes() if isinstance(tensor.data, np.ndarray) else tensor.data
    assert isinstance(tensor.type, str), "a tensor with a type number needs data"
    _, block_size, type_size = TYPES[tensor.type]
    return bytes(int(np.prod(tensor.ne)) // block_size * type_size)


def build(
    metadata: Mapping[str, Any] | Iterable[tuple[str | bytes, Any]] = (),
    tensors: Sequence[T] = (),
    *,
    version: int = 3,
    order: str = "<",
    alignment: int = 32,
    magic: bytes = b"GGUF",
    n_kv: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """Return a whole file. alignment other than 32 is also written as general.alignment; n_kv, n_tensors: lies."""
    pairs = list(metadata.items() if isinstance(metadata, Mapping) else metadata)
    if alignment != 32:
        pairs.append(("general.alignment", alignment))
    head = magic + struct.pack(
        order + "IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(pairs) if n_kv is None else n_kv,
    )
    head += b"".join(encode_pair(key, value, order) for key, value in pairs)
    body = b""
    for tensor in tensors:
        offset = len(body) if tensor.offset is None else tensor.offset
        id = TYPES[tensor.type][0] if isinstance(tensor.type, str) else tensor.type
        n_dims = len(tensor.ne) if tensor.n_dims is None else tensor.n_dims
        head += string(tensor.name, order) + struct.pack(order + "I", n_dims)
        head += struct.pack(f"{order}{len(tensor.ne)}QIQ", *tensor.ne, id, offset)
        body += tensor_data(tensor)
        body += bytes(-len(body) % alignment)
    return head + bytes(-len(head) % alignment if tensors else 0) + body


def write(path: Path, *args: Any, **options: Any) -> Path:
    """build() into a file; returns its path."""
    path.write_bytes(build(*args, **options))
    return path


# key -> (type, value as written, value as read); arrays are compared as lists.
VALUES: dict[str, tuple[str, Any]] = {
    "a.u8": ("u8", 255), "a.i8": ("i8", -128), "a.u16": ("u16", 65535), "a.i16": ("i16", -32768),
    "a.u32": ("u32", 2**32 - 1), "a.i32": ("i32", -(2**31)), "a.u64": ("u64", 2**64 - 1), "a.i64": ("i64", -(2**63)),
    "a.f32": ("f32", 0.15625), "a.f64": ("f64", 1e-300), "a.yes": ("bool", True), "a.no": ("bool", False),
    "a.text": ("string", "Größe 漢字 🦙"), "a.empty": ("string", ""), "a.nul": ("string", "a\0b\n"),
    "b.u8": ("[u8]", [0, 1, 255]), "b.i8": ("[i8]", [-128, 127]), "b.u16": ("[u16]", [1, 65535]),
    "b.i16": ("[i16]", [-2, 300]), "b.u32": ("[u32]", [1, 2**32 - 1]), "b.i32": ("[i32]", [-5, 70000]),
    "b.u64": ("[u64]", [2**64 - 1]), "b.i64": ("[i64]", [-(2**63), 5]), "b.f32": ("[f32]", [0.5, -1.25]),
    "b.f64": ("[f64]", [1e300]), "b.bool": ("[bool]", [True, False, True]), "b.none": ("[f32]", []),
    "c.text": ("[string]", ["", "a", "漢字", "\0", "\uffff", "🦙" * 20]), "c.none": ("[string]", []),
    "d.nested": ("[[i32]]", [[1, -2], [], [3]]), "d.words": ("[[string]]", [["a", "b"], ["c"]]),
    "d.deep": ("[[[[[[[[u8]]]]]]]]", [[[[[[[[7]]]]]]]]), "d.none": ("[[u8]]", []),
    "d.wide": ("[[[u8]]]", [[[1], [2, 3]]] * 20), "llama.block_count": ("u32", 3),
}  # fmt: skip


def write_split(folder: Path, count: int = 3, name: str = "m", **changes: Any) -> Path:
    """A model in `count` files with one tensor each; returns the first file's path."""
    for no in range(count):
        pairs = {"general.name": "split", "split.no": Typed("u16", no), "split.count": Typed("u16", count)}
        pairs |= {"split.tensors.count": Typed("i32", count)} | (changes if no == 0 else {})
        write(folder / f"{name}-{no + 1:05d}-of-{count:05d}.gguf", pairs, [T(f"t{no}", (4,), data=bytes([no]) * 16)])
    return folder / f"{name}-00001-of-{count:05d}.gguf"
