"""The one place that knows numba's options: every compiled function of the project is made by `njit` or `cfunc`.

Why a cache folder of our own: numba notices an edit of the file that holds a function, but not of a helper that the
function calls in another file, and would then run stale machine code. The folder's name is therefore a hash of all
sources that can end up in a kernel.
"""

import functools
import hashlib
import os
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
from numba.core import config, event

from gguf_run.formats.cachedir import user_cache_dir

# error_model="numpy": no hidden branch that raises on division. No fastmath: results must not depend on the
# instruction set more than the SIMD kernels' own summation order; a kernel that wants it asks for it.
_OPTIONS: dict[str, Any] = {"error_model": "numpy"}


@functools.cache
def kernel_cache_dir() -> Path | None:
    """Return the folder for compiled kernels of exactly these sources, or None (with a warning) if none is writable."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for folder in ("formats", "kernels_cpu"):
        for source in sorted((package / folder).glob("*.py")):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    path = user_cache_dir() / f"kernels-{digest.hexdigest()[:16]}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        warnings.warn(
            f"cannot write to {path} ({error.strerror}): kernels are compiled anew in every run; "
            "set XDG_CACHE_HOME to a writable folder",
            stacklevel=2,
        )
        return None


@contextmanager
def _caching() -> Iterator[bool]:
    """numba reads its cache folder when a function is decorated: set ours only for that moment."""
    path = kernel_cache_dir()
    before = config.CACHE_DIR
    config.CACHE_DIR = os.fspath(path or before)
    try:
        yield path is not None
    finally:
        config.CACHE_DIR = before


def njit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a function on its first call (without the GIL, cached on disk). Usable bare or with numba's options.

    What is always inlined is compiled into its callers: it is not cached, which would only cost time at import.
    """
    if function is None:
        return functools.partial(njit, **options)
    if "inline" in options or "forceinline" in options:
        return numba.njit(nogil=True, **_OPTIONS, **options)(function)
    with _caching() as cache:
        return numba.njit(nogil=True, cache=cache, **_OPTIONS, **options)(function)


def clone(function: Callable[..., Any], name: str, **names: Any) -> Callable[..., Any]:
    """Return a copy of a plain function in which the global names `names` stand for these values.

    This is how one generic loop serves many types: `clone(loop, "Q4_0", unpack=unpack_q4_0, BLOCK_SIZE=32)`. The
    values are constants to the compiler, and compiled functions among them are inlined. A closure would do the same,
    but numba keys its disk cache by the pickled closure, and that of a compiled function differs in every process; here
    the key is the copy's own name, so `name` must say all that `names` depends on.
    """
    copy = types.FunctionType(function.__code__, {**function.__globals__, **names}, f"{function.__name__}_{name}")
    copy.__qualname__ = f"{function.__qualname__}_{name}"
    return copy


def specialize(function: Callable[..., Any], name: str, **names: Any) -> Any:
    """Compile a `clone`."""
    return njit(clone(function, name, **names))


def cfunc(signature: Any, function: Callable[..., Any], **options: Any) -> Any:
    """Compile a C callback now, or load it from the cache. Its `.address` goes onto a tape."""
    with _caching() as cache:
        return numba.cfunc(signature, cache=cache, **_OPTIONS, **options)(function)


class _FirstPass(event.Listener):
    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify: Callable[[], None] | None = notify

    def on_start(self, _: event.Event) -> None:
        notify, self._notify = self._notify, None
        if notify is not None:
            notify()

    def on_end(self, _: event.Event) -> None:
        pass


@contextmanager
def compile_notice(notify: Callable[[], None]) -> Iterator[None]:
    """Call `notify` once, when the first function that the disk cache lacks begins to compile: that takes seconds."""
    with event.install_listener("numba:run_pass", _FirstPass(notify)):
        yield
