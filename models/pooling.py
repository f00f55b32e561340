"""How the hidden states of a text become its embedding, or a score."""

from collections.abc import Mapping

from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.frozen import frozen
from gguf_run.formats.gguf.reader import Tensor
from gguf_run.models.architectures import Architecture
from gguf_run.models.keys import Keys

DENSE = ("dense_2", "dense_3")  # matrices that an embedding is multiplied with, one after the other
SCORES = "cls.output"  # the matrix that makes scores
_OF_FILE = ("none", "mean", "cls", "last", "rank")  # by number, as files have them
POOLINGS = ("mean", "cls", "last")  # the mean of all rows, the first row, the last row


@frozen
class Pooling:
    """What a file says of it."""

    type: str  # one of POOLINGS
    is_only: bool  # the model makes no text: it is an encoder or a reranker, which may lack the output matrix
    template: str | None  # of the prompt that asks for a score, with {query} and {document}; None: there are no scores
    tensors: Mapping[str, tuple[int, ...]]  # ne of tensors that only such models have, if the file has them


def read_pooling(arch: Architecture, keys: Keys, tensors: Mapping[str, Tensor]) -> Pooling:
    """Read the numbers of a model that makes embeddings. A file that names no pooling: the mean, or causal: the last.

    FormatError for a number or a shape that is wrong. UnsupportedError for layers that cannot see later tokens.
    """
    if not arch.is_causal and (arch.mixer or arch.chunk or keys.get("attention.shared_kv_layers")):
        raise UnsupportedError(f"{keys.prefix}.attention.causal is false: this program does not have that yet")
    found = _OF_FILE[keys.integer("pooling_type", 0, low=0, high=len(_OF_FILE) - 1)]
    n_embd = width = keys.integer("embedding_length")
    shapes: dict[str, tuple[int, ...]] = {}
    for name in (*DENSE, SCORES):
        if (tensor := tensors.get(f"{name}.weight")) is not None:
            n_in, width = n_embd if name == SCORES else width, tensor.ne[-1]
            shapes |= {f"{name}.weight": (n_in, width), f"{name}.bias": (width,)}
    if arch.step == "encoder_step" and (types := tensors.get("token_types.weight")) is not None:
        shapes["token_types.weight"] = (n_embd, types.ne[-1])
    template = keys.metadata.get("tokenizer.chat_template.rerank")
    template = template if isinstance(template, str) and f"{SCORES}.weight" in shapes else None
    usual, is_only = "last" if arch.is_causal else "mean", found == "rank" or not arch.is_causal
    return Pooling(found if found in POOLINGS else usual, is_only, template, shapes)
