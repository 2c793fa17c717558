"""OLMo 2 and 3: norms after attention and MLP, so their inputs are the residual stream itself."""

from typing import Any

from phoque.models.architectures.base import Architecture, GgufFormat

POST_NORM_SOURCES = (None, "self_attn.v_proj", None, "mlp.up_proj")


def _gguf_window_keys(config: Any) -> dict[str, Any]:
    return {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
    }


def _find_gguf_limit(config: Any) -> str:
    return (
        "llama.cpp needs a head of its own, and this model uses its embeddings." if config.tie_word_embeddings else ""
    )


OLMO2 = Architecture(
    "olmo2", "Olmo2ForCausalLM", smooth_sources=POST_NORM_SOURCES, gguf=GgufFormat("olmo2", find_limit=_find_gguf_limit)
)
OLMO3 = Architecture(
    "olmo3",
    "Olmo3ForCausalLM",
    smooth_sources=POST_NORM_SOURCES,
    gguf=GgufFormat("olmo2", has_windows=True, keys=_gguf_window_keys, find_limit=_find_gguf_limit),
)
