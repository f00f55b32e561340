"""Compares gguf-quantize with llama.cpp's quantizer: bytes, time and memory, in turns.

    python benchmarks/make_model.py llama-1b F16
    python benchmarks/quantize_vs_llamacpp.py llama-1b-F16.gguf Q4_K_M Q5_K_S Q3_K_M Q2_K -t 2

llama.cpp is llama_model_quantize of the prebuilt libllama (peer.py). Each runs as a process of its own. The time
includes the start. Memory is the largest resident size, with the pages of the mapped input. With an imatrix only the
tensors can be equal: the program llama-quantize notes the imatrix in the metadata, the library does not.
"""

import ctypes
import filecmp
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import click
import numpy as np
from peer import _LOG, _TEXT, _open, library_folder

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.quantize.file_types import file_type

_OURS = "from gguf_run.runtime.cli.quantize import main; main()"


class _Params(ctypes.Structure):
    """llama_model_quantize_params of llama.h, release v0.5.0."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p),
        ("prune_layers", ctypes.c_void_p),
        ("max_buf_size", ctypes.c_size_t),
    )


class _Entry(ctypes.Structure):
    """llama_model_imatrix_data."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


def quantize_with_peer(source: str, output: str, kind: str, n_threads: int, imatrix: str | None) -> None:
    """Run llama.cpp's quantizer in this process."""
    functions = {
        "llama_log_set": (None, (_LOG, ctypes.c_void_p)),
        "llama_backend_init": (None, ()),
        "llama_model_quantize_default_params": (_Params, ()),
        "llama_model_quantize": (ctypes.c_uint32, (_TEXT, _TEXT, ctypes.POINTER(_Params))),
    }
    library = _open(next(library_folder().glob("libllama.v*.so")), functions)
    errors: list[str] = []
    log = _LOG(lambda level, text, data: errors.append(text.decode()) if level >= 4 else None)
    library.llama_log_set(log, None)
    library.llama_backend_init()
    params = library.llama_model_quantize_default_params()
    params.nthread, params.ftype = n_threads, file_type(kind).id
    if imatrix:
        from gguf_run.formats.gguf.imatrix import Imatrix

        values = {name.encode(): np.ascontiguousarray(v) for name, v in Imatrix.open(imatrix).entries.items()}
        entries = [_Entry(name, v.ctypes.data, v.size) for name, v in values.items()]
        table = (_Entry * (len(entries) + 1))(*entries, _Entry(None, None, 0))
        params.imatrix = ctypes.addressof(table)
    if library.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp: {' '.join(errors)}")


@dataclass(frozen=True)
class Cost:
    """What a process needed."""

    seconds: float  # wall time
    nbytes: int  # largest resident size


def run(command: Sequence[str]) -> Cost:
    """Run a program and wait for it."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: ended with {status}")
    return Cost(time.perf_counter() - start, usage.ru_maxrss * 1024)


def compare(ours: Path, theirs: Path) -> str:
    """Return a few words on how far the files are equal. Print tensors that differ to stderr."""
    if filecmp.cmp(ours, theirs, shallow=False):
        return "same file"
    n_other = 0
    with GGUFFile.open(ours) as a, GGUFFile.open(theirs) as b:
        for one, other in zip_longest(a.tensors.values(), b.tensors.values()):
            if one is None or other is None or (one.name, one.ne, one.type) != (other.name, other.ne, other.type):
                return f"ours {one}, llama.cpp's {other}"
            x, y = (t.blocks().reshape(-1, t.type.type_size) for t in (one, other))
            if n_bad := int((x != y).any(axis=1).sum()):
                n_other += 1
                print(f"{one.name}: {n_bad} of {len(x)} blocks of {one.type.name} differ", file=sys.stderr)
    return f"{n_other} tensors differ" if n_other else "same tensors"


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.argument("types", nargs=-1, required=True)
@click.option("-t", "--threads", default=2, show_default=True, type=click.IntRange(1))
@click.option("-r", "--repeat", default=1, show_default=True, type=click.IntRange(1), help="Pairs for each type.")
@click.option("--imatrix", type=click.Path(exists=True), help="Importance matrix for both.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to write the outputs, which are removed.")
@click.option("--peer", hidden=True)
def main(
    model: str, types: tuple[str, ...], threads: int, repeat: int, imatrix: str | None, folder: Path | None, peer: str
) -> None:
    """Quantize MODEL to each of TYPES with both; print what differs, and a table of seconds and memory."""
    if peer:
        quantize_with_peer(model, peer, types[0], threads, imatrix)
        return
    with GGUFFile.open(model) as file:
        largest = max(tensor.nbytes for tensor in file.tensors.values())
    options = ["-t", str(threads), *(["--imatrix", imatrix] if imatrix else [])]
    print(f"{model}, {threads} threads; largest tensor {largest / 1e6:.0f} MB\n")
    print("| type | llama.cpp s | gguf-quantize s | ratio | llama.cpp MB | gguf-quantize MB | bytes |")
    print("|---" * 7 + "|")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        theirs, ours = Path(scratch) / "theirs.gguf", Path(scratch) / "ours.gguf"
        for kind in types:
            pairs = [
                (
                    run([__file__, model, kind, *options, "--peer", str(theirs)]),
                    run(["-c", _OURS, model, str(ours), kind, *options]),
                )
                for _ in range(repeat)
            ]
            peer_s, our_s = (sorted(cost.seconds for cost in side)[repeat // 2] for side in zip(*pairs, strict=True))
            peer_mb, our_mb = (max(cost.nbytes for cost in side) / 1e6 for side in zip(*pairs, strict=True))
            row = f"{peer_s:.1f} | {our_s:.1f} | {peer_s / our_s:.2f} | {peer_mb:.0f} | {our_mb:.0f}"
            print(f"| {kind} | {row} | {compare(ours, theirs)} |", flush=True)


if __name__ == "__main__":
    main()
