"""Decoders with latent attention: DeepSeek V2 to R1, Kimi K2, GLM 4.7 Flash, Mistral Small 4."""

from gguf_run.models.architectures import Architecture

ENTRIES = tuple(
    Architecture(name, qkv=(), mixer="latent", moe="maybe", expert_norm=False, router_bias="maybe")
    for name in ("deepseek2", "mistral4")
)
