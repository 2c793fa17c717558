"""Llama, and models with its layout: SmolLM2, TinyLlama."""

from phoque.models.architectures.base import Architecture

LLAMA = Architecture("llama", "LlamaForCausalLM", in_optimum=True)
