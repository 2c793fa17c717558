"""SmolLM3: Llama's layout, and every fourth block without rotary embeddings."""

from typing import Any

from phoque.models.architectures.base import Architecture, GgufFormat


def _find_gguf_limit(config: Any) -> str:
    if list(config.no_rope_layers) != [int((n + 1) % 4 != 0) for n in range(config.num_hidden_layers)]:
        return "In llama.cpp every fourth block has no rotary embeddings, and every other has."
    return ""


SMOLLM3 = Architecture(
    "smollm3",
    "SmolLM3ForCausalLM",
    layer_lists=("layer_types", "no_rope_layers"),
    gguf=GgufFormat("smollm3", interleaves_rope=True, find_limit=_find_gguf_limit),
)
