"""Gemma 3: text models (270M, 1B), and the text part of the models with a vision tower (4B, 12B, 27B)."""

from typing import Any

from phoque.models.architectures.base import VISION_FULL_NAMES, VISION_TEXT_KEYS, Architecture, GgufFormat

# Gemma's norms multiply by 1 + weight, so a division of their output is not a division of the weight
SMOOTH_SOURCES = (None, "self_attn.v_proj", None, "mlp.up_proj")


def _embedding_scale(config: Any) -> float:
    return config.hidden_size**0.5


def _find_gguf_limit(config: Any) -> str:
    types = ["full_attention" if (n + 1) % 6 == 0 else "sliding_attention" for n in range(config.num_hidden_layers)]
    if list(config.layer_types) != types:
        return "In llama.cpp every sixth block has full attention, and the others have windows."
    is_27b = config.num_hidden_layers == 62
    scale = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
    if config.query_pre_attn_scalar != scale:
        return f"llama.cpp scales queries by {scale}, and this model by {config.query_pre_attn_scalar}."
    return ""


GGUF = GgufFormat("gemma3", norm_offset=1.0, has_windows=True, find_limit=_find_gguf_limit)
GEMMA3_TEXT = Architecture(
    "gemma3_text", "Gemma3ForCausalLM", smooth_sources=SMOOTH_SOURCES, embedding_scale=_embedding_scale, gguf=GGUF
)
GEMMA3 = Architecture(
    "gemma3",
    "Gemma3ForCausalLM",
    text_keys=VISION_TEXT_KEYS,
    full_names=VISION_FULL_NAMES,
    auto_class="AutoModelForImageTextToText",
    smooth_sources=SMOOTH_SOURCES,
    embedding_scale=_embedding_scale,
    gguf=GGUF,
)
