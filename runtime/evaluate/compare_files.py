"""Files of one model against a base, on the same tokens: the base runs once, then each file, alone in memory.

Or layers of one file: the base with the weights of one layer from the file tells what this layer loses.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.evaluate.kl import Comparison, compare
from gguf_run.runtime.evaluate.logits_file import LogitsFile, LogitsHeader, hash_vocabulary, writing_logits
from gguf_run.runtime.evaluate.perplexity import perplexity
from gguf_run.runtime.evaluate.text import N_CTX, Chunk, Scorer, bos_of, cut_chunks, tokens_of
from gguf_run.runtime.load.machine import default_threads
from gguf_run.runtime.load.options import LoadOptions
from gguf_run.runtime.model import Model

N_CHUNK = 20  # of a text, unless the user says more: enough for standard errors by chunks
Load = Callable[[Path | GGUFFile], AbstractContextManager[Scorer]]  # loads a model with a context of one chunk


@dataclass(frozen=True)
class Known:
    """What the base expects of a text."""

    logits: Path  # a LogitsFile
    text: str
    ids: list[int]  # of the whole text
    chunks: list[Chunk]


def other_vocabulary(path: object, base: object) -> GgufRunError:
    problem = f"{path}: has another vocabulary than {base}"
    return GgufRunError(f"{problem}: only models with the same tokens can be compared")


def check_vocabulary(path: Path, base: Path) -> None:
    """GgufRunError if a file has other tokens than the base."""
    if hash_vocabulary(path) != hash_vocabulary(base):
        raise other_vocabulary(path, base)


@contextmanager
def known_base(
    load: Load, base: Path, texts: Sequence[str], step: Callable[[], None], n_chunk: int = N_CHUNK,
    n_ctx: int = N_CTX, n_skip: int = 0,
) -> Iterator[list[Known]]:  # fmt: skip
    """Run the base over chunks of each text. Its logits lie in a temporary folder until the context ends.

    step: called after each chunk. Errors are those of cut_chunks and writing_logits.
    """
    with TemporaryDirectory(prefix="gguf-eval-") as folder:
        known = []
        with load(base) as scorer:
            for i, text in enumerate(texts):
                ids = tokens_of(scorer.model, text)
                chunks = cut_chunks(ids, n_ctx, bos_of(scorer.model), n_chunk, n_skip=n_skip)
                part = Known(Path(folder, f"{i}.logits"), text, ids, chunks)
                sizes = scorer.model.decoder.config.n_vocab, n_ctx, len(chunks), len(chunks[0].targets)
                with writing_logits(part.logits, LogitsHeader(*sizes, "", "", "", base.name)) as writer:
                    for _ in perplexity(scorer, chunks, writer.add):
                        step()
                known.append(part)
        yield known


def layer_of(name: str) -> int:
    """Return the number of a tensor's layer, -1 for one in no layer."""
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def layers(file: GGUFFile, base: GGUFFile) -> Iterator[tuple[int, GGUFFile]]:
    """Yield the number of each layer, as layer_of has it, and the base with this layer's weights from the file.

    GgufRunError if the file has other tensors than the base.
    """
    if {name: tensor.ne for name, tensor in file.tensors.items()} != {name: t.ne for name, t in base.tensors.items()}:
        raise GgufRunError(f"{file.path}: has other tensors than {base.path}: its layers cannot be compared")
    metadata = {key: base.metadata.typed(key) for key in base.metadata}
    for layer in sorted({*map(layer_of, base.tensors)}):
        tensors = {name: (file if layer_of(name) == layer else base).tensors[name] for name in base.tensors}
        yield layer, GGUFFile.of(base.path, metadata, tensors)


@contextmanager
def scoring(file: Path | GGUFFile, options: LoadOptions) -> Iterator[Scorer]:
    """Load a file, and what scores its tokens."""
    with Model.load(file, options) as model, Scorer(model, options.n_threads or default_threads()) as scorer:
        yield scorer


def compared(load: Load, path: Path | GGUFFile, known: Sequence[Known], step: Callable[[], None]) -> list[Comparison]:
    """Run a file over the chunks that the base has scored; return a comparison for each text.

    step: as of known_base. GgufRunError if the file splits a text into other tokens than the base.
    """
    done = []
    with load(path) as scorer:
        for part in known:
            if tokens_of(scorer.model, part.text) != part.ids:
                raise GgufRunError(f"{path}: splits the text into other tokens than the base: no comparison")
            with LogitsFile(part.logits) as saved:
                done.append(Comparison())
                for done[-1] in compare(scorer, saved.chunk, part.chunks, rounded=True):
                    step()
    return done
