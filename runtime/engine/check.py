"""What the engine refuses."""

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.models.adapted_step import Adapters
from gguf_run.models.kv_cache import GROUP
from gguf_run.runtime.engine.reply import Request


class ContextError(GgufRunError):
    """The prompt is longer than the context."""


class QueueFullError(GgufRunError):
    """As many requests as are allowed wait already."""


def kept(n_keep: int) -> int:
    """Return n_keep rounded up to whole groups of the cache, at least one group.

    Much of the attention rests on the first tokens: a model without them breaks down (Xiao et al. 2023, StreamingLLM).
    """
    return max(1, -(-n_keep // GROUP)) * GROUP


def check(request: Request, n_ctx: int, adapters: Adapters | None, name: str = "the prompt") -> None:
    """Check what is asked.

    n_ctx: positions of the context.
    adapters: those of the model.
    name: of the prompt, for the error.

    ContextError for more ids than the context holds, GgufRunError for none, OptionError for max_tokens, n_keep, or
    adapters that the model has not.
    """
    if request.adapters:
        if adapters is None:
            first = next(iter(request.adapters))
            raise OptionError(f"adapter {first} is not loaded: name it when the model is (--lora)")
        adapters.scales.check(request.adapters)
    if request.context_shift and not (request.n_keep >= 0 and kept(request.n_keep) + 2 * GROUP <= n_ctx):
        raise OptionError(
            f"n_keep (--keep) is {request.n_keep} in a context of {n_ctx} tokens (--ctx-size); allowed: 0 to "
            f"{n_ctx - 2 * GROUP}, and contexts of {3 * GROUP} or more, so that they can be shifted"
        )
    if request.max_tokens is not None and request.max_tokens < 1:
        raise OptionError(f"max_tokens (--max-tokens) is {request.max_tokens}; allowed: at least 1")
    if not request.ids:
        raise GgufRunError(f"{name} is empty: give at least one token of text")
    if len(request.ids) > n_ctx and not request.context_shift:
        raise ContextError(
            f"{name} has {len(request.ids)} tokens, the context holds {n_ctx}: shorten the prompt or choose a larger "
            "context (--ctx-size)"
        )
