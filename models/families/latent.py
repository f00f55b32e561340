"""Decoders with latent attention: DeepSeek V2 to R1, Kimi K2, GLM 4.7 Flash, Mistral Small 4."""

from gguf_run.models.architectures import Architecture

ENTRIES = tuple(
    Architecture(name, qkv=(), mixer="latent", moe="maybe", gating=gating, router_bias="maybe", expert_norm=False)
    for name, gating in (("deepseek2", ""), ("mistral4", "softmax"))  # first files of V3 and GLM 4.7 have no key of it
)
