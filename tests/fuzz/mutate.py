"""Changes files at random, as damage or malice would. The same random numbers give the same file."""

import json
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ggufbuild import TYPES, Raw, T, Typed, build, encode_pair

from gguf_run.formats.sealed import FileKind

Chance = random.Random

# Numbers at the edges of what fits.
EDGES = [
    0,
    1,
    2,
    7,
    31,
    32,
    127,
    128,
    255,
    2**15,
    2**16,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    10**10,
    2**48,
    2**58,
]
EDGES += [2**61, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
TEXTS = [
    "",
    " ",
    "\0",
    "a\nb",
    "\u202e",
    "é",
    "▁",
    "<unk>",
    "<0x41>",
    "a b",
    "../a",
    "/dev/zero",
    "1" * 5000,
    "x" * 70000,
]
TEXTS += ["llama", "gemma3", "gpt2", "t5", "bert", "yarn", "longrope", "F32", "BF16", "I8"]
# Values as they stand in JSON. Python's json reads all but the last as a value.
JSON = ["null", "true", "false", "1.5", "-1", "-0.0", "1e999", "NaN", "-Infinity", "9" * 400, "9" * 5000, "[]", "{}"]
JSON += ["[null]", '{"a": 1}', '"\\ud800"', '[["a", "b"]]', "[" * 500 + "]" * 500, "[" * 99999, *map(str, EDGES)]
JSON += [json.dumps(text) for text in TEXTS]
# What people have in the place of a file.
WHOLE = [
    b"",
    b"\0",
    b" ",
    b"{}",
    b"[]",
    b"null",
    b'"a"',
    b"\xff\xfe{\0}\0",
    b"\xef\xbb\xbf{}",
    b"<html>",
    b"PK\3\4",
    b"a" * 999,
]
WHOLE += [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"---\na: &a [*a]\n---\n", bytes(4096)]


@dataclass(frozen=True)
class Gguf:
    """A GGUF file whose parts can be changed before it is written."""

    pairs: tuple[tuple[str | bytes, Any], ...]
    tensors: tuple[T, ...]

    @cached_property
    def encoded(self) -> dict[int, tuple[str | bytes, Raw]]:
        """The bytes of each pair, by the pair's id: they are most of the work."""
        found = {}
        for pair in self.pairs:
            key, value = pair
            data = encode_pair("", value)[8:]
            found[id(pair)] = key, Raw(int.from_bytes(data[:4], "little"), data[4:])
        return found

    def data(self, pairs: Sequence[tuple[str | bytes, Any]] = (), **changes: Any) -> bytes:
        """Return the file, with other pairs and with what ggufbuild.build takes."""
        known = [self.encoded.get(id(pair), pair) for pair in pairs or self.pairs]
        return build(known, **{"tensors": self.tensors} | changes)


@dataclass(frozen=True)
class Sealed:
    """A file of formats/sealed.py. Its checksums are right whatever is in it: a checksum is no signature."""

    kind: FileKind
    metadata: dict[str, str]
    arrays: tuple[tuple[str, str, tuple[int, ...], bytes], ...]  # name, dtype, shape, bytes

    def data(self) -> bytes:
        arrays, crc = list(self.arrays), 0
        for name, _, _, data in arrays:
            crc = zlib.crc32(data, zlib.crc32(name.encode(), crc))
        if self.kind.name == "session":
            arrays.append(("crc32", "U32", (1,), crc.to_bytes(4, "little")))
        header: dict[str, Any] = {"__metadata__": self.kind.seal(self.metadata)}
        end = 0
        for name, dtype, shape, data in arrays:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
            end += len(data)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, _, data in arrays)


def mutated(name: str, content: "bytes | Gguf | Sealed", chance: Chance) -> bytes:
    """Return another content for a file. Its name tells what it holds."""
    if chance.random() < 0.01:
        return chance.choice(WHOLE)
    if isinstance(content, Gguf):
        data = _gguf(content, chance) if chance.random() < 0.8 else content.data()
        return data if chance.random() < 0.7 else _bytes(data, chance)
    if isinstance(content, Sealed):
        return _sealed(content, chance) if chance.random() < 0.8 else _bytes(content.data(), chance)
    if name.endswith(".json") and chance.random() < 0.85:
        return _json(content, chance)
    return _bytes(content, chance)


def _bytes(data: bytes, chance: Chance) -> bytes:
    """Overwrite, insert, remove, repeat or move bytes at a few places. Half of the places are near the start."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randint(0, min(len(changed), chance.choice([64, 400, len(changed)])))
        n = chance.choice([1, 1, 2, 4, 8, 20, 100])
        kind = chance.randrange(7)
        if kind < 2:
            width = chance.choice([1, 2, 4, 8])
            number = chance.choice(EDGES) % (1 << 8 * width)
            changed[at : at + width] = number.to_bytes(width, chance.choice(["little", "big"]))
        elif kind == 2 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 3:
            changed[at : at + n * chance.randint(0, 1)] = chance.randbytes(n)
        elif kind == 4:
            del changed[at : at + n]
        elif kind == 5:
            changed[at:at] = changed[at : at + n] * chance.choice([1, 1, 2, 1000])
        elif chance.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def _json(data: bytes, chance: Chance) -> bytes:
    """Replace, remove, rename, repeat or swap values anywhere in a JSON text."""
    root = {"": json.loads(data)}
    raw: list[str] = []

    def hostile() -> str:
        raw.append(chance.choice(JSON))
        return f"@{len(raw) - 1}@"

    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        place, key = _place(root, chance)
        kind = chance.randrange(8)
        if kind == 0 and place is not root:
            del place[key]
        elif kind == 1 and isinstance(place, dict) and place is not root:
            place[chance.choice(TEXTS)] = place.pop(key)
        elif kind == 2:
            other, there = _place(root, chance)
            place[key], other[there] = json.loads(json.dumps((other[there], place[key])))
        elif kind == 3:
            is_small = len(json.dumps(place[key])) < 500
            place[key] = [place[key]] * chance.choice([1, 2, 300 if is_small else 3])
        else:
            place[key] = hostile()
    text = json.dumps(root.get(""), ensure_ascii=chance.random() < 0.5)
    for i, value in enumerate(raw):
        text = text.replace(f'"@{i}@"', value)
    if chance.random() < 0.05:
        text = text.replace("{", f'{{"{chance.choice(["a", "b", "model"])}": 1, ', chance.choice([1, 3]))
    return text.encode(errors="surrogatepass")


def _place(root: Any, chance: Chance) -> tuple[Any, Any]:
    """Return a list or an object, and a key in it. Each level is as likely as the next."""
    place, key = root, ""
    while isinstance(place[key], dict | list) and place[key] and chance.random() < 0.8:
        place = place[key]
        key = chance.choice(list(place)) if isinstance(place, dict) else chance.randrange(len(place))
    return place, key


def _gguf(file: Gguf, chance: Chance) -> bytes:
    """Change metadata pairs and tensor entries."""
    pairs, tensors = list(file.pairs), list(file.tensors)
    lies: dict[str, Any] = {}
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        if not tensors or chance.random() < 0.65:
            _change_pair(pairs, chance)
        elif chance.random() < 0.9:
            _change_tensor(tensors, chance)
        else:
            key = chance.choice(["n_kv", "n_tensors", "version", "alignment"])
            lies[key] = chance.choice(EDGES) if key.startswith("n_") else chance.choice([0, 1, 2, 3, 4, 8, 64, 65536])
    lies["alignment"] = max(1, lies.get("alignment", 32))  # build() divides by it
    return file.data(pairs, tensors=tensors, **lies)


def _value(chance: Chance) -> Any:
    """Return a metadata value of any type."""
    number = chance.choice(EDGES)
    signed = chance.choice([-1, 1]) * (number >> 1)
    values: list[Callable[[], Any]] = [
        lambda: Typed("u32", number & 0xFFFFFFFF),
        lambda: Typed("u64", number & (1 << 64) - 1),
        lambda: Typed("i64", signed),
        lambda: Typed("i32", signed % (1 << 31) - (1 << 30)),
        lambda: Typed("f32", chance.choice([0.0, -1.0, 1e-38, 3e38, float("inf"), float("nan"), 1e4])),
        lambda: Typed("f64", chance.choice([1e308, -1e-308, float("nan")])),
        lambda: Typed("bool", chance.random() < 0.5),
        lambda: Typed("string", chance.choice(TEXTS)),
        lambda: Typed("[string]", chance.choices(TEXTS, k=chance.choice([0, 1, 300]))),
        lambda: Typed("[i32]", [chance.choice([-1, 0, 1, 6, 2**31 - 1])] * chance.choice([0, 1, 2, 300])),
        lambda: Typed("[f32]", [chance.choice([0.0, float("nan"), -1e30])] * chance.choice([0, 16, 300])),
        lambda: Typed("[[u8]]", [[1], []]),
        lambda: Raw(chance.choice([8, 9, 12, 13, 255]), chance.randbytes(chance.choice([0, 4, 12, 40]))),
    ]
    return chance.choice(values)()


def _change_pair(pairs: list[tuple[str | bytes, Any]], chance: Chance) -> None:
    at = chance.randrange(len(pairs))
    key, value = pairs[at]
    kind = chance.randrange(10)
    if isinstance(value, list) and value and kind < 5:
        items = list(value)
        i = chance.randrange(len(items))
        if kind == 0:
            items = items[:i]
        elif kind == 1:
            items *= 2
        elif kind == 2:
            items[i] = items[chance.randrange(len(items))]
        elif isinstance(items[i], str):
            items[i] = chance.choice(TEXTS)
        elif isinstance(items[i], float):
            items[i] = chance.choice([float("nan"), float("inf"), -1e38, 0.0])
        elif isinstance(items[i], int):
            items[i] = chance.choice([0, 1, 2, 3, 4, 5, 6, 7, 2**31 - 1])
        pairs[at] = key, items
    elif kind == 5:
        del pairs[at : at + 1 if len(pairs) > 1 else at]
    elif kind == 6:
        pairs.append((key, _value(chance)))
    elif kind == 7:
        pairs[at] = chance.choice([*TEXTS, b"\xff"]), value
    else:
        pairs[at] = key, _value(chance)


def _change_tensor(tensors: list[T], chance: Chance) -> None:
    at = chance.randrange(len(tensors))
    tensor = tensors[at]
    ne = list(tensor.ne)
    if ne:
        ne[chance.randrange(len(ne))] = chance.choice([*EDGES, 3, 5, 96]) & (1 << 64) - 1
    changes: list[dict[str, Any]] = [
        {"ne": ne},
        {"ne": tensor.ne[::-1]},
        {"ne": [*tensor.ne, 1]},
        {"ne": tensor.ne[:-1]},
        {"type": chance.choice([4, 5, 43, 255, 2**31, *(id for id, _, _ in TYPES.values())])},
        {"offset": chance.choice([*EDGES, 64, 96])},
        {"n_dims": chance.choice([0, 1, 3, 5, 9, 2**31, 2**32 - 1])},
        {"name": chance.choice([*TEXTS, b"\xff", tensors[0].name, "blk.9.attn_q.weight"])},
    ]
    kind = chance.randrange(len(changes) + 2)
    if kind < len(changes):
        tensors[at] = replace(tensor, **changes[kind])
    elif kind == len(changes):
        del tensors[at]
    else:
        tensors.append(tensor)


def _sealed(file: Sealed, chance: Chance) -> bytes:
    """Change the texts and the arrays of a sealed file."""
    metadata, arrays = dict(file.metadata), list(file.arrays)
    for _ in range(chance.choice([1, 1, 2])):
        if chance.random() < 0.5:
            metadata[chance.choice([*metadata, "kind"])] = chance.choice([*JSON, *TEXTS, "[{}]", '[{"role": 1}]'])
            continue
        at = chance.randrange(len(arrays))
        name, dtype, shape, data = arrays[at]
        arrays[at] = chance.choice(
            [
                (name, dtype, shape[::-1], data),
                (name, dtype, (*shape, 1), data),
                (name, "U8", (len(data),), data),
                (name, "I32", (len(data) // 4,), data[: len(data) // 4 * 4]),
                (name, dtype, (0, *shape[1:]), b""),
                (name, dtype, shape, chance.randbytes(len(data))),
                (
                    chance.choice([*TEXTS, "ids", "0.k", "1.v", "99999.k", "-1.v", "0.x", "crc32", "1e3.k"]),
                    dtype,
                    shape,
                    data,
                ),
            ]
        )
        if chance.random() < 0.2:
            del arrays[chance.randrange(len(arrays))]
            if not arrays:
                break
    return replace(file, metadata=metadata, arrays=tuple(arrays)).data()
