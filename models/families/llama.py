"""Llama, whose layer most other decoders copy."""

from gguf_run.models.architectures import Architecture

ENTRIES = (
    # Llama 1 to 3.x, Mistral, Mixtral, and most models that copy their layer (SmolLM, TinyLlama, Yi ...).
    Architecture("llama", moe="maybe"),
    Architecture("mistral3", moe="maybe"),
    Architecture("ernie4_5"),
    Architecture("smollm3", no_rope_period=4),
    Architecture("internlm2"),
    Architecture("granite"),
)
