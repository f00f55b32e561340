"""Files of logits: what is in them byte by byte, how exact they are, and that no damaged one is believed."""

import hashlib
import itertools
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from ggufbuild import write
from tinymodel import write_tiny

from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.safetensors import read_safetensors
from gguf_run.runtime.evaluate.logits_file import (
    KIND,
    LogitsFile,
    LogitsHeader,
    hash_file,
    hash_ids,
    hash_vocabulary,
    round_logits,
    unround_logits,
    writing_logits,
)
from gguf_run.runtime.evaluate.text import Block

N_VOCAB, N_CHUNK, N_CTX = 21, 2, 140
N_SCORED = N_CTX // 2 - 1  # more than are read at once
HEADER = LogitsHeader(
    n_vocab=N_VOCAB,
    n_ctx=N_CTX,
    n_chunk=N_CHUNK,
    n_scored=N_SCORED,
    model_hash="01" * 32,
    vocab_hash="02" * 32,
    text_hash="03" * 32,
    model="modèle.gguf",
)


def blocks(seed: int = 0) -> list[Block]:
    rng = np.random.default_rng(seed)
    logits = (4 * rng.standard_normal((N_CHUNK * N_SCORED, N_VOCAB))).astype(np.float32)
    whole = Block(logits, rng.random(len(logits)))
    cuts = [0, 50, N_SCORED, N_SCORED + 64, 2 * N_SCORED]
    return [whole.rows(first, end) for first, end in itertools.pairwise(cuts)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with writing_logits(tmp_path / "a.logits", HEADER) as writer:
        for block in blocks():
            writer.add(block)
    return tmp_path / "a.logits"


def test_round_trip(path: Path) -> None:
    assert [file.name for file in path.parent.iterdir()] == ["a.logits"]
    expected = blocks()
    with LogitsFile(path) as file:
        assert file.header == HEADER
        for i in (1, 0):  # in any order
            found = list(file.chunk(i))
            assert [len(block.nll) for block in found] == [64, N_SCORED - 64]
            nll, top, logits = (
                np.concatenate([getattr(block, name) for block in found]) for name in ("nll", "top", "logits")
            )
            whole = np.concatenate([block.logits for block in expected[2 * i : 2 * i + 2]])
            assert (nll == np.concatenate([block.nll for block in expected[2 * i : 2 * i + 2]])).all()
            assert (top == whole.argmax(1)).all()
            relative = whole - whole.max(1, keepdims=True)
            step = -relative.min(1, keepdims=True) / 65535
            assert (np.abs(logits - relative) <= 0.51 * step + 1e-6).all()


def test_layout(path: Path) -> None:
    """As the module's docstring says, read without our reader."""
    safe_open = pytest.importorskip("safetensors").safe_open
    with safe_open(path, "np") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    texts = {name: str(value) for name, value in asdict(HEADER).items()}
    sealed = {"kind": "file of logits", "version": "2", **texts}
    assert metadata == sealed | {"crc32": f"{zlib.crc32(json.dumps(sealed, sort_keys=True).encode()):08x}"}
    assert HEADER.nbytes == sum(array.nbytes for array in arrays.values()) < path.stat().st_size
    names = ("nll", "top", "step", "q")
    for i in range(N_CHUNK):
        assert arrays["crc32"][i].tolist() == [zlib.crc32(arrays[name][i].tobytes()) for name in names]
    nll, top, step, q = (arrays[name][0, 0] for name in names)
    first = blocks()[0]
    assert (nll, top, max(q), min(q)) == (first.nll[0], first.top[0], 65535, 0)
    assert q[top] == 65535
    relative = first.logits[0] - first.logits[0].max()
    assert (q.astype(float) - 65535) * step == pytest.approx(relative, abs=0.51 * float(step))


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([3.0, 3.0, 3.0], [0, 0, 0]),  # no range
        ([-7.0], [0]),
        ([0.0, -100.0, -1e30, -64.0], [0, -64, -64, -64]),  # what is impossible at any rate is cut off
        ([5.0, 4.0, -5.0], [0, -1, -10]),
    ],
)
def test_rounding(logits: list[float], expected: list[float]) -> None:
    found = unround_logits(*round_logits(np.array([logits], np.float32)))
    assert found.dtype == np.float32
    assert found[0] == pytest.approx(expected, abs=1e-3)


def test_rounding_leaves_its_argument_alone() -> None:
    logits = np.array([[1.0, 2.0]], np.float32)
    round_logits(logits)
    assert logits.tolist() == [[1.0, 2.0]]


def resealed(**changes: object) -> Callable[[bytes], bytes]:
    """A changed header with the right checksum."""

    def change(data: bytes) -> bytes:
        n = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + n])
        texts = {name: str(value) for name, value in (asdict(HEADER) | changes).items() if value is not None}
        header["__metadata__"] = KIND.seal(texts)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + n :]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"GGUF" + data[4:], "is not a file of logits"),
        (lambda data: data[:7], "is not a file of logits, or it is damaged"),
        (lambda data: data[:255], "is not a file of logits, or it is damaged"),
        (lambda data: data[:-1], "is not a file of logits, or it is damaged .*truncated"),
        (lambda data: b"GGRLOGIT" + data, "is a file of logits of an earlier version of this program: make it again"),
        (lambda data: data.replace(b'"version":"2"', b'"version":"3"'), "of version 3, this program reads 2"),
        (lambda data: data.replace(b'"n_ctx":"140"', b'"n_ctx":"141"'), "the checksum of its header differs"),
        (lambda data: data.replace(b"gguf", b"ggud"), "the checksum of its header differs"),
        (lambda data: data.replace(b'"nll":', b'"nlm":'), "its arrays are not those"),
        (lambda data: data.replace(b'"U32","shape":[2,69]', b'"I32","shape":[2,69]'), "its arrays are not those"),
        (resealed(n_vocab=0), "impossible sizes"),
        (resealed(n_vocab=2**32 - 1), "impossible sizes"),
        (resealed(n_chunk=-1), "impossible sizes"),
        (resealed(n_ctx=1), "impossible sizes"),  # n_ctx and n_scored do not belong together
        (resealed(n_chunk=3), "its arrays are not those"),
        (resealed(n_chunk="two"), "its header is not what this program writes"),
        (resealed(model=None), "its header is not what this program writes"),
    ],
)
def test_damaged_files(path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(FormatError, match=message) as caught:
        LogitsFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damaged", [0, 1])
@pytest.mark.parametrize("name", ["nll", "top", "step", "q", "crc32"])
def test_damaged_chunks(path: Path, name: str, damaged: int) -> None:
    array = read_safetensors(path).arrays[name]
    data = bytearray(path.read_bytes())
    data[array.offset + damaged * array.data.nbytes // N_CHUNK] ^= 1
    path.write_bytes(data)
    with LogitsFile(path) as file:
        list(file.chunk(1 - damaged))
        with pytest.raises(FormatError, match=rf"the checksum of chunk {damaged + 1} differs"):
            list(file.chunk(damaged))


def test_file_that_shrinks_while_it_is_read(path: Path) -> None:
    with LogitsFile(path) as file:
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(FormatError, match="became shorter"):
            list(file.chunk(0))


# Writing.


def test_nothing_is_left_of_an_incomplete_file(tmp_path: Path) -> None:
    path = tmp_path / "a.logits"
    path.write_text("an older one")
    with writing_logits(path, HEADER) as writer:
        writer.add(blocks()[0])
        assert not writer.is_complete
    with suppress(KeyboardInterrupt), writing_logits(path, HEADER) as writer:
        for block in blocks():
            writer.add(block)
        assert writer.is_complete
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["a.logits"]
    assert path.read_text() == "an older one"


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GgufRunError, match="is a folder"), writing_logits(tmp_path, HEADER):
        pass
    with pytest.raises(FileNotFoundError), writing_logits(tmp_path / "no/such.logits", HEADER):
        pass
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=HEADER.nbytes - 1))
    no_room = r"the logits take 8\.0 kB, the disk has 8\.0 kB left: use fewer --chunks"
    with pytest.raises(GgufRunError, match=no_room), writing_logits(tmp_path / "a.logits", HEADER):
        pass
    assert not list(tmp_path.iterdir())


def test_long_names(tmp_path: Path) -> None:
    header = replace(HEADER, n_chunk=1, n_ctx=4, n_scored=1, model="é" * 100)
    with writing_logits(tmp_path / "a.logits", header) as writer:
        writer.add(Block(np.zeros((1, N_VOCAB), np.float32), np.zeros(1)))
    with LogitsFile(tmp_path / "a.logits") as file:
        assert file.header == header


# Hashes.


def test_hash_of_a_model_is_that_of_its_file(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a.gguf")
    data = (tmp_path / "a.gguf").read_bytes()
    assert hash_file(tmp_path / "a.gguf") == hashlib.sha256(hashlib.sha256(data).digest()).hexdigest()
    (tmp_path / "b.gguf").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert hash_file(tmp_path / "b.gguf") != hash_file(tmp_path / "a.gguf")


def test_hash_of_a_vocabulary(tmp_path: Path) -> None:
    def hashed(*tokens: str) -> str:
        return hash_vocabulary(write(tmp_path / "a.gguf", {"tokenizer.ggml.tokens": list(tokens)}))

    assert hashed("a", "b") == hashlib.sha256(json.dumps(["a", "b"]).encode()).hexdigest()
    assert len({hashed("a", "b"), hashed("ab"), hashed("b", "a"), hashed("a", "b", "")}) == 4


def test_hash_of_ids() -> None:
    assert hash_ids([1, 2]) == hashlib.sha256(struct.pack("<2i", 1, 2)).hexdigest()
