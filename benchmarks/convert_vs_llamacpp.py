"""Compares the logits of converted checkpoints in llama.cpp with those of transformers.

transformers writes a tiny checkpoint of every architecture, gguf-convert converts it at F32, and the prebuilt llama.cpp
runs it.

    python benchmarks/convert_vs_llamacpp.py [--type F32] [NAME ...]

Needs the tests' packages (transformers, torch), and npm for the peer (peer.py). Architectures that this program runs
are compared in its own decoder too. Differences are relative: the root mean square of the difference, divided by that
of transformers' logits.
"""

import argparse
import multiprocessing
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parent.parent / "tests/helpers"))
IDS = [(7 * i * i + 3 * i + 2) % 300 for i in range(24)]
LIMIT = 1e-3


def relative(x: NDArray[Any], reference: NDArray[Any]) -> float:
    """Return the root mean square of the difference, divided by that of the reference."""
    return float(np.sqrt(np.mean((x.astype(np.float64) - reference) ** 2) / np.mean(reference.astype(np.float64) ** 2)))


def by_peer(path: Path, ids: list[int]) -> NDArray[np.float32]:
    """Return llama.cpp's logits, f32[len(ids), n_vocab]."""
    from peer import Peer

    peer = Peer(path, 1, 32, cache_types=("f32", "f32"))
    return np.concatenate([part.copy() for part in peer.forward(ids, len(ids))])


def _by_peer(path: str, ids: list[int], to: Any) -> None:
    """Run by_peer in this process, which llama.cpp may end."""
    to.send(by_peer(Path(path), ids))


def isolated(path: Path, ids: list[int]) -> NDArray[np.float32]:
    """Run by_peer in a process of its own."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_by_peer, args=(str(path), ids, there))
    process.start()
    there.close()
    try:
        result: NDArray[np.float32] = here.recv()
    except EOFError:
        raise SystemExit(f"llama.cpp failed on {path.name}") from None
    finally:
        process.join()
    return result


def own(path: Path, ids: list[int]) -> NDArray[np.float32]:
    """Return this program's logits."""
    from gguf_run.runtime import Model

    with Model.load(path, n_threads=1, n_ctx=32, cache_type="f32") as model:
        return model.logits(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--type", default="F32")
    parser.add_argument("--keep", type=Path, help="Write the files into this folder, and leave them there.")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    import hf_tiny

    from gguf_run.formats.errors import GgufRunError
    from gguf_run.runtime.convert.open_checkpoint import open_checkpoint
    from gguf_run.runtime.quantize.file import quantize_file
    from gguf_run.runtime.quantize.file_types import file_type
    from gguf_run.runtime.quantize.plan import Options, make_plan

    failed = 0
    print(
        f"{'checkpoint':18} {'llama.cpp':>10} {'gguf-run':>10}   relative difference of {given.type} from transformers"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.names or hf_tiny.TINY:
            folder = (given.keep or Path(scratch)) / name
            model = hf_tiny.make(name, folder)
            path = folder / f"{name}.gguf"
            # A name of ours: for "phi3" in it llama.cpp looks for tokens that the tiny vocabulary lacks.
            with open_checkpoint(folder, name="Tiny") as file:
                quantize_file(make_plan(file, Options(file_type(given.type))), path, 1, lambda done, total: None)
            expected = hf_tiny.logits(model, IDS)
            by_peer = relative(isolated(path, IDS), expected)
            try:
                by_us = f"{relative(own(path, IDS), expected):10.2e}"
            except (GgufRunError, NotImplementedError):  # what the CPU's kernels do not have
                by_us = f"{'-':>10}"
            print(f"{name:18} {by_peer:10.2e} {by_us}", flush=True)
            failed += by_peer > LIMIT
    if failed and given.type == "F32":
        raise SystemExit(f"{failed} checkpoints differ by more than {LIMIT}")


if __name__ == "__main__":
    main()
