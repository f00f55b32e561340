"""The temperature of queries in long contexts: Llama 4, Ministral 3. Other models do not import this file."""

from gguf_run.formats.frozen import frozen
from gguf_run.models.keys import Keys


@frozen
class Temperature:
    """Factor on the queries at position p, for long contexts: 1 + scale * ln(1 + floor((p + offset) / length))."""

    scale: float
    length: int  # positions
    offset: int = 0


def read_temperature(keys: Keys, built_in: tuple[float, int, int] | tuple[()]) -> Temperature | None:
    """Return the temperature of the queries. built_in: scale, length and offset, unless the file has others."""
    scale, length, offset = built_in or (0.0, 0, 0)
    if not (scale := keys.number("attention.temperature_scale", scale)):
        return None
    length = keys.integer("attention.temperature_length", length, low=0)
    return Temperature(scale, length or keys.integer("rope.scaling.original_context_length"), offset)
