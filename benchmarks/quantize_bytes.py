"""Compares quantized blocks with libgguf's and llama.cpp's (ggml_quantize_chunk of the prebuilt library).

    python benchmarks/quantize_bytes.py                  # every type, 10^7 weights of each kind: 10 minutes
    python benchmarks/quantize_bytes.py Q4_K Q6_K -n 1e6

Each line tells how many blocks of a type differ from each reference, and how fast one thread quantizes usual weights.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import click
import libgguf
import numpy as np
from numpy.typing import NDArray
from peer import _open, library_folder

from gguf_run.formats.blocks.types import TensorType, type_by_name
from gguf_run.formats.quantizers.quantizer import QUANTIZERS, quantize

Floats = NDArray[np.float32]
Reference = Callable[[Floats, TensorType, Floats | None], NDArray[np.uint8]]
N, N_ROWS = 4096, 256  # a row; rows of a piece
_LARGEST = np.finfo(np.float32).max


def _denormal(x: Floats, rng: np.random.Generator) -> Floats:
    """Return rows of every magnitude, from the least denormal number to the first normal ones."""
    return x * np.exp2(rng.integers(-148, -122, (len(x), 1)))


def _constant(x: Floats, rng: np.random.Generator) -> Floats:
    return np.repeat(x[:, ::32], 32, axis=1)


# From numbers of a standard normal distribution to weights.
KINDS: Mapping[str, Callable[[Floats, np.random.Generator], Floats]] = {
    "normal": lambda x, rng: x * 0.02,
    "heavy-tailed": lambda x, rng: x / np.maximum(rng.random(x.shape), 1e-6) ** 2,
    "constant": _constant,
    "zero": lambda x, rng: x * (rng.random(x.shape) < 0.01),  # of both signs, and a few that are not
    "denormal": _denormal,
    "huge": lambda x, rng: np.clip(
        x.astype(np.float64) * np.exp2(rng.integers(60, 128, (len(x), 1))), -_LARGEST, _LARGEST
    ),
    "mixed sizes": lambda x, rng: x * np.exp2(rng.integers(-30, 30, x.shape)),
    "mixed signs": lambda x, rng: np.where(
        _constant(x, rng) > 0.5, abs(x), np.where(_constant(x, rng) < -0.5, -abs(x), x)
    ),
}


def _libgguf(x: Floats, type: TensorType, importance: Floats | None) -> NDArray[np.uint8]:
    out = np.empty((len(x), type.row_bytes(N)), np.uint8)
    libgguf.quantize_rows_into_raw(type.id, x, out, len(x), N, importance)
    return out


def _llama_cpp() -> Reference:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    arguments = (ctypes.c_int, pointer, pointer, integer, integer, integer, pointer)
    base = _open(library_folder() / "libggml-base.so", {"ggml_quantize_chunk": (ctypes.c_size_t, arguments)})

    def run(x: Floats, type: TensorType, importance: Floats | None) -> NDArray[np.uint8]:
        out = np.empty((len(x), type.row_bytes(N)), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        base.ggml_quantize_chunk(type.id, x.ctypes.data, out.ctypes.data, 0, len(x), N, weights)
        return out

    return run


def _pieces(kind: str, n: int) -> Iterator[Floats]:
    """Yield about n weights in pieces f32[N_ROWS, N]."""
    for seed in range(-(-n // (N * N_ROWS))):
        rng = np.random.default_rng(seed)
        with np.errstate(all="ignore"):
            yield KINDS[kind](rng.standard_normal((N_ROWS, N), np.float32), rng).astype(np.float32)


def _rate(run: Callable[[], object], n: int) -> float:
    """Return million weights per second, the best of a few runs."""
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return n / min(times) / 1e6


@click.command()
@click.argument("types", nargs=-1)
@click.option("-n", "--n-weights", type=float, default=1e7, show_default=True, help="Weights of each kind.")
def main(types: tuple[str, ...], n_weights: float) -> None:
    """Compare TYPES (all that can be written, if none is named)."""
    references: dict[str, Reference] = {"libgguf": _libgguf, "llama.cpp": _llama_cpp()}
    importance = (np.random.default_rng(0).standard_normal(N, np.float32) ** 2) * (np.arange(N) % 512 > 40)
    print("| type | importance | blocks | " + " | ".join(f"differ from {name}" for name in references), end="")
    print(" | Mweights/s | libgguf |\n|---|---|---|" + "---|" * (len(references) + 2))
    n_wrong = 0
    for name in types or QUANTIZERS:
        type = type_by_name(name)
        for weights in (None, importance):
            differ = dict.fromkeys(references, 0)
            n_blocks = 0

            def compare(x: Floats, type: TensorType = type, weights: Floats | None = weights) -> dict[str, int]:
                ours = quantize(x, type, weights, n_threads=1)
                unequal = {name: ours != reference(x, type, weights) for name, reference in references.items()}
                return {
                    name: int(wrong.reshape(-1, type.type_size).any(axis=1).sum()) for name, wrong in unequal.items()
                }

            for kind in KINDS:
                here = dict.fromkeys(references, 0)
                with ThreadPoolExecutor(2) as pool:
                    for found in pool.map(compare, _pieces(kind, int(n_weights))):
                        n_blocks += N * N_ROWS // type.block_size
                        here = {name: here[name] + found[name] for name in here}
                differ = {name: differ[name] + here[name] for name in differ}
                if any(here.values()):
                    print(f"{type.name}, {kind}: {here} blocks differ", file=sys.stderr)
            x = next(_pieces("normal", 1))
            rates = [
                _rate(lambda: quantize(x, type, weights, n_threads=1), x.size),  # noqa: B023 (runs at once)
                _rate(lambda: _libgguf(x, type, weights), x.size),  # noqa: B023
            ]
            cells = [type.name, "no" if weights is None else "yes", n_blocks, *differ.values(), *map(round, rates)]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            n_wrong += sum(differ.values())
    sys.exit(n_wrong > 0)


if __name__ == "__main__":
    main()
