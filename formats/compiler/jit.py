"""The one place that knows numba's options: every compiled function of the project is made by `njit`.

A compiled function is kept on disk as an object file, if machine_code.py can make one. numba's own cache is not used:
it consists of pickles, which can run anything. numba is imported only when something must be compiled (deferred.py).

The cache folder's name is a hash of all sources that can be part of a kernel: an edit of a helper in another file makes
other machine code.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import llvmlite
import numpy as np
from llvmlite import binding

from gguf_run.formats.compiler.cachedir import other_writers, read_own, user_cache_dir
from gguf_run.formats.compiler.deferred import Deferred, copied, imported
from gguf_run.formats.compiler.machine_code import Code, Entry, Kind, Loader, host_features

# error_model="numpy": divisions have no hidden branch that raises. No fastmath: results may differ between instruction
# sets by the order of sums in the SIMD kernels, and by nothing else. A kernel that wants fastmath asks for it.
_OPTIONS: dict[str, Any] = {"error_model": "numpy"}
# Folders of files whose numbers can end up in a kernel.
_KERNEL_FOLDERS = tuple(Path(__file__).resolve().parents[2] / name for name in ("formats", "kernels_cpu", "models"))
_KEEP_FOLDERS, _KEEP_SECONDS = 16, 86400  # of other versions: so many, and those in use today


@functools.cache
def kernel_cache_dir() -> Path | None:
    """Return the folder for kernels of exactly these sources.

    None, with a warning, if the folder is not writable, belongs to somebody else or can be written by others.
    """
    digest = hashlib.sha256()
    for folder in _KERNEL_FOLDERS:
        for source in sorted(folder.glob("**/*.py")):
            digest.update(source.relative_to(folder).as_posix().encode() + b"\0" + source.read_bytes())
    path = user_cache_dir() / f"kernels-{digest.hexdigest()[:16]}"
    try:
        if not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(0o700, exist_ok=True)
            with suppress(OSError):  # another process may remove the same folders
                _remove_old(path.parent)
        reason = other_writers(path.stat()) or ("" if os.access(path, os.W_OK) else "is read-only")
        if not reason:
            os.utime(path)  # used now
            return path
    except OSError as error:
        reason = f"cannot be used ({error.strerror or type(error).__name__})"
    warnings.warn(
        f"{path} {reason}: kernels are compiled anew in every run; set XDG_CACHE_HOME to a folder that only you may "
        "write to",
        stacklevel=2,
    )
    return None


def _remove_old(caches: Path) -> None:
    """Remove the kernels of old versions. A process that still uses such a version compiles its kernels again."""
    used = sorted(((path.stat().st_mtime, path) for path in caches.glob("kernels-*")), reverse=True)
    for when, path in used[_KEEP_FOLDERS:]:
        if time.time() - when > _KEEP_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


# What kernels need of numba.
carray, types, cgutils = imported("numba", "carray"), imported("numba", "types"), imported("numba.core", "cgutils")


def intrinsic(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """numba's decorator for a function that returns LLVM code; usable bare or with options."""
    if function is None:
        return functools.partial(intrinsic, **options)
    numba = imported("numba.extending", "intrinsic")
    return Deferred(lambda: numba.real(**options)(function) if options else numba.real(function))


class Kernel(Deferred):
    """A function that is compiled when it is first called. Its real thing, for other kernels, is numba's dispatcher."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        # Only compiled code calls the real thing. The wrappers for Python would take long to compile.
        wrappers = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
        super().__init__(lambda: self._compiled_by_numba({**options, **wrappers}))
        self._function, self._options = function, options
        self._entries: dict[tuple[Kind | None, ...], Entry | None] = {}

    def __call__(self, *args: Any) -> Any:
        """Run the function without the GIL. Arguments are numbers and arrays."""
        kinds = tuple(map(_kind, args))
        entry = self._entries[kinds] if kinds in self._entries else self.entry(kinds)
        if entry is not None:
            done, result = entry(*args)
            if done:
                return result
        return self._dispatcher(*args)

    def entry(self, kinds: tuple[Kind | None, ...]) -> Entry | None:
        """Compile the function for arguments of these kinds, or load it from the cache.

        None if numba must run it: a kind is None, or machine_code.py cannot compile it.
        """
        with _STORE.lock:
            if kinds not in self._entries:
                plain = tuple(kind for kind in kinds if kind is not None)
                self._entries[kinds] = _STORE.find(self, plain) if len(plain) == len(kinds) else None
        return self._entries[kinds]

    def bare(self, *kinds: Kind) -> Callable[..., None]:
        """Return the C function: no signal interrupts a call. machine_code.py describes its arguments."""
        entry = self.entry(kinds)
        assert entry is not None
        return entry.function

    def compile(self, kinds: tuple[Kind, ...]) -> Code | None:
        """Compile the function for arguments of these kinds: see compile_entry."""
        from gguf_run.formats.compiler.object_file import compile_entry  # late: a warm start compiles nothing
        from gguf_run.formats.compiler.resolve import resolved, tell_numba

        tell_numba()
        return compile_entry(resolved(self._function), kinds, {**_OPTIONS, **self._options})

    def _compiled_by_numba(self, options: dict[str, Any]) -> Any:
        from gguf_run.formats.compiler.resolve import numba_njit

        return numba_njit(self._function, {**_OPTIONS, **options})

    def file_name(self, kinds: tuple[Kind, ...]) -> str:
        """Return a file name that tells apart all that the code depends on beside the folder's sources."""
        function = self._function
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        cells = [cell.file_name(()) if isinstance(cell, Kernel) else cell for cell in cells]
        options = [sorted(value) if isinstance(value, set) else value for value in self._options.values()]
        source = Path(function.__code__.co_filename)
        stamp = None
        if not any(map(source.is_relative_to, _KERNEL_FOLDERS)):
            with suppress(OSError):
                stamp = source.stat().st_mtime_ns
        name = (function.__module__, function.__qualname__, function.__code__.co_firstlineno)
        key = repr((name, kinds, list(self._options), options, cells, stamp, _machine()))
        assert " at 0x" not in key, f"{name} depends on {cells}: the cache can only tell plain values apart"
        return f"{function.__name__}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.o"

    @functools.cached_property
    def _dispatcher(self) -> Any:
        """numba's own dispatcher, for calls from Python. Every process compiles it anew."""
        with _STORE.lock:
            return self._compiled_by_numba(self._options)


_SCALARS: dict[type, Kind] = {int: "i8", float: "f8", bool: "b1", np.int64: "i8", np.float64: "f8"}
_ITEMS = frozenset(np.dtype(name).str for name in ["?", "b", "B", "h", "H", "i", "I", "q", "Q", "f", "d"])


def _kind(value: Any) -> Kind | None:
    """Return the kind of an argument (see machine_code.py), or None if machine_code.py cannot pass it."""
    if type(value) is np.ndarray and value.dtype.str in _ITEMS and value.flags.c_contiguous and value.flags.aligned:
        return value.dtype.str, value.ndim
    return _SCALARS.get(type(value))


@functools.cache
def _machine() -> tuple[Any, ...]:
    """Return what else machine code depends on: versions, the CPU, numba's settings."""
    numba = importlib.util.find_spec("numba")
    assert numba is not None and numba.origin is not None  # noqa: PT018
    version = (Path(numba.origin).parent / "_version.py").read_bytes()
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith("NUMBA_"))
    cpu = (platform.machine(), binding.get_host_cpu_name(), host_features())
    return sys.version, np.__version__, llvmlite.__version__, version, cpu, settings


class _Store:
    """The compiled functions of this process and of the cache folder."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.before_compiling: list[Callable[[], None]] = []

    @functools.cached_property
    def _loader(self) -> Loader:
        """Whoever asks holds the lock: a second loader would be freed, with machine code that a thread still calls."""
        return Loader()

    def find(self, kernel: Kernel, kinds: tuple[Kind, ...]) -> Entry | None:
        """Load a kernel for arguments of these kinds, after compiling it if the folder lacks it.

        A file that is damaged, or of another kernel, other sources or another CPU, counts as missing.
        """
        folder = kernel_cache_dir()
        name = kernel.file_name(kinds)
        key = f"{folder.name}/{name}" if folder else ""
        if folder:
            with suppress(OSError, ValueError, RuntimeError):
                return self._loader.load(Code.unsealed(read_own(folder / name), key), kinds)
        for notify in self.before_compiling:
            notify()
        code = kernel.compile(kinds)
        if code is None:
            return None
        if folder:
            from gguf_run.formats.atomic import write_own  # late: a warm start writes nothing

            with suppress(OSError):  # a file that is missing costs the next process time
                write_own(folder / name, code.sealed(key))
        return self._loader.load(code, kinds)


_STORE = _Store()  # of this process


def njit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a function on its first call (without the GIL, cached on disk). Usable bare or with numba's options."""
    return functools.partial(njit, **options) if function is None else Kernel(function, options)


def clone(function: Callable[..., Any], name: str, **names: Any) -> Callable[..., Any]:
    """Return a copy of a plain function whose globals `names` have these values.

    This is how one loop serves many types: `clone(loop, "Q4_0", unpack=unpack_q4_0, BLOCK_SIZE=32)`. The compiler sees
    the values as constants and inlines compiled functions among them. The cache tells copies apart by `name` alone: it
    must differ wherever `names` differ.
    """
    return copied(function, f"{function.__name__}_{name}", {**function.__globals__, **names})


def specialize(function: Callable[..., Any], name: str, **names: Any) -> Any:
    """Compile a `clone`."""
    return njit(clone(function, name, **names))


@contextmanager
def compile_notice(notify: Callable[[], None]) -> Iterator[None]:
    """Call `notify` once, when the first function that the disk cache lacks begins to compile, which takes seconds."""

    def once() -> None:
        _STORE.before_compiling.remove(once)
        notify()

    _STORE.before_compiling.append(once)
    try:
        yield
    finally:
        with suppress(ValueError):
            _STORE.before_compiling.remove(once)
