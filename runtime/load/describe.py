"""Names of a loaded model: for people, and for sessions."""

import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.backend import CacheType
from gguf_run.runtime.engine.session_file import SessionHeader, hash_model
from gguf_run.runtime.load.adapters import Named, with_scales
from gguf_run.runtime.quantize.file_types import model_type


def describe_plan(plan: Sequence[CacheType]) -> str:
    """Return one line for people: "q8_0", "K q8_0, V q4_0", or how many layers have which type.

    The line tells sessions apart: it is another one wherever the bytes of a cache mean something else.
    """
    counts = Counter(_describe(kind) for kind in plan)
    text = next(iter(counts)) if len(counts) == 1 else "; ".join(f"{n} x {name}" for name, n in counts.items())
    static = [(kind.k_scales, kind.v_scales) for kind in plan]
    if len(counts) > 1 or any(scales != (None, None) for scales in static):
        names = [_describe(kind) for kind in plan]
        text += f" (layers {zlib.crc32(repr((names, static)).encode()):08x})"
    return text


def _describe(kind: CacheType) -> str:
    name = kind.k if kind.k == kind.v else f"K {kind.k}, V {kind.v}"
    return name + {None: "", True: ", all rotated", False: ", not rotated"}[kind.rotate]


def about(file: GGUFFile) -> str:
    return f"{file.path.name.removesuffix('.gguf')}, {model_type(file)}"


def identity(file: GGUFFile, plan: Sequence[CacheType], n_gpu: int, lora: Sequence[Named]) -> SessionHeader:
    # Each kind of device has its own layout of a cache's bytes.
    cache = describe_plan(plan) + (f", the last {n_gpu} layers' on a GPU" if n_gpu else "")
    for path, scale in with_scales(lora).items():
        with GGUFFile.open(path) as adapter:
            cache += f", with {scale} x {Path(path).name} ({hash_model(adapter)[:8]})"
    return SessionHeader(hash_model(file), file.path.name, cache, ids=())
