"""Thousands of damaged headers: each is read, or refused by a GgufRunError, in bounded memory and time, no crash."""

import os
import tracemalloc
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import real
from ggufbuild import VALUES, T, Typed, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.strings import StringArray

# Far above what a mutant takes (about a millisecond), so that only a runaway loop fails on a busy machine.
SETTINGS = settings(
    max_examples=1000,
    deadline=timedelta(seconds=60),
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# (place, new bytes): numbers at the edges of what fits, in both byte orders, or a few random bytes.
EDGES = [0, 1, 2, 7, 8, 9, 31, 32, 63, 64, 127, 128, 255, 2**15, 2**16 - 1, 2**16, 2**30, 2**31 - 1, 2**31, 2**32 - 1]
EDGES += [2**32, 2**58, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
NUMBERS = st.builds(
    lambda n, width, order: (n % (1 << 8 * width)).to_bytes(width, order),
    st.sampled_from(EDGES),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(["little", "big"]),
)
CHANGE = st.one_of(NUMBERS, NUMBERS, st.binary(min_size=1, max_size=12))


def look_at_everything(path: Path, sample: int) -> None:
    with GGUFFile.open(path) as file:
        for key in file.metadata:
            file.metadata.type_name(key)
            value = file.metadata[key]
            if isinstance(value, StringArray):
                _ = value.tolist() if len(value) <= sample else value[-sample:]
        for tensor in file.tensors.values():
            blocks = tensor.blocks()
            assert blocks.nbytes == tensor.nbytes
            blocks[-1:, -1:].tobytes()  # there may be none


def use(path: Path, sample: int = 1 << 20) -> str:
    """Open a file and use it (of long arrays, `sample` strings), in at most 64 MB; return what came of it."""
    problem = ""
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is not valid UTF-8")
            look_at_everything(path, sample)
    except GgufRunError as error:
        problem = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    if not problem:
        return "read"
    assert problem.startswith(str(path))
    assert len(problem.splitlines()) == 1
    return "refused"


def small_file(order: str) -> bytes:
    pairs: dict[str, Any] = {"general.alignment": 32}
    pairs |= {key: Typed(*value) for key, value in VALUES.items()}
    return build(pairs, [T("a", (32, 3), "Q8_0"), T("b", (5,)), T("c", (256, 1, 2), "Q4_K")], order=order)


SMALL = {order: small_file(order) for order in "<>"}


def test_the_unchanged_files_are_read(tmp_path: Path) -> None:
    for data in SMALL.values():
        (tmp_path / "m.gguf").write_bytes(data)
        assert use(tmp_path / "m.gguf") == "read"


@SETTINGS
@given(
    order=st.sampled_from("<>"),
    changes=st.lists(st.tuples(st.integers(0, len(SMALL["<"])), CHANGE), min_size=1, max_size=3),
    cut=st.one_of(st.none(), st.integers(0, len(SMALL["<"]))),
)
def test_small_file_overwritten(tmp_path: Path, order: str, changes: list[tuple[int, bytes]], cut: int | None) -> None:
    data = bytearray(SMALL[order])
    for at, new in changes:
        data[at : at + len(new)] = new
    path = tmp_path / "m.gguf"
    path.write_bytes(data[:cut])
    use(path)


@SETTINGS
@given(
    order=st.sampled_from("<>"),
    at=st.integers(0, len(SMALL["<"])),
    removed=st.integers(0, 40),
    new=st.one_of(CHANGE, st.integers(0, 400).map(lambda at: SMALL["<"][at : at + 60])),
)
def test_small_file_shifted(tmp_path: Path, order: str, at: int, removed: int, new: bytes) -> None:
    """Bytes cut out and put in: everything behind is read from the wrong place."""
    path = tmp_path / "m.gguf"
    path.write_bytes(SMALL[order][:at] + new + SMALL[order][at + removed :])
    use(path)


@given(data=st.binary(max_size=300), order=st.sampled_from("<>"))
@settings(SETTINGS, max_examples=500)
def test_random_bytes(tmp_path: Path, data: bytes, order: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(SMALL[order][:24] + data)
    use(path)


@pytest.fixture(scope="module")
def smollm2_header(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with SmolLM2's header and holes for its data, which takes no room on the disk."""
    source = real.smollm2()
    with GGUFFile.open(source) as file:
        start = min(tensor.offset for tensor in file.tensors.values())
    path = tmp_path_factory.mktemp("header") / "smollm2.gguf"
    with source.open("rb") as full:
        path.write_bytes(full.read(start))
    os.truncate(path, source.stat().st_size)
    assert use(path) == "read"
    return path


HEADER_BYTES = 1_785_664  # of this model; its tensor entries take the last 17,000
PLACES = st.one_of(st.integers(0, 2000), st.integers(0, 65536), st.integers(HEADER_BYTES - 20_000, HEADER_BYTES))


@settings(SETTINGS, max_examples=500)
@given(changes=st.lists(st.tuples(PLACES, CHANGE), min_size=1, max_size=2))
def test_real_header_overwritten(smollm2_header: Path, changes: list[tuple[int, bytes]]) -> None:
    with smollm2_header.open("r+b") as file:
        old = []
        for at, new in changes:
            file.seek(at)
            old.append((at, file.read(len(new))))
            file.seek(at)
            file.write(new)
        file.flush()
        try:
            use(smollm2_header, sample=20)
        finally:
            for at, data in reversed(old):
                file.seek(at)
                file.write(data)


@pytest.mark.parametrize("share", range(0, 100, 7))
def test_real_header_truncated(smollm2_header: Path, tmp_path: Path, share: int) -> None:
    path = tmp_path / "cut.gguf"
    with smollm2_header.open("rb") as file:
        path.write_bytes(file.read(HEADER_BYTES * share // 100))
    assert use(path) == "refused"
