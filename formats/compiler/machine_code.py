"""Compiled functions as object files: numba makes them once, LLVM alone loads them afterwards.

Importing numba, setting up its compiler and reading its own cache takes longer than all else before the first token.
Therefore a function with plain arguments is compiled to one object file with a C entry. The entry calls the function;
the file holds all that the function needs.

    int64 entry(record *, int64, ...)              an op: its first argument is a record
    void  entry(..., int64 outcome[2])             a function for Python: outcome becomes (failed, result)

An argument has a kind:

    "i8", "f8", "b1"       a number
    (dtype.str, ndim)      a C-contiguous array, passed as its address and its shape
    a structured dtype     the address of a record
"""

import ctypes
import functools
import hashlib
import itertools
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from llvmlite import binding

Kind: TypeAlias = str | tuple[str, int] | np.dtype[Any]

ENTRY = "gguf_run_entry"
_RESULTS: dict[str, Callable[[Any], Any]] = {
    "i8": lambda outcome: outcome[1],
    "f8": lambda outcome: ctypes.c_double.from_buffer(outcome, 8).value,
    "b1": lambda outcome: bool(outcome[1]),
    "none": lambda outcome: None,
}


def n_words(kind: Kind) -> int:
    """Return how many arguments of the entry an argument becomes."""
    return 1 + kind[1] if isinstance(kind, tuple) else 1


class Code(NamedTuple):
    """A compiled function."""

    result: str  # kind of its result: a key of _RESULTS
    object: bytes  # the object file

    def sealed(self, key: str) -> bytes:
        """Return the content of a file: the kind of the result, a checksum, the object file.

        key: what tells this code apart from all other. It is a part of the checksum, so that no file can stand in for
            another.
        """
        return b"%s %s\n%s" % (self.result.encode(), self._checksum(key), self.object)

    @classmethod
    def unsealed(cls, data: bytes, key: str) -> "Code":
        """Return the code in a file. ValueError if the file is damaged, or was sealed with another key."""
        head, _, content = data.partition(b"\n")
        result, _, checksum = head.partition(b" ")
        code = cls(result.decode("ascii"), content)
        if code.result not in _RESULTS or checksum != code._checksum(key):
            raise ValueError("not the code that was asked for")
        return code

    def _checksum(self, key: str) -> bytes:
        return hashlib.sha256(f"{key}\n{self.result}\n".encode() + self.object).hexdigest().encode()


class Loader:
    """Loads object files into this process, for as long as the loader lives."""

    def __init__(self) -> None:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        self._jit = binding.create_lljit_compiler()
        self._loaded: list[Any] = []
        self._numbers = itertools.count()  # no name is used twice, even if Ctrl-C interrupts `load`

    def load(self, code: Code, kinds: tuple[Kind, ...]) -> "Entry":
        """Load what compile_entry returned. RuntimeError if it needs something that this process lacks."""
        builder = binding.JITLibraryBuilder().add_object_img(code.object).export_symbol(ENTRY).add_current_process()
        library = builder.link(self._jit, f"kernel{next(self._numbers)}")
        self._loaded.append(library)
        return Entry(library[ENTRY], kinds, _RESULTS[code.result])


class Entry:
    """A loaded function: its address, and a call from Python."""

    def __init__(self, address: int, kinds: tuple[Kind, ...], result: Callable[[Any], Any]) -> None:
        self.address, self._result = address, result
        words = [ctypes.c_double if kind == "f8" else ctypes.c_int64 for kind in kinds for _ in range(n_words(kind))]
        self.function = ctypes.CFUNCTYPE(None, *words, ctypes.c_void_p)(address)

    def __call__(self, *args: Any) -> tuple[bool, Any]:
        """Call the function without the GIL. Return (done, result); done is False if the function raised."""
        words: list[Any] = []
        for value in args:
            if isinstance(value, np.ndarray):
                words += (value.ctypes.data, *value.shape)
            else:
                words.append(value)
        outcome = (ctypes.c_int64 * 2)()
        self.function(*words, outcome)
        return not outcome[0], self._result(outcome)


@functools.cache
def host_features() -> str:
    """Return the features of this CPU, as LLVM writes them: "+neon,+dotprod"."""
    arm_bits = 0
    if platform.machine() == "aarch64":
        with suppress(OSError, AttributeError):
            arm_bits = ctypes.CDLL(None).getauxval(_AT_HWCAP)
    is_apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return with_arm_features(binding.get_host_cpu_features().flatten(), arm_bits, is_apple)


_AT_HWCAP, _HWCAP = 16, {"neon": 1 << 1, "dotprod": 1 << 20}  # of Linux: a number of features, and bits in it


def with_arm_features(named: str, arm_bits: int, is_apple: bool) -> str:
    """Return LLVM's features, and those of an ARM CPU that LLVM does not name. All of Apple's have them.

    arm_bits: what Linux calls AT_HWCAP, 0 on other machines.
    """
    known = {word[1:] for word in named.split(",")}
    more = [name for name, bit in _HWCAP.items() if (arm_bits & bit or is_apple) and name not in known]
    return ",".join([*([named] if named else []), *(f"+{name}" for name in more)])
