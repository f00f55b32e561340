"""Compares the logits of converted checkpoints in llama.cpp with those of transformers.

transformers writes a tiny checkpoint of every row of hf_tiny.TINY, and of every table TINY in tests/models.
gguf-convert converts it at F32, and the prebuilt llama.cpp runs it.

    python benchmarks/convert_vs_llamacpp.py [--type F32] [NAME ...]

Needs the tests' packages (transformers, torch), and npm for the peer (peer.py). Architectures that this program runs
are compared in its own decoder too. Differences are relative: the root mean square of the difference, divided by that
of transformers' logits. KL: of llama.cpp's probabilities from this program's, in nats, the mean of all tokens.

llama.cpp has fixed numbers where transformers has keys: Llama 4's chunks of 8192, Gemma 3n's widths, EXAONE 4's
windows with 64 layers alone, LFM2's scale of experts 1. It groups experts of DeepSeek-V2 by two, and PhiMoE's router is
another. So tiny checkpoints of these differ, or cannot be loaded.
"""

import argparse
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TESTS = Path(__file__).parent.parent / "tests"
sys.path.append(str(TESTS / "helpers"))
N_CTX = 128
LIMIT = 1e-3


def rows() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the rows of the tests' tables: the name, the class in transformers, and the config."""
    import hf_tiny

    os.environ.setdefault("TRITON_INTERPRET", "1")  # which some of the tests' modules ask for, see tests/conftest.py
    found: dict[str, tuple[str, dict[str, Any]]] = dict(hf_tiny.TINY)
    for path in sorted((TESTS / "models").glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if "\nTINY" in path.read_text() and spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found |= module.TINY
    return found


def divergence(x: NDArray[Any], reference: NDArray[Any]) -> float:
    """Return the mean divergence of softmax(x) from softmax(reference), in nats."""
    p, q = (y.astype(np.float64) - y.max(axis=-1, keepdims=True) for y in (reference, x))
    p, q = (y - np.log(np.exp(y).sum(axis=-1, keepdims=True)) for y in (p, q))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def relative(x: NDArray[Any], reference: NDArray[Any]) -> float:
    """Return the root mean square of the difference, divided by that of the reference."""
    return float(np.sqrt(np.mean((x.astype(np.float64) - reference) ** 2) / np.mean(reference.astype(np.float64) ** 2)))


def by_peer(path: Path, ids: list[int]) -> NDArray[np.float32]:
    """Return llama.cpp's logits, f32[len(ids), n_vocab]."""
    from peer import Peer

    peer = Peer(path, 1, N_CTX, cache_types=("f32", "f32"))
    return np.concatenate([part.copy() for part in peer.forward(ids, len(ids))])


def _by_peer(path: str, ids: list[int], to: Any) -> None:
    """Run by_peer in this process, which llama.cpp may end."""
    to.send(by_peer(Path(path), ids))


def isolated(path: Path, ids: list[int]) -> NDArray[np.float32]:
    """Run by_peer in a process of its own. Return NaN where llama.cpp fails, which says why on the terminal."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_by_peer, args=(str(path), ids, there))
    process.start()
    there.close()
    try:
        result: NDArray[np.float32] = here.recv()
    except EOFError:
        return np.full((len(ids), 1), np.nan, np.float32)
    finally:
        process.join()
    return result


def own(path: Path, ids: list[int]) -> NDArray[np.float32]:
    """Return this program's logits."""
    from gguf_run.runtime import Model

    with Model.load(path, n_threads=1, n_ctx=N_CTX, cache_type="f32") as model:
        return model.logits(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--type", default="F32")
    parser.add_argument("--keep", type=Path, help="Write the files into this folder, and leave them there.")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    import hf_tiny
    import tiny

    from gguf_run.formats.errors import GgufRunError
    from gguf_run.runtime.convert.open_checkpoint import open_checkpoint
    from gguf_run.runtime.quantize.file import quantize_file
    from gguf_run.runtime.quantize.file_types import file_type
    from gguf_run.runtime.quantize.plan import Options, make_plan

    failed = 0
    heads = f"{'checkpoint':18} {'llama.cpp':>10} {'gguf-run':>10} {'KL':>10}"
    print(f"{heads}   relative difference of {given.type} from transformers")
    with tempfile.TemporaryDirectory() as scratch:
        table = rows()
        for name in given.names or table:
            folder = (given.keep or Path(scratch)) / name
            model = hf_tiny.make(name, folder) if name in hf_tiny.TINY else tiny.make(folder, *table[name])
            path = folder / f"{name}.gguf"
            # A name of ours: for "phi3" in it llama.cpp looks for tokens that the tiny vocabulary lacks.
            with open_checkpoint(folder, name="Tiny") as file:
                quantize_file(make_plan(file, Options(file_type(given.type))), path, 1, lambda done, total: None)
            expected, theirs = hf_tiny.logits(model, tiny.IDS), isolated(path, tiny.IDS)
            by_peer = relative(theirs, expected)
            try:
                ours = own(path, tiny.IDS)
                by_us = f"{relative(ours, expected):10.2e} {divergence(ours, theirs):10.2e}"
            except (GgufRunError, NotImplementedError):  # what the CPU's kernels do not have
                by_us = f"{'-':>10} {'-':>10}"
            print(f"{name:18} {by_peer:10.2e} {by_us}", flush=True)
            failed += not by_peer <= LIMIT
    if failed and given.type == "F32":
        raise SystemExit(f"{failed} checkpoints fail in llama.cpp, or differ by more than {LIMIT}")


if __name__ == "__main__":
    main()
