"""Llama 3, 3.1 and 3.2, and models with its layout: TinyLlama, SmolLM2, Hermes 3."""

from phoque.models.architectures.base import Architecture, GgufFormat

LLAMA = Architecture("llama", "LlamaForCausalLM", in_optimum=True, gguf=GgufFormat("llama", interleaves_rope=True))
