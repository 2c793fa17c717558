"""Qwen 2, 2.5 and 3, dense."""

from phoque.models.architectures.base import Architecture

QWEN2 = Architecture("qwen2", "Qwen2ForCausalLM", in_optimum=True)
QWEN3 = Architecture("qwen3", "Qwen3ForCausalLM", in_optimum=True)
