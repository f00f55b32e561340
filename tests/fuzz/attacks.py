"""The corpus: files that broke a reader once, or that were made to break one. Each is read or refused, as mutants are.

A finding of fuzz.py that is mended becomes an entry here.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from ggufbuild import Raw, T, Typed, string
from mutate import Gguf, Sealed
from targets import TARGETS

Change = bytes | Callable[[Path], None]  # the content of a file, or what makes something else in its place


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def changed_json(target: str, file: str, **values: Any) -> bytes:
    """Return a JSON file with other values: a text that begins with "=" stands in the file as it is."""
    content = TARGETS[target].files()[file]
    assert isinstance(content, bytes)
    data = json.loads(content) | values
    raw = {value: value[1:] for value in values.values() if isinstance(value, str) and value.startswith("=")}
    text = json.dumps(data)
    for value, plain in raw.items():
        text = text.replace(json.dumps(value), plain)
    return text.encode()


def changed_gguf(file: str = "llama.gguf", tensors: tuple[T, ...] = (), **values: Any) -> bytes:
    """Return a GGUF file with other values: `tokens` means tokenizer.ggml.tokens, `general__name` general.name."""
    content = TARGETS["gguf"].files()[file]
    assert isinstance(content, Gguf)
    pairs = dict(content.pairs)
    for name, value in values.items():
        key = name.replace("__", ".") if "__" in name else f"tokenizer.ggml.{name}"
        pairs[key] = value
    return replace(content, pairs=tuple(pairs.items()), tensors=content.tensors + tensors).data()


def changed_sealed(target: str, file: str, arrays: tuple[Any, ...] = (), **metadata: str) -> bytes:
    content = TARGETS[target].files()[file]
    assert isinstance(content, Sealed)
    kept = tuple(array for array in content.arrays if array[0] not in [name for name, *_ in arrays])
    return replace(content, metadata=content.metadata | metadata, arrays=(*kept, *arrays)).data()


def header(text: str, data: bytes = b"") -> bytes:
    """Return a safetensors file."""
    return len(text.encode()).to_bytes(8, "little") + text.encode() + data


def array(**values: Any) -> str:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | values})


DEEP = "[" * 100_000
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
OTHERS = {"nothing": b"", "a pointer of LFS": LFS, "a page": b"<!DOCTYPE html>", "a zip": b"PK\3\4" + bytes(99)}


def gguf_attacks() -> Iterator[tuple[str, bytes]]:
    yield from OTHERS.items()
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
    nested = struct.pack("<IQ", 9, 1) * 10_000 + struct.pack("<IQ", 0, 0)
    yield "arrays in arrays", head + string("a") + struct.pack("<I", 9) + nested
    yield "an array of 2^62 arrays", head + string("a") + struct.pack("<IIQ", 9, 9, 1 << 62) + nested
    yield "a key of 2^63 bytes", head + struct.pack("<Q", 1 << 63)
    yield "2^64 - 1 pairs", struct.pack("<4sIQQ", b"GGUF", 3, 0, (1 << 64) - 1) + string("a") * 100
    yield "2^40 tensors", struct.pack("<4sIQQ", b"GGUF", 3, 1 << 40, 0) + bytes(999)
    yield "an element count that wraps", changed_gguf(tensors=(T("a", (1 << 32, 1 << 32), data=bytes(32)),))
    yield "an offset that wraps", changed_gguf(tensors=(T("a", (4,), offset=(1 << 64) - 32),))
    yield "a name that moves the cursor", changed_gguf(tensors=(T("\x1b[2J\n\u202e", (4,)),), general__name="\x1b[2J")
    yield "a type of file that is an array", changed_gguf(general__type=[1, 2])
    yield "an architecture that is an array", changed_gguf(general__architecture=[1, 2])
    yield "no alignment", changed_gguf(general__alignment=0)
    yield "an alignment of 2^31", changed_gguf(general__alignment=1 << 31)
    yield "an architecture of 70,000 letters", changed_gguf(general__architecture="x" * 70_000)
    yield "2^31 - 1 layers", changed_gguf(llama__block_count=2**31 - 1)
    yield "a context of 2^32 - 1", changed_gguf(llama__context_length=2**32 - 1)
    yield "a head of no columns", changed_gguf(llama__attention__key_length=0)
    yield "an infinite base", changed_gguf(llama__rope__freq_base=float("inf"))
    yield "eps that is no number", changed_gguf(llama__attention__layer_norm_rms_epsilon=float("nan"))
    yield "no tokens", changed_gguf(tokens=[])
    yield "one token 300 times", changed_gguf(tokens=["a"] * 300)
    yield "tokens that are numbers", changed_gguf(tokens=Typed("[u8]", [1, 2]))
    yield "a token that is no UTF-8", changed_gguf(tokens=Typed("[string]", [b"\xff"] * 279))
    yield "types of no token", changed_gguf(token_type=Typed("[i32]", [-1] * 279))
    yield "an end beyond the vocabulary", changed_gguf(eos_token_id=2**32 - 2)
    yield "merges of nothing", changed_gguf(merges=["", " ", "a", "a b c", "  "])
    yield "a merge of 1.5 MB", changed_gguf(merges=["a" * 1_500_000 + " b"])
    yield "a value of type 255", changed_gguf(general__name=Raw(255, b""))
    units = struct.pack("<I4I", 16, *[1 << 31] * 4) + b"a\0"
    yield "a table whose first unit is a text", changed_gguf("t5.gguf", precompiled_charsmap=Typed("[u8]", list(units)))


def imatrix_attacks() -> Iterator[tuple[str, bytes]]:
    yield from gguf_attacks()
    numbers = struct.pack("<2f", 1, float("nan"))
    for what, sums, counts in (
        ("counts of no columns", T("a.in_sum2", (2,), data=numbers), T("a.counts", (0, 1), data=b"")),
        ("sums of no columns", T("a.in_sum2", (0, 1), data=b""), T("a.counts", (1,), data=numbers)),
        ("sums that are no numbers", T("a.in_sum2", (2,), data=numbers), T("a.counts", (1,), data=numbers)),
        ("counts for other rows", T("a.in_sum2", (2,), data=numbers), T("a.counts", (1, 2), data=numbers)),
        ("counts of 16 bits", T("a.in_sum2", (2,), data=numbers), T("a.counts", (1,), "F16", data=numbers)),
    ):
        yield what, Gguf((("a", 1),), (sums, counts)).data()


def safetensors_attacks() -> Iterator[tuple[str, bytes]]:
    yield from OTHERS.items()
    yield "a header of 2^63 bytes", struct.pack("<Q", 1 << 63)
    yield "a deep header", header(DEEP)
    yield "a size that wraps", header(array(shape=[1 << 47, 1 << 47], data_offsets=[0, 0]))
    yield "a size of 400 digits", header(array(shape=[10**400]))
    yield (
        "a size of 5,000 digits",
        header('{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 4]}}'),
    )
    yield "sizes below 0", header(array(shape=[-1], data_offsets=[4, 0]), bytes(8))
    yield "a size that is true", header(array(shape=[True]), bytes(8))
    yield "offsets that are no numbers", header(array(data_offsets=["0", float("nan")]), bytes(8))
    yield "a type that is a list", header(array(dtype=["F32"]), bytes(8))
    yield "half a surrogate pair", header('{"\\ud800": 1}')
    yield "metadata of numbers", header('{"__metadata__": {"a": 1}}')


def json_attacks() -> Iterator[tuple[str, str, bytes]]:
    """Files of a checkpoint: what it is, name, content."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        yield from ((f"{what} as {name}", name, data) for what, data in OTHERS.items())
        for what, text in {
            "a deep text": DEEP,
            "deep objects": '{"a":' * 9999,
            "a number": "1",
            "5,000 digits": "9" * 5000,
        }.items():
            yield f"{what} as {name}", name, text.encode()
        yield f"a key with 5,000 digits in {name}", name, changed_json("checkpoint", name, vocab_size="=" + "9" * 5000)
    config: dict[str, Any] = {
        "vocab_size": 10**10, "num_hidden_layers": 2**31 - 1, "hidden_size": True, "rms_norm_eps": "=1e999",
        "rope_theta": "=NaN", "rope_scaling": [], "eos_token_id": [2**70, True, "a", None], "text_config": [1],
        "architectures": [None], "model_type": "a\nb" * 9999, "quantization_config": {"quant_method": []},
        "head_dim": 10**400, "num_attention_heads": 0,
    }  # fmt: skip
    for key, value in config.items():
        for name in (key, "rope_scaling") if key == "rope_theta" else (key,):
            yield (
                f"a {name} of {str(value)[:20]!r}",
                "config.json",
                changed_json("checkpoint", "config.json", **{name: value}),
            )
    model = json.loads(TARGETS["checkpoint"].files()["tokenizer.json"])["model"]  # type: ignore[arg-type]
    models: dict[str, Any] = {
        "a merge of 1.5 MB": {"merges": ["a" * 1_500_000 + " b"]}, "a merge of half a pair": {"merges": ["\ud800 a"]},
        "an id of 2^40": {"vocab": model["vocab"] | {"x": 2**40}}, "one id twice": {"vocab": {"a": 0, "b": 0}},
        "an id below 0": {"vocab": {"a": -1}}, "a token of half a pair": {"vocab": model["vocab"] | {"\ud800": 277}},
        "merges of numbers": {"merges": [1, [2, 3]]}, "no model": {"type": "x\n"}, "a token of 1.5 MB":
        {"vocab": model["vocab"] | {"a" * 1_500_000: 277}},
    }  # fmt: skip
    for what, values in models.items():
        yield what, "tokenizer.json", changed_json("checkpoint", "tokenizer.json", model=model | values)
    steps: dict[str, Any] = {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        "added_tokens": [{"id": 1, "content": "\ud800"}],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
        "post_processor": {"type": "TemplateProcessing", "single": 1}, "decoder": DEEP[:200],
    }  # fmt: skip
    for key, value in steps.items():
        yield (
            f"{key} of {str(value)[:30]}",
            "tokenizer.json",
            changed_json("checkpoint", "tokenizer.json", **{key: value}),
        )
    decoder = {"9" * 5000: {"content": "a", "special": True}}
    yield "an added id of 5,000 digits", "tokenizer_config.json", json.dumps({"added_tokens_decoder": decoder}).encode()
    laughs = "a: &a [x,x]\n" + "".join(f"{b}: &{b} [*{a},*{a},*{a},*{a}]\n" for a, b in pairwise("abcdefghijklm"))
    for what, card in {
        "a card that multiplies": laughs, "a licence of 9,000 digits": "license: " + "9" * 9000, "a card that runs":
        "license: !!python/object/apply:os.system [ls]", "a deep card": "tags: " + "[" * 3000,
        "a date": "name: 0000-99-99",
    }.items():  # fmt: skip
        yield what, "README.md", f"---\n{card}\n---\n".encode()


def shard_attacks() -> Iterator[tuple[str, str, bytes]]:
    index = "model.safetensors.index.json"
    for place in ("../a", "/etc/passwd", "", ".", "a\nb", "1" * 5000, "none.safetensors", 1, ["a"]):
        yield f"a shard named {place!r:.20}", index, json.dumps({"weight_map": {"lm_head.weight": place}}).encode()
    pieces = {
        "a varint without end": b"\x0a" + b"\xff" * 20, "a message of 2^63": b"\x0a" + b"\xff" * 9 + b"\1",
        "a piece that is no number": b"\x0a\x07\x0a\0\x15" + struct.pack("<f", float("nan")), "a wire of 7": b"\x0f",
        "a piece without a text": b"\x0a\0", "a piece in a piece": b"\x0a\4\x0a\2\x0a\0",
        "half a character": b"\x0a\3\x0a\1\xff",
    }  # fmt: skip
    yield from ((what, "tokenizer.model", data) for what, data in (pieces | OTHERS).items())


def session_attacks() -> Iterator[tuple[str, bytes]]:
    yield from OTHERS.items()
    messages = (
        DEEP,
        "9" * 5000,
        "1",
        "null",
        '{"role": 1}',
        "[1]",
        '[{"role": "user"}]',
        '[{"role": [], "content": 1e999}]',
    )
    yield from ((f"messages {text[:30]}", changed_sealed("session", "s.session", messages=text)) for text in messages)
    yield "a cache of two lines", changed_sealed("session", "s.session", cache="a\nb")
    yield "a model of 70,000 letters", changed_sealed("session", "s.session", model_hash="x", model="x" * 70_000)
    for name in ("x", "0", "0.k.v", "1e3.k", "-1.k", "9" * 5000 + ".k", "٣.k"):
        yield f"an array {name[:10]}", changed_sealed("session", "s.session", ((name, "U8", (4,), bytes(4)),))
    ids = struct.pack("<4i", 1, 2, -1, 2**31 - 1)
    for what, (dtype, shape) in {"floats": ("F32", (4,)), "a square": ("I32", (2, 2)), "bytes": ("U8", (16,))}.items():
        yield f"ids that are {what}", changed_sealed("session", "s.session", (("ids", dtype, shape, ids),))
    yield "ids beyond the vocabulary", changed_sealed("session", "s.session", (("ids", "I32", (4,), ids),))


def logits_attacks() -> Iterator[tuple[str, bytes]]:
    yield from OTHERS.items()
    for text in ("0", "-1", "16777216", "9" * 5000, "1e3", "٣", "a\nb", ""):
        for key in ("n_vocab", "n_chunk", "n_scored"):
            yield f"{key} of {text[:10]}", changed_sealed("logits", "l.logits", **{key: text})


def scales_attacks() -> Iterator[tuple[str, bytes]]:
    yield from OTHERS.items()
    yield from (
        ("a deep text", DEEP.encode()),
        ("a version of 70,000 letters", changed_json("scales", "scales.json", version="x" * 70_000)),
    )
    layer = {"k_max": [1.0], "v_max": [2.0], "k": "f16", "v": "f16"}
    values = ("=" + "9" * 400, "=" + "9" * 5000, "=1e999", "=NaN", True, None, "1", -1, 1e308, 1e-320, [1])
    for value in values:
        data = json.dumps({"format": "gguf-run kv-scales", "version": 1, "layers": [layer | {"k_max": ["@"]}]})
        text = value[1:] if isinstance(value, str) and value.startswith("=") else json.dumps(value)
        yield f"a scale of {text[:10]}, {len(text)} characters", data.replace('"@"', text).encode()
    for value in (["f16"] * 999, "x" * 999, 1, {"a": 1}, DEEP[:500]):
        data = json.loads(TARGETS["scales"].files()["scales.json"]) | {"layers": [layer | {"k": value}]}  # type: ignore[arg-type]
        yield f"a type {str(value)[:20]}", json.dumps(data).encode()


@cache
def attacks() -> dict[str, tuple[str, Mapping[str, Change]]]:
    """Return all attacks by name: the target, and the files that take the place of whole ones."""
    alone: list[tuple[str, str, Iterator[tuple[str, bytes]]]] = [
        ("gguf", "m.gguf", gguf_attacks()), ("model", "m.gguf", gguf_attacks()),
        ("imatrix", "i.gguf", imatrix_attacks()),
        ("safetensors", "model.safetensors", safetensors_attacks()), ("session", "s.session", session_attacks()),
        ("checkpoint", "model.safetensors", safetensors_attacks()), ("logits", "l.logits", logits_attacks()),
        ("scales", "scales.json", scales_attacks()),
    ]  # fmt: skip
    found: dict[str, tuple[str, Mapping[str, Change]]] = {
        f"{target}: {what}": (target, {file: data}) for target, file, made in alone for what, data in made
    }
    for target, listed in (("checkpoint", json_attacks()), ("shards", shard_attacks())):
        found |= {f"{target}: {what}": (target, {file: data}) for what, file, data in listed}
    for target in TARGETS:
        for file in TARGETS[target].files():
            found |= {
                f"{target}: {make.__name__} as {file}": (target, {file: make})
                for make in (pipe, device, circle, Path.mkdir)
            }
    return found
