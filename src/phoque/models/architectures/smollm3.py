"""SmolLM3: Llama's layout, and every fourth block without rotary embeddings."""

from phoque.models.architectures.base import Architecture

SMOLLM3 = Architecture("smollm3", "SmolLM3ForCausalLM", layer_lists=("layer_types", "no_rope_layers"))
