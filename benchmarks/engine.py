"""The interface through which benchmarks use a runtime, and gguf-run behind it. peer.py has llama.cpp behind it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.kernels_cpu.backend import CpuBackend
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.runtime.load.load_model import tuned
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer


class Engine(Protocol):
    """A loaded model."""

    cpu: str  # what the kernels are compiled for
    weight_bytes: int  # bytes of the weights as the runtime holds them
    n_vocab: int
    bos: int | None  # the token that a context starts with, if any

    def rewind(self, n_past: int) -> int:
        """Forget the tokens from position n_past on, or all if that is impossible. Return how many are left."""

    def forward(self, ids: Sequence[int], n_outputs: int = 1) -> Iterator[NDArray[np.float32]]:
        """Append ids. Yield the logits of the last n_outputs tokens, in blocks f32[any, n_vocab].

        The next block overwrites a block. The work is done during the iteration.
        """

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text, with BOS if the model adds one. Special tokens in it are plain text."""

    def rest(self) -> None:
        """Leave the processor to others until the next forward."""


class Ours:
    """gguf-run, with the defaults of its command."""

    def __init__(
        self, path: Path, n_threads: int, n_ctx: int, n_batch: int = 512, cache_type: str = "f16", backend: Any = None
    ) -> None:
        """backend: None for the CPU."""
        self._file = GGUFFile.open(path)
        config = ModelConfig.from_metadata(self._file.metadata, self._file.tensors)
        self._tokenizer = Tokenizer.from_metadata(self._file.metadata)
        self._backend = backend or CpuBackend(n_threads)
        self.cpu = self._backend.name
        self.n_vocab = config.n_vocab
        self.bos = self._tokenizer.bos if self._tokenizer.add_bos else None
        layers = ([self._backend] * config.n_layer, [CacheType(cache_type, cache_type)] * config.n_layer)
        self._decoder = Decoder(config, self._file.tensors, layers[0], n_ctx, n_batch, cache_types=layers[1])
        if backend is None:
            tuned([(t.type.name, t.nbytes) for t in self._file.tensors.values()], n_threads)[1](self._backend)
        self.weight_bytes = self._decoder.nbytes()["weights"]

    def rewind(self, n_past: int) -> int:
        return self._decoder.rewind(n_past)

    def forward(self, ids: Sequence[int], n_outputs: int = 1) -> Iterator[NDArray[np.float32]]:
        return self._decoder.forward(ids, n_outputs)

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, parse_special=False)

    def rest(self) -> None:
        pass  # the thread team sleeps by itself

    def close(self) -> None:
        """End the threads and close the file."""
        self._decoder.close()
        self._backend.close()
        self._file.close()
